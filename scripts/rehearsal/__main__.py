"""`make rehearsal`: what `make quickstart` does on a cluster of one's own, with images built from the Dockerfile, from end to end.

A node without development images (`gantline_devcluster up --built-images`) and its registry; buildah; then apply, quantize, serve, stream,
every image as any user, two gateways, `helm upgrade`, `helm test`, roll out, scale, share a GPU, delete, `helm uninstall`. What it measured
is printed at the end. Needs root and Debian's packages; takes minutes, and 15 GB in the cache the first time. Not part of `make test`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

from gantline_devcluster.cache import cache_root
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.node.cluster import NodeCluster

from scripts.rehearsal import gateways, path
from scripts.rehearsal.cluster import Rehearsal, RehearsalFailed
from scripts.rehearsal.images import build_again, build_runtime, builder_environment, install_packages, provide_base, record_sizes
from scripts.rehearsal.pods import run_as_anyone

NAME = "rehearsal"
STEPS: tuple[tuple[str, Callable[[Rehearsal], None]], ...] = (
    ("each image as a user of its own number, with a read-only root", run_as_anyone),
    ("two gateways, each of which answers and knows of the other", gateways.share),
    ("helm upgrade under streams, without touching a serving pod", path.upgrade_chart),
    ("two gateways split the limits of a key", gateways.limits_are_split),
    ("drain a gateway that has streams", gateways.drain),
    ("helm test", path.test_chart),
    ("roll out a changed setting under streams", path.roll_out),
    ("scale to 2 and back", path.scale),
    ("two services for one GPU, one after the other", path.share_one_gpu),
    ("delete the service, helm uninstall", path.remove),
)


def rehearse(rehearsal: Rehearsal, *, with_runtime: bool) -> None:
    with rehearsal.step("the Dockerfile's base"):
        provide_base(rehearsal)
    with rehearsal.step("make quickstart KUBECONFIG=... IMAGE_REPOSITORY=..."):
        path.quickstart(rehearsal)
    path.record_readiness(rehearsal)
    if with_runtime:
        build_runtime(rehearsal)
    for title, action in STEPS:
        with rehearsal.step(title):
            action(rehearsal)
    record_sizes(rehearsal)
    build_again(rehearsal)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the cluster running, to look at it; `--name rehearsal down` removes it")
    parser.add_argument("--without-runtime", action="store_true", help="leave out the image for GPUs, which is most of the time and space")
    options = parser.parse_args()
    cluster = NodeCluster(NAME)
    figures: list[tuple[str, str]] = []
    try:
        install_packages()
        started = time.monotonic()
        cluster.up(built_images=True)
        figures.append(("a node and its registry", f"{time.monotonic() - started:.1f} s"))
        binaries = subprocess.run([sys.executable, "-m", "gantline_devcluster", "binaries"], capture_output=True, text=True, check=True)
        environment = {
            **os.environ, **builder_environment(cache_root() / "rehearsal", cluster.registry), "KUBECONFIG": str(cluster.kubeconfig),
            "PATH": f"{binaries.stdout.strip()}:{os.environ['PATH']}",
        }  # fmt: skip
        rehearse(Rehearsal(cluster, environment, figures), with_runtime=not options.without_runtime)
    except (RehearsalFailed, DevclusterError, OSError, subprocess.SubprocessError) as failure:
        print(f"gantline: the rehearsal failed: {failure}", file=sys.stderr)
        return 1
    finally:
        print("\n".join(["", *(f"{what:64} {figure}" for what, figure in figures)]), flush=True)
        if not options.keep:
            cluster.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
