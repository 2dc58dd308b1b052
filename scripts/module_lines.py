"""Write the list of modules in docs/architecture.md from the first sentence of each module's docstring. A test compares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architecture.md"
HEAD = "## Modules\n"
PACKAGES = (
    "operator/gantline_operator", "runtime/gantline_gateway", "runtime/gantline_runtime", "kernels/gantline_kernels",
    "quant/gantline_quant", "devcluster/gantline_devcluster",
)  # fmt: skip


def page() -> str:
    """docs/architecture.md with its list of modules made anew."""
    return PAGE.read_text().split(HEAD)[0] + HEAD + "".join(_part(ROOT / package) for package in PACKAGES)


def _part(root: Path) -> str:
    lines = [f"\n### `{root.name}`: {_first_line(root / '__init__.py')}\n"]
    for file in sorted(root.rglob("*.py")):
        if file.name not in ("__init__.py", "__main__.py"):
            lines.append(f"- `{file.relative_to(root)}`: {_first_line(file)}\n")
    return "".join(lines)


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).split(": `")[0]


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == page() else "docs/architecture.md is not what `make crds` writes")
    PAGE.write_text(page())
