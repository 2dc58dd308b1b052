"""What a start measured is told in the status, kept, and used by the next plan: pure, and on a real API server with a pod that answers."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator.calibration import (
    LEAST,
    LOAD_BOUND,
    MAX_ENTRIES,
    MOST,
    Calibration,
    Measurement,
    PodReport,
    bounded_load_s,
    bounded_ratio,
    key_of,
    later,
    measure,
    parse,
    read_report,
    render,
)  # fmt: skip
from gantline_operator.plan import Plan, plan
from gantline_operator.plan_status import from_status, to_status
from gantline_operator.resources.serving import SERVER_PORT
from hypothesis import given
from hypothesis import strategies as st

from tests.operator.harness import (
    TINY,
    apply,
    fates,
    get,
    inspected,
    install_crd,
    server_pods,
    service,
    serving,
    status,
    wait,
    wait_reason,
)  # fmt: skip
from tests.operator.planning import IMAGES, MODELS, accepted, cluster_of, spec_of
from tests.operator.scaling_world import answering, set_address

H100 = cluster_of("h100")
KEY = key_of(MODELS["8b"].fingerprint, "NVIDIA-H100-80GB-HBM3", 1, "bfloat16", "bfloat16")


def planned(measured: Measurement | None, previous: Plan | None = None) -> Plan:
    known = Calibration({KEY: measured} if measured else {})
    answer = plan(spec_of(), MODELS["8b"], H100, IMAGES, previous, calibration=known)
    assert isinstance(answer, Plan), answer
    return answer


def test_a_plan_goes_by_what_starts_measured_and_says_so() -> None:
    formula = accepted("8b", H100)
    measured = planned(Measurement({"workspace": 0.8, "context": 0.9}, 30.0, 3, "now"))
    assert LEAST * formula.memory.workspace < measured.memory.workspace < formula.memory.workspace
    assert measured.memory.capacity_tokens > formula.memory.capacity_tokens and measured.engine.tp == formula.engine.tp
    assert measured.load_seconds < formula.load_seconds
    parts = "context 0.90 of the formula's bytes, workspace 0.80 of the formula's bytes"
    assert measured.calibration == f"{parts}, ready after 30 s; measured in 3 starts."
    assert from_status(to_status(measured), spec_of()) == measured
    assert not formula.calibration and "calibration" not in to_status(formula)


def test_a_plan_that_stands_is_not_moved_by_a_measurement() -> None:
    formula = accepted("8b", H100)
    assert planned(Measurement({"workspace": 2.0, "context": 2.0}, 900.0, 1, "now"), formula) == formula


def test_what_was_measured_elsewhere_says_nothing_here() -> None:
    formula = accepted("8b", H100)
    for key in (KEY.replace("H100", "A100"), KEY.replace("/1/", "/2/"), KEY.replace("bfloat16/bfloat16", "awq4/float16"), "x" + KEY[1:]):
        known = Calibration({key: Measurement({"workspace": 2.0}, 900.0, 1, "now")})
        assert plan(spec_of(), MODELS["8b"], H100, IMAGES, calibration=known) == formula


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.floats(0, 1e9))
def test_no_measurement_makes_a_plan_absurd(workspace: float, context: float, load_s: float) -> None:
    formula, measured = accepted("8b", H100), Measurement({"workspace": workspace, "context": context}, load_s, 1, "now")
    for part in ("workspace", "context"):
        assert LEAST <= bounded_ratio(measured, part) <= MOST
    found = planned(measured)
    assert formula.memory.workspace * LEAST <= found.memory.workspace <= formula.memory.workspace * MOST + 1
    assert formula.load_seconds / LOAD_BOUND <= found.load_seconds <= formula.load_seconds * LOAD_BOUND
    assert 3 * found.load_seconds >= formula.load_seconds, "probes still allow for a start as slow as the formula says"


def test_a_larger_measurement_counts_at_once_and_a_smaller_one_by_and_by() -> None:
    first = Measurement({"context": 1.0}, 40.0, 1, "1")
    grown = Calibration({KEY: first}).noted(KEY, Measurement({"context": 1.5}, 20.0, 1, "2")).known[KEY]
    assert grown == Measurement({"context": 1.5}, 30.0, 2, "2")
    shrunk = Calibration({KEY: grown}).noted(KEY, Measurement({"context": 1.0, "workspace": 0.9}, 30.0, 1, "3")).known[KEY]
    assert shrunk == Measurement({"context": 1.25, "workspace": 0.9}, 30.0, 3, "3")


def test_calibrations_stay_bounded_read_as_written_and_two_operators_lose_nothing() -> None:
    many = Calibration()
    for number in range(MAX_ENTRIES + 10):
        many = many.noted(f"k{number}", Measurement({"context": 1.0}, 1.0, 1, f"{number:06}"))
    assert len(many.known) == MAX_ENTRIES and "k0" not in many.known and parse(render(many)).known == many.known
    one, two = (Calibration({name: Measurement({}, 1.0, 1, seen)}) for name, seen in (("a", "1"), ("b", "2")))
    assert set(later(one, two).known) == {"a", "b"}
    newer = Calibration({"a": Measurement({}, 2.0, 2, "3")})
    assert later(newer, one) == later(one, newer) == newer


@pytest.mark.parametrize("text", ["", "no", "[]", '{"a": 3}', '{"a": {"ratios": {"context": "x"}}}', "x" * (1 << 20)])
def test_a_config_map_that_cannot_be_read_leaves_the_formula(text: str) -> None:
    assert parse(text) == Calibration()


ANSWER = """# HELP gantline_startup_seconds How long each phase of the start took.
gantline_startup_seconds{phase="weights"} 1.25
gantline_startup_seconds{phase="warm-up"} 0.5
gantline_startup_seconds{phase="total"} 9.0
gantline_memory_promised_bytes{part="weights"} 1.1e+07
gantline_memory_promised_bytes{part="context"} 1.073741824e+09
gantline_memory_reserved_bytes{part="context"} 4e+09
gantline_memory_reserved_bytes{part="weights"} NaN
gantline_memory_reserved_bytes{part="cache"} -1
gantline_startup_seconds{phase="../x"} 1
"""


def test_a_servers_metrics_are_read_as_far_as_they_are_numbers() -> None:
    report = read_report(ANSWER)
    assert report == PodReport(
        {"weights": 1.25, "warm-up": 0.5, "total": 9.0}, {"weights": 1.1e7, "context": float(1 << 30)}, {"context": 4e9}
    )
    assert measure(report, 12.0, "now") == Measurement({"context": 4e9 / (1 << 30)}, 12.0, 1, "now")
    assert measure(replace(report, reserved={}), 12.0, "now").ratios == {}
    assert bounded_load_s(None, 60.0) == 60.0


def test_a_start_is_told_by_its_phases_kept_and_used_by_the_next_plan(api_cluster: ApiCluster, namespace: str) -> None:
    install_crd(api_cluster)
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    fates(api_cluster, [*inspected(probed=TINY, again=TINY), ("server", "probed", "never-ready", "", {})])
    apply(api_cluster, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "learnt", "namespace": namespace}})
    address = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}.9"
    kept = {"calibration_configmap": f"{namespace}/learnt"}
    with answering(address, SERVER_PORT, lambda path: ANSWER if path == "/metrics" else None):
        with serving(api_cluster, namespace, **kept):
            apply(api_cluster, service("probed", namespace))
            pod = wait(lambda: [pod for pod in server_pods(api_cluster, "probed", namespace) if pod["status"].get("phase") == "Running"])[0]
            name = pod["metadata"]["name"]
            set_address(api_cluster, namespace, name, address)
            api_cluster.kubectl("annotate", "--overwrite", f"pod/{name}", "-n", namespace, "simulated.gantline.io/fate=ready")
            wait_reason(api_cluster, "probed", namespace, "Ready")
            wait(lambda: status(api_cluster, "probed", namespace).get("startup", {}).get("phases"))
            first = status(api_cluster, "probed", namespace)
            assert first["startup"]["phases"] == {"weights": "1.2s", "warm-up": "0.5s"}
            assert set(first["startup"]) == {"revision", "scheduled", "pulled", "loaded", "total", "phases"}
            assert "calibration" not in first["plan"]
            learnt: dict[str, Any] = wait(lambda: get(api_cluster, "configmaps", "learnt", namespace).get("data"))
            assert list(json.loads(learnt["measurements"])) == [key_of(TINY["fingerprint"], "", 1, "float32", "float32")]
            api_cluster.kubectl("delete", "gisvc/probed", "-n", namespace)
        with serving(api_cluster, namespace, **kept):  # another operator, which has only read of it
            apply(api_cluster, service("again", namespace))
            wait_reason(api_cluster, "again", namespace, "Ready")
    second = status(api_cluster, "again", namespace)["plan"]
    assert second["calibration"].startswith("context 3.73 of the formula's bytes")
    assert second["memory"]["workspace"] == first["plan"]["memory"]["workspace"] + (1 << 30), "twice the estimate is believed, not more"
    assert second["memoryBytes"] > first["plan"]["memoryBytes"]
