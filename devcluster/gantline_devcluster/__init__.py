"""A real Kubernetes for development and tests: API-only, one node in namespaces, simulated GPU nodes."""
