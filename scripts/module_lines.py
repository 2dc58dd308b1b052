"""Write what documents and code share: the list of modules in docs/architecture.md, from the first sentence of each module's docstring,
and the operator's reasons.json, from the table of reasons in docs/operations.md. A test compares."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architecture.md"
REASONS = ROOT / "operator/gantline_operator/reasons.json"
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


def reasons() -> str:
    """The table of reasons as JSON: reason -> [what it means, what to do], links without their addresses."""
    rows = (ROOT / "docs/operations.md").read_text().split("<!-- reasons:")[1].split("<!-- end of reasons -->")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| `")]
    texts = {name: [_without_links(text) for text in row[1:]] for row in cells for name in re.findall(r"`(\w+)`", row[0])}
    return json.dumps(texts, indent=1) + "\n"


def _without_links(text: str) -> str:
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)


def main() -> int:
    written = {PAGE: page(), REASONS: reasons()}
    if "--check" in sys.argv:
        wrong = [str(path.relative_to(ROOT)) for path, text in written.items() if not path.exists() or path.read_text() != text]
        print(*(f"{path} is not what `make crds` writes" for path in wrong), sep="\n")
        return 1 if wrong else 0
    for path, text in written.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
