"""Manifests that are right, and manifests that are wrong, each with the path of the field at fault."""

from __future__ import annotations

import copy
from typing import Any

Object = dict[str, Any]

FULL: Object = {
    "model": {"uri": "hf://org/name", "revision": "refs/pr-1", "servedName": "chat", "secretRef": {"name": "hub-token"}},
    "quantization": {"method": "awq", "policy": "IfNeeded", "bits": 4, "groupSize": 64, "maxPerplexityIncrease": "0.05"},
    "engine": {
        "backend": "cuda", "tensorParallel": 2, "dtype": "float16", "sessionLen": 8192, "maxBatchSize": 64, "cacheMaxEntryCount": "0.7",
        "enablePrefixCaching": False,
    },
    "accelerator": {
        "resource": "nvidia.com/gpu", "minMemory": "24Gi", "products": ["NVIDIA-A10"], "nodeSelector": {"example.com/pool": "gpu"},
        "allowShared": False,
    },
    "replicas": 2,
    "scaling": {
        "controller": "Gantline", "min": 0, "max": 4, "metric": "kvCache", "target": 70, "downAfter": "2m", "zeroAfter": "1h",
        "onUnknown": "Max",
    },
    "cache": {"storageClassName": "fast", "size": "100Gi", "accessMode": "ReadWriteMany"},
    "rollout": {"drainTimeout": "5m"},
    "ingress": {"host": "chat.example.com", "className": "nginx"},
    "pod": {
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}],
        "priorityClassName": "high", "runtimeClassName": "nvidia", "imagePullSecrets": [{"name": "registry"}],
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "resources": {"requests": {"cpu": 2, "memory": "8Gi"}, "limits": {"memory": "16Gi", "ephemeral-storage": "1Gi"}},
    },
    "suspend": True,
}  # fmt: skip

MINIMAL: Object = {"model": {"uri": "pvc://models/llama"}}

GOOD_URIS = (
    "hf://org/name", "hf://Org-1/na.me_2", "pvc://claim", "pvc://claim/", "pvc://claim/a/b.c", "pvc://my.claim/x", "file:///models/a",
    "file:///opt/gantline/tiny-model/", "s3://bucket", "s3://my.bucket/a/b.c/", "oci://registry.example/name", "oci://localhost:5000/a/b-c:v1.0",
    "oci://registry.example/team/name:v1@sha256:" + "0" * 64,
)  # fmt: skip
BAD_URIS = (
    "", "name", "org/name", "http://x/y", "hf://org", "hf://org/name/more", "hf:///name", "pvc://", "pvc:///x", "pvc://Claim/x",
    "pvc://claim/../x", "pvc://claim//x", "file://models", "file:///", "file:///a/../b", "file:///.hidden", "s3://B/x",
    "s3://bucket/../x", "s3://key:secret@bucket/x", "oci://registry.example", "oci://registry.example/Name", "oci://registry.example/a@sha256:1",
    "oci://user@registry.example/a",
    "hf://org/name ", "hf://org/na me", "hf://org/" + "n" * 600, "pvc://claim/a\nb",
)  # fmt: skip
BAD_HOSTS = (
    "", "Chat.example.com", "*.example.com", "10.0.0.1", "chat..com", "-a.com", "chat.com/v1", "https://chat.com", "chat.com:80", "a" * 64,
    "a." * 127,
)  # fmt: skip


def service(spec: Object, name: str = "chat") -> Object:
    return {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "metadata": {"name": name}, "spec": copy.deepcopy(spec)}


def changed(path: str, value: Any, base: Object = MINIMAL) -> Object:
    """A copy of `base` with the field at the dotted `path` set."""
    spec = copy.deepcopy(base)
    *parents, last = path.split(".")
    target = spec
    for part in parents:
        target = target.setdefault(part, {})
    target[last] = value
    return spec


ENV_43 = [{"name": f"V{index}", "value": "x"} for index in range(43)]

WRONG: list[tuple[Object, str]] = [
    # wrong types and choices
    (changed("replicas", "many"), "spec.replicas"),
    (changed("replicas", -1), "spec.replicas"),
    (changed("replicas", 1001), "spec.replicas"),
    (changed("suspend", "yes"), "spec.suspend"),
    (changed("quantization.method", "gptq"), "spec.quantization.method"),
    (changed("quantization.policy", "Sometimes"), "spec.quantization.policy"),
    (changed("quantization", {"method": "awq", "bits": 8}), "spec.quantization.bits"),
    (changed("quantization", {"method": "awq", "groupSize": 100}), "spec.quantization.groupSize"),
    (changed("quantization", {"method": "awq", "maxPerplexityIncrease": "-0.1"}), "spec.quantization.maxPerplexityIncrease"),
    (changed("quantization", {"method": "awq", "maxPerplexityIncrease": "2000"}), "spec.quantization.maxPerplexityIncrease"),
    (changed("quantization", {"method": "awq", "maxPerplexityIncrease": 0.05}), "spec.quantization.maxPerplexityIncrease"),
    (changed("engine.backend", "turbomind"), "spec.engine.backend"),
    (changed("engine.tensorParallel", 3), "spec.engine.tensorParallel"),
    (changed("engine.tensorParallel", 16), "spec.engine.tensorParallel"),
    (changed("engine.tensorParallel", "two"), "spec.engine.tensorParallel"),
    (changed("engine.dtype", "int8"), "spec.engine.dtype"),
    (changed("engine.sessionLen", 1), "spec.engine.sessionLen"),
    (changed("engine.sessionLen", "8k"), "spec.engine.sessionLen"),
    (changed("engine.maxBatchSize", 0), "spec.engine.maxBatchSize"),
    (changed("engine.cacheMaxEntryCount", "1"), "spec.engine.cacheMaxEntryCount"),
    (changed("engine.cacheMaxEntryCount", "0"), "spec.engine.cacheMaxEntryCount"),
    (changed("engine.cacheMaxEntryCount", "NaN"), "spec.engine.cacheMaxEntryCount"),
    (changed("accelerator.resource", "gpu"), "spec.accelerator.resource"),
    (changed("accelerator.minMemory", "lots"), "spec.accelerator.minMemory"),
    (changed("accelerator.products", ["x"] * 33), "spec.accelerator.products"),
    (changed("accelerator.products", ["a b"]), "spec.accelerator.products[0]"),
    (changed("accelerator.nodeSelector", {"a": "b c"}), "spec.accelerator.nodeSelector.a"),
    (changed("scaling", {}), "spec.scaling.max"),
    (changed("scaling", {"max": 0}), "spec.scaling.max"),
    (changed("scaling", {"max": 2, "controller": "Mine"}), "spec.scaling.controller"),
    (changed("scaling", {"max": 2, "metric": "cpu"}), "spec.scaling.metric"),
    (changed("scaling", {"max": 2, "target": 0}), "spec.scaling.target"),
    (changed("scaling", {"max": 2, "zeroAfter": "200h"}), "spec.scaling.zeroAfter"),
    (changed("scaling", {"max": 2, "onUnknown": "Shrink"}), "spec.scaling.onUnknown"),
    (changed("cache.accessMode", "ReadOnlyMany"), "spec.cache.accessMode"),
    (changed("cache.size", "big"), "spec.cache.size"),
    (changed("rollout.drainTimeout", "120"), "spec.rollout.drainTimeout"),
    (changed("rollout.drainTimeout", "25h"), "spec.rollout.drainTimeout"),
    *((changed("ingress.host", host), "spec.ingress.host") for host in BAD_HOSTS),
    (changed("ingress", {"host": "chat.example.com", "className": "Nginx"}), "spec.ingress.className"),
    (changed("ingress", {"className": "nginx"}), "spec.ingress.host"),
    (changed("pod.env", ENV_43), "spec.pod.env"),
    (changed("pod.env", [{"name": "1X"}]), "spec.pod.env[0].name"),
    (changed("pod.resources", {"requests": {"cpu": "two"}}), "spec.pod.resources.requests.cpu"),
    (changed("pod.tolerations", [{"key": "a", "operator": "Like"}]), "spec.pod.tolerations[0].operator"),
    ({}, "spec.model"),
    ({"model": {}}, "spec.model.uri"),
    # combinations
    (changed("model.revision", "main"), "spec.model.revision"),
    (changed("model.secretRef", {"name": "x"}), "spec.model.secretRef"),
    (changed("model", {"uri": "s3://bucket/x", "revision": "main"}), "spec.model.revision"),
    (changed("model", {"uri": "oci://registry.example/x", "revision": "v1"}), "spec.model.revision"),
    (changed("quantization", {"maxPerplexityIncrease": "0.1"}), "spec.quantization.maxPerplexityIncrease"),
    (changed("accelerator", {"resource": "cpu", "minMemory": "24Gi"}), "spec.accelerator.minMemory"),
    (changed("accelerator", {"resource": "cpu", "products": ["A10"]}), "spec.accelerator.products"),
    (changed("accelerator", {"resource": "cpu", "allowShared": True}), "spec.accelerator.allowShared"),
    ({**MINIMAL, "accelerator": {"resource": "cpu"}, "engine": {"backend": "cuda"}}, "spec.engine.backend"),
    ({**MINIMAL, "accelerator": {"resource": "amd.com/gpu"}, "engine": {"backend": "cuda"}}, "spec.engine.backend"),
    ({**MINIMAL, "accelerator": {"resource": "huawei.com/Ascend910"}, "engine": {"backend": "triton"}}, "spec.engine.backend"),
    ({**MINIMAL, "accelerator": {"resource": "nvidia.com/mig-1g.10gb"}, "engine": {"tensorParallel": 2}}, "spec.engine.tensorParallel"),
    (changed("pod.resources", {"requests": {"cpu": "2"}, "limits": {"cpu": "1500m"}}), "spec.pod.resources.requests"),
    (changed("pod.resources", {"requests": {"memory": "2Gi"}, "limits": {"memory": 2000000000}}), "spec.pod.resources.requests"),
    (
        changed("pod.resources", {"requests": {"ephemeral-storage": "3Gi"}, "limits": {"ephemeral-storage": "2Gi"}}),
        "spec.pod.resources.requests",
    ),
    (changed("scaling", {"min": 3, "max": 2}), "spec.scaling.min"),
    (changed("scaling", {"max": 2, "metric": "kvCache", "target": 101}), "spec.scaling.target"),
    (changed("cache", {"claimName": "a", "storageClassName": "b"}), "spec.cache.storageClassName"),
    (changed("cache", {"claimName": "a", "size": "1Gi"}), "spec.cache.size"),
    (changed("pod.tolerations", [{"operator": "Equal"}]), "spec.pod.tolerations[0].operator"),
    (changed("pod.tolerations", [{"key": "a", "operator": "Exists", "value": "b"}]), "spec.pod.tolerations[0].value"),
    (changed("pod.tolerations", [{"key": "a", "tolerationSeconds": 3}]), "spec.pod.tolerations[0].tolerationSeconds"),
    (changed("pod.env", [{"name": "GANTLINE_X"}]), "spec.pod.env[0].name"),
    (changed("pod.env", [{"name": "HF_TOKEN", "value": "secret"}]), "spec.pod.env[0].name"),
    (changed("pod.env", [{"name": "AWS_SECRET_ACCESS_KEY", "value": "secret"}]), "spec.pod.env[0].name"),
    (changed("pod.env", [{"name": "A"}, {"name": "A"}]), "spec.pod.env"),
]

UNKNOWN: list[tuple[Object, str]] = [
    (changed("modell", 1), "spec.modell"),
    (changed("engine.sesionLen", 4096), "spec.engine.sesionLen"),
    (changed("pod.resources", {"limits": {"nvidia.com/gpu": "1"}}), "spec.pod.resources.limits.nvidia.com/gpu"),
]

BAD_NAMES = ("a" * 41, "1chat", "chat.v1", "a.b")
