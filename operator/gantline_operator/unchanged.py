"""Whether a server-side apply would change nothing, told from the object alone.

The API server writes into `metadata.managedFields` who owns which field. An apply sets the fields that it names, takes away those that its
manager owned and names no more, and so changes nothing if and only if both hold:

    the manager owns exactly the fields that are desired      (a field that others took over or removed is owned no more)
    each of them has the value that is desired

`fieldsV1` is a tree that also says how each list is merged: `f:name` is a field, `k:{"name":"x"}` an item of a list by its keys, `v:"x"` an
item of a set; a node without children is compared whole, atomic lists and maps among them. Where the server writes a value in another way
than it was given (quantities, defaults within what is atomic) the answer is False: then an apply is sent in vain, and nothing else is lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["apply_changes_nothing"]

Object = dict[str, Any]

_ADDRESS = ("apiVersion", "kind")
_ADDRESS_IN_METADATA = ("name", "namespace", "uid", "resourceVersion")
"""What an apply says to find its object, and its guards: owned by nobody."""


def apply_changes_nothing(desired: Object, live: Object, manager: str) -> bool:
    """Whether an apply of `desired` by `manager` would leave `live`, as the API server gave it, as it is."""
    owned = [entry for entry in live["metadata"].get("managedFields") or [] if _is_apply_of(entry, manager)]
    if len(owned) != 1 or owned[0].get("apiVersion") != desired["apiVersion"]:
        return False
    wanted = {key: value for key, value in desired.items() if key not in _ADDRESS}
    wanted["metadata"] = {key: value for key, value in desired["metadata"].items() if key not in _ADDRESS_IN_METADATA}
    return _is_held(owned[0].get("fieldsV1") or {}, wanted, live)


def _is_apply_of(entry: Mapping[str, Any], manager: str) -> bool:
    return (entry.get("manager"), entry.get("operation"), entry.get("subresource", "")) == (manager, "Apply", "")


def _is_held(fields: Mapping[str, Any], desired: object, live: object) -> bool:
    """Whether `fields` are those of `desired`, and `live` has their values."""
    below = {key: node for key, node in fields.items() if key != "."}
    if not below:
        return desired == live
    if isinstance(desired, Mapping) and isinstance(live, Mapping):
        names = {f"f:{name}": name for name in desired}
        return names.keys() == below.keys() and all(
            name in live and _is_held(below[field], desired[name], live[name]) for field, name in names.items()
        )
    if isinstance(desired, list) and isinstance(live, list) and len(desired) == len(below):
        return all(_is_item_held(key, node, desired, live) for key, node in below.items())
    return False


def _is_item_held(key: str, fields: Mapping[str, Any], desired: list[Any], live: list[Any]) -> bool:
    if key.startswith("v:"):
        value = json.loads(key[2:])
        return value in desired and value in live
    if not key.startswith("k:"):
        return False
    keys = json.loads(key[2:])
    # The server fills in keys that have a default, such as a port's protocol.
    ours = [item for item in desired if all(item.get(name, value) == value for name, value in keys.items())]
    theirs = [item for item in live if all(item.get(name) == value for name, value in keys.items())]
    return len(ours) == len(theirs) == 1 and _is_held(fields, ours[0], theirs[0])
