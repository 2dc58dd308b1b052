"""Certificates of what the API server connects to: the webhook, and the API of custom metrics."""
