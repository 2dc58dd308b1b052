"""Look at InferenceServices with your own rights: kubectl finds this program as `kubectl gantline`.

    kubectl gantline plan -f service.yaml      what the operator would decide for a service, and why
    kubectl gantline explain SERVICE           why a service is as it is, and what to do next
    kubectl gantline top [SERVICE ...]         replicas, requests, tokens a second, use of the cache
    kubectl gantline events SERVICE            what happened to a service, its Jobs and its pods, in order

Exit code: 0, 1 where `plan` rejects a service, 64 and above where the question cannot be answered.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from gantline_runtime import termination
from gantline_runtime.errors import ConfigurationError, GantlineError
from kubernetes.aio.config import ConfigException, list_kube_config_contexts

from gantline_operator import plan_command
from gantline_operator.client import connect
from gantline_operator.kubectl import explain, timeline, top
from gantline_operator.kubectl.reading import Reader

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The program; its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        namespace = arguments.namespace or _context_namespace(arguments)
        if arguments.command == "plan":
            arguments.namespace = namespace
            return plan_command.run(arguments)
        print(asyncio.run(_answer(arguments, namespace)))
    except GantlineError as error:
        print(f"kubectl gantline: {error}. {error.cure}", file=sys.stderr)
        return termination.exit_code(error.reason)
    except (BrokenPipeError, KeyboardInterrupt):
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    documentation = inspect.getdoc(sys.modules[__name__]) or ""
    whole = argparse.ArgumentParser(
        prog="kubectl gantline", description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    planning = commands.add_parser("plan", help="what the operator would decide for a service", allow_abbrev=False)
    plan_command.add_arguments(planning, from_cluster=True)
    explaining = commands.add_parser("explain", help="why a service is as it is, and what to do next", allow_abbrev=False)
    explaining.add_argument("service", metavar="SERVICE")
    watching = commands.add_parser("top", help="requests, tokens a second, use of the cache", allow_abbrev=False)
    watching.add_argument("services", metavar="SERVICE", nargs="*", help="only these (default: all of the namespace)")
    watching.add_argument("-A", "--all-namespaces", action="store_true", help="of every namespace")
    watching.add_argument("--interval", type=_seconds, default=2.0, metavar="SECONDS", help="time to count tokens for (default: 2)")
    telling = commands.add_parser("events", help="what happened, in order", allow_abbrev=False)
    telling.add_argument("service", metavar="SERVICE")
    for command in (explaining, watching, telling):
        command.add_argument("-n", "--namespace", help="namespace (default: the context's)")
        command.add_argument("--kubeconfig", metavar="FILE", help="another than $KUBECONFIG or ~/.kube/config")
    for command in (planning, explaining, watching, telling):
        command.add_argument("--context", metavar="NAME", help="another context than the current one")
    return whole


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.2 <= value <= 60:
        raise argparse.ArgumentTypeError("expected 0.2 to 60 seconds")
    return value


def _context_namespace(arguments: argparse.Namespace) -> str:
    """As kubectl does. Without any configuration, such as inside a pod: default."""
    try:
        contexts, current = list_kube_config_contexts(arguments.kubeconfig)
    except (ConfigException, OSError):
        return "default"
    chosen = next((context for context in contexts if context["name"] == arguments.context), current)
    return str((chosen.get("context") or {}).get("namespace") or "default")


async def _answer(arguments: argparse.Namespace, namespace: str) -> str:
    """Raises GantlineError."""
    try:
        client = await connect(arguments.kubeconfig, arguments.context)
    except Exception as error:  # the client's loader raises its own kinds, and plain OSError and YAML errors
        raise ConfigurationError(f"no cluster: {str(error)[:300]}", cure="Give --kubeconfig FILE or --context NAME.") from error
    reader = Reader(client, None if getattr(arguments, "all_namespaces", False) else namespace)
    try:
        if arguments.command == "top":
            return await top.report(reader, arguments.services, arguments.interval)
        if arguments.command == "events":
            return await timeline.report(reader, arguments.service, datetime.now(UTC))
        return await explain.report(reader, arguments.service, datetime.now(UTC))
    finally:
        await client.close()


if __name__ == "__main__":
    sys.exit(main())
