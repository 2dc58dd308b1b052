"""Scripting what happens to simulated pods that somebody else renders: an admission policy writes the fate's annotations into pods with
given labels.

Pods of a Deployment or Job cannot be annotated before they run; a MutatingAdmissionPolicy does it in the API server, at creation.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from gantline_devcluster.client import ApiError, Client
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.stages import AFTER, EXIT_CODE, FATE, FATES, MESSAGE

_GROUP = "admissionregistration.k8s.io"
_PREFIX = "simulated-fate-"
SETTLE_TIMEOUT_S = 15.0


class FatePolicies:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._names: list[str] = []
        self._version = ""

    def set(
        self, labels: dict[str, str], fate: str, *, message: str = "", exit_code: int = 1, after: str = "", namespace: str = ""
    ) -> None:
        """From now on pods that are created with `labels` (in `namespace`, or everywhere) get this fate. Returns when the API server does
        so.

        `message` is their containers' termination message, `after` a duration ("5s") until the fate comes. A later fate for the same
        labels replaces this one.
        """
        if fate not in FATES:
            raise DevclusterError(f"there is no fate {fate!r}", f"Choose one of {', '.join(FATES)}")
        annotations = {k: v for k, v in {FATE: fate, MESSAGE: message, EXIT_CODE: str(exit_code), AFTER: after}.items() if v}
        name = _PREFIX + "-".join(
            part.replace("/", ".").replace("_", "-").lower() for item in sorted(labels.items()) for part in item if part
        )
        name = name[:200] + (f"-{namespace}" if namespace else "")
        path = self._path()
        policy, binding = build_policy(name, labels, annotations, namespace, version=self._version)
        self._client.apply(f"{path}/mutatingadmissionpolicies/{name}", policy)
        self._client.apply(f"{path}/mutatingadmissionpolicybindings/{name}", binding)
        if name not in self._names:
            self._names.append(name)
        self._wait_until_it_acts(labels, annotations, namespace or "default")

    def clear(self) -> None:
        """Forget every fate that was set."""
        for name in self._names:
            for kind in ("mutatingadmissionpolicybindings", "mutatingadmissionpolicies"):
                with contextlib.suppress(ApiError):
                    self._client.call("DELETE", f"{self._path()}/{kind}/{name}")
        self._names.clear()

    def _path(self) -> str:
        """Of the policies' newest version that this API server has: v1 from 1.36 on, before that a beta."""
        if not self._version:
            served = {item["name"] for item in self._client.get(f"/apis/{_GROUP}/v1")["resources"]}
            self._version = "v1" if "mutatingadmissionpolicies" in served else "v1beta1"
        return f"/apis/{_GROUP}/{self._version}"

    def _wait_until_it_acts(self, labels: dict[str, str], annotations: dict[str, str], namespace: str) -> None:
        """The API server learns of a policy a moment after it was written: try with a pod that is never stored."""
        probe = {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "probe-", "labels": labels},
            "spec": {"containers": [{"name": "probe", "image": "probe", **_RESTRICTED}], **_RESTRICTED_POD},
        }  # fmt: skip
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline:
            made = self._client.post(f"/api/v1/namespaces/{namespace}/pods?dryRun=All", probe)
            if annotations.items() <= made["metadata"].get("annotations", {}).items():
                return
            time.sleep(0.1)
        late = f"the fate {annotations[FATE]} did not take effect within {SETTLE_TIMEOUT_S:.0f} s"
        raise DevclusterError(late, "Look into kube-apiserver's log")


_RESTRICTED = {"securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
_RESTRICTED_POD = {"securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}}


def build_policy(
    name: str, labels: dict[str, str], annotations: dict[str, str], namespace: str = "", *, version: str = "v1"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policy and its binding."""
    fields = ", ".join(f"{cel_string(key)}: {cel_string(value)}" for key, value in annotations.items())
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    selection: dict[str, Any] = {"resourceRules": [rule], "objectSelector": {"matchLabels": labels}}
    if namespace:
        selection["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    expression = f"Object{{metadata: Object.metadata{{annotations: {{{fields}}}}}}}"
    head = {"apiVersion": f"{_GROUP}/{version}", "metadata": {"name": name}}
    policy = {
        **head,
        "kind": "MutatingAdmissionPolicy",
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": selection,
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": expression}}],
        },
    }
    return policy, {**head, "kind": "MutatingAdmissionPolicyBinding", "spec": {"policyName": name}}


def cel_string(text: str) -> str:
    """A CEL string literal of any text."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'
