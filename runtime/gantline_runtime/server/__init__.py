"""The OpenAI-compatible HTTP server in front of an engine process.

runner      socket, engine, signals, drain, exit
  app       routes, the one error shape, access log
    chat, completions, text, system        the endpoints
      protocol, parameters, sampling       bodies, what is refused by name, ranges
      service      admission, templates and tokenizing off the event loop, requests to the engine
      output       tokens -> text, stop strings, log-probabilities; the same for streams and whole answers
      sse          event streams that notice when the client has left
lifecycle   loading -> warming -> ready -> draining -> dead
metrics     everything at /metrics
"""
