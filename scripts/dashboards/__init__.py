"""Makes the Grafana dashboards of the chart from tables: `python -m scripts.dashboards`."""
