"""README's rows of speed, made from the accepted runs: `python -m benchmarks.speed_table` writes them into README.md.

What stands there of each workload is the last accepted run in results/h200.json, rounded, beside the peers' figures on the same kind of
GPU, the best of them bold, and last, apart from these, that of results/h100.json. The start's row is `benchmarks.startup`'s, and stays as
it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

__all__ = ["PEERS", "Row", "accepted", "rows_of", "with_rows"]

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """A line of the table: what it is called, which figures of a run it shows, and digits after the point of each."""

    title: str
    figures: tuple[str, ...]
    digits: tuple[int, ...] = (0,)
    more_is_better: bool = True

    def line(self, columns: list[tuple[float, ...] | None], apart: tuple[float, ...]) -> str:
        """`columns`: a run's figures in the order of `figures`, None where there was no run; `apart`: of another kind of GPU."""
        best = (max if self.more_is_better else min)(values for values in columns if values is not None)
        cells = [*(self._cell(values, bold=values == best) for values in columns), self._cell(apart, bold=False)]
        return f"| {self.title} | {' | '.join(cells)} |"

    def _cell(self, values: tuple[float, ...] | None, *, bold: bool) -> str:
        if values is None:
            return "-"
        text = " / ".join(f"{_rounded(value, digits):,.{digits}f}" for value, digits in zip(values, self.digits, strict=True))
        return f"**{text}**" if bold else text


def _rounded(value: float, digits: int) -> Decimal:
    """Halves up, of the number as it is written."""
    return Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)


_ROWS = {
    "chat": Row("chat, output tokens/s", ("out_tok_s",)),
    "decode": Row("decode 256 x (128 in, 1024 out), output tokens/s", ("out_tok_s",)),
    "prefill": Row("prefill 96 x 4096, all tokens/s", ("in_out_tok_s",)),
    "prefix": Row("512 requests over a shared prefix of 2048, output tokens/s", ("out_tok_s",)),
    "batch16": Row("batch of 16, output tokens/s", ("out_tok_s",)),
    "single": Row("one request: first token / each next, ms", ("first_ms", "next_ms"), (1, 2), more_is_better=False),
}
PEERS: dict[str, list[tuple[float, ...] | None]] = {
    "chat": [(11912,), (10868,), (12772,)],
    "decode": [(17023,), (16576,), (18593,)],
    "prefill": [(39775,), (38885,), (37203,)],
    "prefix": [(9232,), (8721,), None],
    "batch16": [(2764,), (2802,), (2677,)],
    "single": [(27.0, 4.94), (25.5, 4.83), (29.1, 5.11)],
}
"""vLLM 0.25.1, SGLang 0.5.13 and LMDeploy 0.18.0 on one H200 (docs/perf-log.md); LMDeploy was not given `prefix`."""


def rows_of(h200: dict[str, Any], h100: dict[str, Any]) -> dict[str, str]:
    """Of each workload the table's line, from the accepted runs on either GPU. Raises KeyError for a workload that has none."""

    def ours(results: dict[str, Any], name: str) -> tuple[float, ...]:
        return tuple(float(results[name]["figures"][figure]) for figure in _ROWS[name].figures)

    return {name: row.line([ours(h200, name), *PEERS[name]], apart=ours(h100, name)) for name, row in _ROWS.items()}


def accepted(gpu: str) -> dict[str, Any]:
    """The accepted runs on an `h200` or an `h100`, by workload."""
    results: dict[str, Any] = json.loads((_ROOT / f"benchmarks/results/{gpu}.json").read_text())
    return results


def with_rows(text: str, lines: dict[str, str]) -> str:
    """`text` with each line of the table in the place of the one with its title. Raises ValueError if there is none."""
    given = text.splitlines()
    for name, line in lines.items():
        at = [i for i, old in enumerate(given) if old.startswith(f"| {_ROWS[name].title} |")]
        if len(at) != 1:
            raise ValueError(f"{len(at)} lines of the table begin with {_ROWS[name].title!r}")
        given[at[0]] = line
    return "\n".join(given) + "\n"


def main() -> None:
    readme = _ROOT / "README.md"
    readme.write_text(with_rows(readme.read_text(), rows_of(accepted("h200"), accepted("h100"))))


if __name__ == "__main__":
    main()
