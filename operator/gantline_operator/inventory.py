"""What an administrator says about the cluster's pools of nodes, in a ConfigMap.

It explains nodes whose labels don't (no GPU Feature Discovery), names pools that stand at zero nodes and would be started when needed,
and is all that is known where the operator may not read nodes. Key `pools`, a YAML list:

    pools: |
      - name: h100
        nodeSelector: {cloud.example/pool: h100}
        resource: nvidia.com/gpu
        count: 8
        product: NVIDIA-H100-80GB-HBM3
        memory: 79Gi
        computeCapability: "9.0"
        taints: [{key: nvidia.com/gpu, effect: NoSchedule}]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from gantline_operator.accelerators import Device, numbers, vendor_of
from gantline_operator.fields import REQUIRED, Choice, ListOf, MapOf, Object, Rule, SpecError, Text, Whole, declare, parse_object
from gantline_operator.quantities import Quantity

__all__ = ["POOLS_KEY", "Inventory", "Pool", "Taint", "parse_inventory"]

POOLS_KEY = "pools"
_MAX_BYTES = 256 << 10

_LABEL_VALUE = Text(63, r"([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?", "a label's value")
_VERSION = Text(32, r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}", 'a version in quotes such as "9.0"')


@dataclass(frozen=True, kw_only=True)
class Taint:
    key: str = declare(Text(317, min_length=1), "Key.", default=REQUIRED)
    value: str = declare(_LABEL_VALUE, "Value.", default="")
    effect: str = declare(Choice(("NoSchedule", "PreferNoSchedule", "NoExecute")), "Effect.", default="NoSchedule")


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Nodes of one shape, of which there may be none now."""

    RULES: ClassVar = (
        Rule("", lambda p: bool(p.node_selector), "a pool needs at least one label that tells its nodes", ".nodeSelector"),
        Rule("", lambda p: p.resource == "cpu" or bool(vendor_of(p.resource)), "no accelerator of that name is known", ".resource"),
        Rule("", lambda p: p.resource == "cpu" or p.memory is not None, "a pool of GPUs needs the memory of one", ".memory"),
        Rule("", lambda p: vendor_of(p.resource) != "nvidia" or bool(p.compute), "NVIDIA GPUs need it", ".computeCapability"),
    )

    name: str = declare(Text(63, min_length=1), "Name, for messages.", default=REQUIRED)
    node_selector: Mapping[str, str] = declare(MapOf(_LABEL_VALUE), "Labels that all nodes of the pool have.", default=REQUIRED)
    resource: str = declare(Text(128, min_length=1), "What pods ask for; cpu for a pool without accelerators.", default=REQUIRED)
    count: int = declare(Whole(0, 64), "Devices of one node.", default=0)
    product: str = declare(Text(63), "Name of the device.", default="")
    memory: int | None = declare(Quantity(), "Memory of one device.")
    compute_capability: str | None = declare(_VERSION, "NVIDIA's compute capability.")
    driver: str | None = declare(_VERSION, "NVIDIA's driver version.")
    host_cpu: int | None = declare(Whole(1, 4096), "CPU cores of one node.")
    host_memory: int | None = declare(Quantity(), "Memory of one node.")
    taints: tuple[Taint, ...] = declare(ListOf(Object(Taint), 16), "Taints of its nodes.", default=[])

    @property
    def compute(self) -> tuple[int, ...]:
        return numbers(self.compute_capability or "")

    @property
    def device(self) -> Device | None:
        """The device, found by the pool's labels; None for a pool of CPUs."""
        if self.resource == "cpu":
            return None
        return Device(
            resource=self.resource,
            vendor=vendor_of(self.resource),
            product=self.product or self.name,
            memory_bytes=self.memory,
            compute=self.compute,
            driver=numbers(self.driver or ""),
            sliced="mig-" in self.resource,
            labels=tuple(sorted((key, (value,)) for key, value in self.node_selector.items())),
        )

    def describes(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels belongs to the pool."""
        return all(labels.get(key) == value for key, value in self.node_selector.items())


@dataclass(frozen=True)
class Inventory:
    pools: tuple[Pool, ...] = ()

    def find(self, labels: Mapping[str, str], resource: str) -> Pool | None:
        """The pool that a node with these labels belongs to and that explains `resource`."""
        return next((pool for pool in self.pools if pool.resource == resource and pool.describes(labels)), None)


def parse_inventory(data: Mapping[str, Any]) -> Inventory:
    """The inventory in a ConfigMap's `data`. Raises SpecError with the path of what is wrong."""
    text = data.get(POOLS_KEY)
    if text is None:
        return Inventory()
    if not isinstance(text, str) or len(text) > _MAX_BYTES:
        raise SpecError(POOLS_KEY, f"it is no text of at most {_MAX_BYTES} bytes", "Give a YAML list of pools.")
    try:
        pools = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SpecError(POOLS_KEY, f"it is not YAML: {' '.join(str(error).split())[:200]}", "Correct the ConfigMap.") from None
    if not isinstance(pools, list) or len(pools) > 256:
        raise SpecError(POOLS_KEY, "it is no list of at most 256 pools", "Give a YAML list of pools.")
    return Inventory(tuple(parse_object(Pool, pool, f"{POOLS_KEY}[{index}]") for index, pool in enumerate(pools)))


def _loader() -> type[yaml.SafeLoader]:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)
