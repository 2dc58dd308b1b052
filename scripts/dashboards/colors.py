"""Colours that mean something: green is never for what is bad."""

from __future__ import annotations

from collections.abc import Mapping

Steps = tuple[tuple[str, float | None], ...]
"""Colours, each from a value on; the first from everywhere."""

Colors = Mapping[str, str]
"""Legend, or /regular expression/ for legends, -> colour."""
ON_THE_WAY = ("Inspecting", "Fetching", "Quantizing", "Evicting", "Starting", "RollingOut", "Retrying")
"""Reasons of services that will be ready by themselves."""
NONE: Colors = {}
BY_STATUS: Colors = {"/^2/": "green", "/^3/": "blue", "/^4/": "orange", "/^[05]/": "red"}
BY_OUTCOME: Colors = {"ok": "green", "left": "blue", "refused": "yellow", "busy": "orange", "failed": "red", "cut": "dark-red"}
BY_END: Colors = {"stop": "green", "length": "blue", "abort": "yellow", "error": "red"}
BY_STATE: Colors = {"loading": "blue", "warming": "light-blue", "ready": "green", "draining": "orange", "dead": "red"}
BY_REASON: Colors = {"Ready": "green", "/^(ScaledToZero|Suspended|Paused)$/": "#8e8e8e", f"/^({'|'.join(ON_THE_WAY)})$/": "blue"}
BY_RESULT: Colors = {"done": "green", "retry": "orange", "error": "red"}

GOOD_AT_ZERO: Steps = (("green", None), ("orange", 1e-9))
BAD_ABOVE_ZERO: Steps = (("green", None), ("red", 1e-9))
