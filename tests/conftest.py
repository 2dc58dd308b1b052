"""Clusters for tests. A test that asks for one is marked `apiserver` or `node` by that alone."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError
from gantline_devcluster.node.cluster import NodeCluster
from gantline_devcluster.node.requirements import why_no_node
from hypothesis import HealthCheck, settings

# Machines that run the suite are slow and shared: a slow draw is no finding.
settings.register_profile("gantline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gantline")

os.environ.setdefault("OMP_NUM_THREADS", "1")


HOMES = {"node": ("tests/e2e/", "tests/devcluster/"), "apiserver": ("tests/operator/", "tests/gateway/", "tests/devcluster/")}
"""Where tests of these marks live: scripts/run_tests.py looks for them nowhere else, so that the others need not be imported."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "api_cluster" in fixtures:
            item.add_marker(pytest.mark.apiserver)
        if "node_cluster" in fixtures:
            item.add_marker(pytest.mark.node)
        for mark, homes in HOMES.items():
            if item.get_closest_marker(mark) and not item.nodeid.startswith(homes):
                raise pytest.UsageError(f"{item.nodeid} is marked {mark}: such tests belong to {' or '.join(homes)}")


@pytest.fixture(scope="session")
def api_cluster() -> Iterator[ApiCluster]:
    """A real API server with controllers, scheduler and kwok: one for each worker process, so that workers share no cluster-wide objects.

    Tests of a worker do share it: give each a `namespace` of its own, and remove the nodes and fates that it made.
    """
    with ApiCluster(kwok=True) as cluster:
        yield cluster


@pytest.fixture
def namespace(api_cluster: ApiCluster) -> Iterator[str]:
    """A namespace for this test alone, in `api_cluster`; its deletion is started at the end and not waited for."""
    name = f"test-{secrets.token_hex(4)}"
    api_cluster.client.post("/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    try:
        api_cluster.client.call("DELETE", f"/api/v1/namespaces/{name}")
    except ApiError as error:
        if error.status != 404:  # a test may have deleted it itself
            raise


@pytest.fixture
def simulated_nodes(api_cluster: ApiCluster) -> Iterator[ApiCluster]:
    """`api_cluster`, whose simulated nodes and fates are removed when the test ends."""
    yield api_cluster
    api_cluster.clear_fates()
    api_cluster.remove_nodes()


@pytest.fixture(scope="module")
def node_cluster() -> Iterator[NodeCluster]:
    """A real node of a module's own, taken down at its end with nothing left: while it lives it takes a share of the processor from others.

    Skipped, with the reason, where none can run.
    """
    if why := why_no_node():
        pytest.skip(f"{why}; use sudo")
    cluster = NodeCluster("test")
    cluster.up()
    yield cluster
    assert cluster.down() == []
