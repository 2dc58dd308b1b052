"""README's table of speed says what the accepted runs say, and those have what makes a figure count."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import workloads
from benchmarks.speed_table import accepted, rows_of, with_rows

ROOT = Path(__file__).parents[2]


def test_readmes_rows_are_made_from_the_accepted_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_rows(readme, rows_of(accepted("h200"), accepted("h100"))) == readme, "run python -m benchmarks.speed_table"


@pytest.mark.parametrize("name", workloads.NAMES)
@pytest.mark.parametrize("gpu", ["h200", "h100"])
def test_an_accepted_run_has_its_check_its_ceilings_and_where_it_comes_from(gpu: str, name: str) -> None:
    row = accepted(gpu)[name]
    assert row["checks"]["passed"] is True and row["checks"]["tokens"] > 100
    assert set(row["ceilings"]) == {"copy_TB_s", "read_TB_s", "bf16_TFLOP_s"}
    assert ({"first_ms", "next_ms"} if name == "single" else {"out_tok_s", "in_out_tok_s"}) <= set(row["figures"])
    assert len(row["figures"]["seconds"]) >= 2
    assert row["commit"] and row["date"] and row["command"].startswith("python -m benchmarks.throughput ")
    assert gpu.upper() in row["versions"]["gpu"]


def test_the_best_of_a_row_is_bold_and_a_title_that_is_not_there_is_named() -> None:
    results = {name: {"figures": {"out_tok_s": 1e6, "in_out_tok_s": 1.0, "first_ms": 20.04, "next_ms": 3.996}} for name in workloads.NAMES}
    h100 = {name: {"figures": {"out_tok_s": 2e6, "in_out_tok_s": 2.0, "first_ms": 1.0, "next_ms": 1.0}} for name in workloads.NAMES}
    lines = rows_of(results, h100)
    assert lines["chat"] == "| chat, output tokens/s | **1,000,000** | 11,912 | 10,868 | 12,772 | 2,000,000 |"
    assert lines["prefill"] == "| prefill 96 x 4096, all tokens/s | 1 | **39,775** | 38,885 | 37,203 | 2 |"
    assert lines["single"].startswith("| one request: first token / each next, ms | **20.0 / 4.00** | 27.0 / 4.94 ")
    with pytest.raises(ValueError, match="0 lines of the table begin with 'chat"):
        with_rows("# Nothing\n", lines)
