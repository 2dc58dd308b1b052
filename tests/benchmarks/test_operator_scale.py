"""The control plane's benchmark refuses what could not come to an end, and says why."""

from __future__ import annotations

import pytest

from benchmarks.operator_scale import parse


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--services 60 --nodes 60 --latency-services 50 --single 5", "--latency-services 50, each way, and --single 5 are 105"),
        ("--services 60 --nodes 60 --latency-services 50 --single 5", "Give --services 107 or more"),
        ("--services 20 --nodes 1 --latency-services 5 --single 5", "--nodes 1 have 4 GPUs, and --services 20 take one each"),
        ("--services 20 --nodes 9 --latency-services 5 --single 1", "a percentile needs two"),
    ],
)
def test_what_could_not_end_is_refused_with_its_cause_and_cure(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(arguments.split())
    assert refused.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_what_fits_is_taken() -> None:
    assert parse(["--services", "107", "--nodes", "60", "--latency-services", "50", "--single", "5"]).services == 107
