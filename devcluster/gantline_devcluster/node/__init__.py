"""One real node in namespaces of its own: kubelet, containerd, kube-proxy, DNS, volumes, beside the control plane of `control_plane`."""
