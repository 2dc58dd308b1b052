"""Grafana's panel components, from npm into the cache, and the page that is bundled of them.

Grafana itself is under the AGPL, and so are some of its packages: every package that comes along is looked at, and another licence than
those below stops the installation. Nothing of them is part of the project, and nothing is installed but by `make dashboards`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

__all__ = ["built_page"]

PACKAGES = (
    "@grafana/ui@13.2.3",
    "@grafana/data@13.2.3",
    "@grafana/schema@13.2.3",
    "react@19.3.1",
    "react-dom@19.3.1",
    "esbuild@0.28.2",
    "@fontsource/inter@5.2.8",
)
LICENCES = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BlueOak-1.0.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MPL-2.0",
    "OFL-1.1",
    "Unlicense",
    "Zlib",
    "none",
}
UNNAMED = {"fast-shallow-equal": "Unlicense", "get-document": "none", "react-universal-interface": "Unlicense"}
"""Packages whose package.json names no licence: by the file beside it. One has none at all: part of an editor that is not shown."""
PAGE = Path(__file__).parent / "page"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gantline"


def built_page(folder: Path) -> dict[str, Path]:
    """Files of the page by their paths on its server; the bundle is made in `folder`."""
    modules = _installed() / "node_modules"
    bundle = folder / "page.js"
    loaders = ("--loader:.svg=dataurl", "--loader:.ttf=empty")
    form = ("--bundle", "--jsx=automatic", '--define:process.env.NODE_ENV="production"', "--log-level=warning")
    command = ["node", str(modules / "esbuild" / "bin" / "esbuild"), str(PAGE / "page.jsx"), f"--outfile={bundle}", *form, *loaders]
    subprocess.run(command, check=True, env={**os.environ, "NODE_PATH": str(modules)}, timeout=300)
    icons = modules / "@grafana" / "ui" / "dist" / "public"
    found = {f"/public/{prefix}{path.relative_to(icons)}": path for path in icons.rglob("*.svg") for prefix in ("", "build/")}
    fonts = modules / "@fontsource" / "inter" / "files"
    weights = {"Regular": 400, "Medium": 500}
    found |= {f"/public/fonts/inter/Inter-{name}.woff2": fonts / f"inter-latin-{weight}-normal.woff2" for name, weight in weights.items()}
    return {**found, "/page.js": bundle, "/page.css": bundle.with_suffix(".css"), "/favicon.ico": icons / "img/icons/unicons/apps.svg"}


def _installed() -> Path:
    """The folder with node_modules; installed once, beside and then renamed. Raises where a licence is not one of LICENCES."""
    whole = CACHE / f"grafana-components-{sha256(' '.join(PACKAGES).encode()).hexdigest()[:12]}"
    if whole.is_dir():
        return whole
    CACHE.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{whole.name}.", dir=CACHE))
    flags = ("--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", "--legacy-peer-deps", "--loglevel=error")
    try:
        subprocess.run(["npm", "install", *flags, "--prefix", str(made), *PACKAGES], check=True, timeout=900)
        if refused := [f"{name}: {licence}" for name, licence in _licences(made / "node_modules") if not _is_free(name, licence)]:
            raise RuntimeError(f"packages of other licences than {sorted(LICENCES)}: {', '.join(refused)}")
        with contextlib.suppress(OSError):  # another run was faster
            made.rename(whole)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return whole


def _licences(folder: Path) -> Iterator[tuple[str, str]]:
    """Of every package below, as their package.json has it."""
    for path in folder.rglob("package.json"):
        *_, before, above, _, _ = path.parts  # .../node_modules/NAME/package.json or .../node_modules/@SCOPE/NAME/package.json
        if above == "node_modules" or (before == "node_modules" and above.startswith("@")):
            about = json.loads(path.read_text())
            yield about["name"], str(about.get("license", ""))


def _is_free(name: str, licence: str) -> bool:
    """An expression of SPDX: one of what `OR` offers, all of what `AND` joins."""
    offered = (licence or UNNAMED.get(name, "")).replace("(", "").replace(")", "").split(" OR ")
    return any(all(part in LICENCES for part in re.split(r" AND ", one)) for one in offered)
