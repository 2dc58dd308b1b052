"""Say what the operator would decide for a service, and why. Nothing is changed: it is the operator's own planner, run here.

    gantline plan -f service.yaml --nodes nodes.yaml          # kubectl get nodes -o yaml (pods in the file count as used GPUs)
    gantline plan -f service.yaml --cluster                   # nodes and pods of the cluster that kubectl uses
    gantline plan -f service.yaml --nodes nodes.yaml --facts facts.json      # gantline inspect URI > facts.json

Exit code: 0 every service is planned (pods may have to wait), 1 one is rejected, 64 and above for bad input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from gantline_runtime.errors import ConfigurationError, GantlineError, SourceError
from gantline_runtime.model_facts import ModelFacts

from gantline_operator.dynamic_devices import DynamicFacts, read_claim, read_class, read_slice
from gantline_operator.facts import PodUse, Reservation, cluster_facts, read_node, reduce_pod
from gantline_operator.fields import SpecError
from gantline_operator.inventory import POOLS_KEY, Inventory, parse_inventory
from gantline_operator.plan import Plan, plan, reservation
from gantline_operator.plan_report import build_report, render_table
from gantline_operator.plan_status import from_status
from gantline_operator.resource import GROUP, KIND, PLURAL, VERSION, InferenceServiceSpec
from gantline_operator.spec import parse_service

__all__ = ["add_arguments", "run"]

_IMAGES = ("cuda", "cpu", "rocm", "ascend")
_MAX_BYTES = 256 << 20
Object = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, *, from_cluster: bool = False) -> None:
    """`from_cluster`: the cluster is read unless --nodes is given, and the namespace is left for the caller to find."""
    parser.add_argument("-f", "--filename", required=True, metavar="FILE", help="manifest with one or more InferenceServices; - for stdin")
    source = parser.add_mutually_exclusive_group(required=not from_cluster)
    source.add_argument("--nodes", metavar="FILE", help="Node objects in YAML or JSON (Pods among them count as used); - for stdin")
    source.add_argument("--cluster", action="store_true", help="read nodes, pods and what is known of the model from the cluster")
    parser.add_argument("--kubeconfig", metavar="FILE", help="with --cluster: another than $KUBECONFIG or ~/.kube/config")
    default = None if from_cluster else "default"
    shown = default or "the context's"
    parser.add_argument("--namespace", "-n", default=default, help=f"namespace of services whose manifest names none (default: {shown})")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--facts", metavar="FILE", help="model facts in JSON, as `gantline inspect` prints them")
    model.add_argument("--model", metavar="DIR|URI", help="inspect this folder or hub repository instead of spec.model.uri")
    parser.add_argument("--inventory", metavar="FILE", help="pools of nodes: a ConfigMap with the key `pools`, or the list itself")
    images = f"runtime images that the operator has, of {', '.join(_IMAGES)} (default: cuda,cpu)"
    parser.add_argument("--images", default="cuda,cpu", metavar="LIST", help=images)
    parser.add_argument("-o", "--output", choices=("table", "json", "yaml"), default="table", help="form of the answer (default: table)")


def run(args: argparse.Namespace) -> int:
    try:
        services = _read_services(args.filename, args.namespace)
        inventory = _read_inventory(args.inventory)
    except SpecError as error:
        raise ConfigurationError(str(error), cure=error.cure) from None
    images = _parse_images(args.images)
    observed = _observe(args)
    nodes = [observed.dynamic.add_to(read_node(node, inventory)) for node in observed.nodes]
    uses = [*(use for use in map(reduce_pod, observed.pods) if use is not None), *observed.dynamic.uses]
    taken = _reserved(observed.services, uses, {f"{namespace}/{name}" for namespace, name, _ in services})
    reports = []
    for namespace, name, spec in services:
        service = f"{namespace}/{name}"
        facts = _find_facts(args, spec, observed.services.get(service))
        # The service's own pods will be replaced, so what they hold is free for the new ones.
        own = [use.uid for use in uses if use.service == service]
        answer = plan(spec, facts, cluster_facts(nodes, uses, reservations=taken, inventory=inventory, credit=own), images)
        if isinstance(answer, Plan):
            taken.append(reservation(service, spec, answer, spec.replicas))
        reports.append(build_report(service, facts, answer))
    sys.stdout.write(_render(reports, args.output))
    return 0 if all(report["planned"] for report in reports) else 1


def _reserved(services: Mapping[str, Object], uses: Sequence[PodUse], leave_out: Collection[str]) -> list[Reservation]:
    """What other services of the cluster were promised and their pods do not hold yet."""
    bound = Counter(use.service for use in uses)
    found = []
    for service, manifest in services.items():
        try:
            _, spec = parse_service(manifest)
        except SpecError:
            continue
        planned = from_status(_map(_map(manifest.get("status")).get("plan")), spec)
        missing = 0 if spec.suspend else spec.replicas - bound[service]
        if planned is not None and missing > 0 and service not in leave_out:
            found.append(reservation(service, spec, planned, missing))
    return found


def _map(value: object) -> Object:
    return value if isinstance(value, dict) else {}


def _render(reports: Sequence[Object], output: str) -> str:
    if output == "table":
        return "\n".join(render_table(report) for report in reports)
    whole: Any = reports[0] if len(reports) == 1 else list(reports)
    if output == "json":
        return json.dumps(whole, indent=2) + "\n"
    text: str = yaml.safe_dump(whole, sort_keys=False, width=140)
    return text


def _parse_images(text: str) -> dict[str, str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in _IMAGES]
    if unknown:
        raise ConfigurationError(f"--images: {unknown[0][:80]!r} is no runtime image", cure=f"Give some of {', '.join(_IMAGES)}.")
    return {name: name for name in names}


# -- reading ---------------------------------------------------------------------------------------------------------------------------


def _documents(filename: str) -> list[Object]:
    """All objects of a YAML or JSON file; Lists are taken apart."""
    try:
        text = sys.stdin.read(_MAX_BYTES) if filename == "-" else _read_text(Path(filename))
        documents = list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except OSError as error:
        raise ConfigurationError(f"{filename} cannot be read: {error.strerror or error}", cure="Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{filename} is not YAML: {' '.join(str(error).split())[:300]}", cure="Correct the file.") from None
    return [item for document in documents for item in _take_apart(document)]


def _read_text(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigurationError(f"{path} has more than {_MAX_BYTES >> 20} MiB", cure="Give a smaller file.")
    return path.read_text()


def _take_apart(document: object) -> Iterable[Object]:
    if isinstance(document, list):
        for item in document:
            yield from _take_apart(item)
    elif isinstance(document, dict):
        if str(document.get("kind", "")).endswith("List") and isinstance(document.get("items"), list):
            yield from (item for item in document["items"] if isinstance(item, dict))
        else:
            yield document


def _read_services(filename: str, namespace: str) -> list[tuple[str, str, InferenceServiceSpec]]:
    """(namespace, name, spec) of each service. Raises SpecError."""
    found = []
    for document in _documents(filename):
        if document.get("kind") == "InferenceService" or "kind" not in document:
            name, spec = parse_service(document)
            found.append((str((document.get("metadata") or {}).get("namespace") or namespace), name, spec))
    if not found:
        raise ConfigurationError(f"{filename} holds no InferenceService", cure="Give a manifest of kind InferenceService.")
    return found


def _read_inventory(filename: str | None) -> Inventory:
    """Raises SpecError."""
    if filename is None:
        return Inventory()
    documents = _documents(filename)
    if not documents:
        raise ConfigurationError(f"{filename} holds no pools", cure="Give a ConfigMap with the key `pools`, or a list of pools.")
    maps = [document.get("data") for document in documents if document.get("kind") == "ConfigMap"]
    pools = {POOLS_KEY: yaml.safe_dump(documents)}
    return parse_inventory(maps[0] if maps and isinstance(maps[0], Mapping) else pools)


@dataclass(frozen=True)
class _Observed:
    """What is there: Node, Pod and InferenceService objects, the last by `namespace/name`."""

    nodes: list[Object]
    pods: list[Object]
    services: dict[str, Object]
    dynamic: DynamicFacts


def _observe(args: argparse.Namespace) -> _Observed:
    if not args.nodes:
        return asyncio.run(_read_cluster(args.kubeconfig, getattr(args, "context", None)))
    documents = _documents(args.nodes)
    nodes = [document for document in documents if document.get("kind") == "Node"]
    if not nodes:
        raise ConfigurationError(f"{args.nodes} holds no Node", cure="Give the output of `kubectl get nodes -o yaml`.")
    pods = [document for document in documents if document.get("kind") == "Pod"]
    return _Observed(nodes, pods, {}, _dynamic(documents))


def _dynamic(items: Iterable[Object], *, any_class: bool = True) -> DynamicFacts:
    """Of ResourceSlices, DeviceClasses and ResourceClaims among `items`."""
    kinds: dict[str, list[Object]] = {"ResourceSlice": [], "DeviceClass": [], "ResourceClaim": []}
    for item in items:
        kinds.get(str(item.get("kind")), []).append(item)
    slices = (found for found in map(read_slice, kinds["ResourceSlice"]) if found is not None)
    classes = (found for found in map(read_class, kinds["DeviceClass"]) if found is not None)
    claims = (found for found in map(read_claim, kinds["ResourceClaim"]) if found is not None)
    return DynamicFacts(slices, classes, claims, any_class=any_class)


async def _read_cluster(kubeconfig: str | None, context: str | None) -> _Observed:
    from gantline_operator.client import ApiError, Forbidden, KindMissing, Resource, connect
    from gantline_operator.dynamic_devices import ANY_CLASS_SINCE
    from gantline_operator.observe import CLAIMS, DEVICE_CLASSES, SLICES

    try:
        client = await connect(kubeconfig, context)
    except Exception as error:  # the client's loader raises its own kinds, and plain OSError and YAML errors
        raise ConfigurationError(f"no cluster: {str(error)[:300]}", cure="Give --kubeconfig FILE, or --nodes FILE instead.") from error
    try:
        nodes = await client.list(Resource("v1", "Node", "nodes"))
        pods = await client.list(Resource("v1", "Pod", "pods"))
        try:
            services = await client.list(Resource(f"{GROUP}/{VERSION}", KIND, PLURAL))
        except KindMissing:
            services = []
        dynamic = []
        for resource in (SLICES, DEVICE_CLASSES, CLAIMS):
            with contextlib.suppress(KindMissing, Forbidden):
                dynamic += [{"kind": resource.kind, **item} for item in await client.list(resource)]
        any_class = await client.version() >= ANY_CLASS_SINCE
    except ApiError as error:
        raise SourceError(f"the cluster gives no answer: {error}", cure="You need the right to list nodes and pods.") from None
    finally:
        await client.close()
    whole = [{"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, **service} for service in services]
    by_name = {f"{item['metadata']['namespace']}/{item['metadata']['name']}": item for item in whole}
    return _Observed(nodes, pods, by_name, _dynamic(dynamic, any_class=any_class))


def _find_facts(args: argparse.Namespace, spec: InferenceServiceSpec, recorded: Object | None) -> ModelFacts:
    """From --facts, --model, the status of the service as the cluster has it, or the source itself. Raises GantlineError."""
    if args.facts:
        documents = _documents(args.facts)
        return ModelFacts.from_json(documents[0] if documents else None)
    known = _map(_map((recorded or {}).get("status")).get("model"))
    if known and not args.model and _map(_map((recorded or {}).get("spec")).get("model")).get("uri") == spec.model.uri:
        return ModelFacts.from_json({key: value for key, value in known.items() if key != "inputs"})
    uri = args.model or spec.model.uri
    if uri.startswith("pvc://"):
        raise SourceError(f"{uri} lies in a cluster", cure="Give --facts FILE (of `gantline inspect`) or --model DIR, where a copy is.")
    return _inspect(uri, "" if args.model else spec.model.revision or "")


def _inspect(uri: str, revision: str) -> ModelFacts:
    # Imported here: the operator's own image plans without ever reading a model.
    from gantline_runtime.checkpoint import read_checkpoint
    from gantline_runtime.sources import open_source, parse_uri

    try:
        files, name, commit = open_source(parse_uri(uri), revision)
        return read_checkpoint(files, name=name, revision=commit).facts
    except GantlineError as error:
        error.cure = f"{error.cure} Or give --facts FILE, or --model DIR."
        raise
