"""The gateway: one OpenAI address for every service, which picks replicas and holds requests while there are none. Torch-free.

main            settings, sockets, signals, drain, exit
  app             endpoints, middleware, the one error shape, access log
    question        what a request asks for, read from its body in one pass
    proxy           one request: pick, hold, send, try again, pass on
      balance         which replica, pure
      holding         requests that wait for a replica
      upstream        one request to one replica
      answer          what the client gets: an answer, a stream kept alive, an error, an error event
    models          /v1/models from the catalog
  catalog         which services there are and by which names they are asked, pure
    discovery       from the API server (cluster_api)
    static_services from a file
  traffic         what runs and waits now, and what has been: the numbers behind metrics and demand
demand          the internal port: probes, /metrics, and what the operator's autoscaler asks
"""
