"""Whether pods can mount an image as a volume here: what the source is, what the API server says, and what nodes report of themselves.

    source     only images: container runtimes unpack no artifacts
    server     asked by a dry run of pods with such a volume; it is there from Kubernetes 1.35 on unless it was turned off, and an admission
               policy may refuse it. An API server that cannot say decides nothing: it is asked again
    nodes      yes (kubelet 1.35, containerd 2.1 or CRI-O 1.31), no, or not known: whoever simulates a node or builds a runtime reports
               what they like, and before 1.35 the kubelet's gate is shut unless somebody opened it

`delivery: image` is somebody's word on the nodes, `auto` needs all of these.
"""

from __future__ import annotations

from gantline_runtime.model_facts import ModelFacts

from gantline_operator.client import Api, Forbidden, Invalid, Resource
from gantline_operator.facts import ClusterFacts
from gantline_operator.plan import Plan
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.resources import ImageMount, image_pods

__all__ = ["DEPLOYMENTS", "refusal_of_nodes", "refusal_of_server", "refusal_of_source"]

DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments")


def refusal_of_source(model: ModelFacts) -> str:
    """Why no container runtime could mount it; empty where one can."""
    if model.image_folder is not None:
        return ""
    return "The source is an artifact or in another format than images, which container runtimes do not mount."


def refusal_of_nodes(spec: InferenceServiceSpec, planned: Plan, cluster: ClusterFacts) -> str:
    """Why not all nodes that the pods may go to are known to mount images; empty where they are."""
    if not cluster.nodes_known:
        return "The operator may not read nodes, so it is not known whether they mount images."
    labels = [(item.key, item.values) for item in planned.placement.node_labels]
    nodes = [node for node in cluster.nodes if node.live and node.matches(labels, spec.accelerator.node_selector)]
    unable = [node.name for node in nodes if node.mounts_images is not True]
    if unable:
        return f"Node {min(unable)} is not known to mount images ({len(unable)} of {len(nodes)} that may run the service)."
    return "" if nodes else "There is no node yet, so it is not known whether it will mount images."


async def refusal_of_server(client: Api, namespace: str, image: ImageMount, user: int | None) -> str:
    """Why the API server takes no pods with this volume; empty where it does. Raises ApiError where it cannot say."""
    try:
        made = await client.try_out(DEPLOYMENTS, namespace, image_pods(namespace, image, user))
    except (Invalid, Forbidden) as error:
        return f"The API server takes no pods with image volumes here: {str(error)[:300]}"
    volumes = made["spec"]["template"]["spec"].get("volumes") or []
    if any((volume.get("image") or {}).get("reference") == image.reference for volume in volumes):
        return ""
    return "The API server drops image volumes: it is older than Kubernetes 1.35, or they were turned off."
