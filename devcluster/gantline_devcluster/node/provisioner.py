"""Volumes that are directories: answers claims of our StorageClasses with a PersistentVolume of kind `local`, and removes what a deleted
claim leaves.

    python -m gantline_devcluster.node.provisioner KUBECONFIG FOLDER

A claim is ours when the controllers wrote our name into its provisioner annotation; with `WaitForFirstConsumer` that is after the
scheduler chose a node. The size is recorded, not enforced. Any access mode is granted: all pods of the one node do share the directory.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from gantline_devcluster.client import ApiError, Client
from gantline_devcluster.control_plane import NODE
from gantline_devcluster.node.config import PROVISIONER

PROVISIONER_KEYS = ("volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner")
SELECTED_NODE = "volume.kubernetes.io/selected-node"
PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
VOLUMES = "/api/v1/persistentvolumes"
CLAIMS = "/api/v1/persistentvolumeclaims"
RETRY_S = 1.0
RESYNC_S = 60
log = logging.getLogger("provisioner")


class Provisioner:
    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self.folder = folder

    def run(self) -> None:
        """List everything, then follow the changes; start over whenever the watch ends or something fails."""
        while True:
            try:
                version = self.reconcile()
                self.follow(version)
            except (ApiError, OSError) as error:
                log.warning("starting over: %s", error)
                time.sleep(RETRY_S)

    def reconcile(self) -> str:
        """Bring every claim and volume to where it should be; returns the resource version to follow claims from."""
        claims = self.client.get(CLAIMS)
        waiting: dict[str, Any] = {}
        for item in self.client.get("/apis/storage.k8s.io/v1/storageclasses")["items"]:
            if item["provisioner"] == PROVISIONER:
                waiting[item["metadata"]["name"]] = item
        volumes = self.client.get(VOLUMES)["items"]
        existing = {volume["metadata"]["name"] for volume in volumes}
        for claim in claims["items"]:
            storage_class = waiting.get(claim["spec"].get("storageClassName", ""))
            if storage_class and wants_volume(claim, storage_class["volumeBindingMode"]) and volume_name(claim) not in existing:
                self.provision(claim, storage_class)
        for volume in volumes:
            if is_abandoned(volume):
                self.remove(volume)
        return str(claims["metadata"]["resourceVersion"])

    def follow(self, version: str) -> None:
        for event in self.client.watch(CLAIMS, version, RESYNC_S):
            if event["type"] != "BOOKMARK":
                if event["type"] == "DELETED":
                    self._wait_until_released(event["object"])
                self.reconcile()

    def provision(self, claim: dict[str, Any], storage_class: dict[str, Any]) -> None:
        name = volume_name(claim)
        path = self.folder / name
        path.mkdir(mode=0o755, parents=True, exist_ok=True)  # a pod's fsGroup decides who may write, as on any other volume
        with contextlib.suppress(ApiError):  # it exists already
            self.client.post(VOLUMES, build_volume(claim, storage_class, path))
        log.info("provisioned %s for %s/%s", name, claim["metadata"]["namespace"], claim["metadata"]["name"])

    def remove(self, volume: dict[str, Any]) -> None:
        name = volume["metadata"]["name"]
        shutil.rmtree(self.folder / name, ignore_errors=True)
        with contextlib.suppress(ApiError):
            self.client.call("DELETE", f"{VOLUMES}/{name}")
        log.info("removed %s", name)

    def _wait_until_released(self, claim: dict[str, Any]) -> None:
        """The controllers mark the volume Released a moment after its claim has gone."""
        for _ in range(20):
            with contextlib.suppress(ApiError):
                if self.client.get(f"{VOLUMES}/{volume_name(claim)}").get("status", {}).get("phase") != "Bound":
                    return
            time.sleep(0.1)


def volume_name(claim: dict[str, Any]) -> str:
    return f"pvc-{claim['metadata']['uid']}"


def wants_volume(claim: dict[str, Any], binding_mode: str) -> bool:
    """Whether a claim waits for us: named by the controllers, not bound, not being deleted, and its node chosen where one must be."""
    annotations = claim["metadata"].get("annotations", {})
    ours = any(annotations.get(key) == PROVISIONER for key in PROVISIONER_KEYS)
    chosen = binding_mode == "Immediate" or SELECTED_NODE in annotations
    return ours and chosen and not claim["spec"].get("volumeName") and "deletionTimestamp" not in claim["metadata"]


def is_abandoned(volume: dict[str, Any]) -> bool:
    ours = volume["metadata"].get("annotations", {}).get(PROVISIONED_BY) == PROVISIONER
    delete = volume["spec"].get("persistentVolumeReclaimPolicy") == "Delete"
    return bool(ours and delete and volume.get("status", {}).get("phase") == "Released")


def build_volume(claim: dict[str, Any], storage_class: dict[str, Any], path: Path) -> dict[str, Any]:
    """The PersistentVolume for a claim: a directory of one node, reserved for that claim."""
    metadata, spec = claim["metadata"], claim["spec"]
    node = metadata.get("annotations", {}).get(SELECTED_NODE, NODE)
    on_node = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": volume_name(claim), "annotations": {PROVISIONED_BY: PROVISIONER}},
        "spec": {
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "accessModes": spec["accessModes"],
            "volumeMode": "Filesystem",
            "persistentVolumeReclaimPolicy": storage_class.get("reclaimPolicy", "Delete"),
            "storageClassName": storage_class["metadata"]["name"],
            "local": {"path": str(path)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [on_node]}},
            "claimRef": {"kind": "PersistentVolumeClaim", "apiVersion": "v1", **{k: metadata[k] for k in ("namespace", "name", "uid")}},
        },
    }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    Provisioner(Client(Path(sys.argv[1])), Path(sys.argv[2])).run()


if __name__ == "__main__":
    main()
