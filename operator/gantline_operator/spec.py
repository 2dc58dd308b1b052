"""From an object, as the API server or a file gives it, to the frozen dataclasses of `resource.py`.

The API server has checked most of it already; a file has not been checked, and a server may carry an older or newer definition than this
operator. So everything is checked again, and whatever is wrong is a `SpecError` with the field's path, a cause and a cure: the
controller turns it into a condition and waits for a change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gantline_operator.fields import SpecError, parse_object, shown
from gantline_operator.resource import GROUP, KIND, MAX_NAME, NAME_RULE, VERSION, InferenceServiceSpec

__all__ = ["SpecError", "parse_service", "parse_spec"]


def parse_spec(spec: object) -> InferenceServiceSpec:
    """The spec (the object under `spec`), defaults filled in. Raises SpecError and nothing else."""
    try:
        result: InferenceServiceSpec = parse_object(InferenceServiceSpec, spec, "spec")
    except RecursionError:
        raise SpecError("spec", "it is nested too deep", "Give the fields that docs/api.md names.") from None
    return result


def parse_service(manifest: object) -> tuple[str, InferenceServiceSpec]:
    """(name, spec) of a whole InferenceService. Raises SpecError and nothing else."""
    if not isinstance(manifest, Mapping):
        raise SpecError("manifest", "it is not an object", f"Give a manifest of kind {KIND}.")
    for key, expected in (("apiVersion", f"{GROUP}/{VERSION}"), ("kind", KIND)):
        if manifest.get(key) != expected:
            raise SpecError(key, f"{shown(manifest.get(key))} is not {expected}", f"Give {key}: {expected}.")
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if not isinstance(name, str) or len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise SpecError("metadata.name", f"{shown(name)}: {NAME_RULE.message}", "Choose such a name.")
    if "spec" not in manifest:
        raise SpecError("spec", "it is missing", "Give spec.model.uri at least.")
    return name, parse_spec(manifest["spec"])
