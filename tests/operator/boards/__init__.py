"""The Grafana dashboards with what they are to show: an installation at work, a Prometheus, Grafana's panel components, a browser."""
