"""The control plane: InferenceService objects in, Kubernetes objects out."""
