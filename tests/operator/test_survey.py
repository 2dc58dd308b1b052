"""What a survey answers and when it does not; whether an apply would change anything, beside the API server's own word."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import json
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator.client import FIELD_MANAGER, Forbidden, KindMissing, NotFound, Page, Raw, Resource, connect
from gantline_operator.controller import Controller
from gantline_operator.observe import PODS
from gantline_operator.reconcile_pass import CHILD_KINDS, SERVICES, Cluster, Memory, Pass
from gantline_operator.resources import Settings, labels, owner_reference
from gantline_operator.survey import MAX_AGE_S, Survey, Surveyed, WouldWrite
from gantline_operator.unchanged import apply_changes_nothing

from tests.operator.applying import apply, path_of
from tests.operator.harness import SETTINGS, install_crd, service
from tests.operator.harness import apply as kubectl_apply
from tests.operator.render_cases import CASES

Object = dict[str, Any]

KINDS = {kind.kind: kind for kind in (*CHILD_KINDS, PODS, SERVICES)}
CHAT = ("ns", "chat")


# -- would an apply change anything? -------------------------------------------------------------------------------------------------


def placed(item: Object, namespace: str) -> Object:
    return {**item, "metadata": {**item["metadata"], "namespace": namespace}}


@pytest.mark.parametrize("name", CASES)
def test_of_whatever_is_rendered_it_is_seen_that_it_stands_as_it_was_applied(api_cluster: ApiCluster, namespace: str, name: str) -> None:
    for item in CASES[name].objects():
        if item["kind"] not in ("Job", "PersistentVolumeClaim"):  # which are never applied
            live = apply(api_cluster.client, placed(item, namespace), dry_run=True)
            assert apply_changes_nothing(placed(item, namespace), live, FIELD_MANAGER), item["kind"]
            assert not apply_changes_nothing(placed(item, namespace), live, "somebody")


def _change(item: Object, path: str, value: Any) -> Object:
    """A copy with the value at a path such as `spec.ports.0.port`; None takes it away."""
    result = copy.deepcopy(item)
    at: Any = result
    *parts, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parts:
        at = at[part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return result


CONTAINER = "spec.template.spec.containers.0"
WISHES = [
    ("Deployment", "spec.replicas", 3),
    ("Deployment", "spec.template.metadata.labels.extra", "one"),
    ("Deployment", f"{CONTAINER}.args", ["other"]),
    ("Deployment", f"{CONTAINER}.ports", []),
    ("Deployment", f"{CONTAINER}.env", [{"name": "ONE", "value": "1"}]),
    ("Deployment", f"{CONTAINER}.securityContext", None),
    ("Deployment", f"{CONTAINER}.resources.limits.memory", "77Gi"),
    ("Deployment", "spec.template.spec.volumes", []),
    ("Service", "spec.ports.0.port", 81),
    ("Service", "metadata.labels", {"only": "this"}),
    ("ServiceAccount", "automountServiceAccountToken", True),
]


@pytest.mark.parametrize(("kind", "path", "value"), WISHES)
def test_a_wish_that_changed_is_seen(api_cluster: ApiCluster, namespace: str, kind: str, path: str, value: Any) -> None:
    item = placed(next(item for item in CASES["gpu-from-claim"].objects() if item["kind"] == kind), namespace)
    live = apply(api_cluster.client, item, dry_run=True)
    assert apply_changes_nothing(item, live, FIELD_MANAGER)
    assert not apply_changes_nothing(_change(item, path, value), live, FIELD_MANAGER)


EDITS = {
    "another value": {"spec": {"replicas": 5}},
    "what is not ours is left as it is": {"spec": {"minReadySeconds": 3}},
    "a field that is gone": {"spec": {"progressDeadlineSeconds": None}},
    "an annotation that is not ours": {"metadata": {"annotations": {"example.com/looked-at": "true"}}},
    "a label of ours": {"metadata": {"labels": {"app.kubernetes.io/part-of": "else"}}},
    "labels that are gone": {"metadata": {"labels": None}},
    "a node selector that grew": {"spec": {"template": {"spec": {"nodeSelector": {"extra": "yes"}}}}},
    "containers that are others": {"spec": {"template": {"spec": {"containers": [{"name": "server", "image": "x"}]}}}},
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("manager", ["kubectl-edit", FIELD_MANAGER])
def test_it_says_of_an_edit_what_the_api_server_says(api_cluster: ApiCluster, namespace: str, edit: str, manager: str) -> None:
    item = next(item for item in CASES["gpu-from-claim"].objects() if item["kind"] == "Deployment")
    live = apply(api_cluster.client, item, namespace=namespace)
    item = placed({**item, "metadata": {key: value for key, value in item["metadata"].items() if key != "ownerReferences"}}, namespace)
    assert apply_changes_nothing(item, live, FIELD_MANAGER)
    path = f"{path_of(item)}?fieldManager={manager}"
    edited = api_cluster.client.call("PATCH", path, EDITS[edit], content_type="application/merge-patch+json")
    applied = apply(api_cluster.client, item, dry_run=True)
    content = [{key: found[key] for key in ("spec",)} | {"labels": found["metadata"].get("labels")} for found in (edited, applied)]
    said = apply_changes_nothing(item, edited, FIELD_MANAGER)
    assert said == (content[0] == content[1]) == (edit in ("what is not ours is left as it is", "an annotation that is not ours"))


# -- what is surveyed ----------------------------------------------------------------------------------------------------------------


def child(kind: str, name: str, version: str = "1", **metadata: Any) -> Object:
    marks = {"labels": labels("chat", "server"), "ownerReferences": [owner_reference("chat", "u-chat")], **metadata}
    return {"metadata": {"name": name, "namespace": "ns", "uid": f"u-{kind}-{name}", "resourceVersion": version, **marks}}


class Listing:
    """An API server that knows these objects by kind, or answers a list of the kind with an error; what it was asked for by name."""

    def __init__(self, **found: list[Object] | Exception) -> None:
        parent = {"metadata": {"name": "chat", "namespace": "ns", "uid": "u-chat", "resourceVersion": "1"}, "status": {"replicas": 1}}
        self.found: dict[str, Any] = {"InferenceService": [parent], **found}
        self.queries: list[tuple[str, str | None, str]] = []
        self.asked: list[str] = []

    async def pages(self, resource: Resource, namespace: str | None = None, **query: str) -> AsyncIterator[Page]:
        self.queries.append((resource.kind, namespace, query.get("labelSelector", "")))
        found = self.found.get(resource.kind, [])
        if isinstance(found, Exception):
            raise found
        items = [item for item in found if namespace in (None, item["metadata"]["namespace"])]
        yield msgspec.convert({"metadata": {}, "items": [Raw(json.dumps(item).encode()) for item in items]}, Page)

    async def get(self, resource: Resource, namespace: str | None, name: str, *, subresource: str = "") -> Object:
        self.asked.append(f"{resource.kind}/{name}")
        raise NotFound("no")

    async def list(self, resource: Resource, namespace: str | None = None, **query: str) -> list[Object]:
        self.asked.append(resource.kind)
        return []


def surveyed(listing: Listing, *namespaces: str) -> tuple[Survey, list[float]]:
    now = [0.0]
    survey = Survey(lambda: now[0])
    asyncio.run(survey.collect(listing, namespaces))  # type: ignore[arg-type]
    return survey, now


def tell(survey: Survey, item: Object) -> bool:
    return survey.tell(CHAT, item["metadata"]["uid"], item["metadata"]["resourceVersion"])


def take(survey: Survey, listing: Listing) -> Surveyed | None:
    return survey.take(CHAT, listing)  # type: ignore[arg-type]


def test_a_survey_is_good_for_one_look_at_each_service_as_long_as_it_is_young() -> None:
    survey, _ = surveyed(listing := Listing())
    assert take(survey, listing) is not None
    assert take(survey, listing) is None
    survey, now = surveyed(listing)
    now[0] = MAX_AGE_S + 1
    assert take(survey, listing) is None
    assert take(Survey(), listing) is None, "not one that was never taken"


@pytest.mark.parametrize("part", [{"status": {}}, {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}])
def test_a_service_that_is_new_or_goes_is_asked_for(part: Object) -> None:
    listing = Listing()
    parent = listing.found["InferenceService"][0]
    listing.found["InferenceService"] = [{**parent, **part, "metadata": {**parent["metadata"], **part.get("metadata", {})}}]
    survey, _ = surveyed(listing)
    assert take(survey, listing) is None


def test_an_event_is_news_only_if_it_tells_of_another_version_and_then_the_service_is_asked_for() -> None:
    service = child("Service", "chat", "7")
    survey, _ = surveyed(listing := Listing(Service=[service]))
    assert not tell(survey, service)
    assert not tell(survey, listing.found["InferenceService"][0])
    assert take(survey, listing) is not None
    survey, _ = surveyed(listing)
    assert tell(survey, child("Service", "chat", "8"))
    assert take(survey, listing) is None
    survey, _ = surveyed(listing)
    assert tell(survey, child("Service", "unknown"))
    assert take(survey, listing) is None


def test_what_events_told_while_the_lists_were_made_counts_too() -> None:
    listing = Listing(Service=[child("Service", "chat", "7")])
    for version, usable in (("7", True), ("8", False)):
        survey = Survey(lambda: 0.0)
        assert tell(survey, child("Service", "chat", version)), "it is not known yet whether it is"
        asyncio.run(survey.collect(listing, ()))  # type: ignore[arg-type]
        assert (take(survey, listing) is not None) is usable


def test_a_service_that_no_watch_told_of_has_vanished() -> None:
    survey, _ = surveyed(listing := Listing(Service=[child("Service", "chat")]))
    assert survey.untold() == {CHAT}
    tell(survey, child("Service", "chat"))
    assert survey.untold() == {CHAT}, "children are watched before they are listed"
    tell(survey, listing.found["InferenceService"][0])
    assert survey.untold() == set()


async def test_a_service_that_comes_between_the_first_list_and_the_survey_is_queued_by_its_watch(
    api_cluster: ApiCluster, namespace: str
) -> None:
    """It is in the survey as the watch tells of it, but was not in the list from which all are queued."""
    await asyncio.to_thread(install_crd, api_cluster)
    client = await connect(str(api_cluster.kubeconfig))
    try:
        controller = Controller(client, replace(SETTINGS, watch_namespaces=(namespace,)), "1")
        await controller._enqueue_all(spread_s=0.0)
        await asyncio.to_thread(kubectl_apply, api_cluster, service("late", namespace))
        await controller._take_survey()
        metadata = (await client.get(SERVICES, namespace, "late"))["metadata"]
        controller.tell((namespace, "late"), metadata["uid"], metadata["resourceVersion"])
        assert await asyncio.wait_for(controller.queue.get(), 5) == (namespace, "late")
    finally:
        await client.close()


def test_kinds_are_listed_by_our_label_in_each_namespace_that_is_served_and_autoscalers_without() -> None:
    _, _ = surveyed(listing := Listing(), "a", "b")
    wanted = [("Deployment", name, "app.kubernetes.io/managed-by=gantline-operator") for name in "ab"]
    assert [query for query in listing.queries if query[0] == "Deployment"] == wanted
    assert ("HorizontalPodAutoscaler", "a", "") in listing.queries
    assert all(namespace in ("a", "b") for _, namespace, _ in listing.queries)
    assert len(listing.queries) == 2 * len(KINDS)


def test_reads_are_answered_from_it_and_what_it_cannot_know_is_asked_for() -> None:
    found: dict[str, list[Object] | Exception] = {
        "Service": [child("Service", "chat"), child("Service", "unlabelled", labels={})],
        "Secret": [],
        "ScaledObject": KindMissing("no such kind"),
        "Ingress": Forbidden("no"),
        "HorizontalPodAutoscaler": [child("HorizontalPodAutoscaler", "stray", labels={})],
    }
    survey, _ = surveyed(listing := Listing(**found))
    api = take(survey, listing)
    assert api is not None
    selector = "app.kubernetes.io/managed-by=gantline-operator,gantline.io/service=chat"

    async def ask() -> None:
        assert (await api.get(KINDS["Service"], "ns", "chat"))["kind"] == "Service"
        assert [item["metadata"]["name"] for item in await api.list(KINDS["Service"], "ns", labelSelector=selector)] == ["chat"]
        assert (await api.get(KINDS["HorizontalPodAutoscaler"], "ns", "stray"))["metadata"]["name"] == "stray"
        with pytest.raises(NotFound):
            await api.get(KINDS["HorizontalPodAutoscaler"], "ns", "chat")
        with pytest.raises(KindMissing):
            await api.get(KINDS["ScaledObject"], "ns", "chat")
        with pytest.raises(KindMissing):
            await api.list(KINDS["ScaledObject"], "ns", labelSelector=selector)
        assert not listing.asked
        with pytest.raises(NotFound):
            await api.get(KINDS["Service"], "ns", "gone")
        await api.list(KINDS["Ingress"], "ns", labelSelector=selector)
        await api.list(KINDS["Service"], "ns", labelSelector="another=one")
        assert listing.asked == ["Service/gone", "Ingress", "Service"]

    asyncio.run(ask())


def test_what_was_listed_is_let_go_as_soon_as_it_was_used() -> None:
    """Also where a look met a kind that the cluster lacks: an error that is raised again holds all that ever raised it."""

    def look() -> weakref.ref[Surveyed]:
        api = take(survey, listing)
        assert api is not None
        asyncio.run(ask(api))
        return weakref.ref(api)

    async def ask(api: Surveyed) -> None:
        with contextlib.suppress(KindMissing):
            await api.get(KINDS["ScaledObject"], "ns", "chat")

    survey, _ = surveyed(listing := Listing(ScaledObject=KindMissing("no such kind")))
    gc.disable()
    try:
        assert look()() is None
    finally:
        gc.enable()


def test_a_pass_is_let_go_as_soon_as_it_is_over() -> None:
    def some(*_: Any) -> Any:
        return None

    parent = {"metadata": {"name": "chat", "namespace": "ns", "uid": "u-chat"}}
    rendering = Settings.of(SETTINGS, "1")
    cluster = Cluster(Listing(), SETTINGS, rendering, some, some, some, some, lambda service, uid: Memory(uid))  # type: ignore[arg-type]
    gc.disable()
    try:
        gone = weakref.ref(Pass(cluster, parent))
        assert gone() is None
    finally:
        gc.enable()


def test_nothing_is_written_but_what_would_change_nothing() -> None:
    survey, _ = surveyed(listing := Listing(Service=[child("Service", "chat")]))
    api = take(survey, listing)
    assert api is not None
    body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "chat"}}
    for call in (
        lambda: api.apply(KINDS["Service"], body),
        lambda: api.apply(KINDS["Service"], {**body, "metadata": {"name": "other"}}),
        lambda: api.create(KINDS["Service"], "ns", {**body, "metadata": {"name": "other"}}),
        lambda: api.patch(KINDS["Service"], "ns", "chat", {}),
        lambda: api.delete(KINDS["Service"], "ns", "chat", uid="u-Service-chat"),
    ):
        with pytest.raises(WouldWrite):
            asyncio.run(call())
