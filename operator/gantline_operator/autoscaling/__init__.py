"""How many replicas a service has, where its spec says `scaling`. docs/autoscaling.md tells the whole story.

policy       what spec.scaling asks for, resolved
observation  what is known at one moment: replicas' samples with their age, gateways' held requests
capacity     how many requests one replica can run at once, learnt from samples
load         from a sample to replicas' worth of load, the one measure that every controller uses
decision     pure: policy, observation and what is remembered -> replicas and the reason
exposition   from /metrics and /demand, which are not trusted, to samples and demand
scraping     asks replicas and gateways, many at once, within bounds
targets      what reconciles tell the loop, and what the loop tells reconciles
loop         observes, decides, and writes `replicas` through /scale
"""
