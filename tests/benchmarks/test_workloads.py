"""The request sets never drift: a figure is comparable only on the same work."""

from __future__ import annotations

import pytest

from benchmarks import workloads

DIGESTS = {
    "chat": "71e344e1db9c84ce", "decode": "f2bb7961c5eb4b32", "prefill": "038f08d9d85ad6b0", "prefix": "72c6018f60687102",
    "batch16": "0c292b3674697c1c", "single": "93a1270935c6ef26",
}  # fmt: skip


@pytest.mark.parametrize("name", workloads.NAMES)
def test_a_request_set_is_the_one_that_peers_were_measured_on(name: str) -> None:
    assert workloads.digest(workloads.build(name)) == DIGESTS[name]


def test_an_unknown_workload_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="sonnet"):
        workloads.build("sonnet")
