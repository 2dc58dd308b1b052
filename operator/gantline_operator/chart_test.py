"""`helm test`: create a small service on a CPU, wait until it is Ready, ask it one question, delete it.

Runs in a pod with the operator's image and rights of its own: to create an InferenceService, and to get and delete the one it made.
The service is deleted however this ends, also at SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from kubernetes.aio.config import ConfigException

from gantline_operator.client import ApiError, Client, Conflict, NotFound, Object, Resource, Unavailable, connect
from gantline_operator.resource import GROUP, KIND, PLURAL, VERSION

__all__ = ["TestFailed", "build_service", "main", "run_test"]

_SERVICES = Resource(f"{GROUP}/{VERSION}", KIND, PLURAL)
_PAUSE_S = 0.5
_DELETION_S = 30.0
_ANSWER_S = 60.0
_MAX_ANSWER_BYTES = 1 << 20


class TestFailed(Exception):
    """The service was refused, did not become Ready, or did not answer; the message says which."""

    __test__ = False


def build_service(name: str, namespace: str, model_uri: str) -> Object:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"uri": model_uri},
            "engine": {"sessionLen": 256, "maxBatchSize": 1},
            "accelerator": {"resource": "cpu"},
            "rollout": {"drainTimeout": "5s"},
        },
    }


async def run_test(client: Client, service: Object, timeout_s: float) -> str:
    """The text that the service answered. Raises TestFailed or ApiError; the service is gone in any case."""
    deadline = time.monotonic() + timeout_s
    await _delete(client, service)  # what an earlier run may have left
    try:
        await client.create(_SERVICES, service["metadata"]["namespace"], service)
        print(f"created {_name(service)}", flush=True)
        url = await _wait_until_ready(client, service, deadline)
        return await asyncio.to_thread(_ask, url, service["metadata"]["name"])
    finally:
        with contextlib.suppress(ApiError):
            await asyncio.shield(_delete(client, service))
            print(f"deleted {_name(service)}", flush=True)


async def _wait_until_ready(client: Client, service: Object, deadline: float) -> str:
    """The service's address. Prints what it waits for, once each time that changes."""
    shown = ""
    while time.monotonic() < deadline:
        status = await _status(client, service)
        ready: Object = next((c for c in status.get("conditions") or [] if c["type"] == "Ready"), {})
        if ready.get("status") == "True" and status.get("url"):
            return str(status["url"])
        waiting = f"{ready.get('reason', 'Pending')}: {ready.get('message', 'the operator has not answered yet')}"
        if waiting != shown:
            print(waiting, flush=True)
        shown = waiting
        await asyncio.sleep(_PAUSE_S)
    raise TestFailed(f"{_name(service)} was not Ready in time; last: {shown or 'nothing'}")


async def _status(client: Client, service: Object) -> Object:
    with contextlib.suppress(Unavailable):
        live = await client.get(_SERVICES, service["metadata"]["namespace"], service["metadata"]["name"])
        status: Object = live.get("status") or {}
        return status
    return {}


async def _delete(client: Client, service: Object) -> None:
    """Deletes the service and waits until it is gone."""
    namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
    for _ in range(int(_DELETION_S / _PAUSE_S)):
        try:
            live = await client.get(_SERVICES, namespace, name)
            await client.delete(_SERVICES, namespace, name, uid=live["metadata"]["uid"])
        except NotFound:
            return
        except Conflict:
            continue  # replaced between the two requests
        await asyncio.sleep(_PAUSE_S)


def _ask(url: str, model: str) -> str:
    """The answer to one chat request. A service that has just become Ready may not be known to every node's proxy: tried for a while."""
    body = {"model": model, "messages": [{"role": "user", "content": "What does os.path.join do?"}], "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_S) as response:
                return _text(response.read(_MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            raise TestFailed(f"{request.full_url} answered {error.code}: {error.read(500).decode(errors='replace')}") from None
        except OSError as error:
            if time.monotonic() + _PAUSE_S > deadline:
                raise TestFailed(f"{request.full_url} does not answer: {error}") from None
            time.sleep(_PAUSE_S)


def _text(body: bytes) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise TestFailed(f"the answer is no chat completion: {body[:200].decode(errors='replace')}") from None
    if not isinstance(text, str) or not text.strip():
        raise TestFailed("the answer has no text")
    return text


def _name(service: Object) -> str:
    return f"{KIND} {service['metadata']['namespace']}/{service['metadata']['name']}"


async def _run(kubeconfig: str | None, service: Object, timeout_s: float) -> str:
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    client = await connect(kubeconfig)
    try:
        return await run_test(client, service, timeout_s)
    finally:
        await client.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gantline_operator.chart_test", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the service to create")
    parser.add_argument("--namespace", required=True, help="namespace to create it in")
    parser.add_argument("--model-uri", required=True, help="small model to serve, such as file:///opt/gantline/tiny-model")
    parser.add_argument("--timeout-seconds", type=float, default=300.0, help="give up after so many seconds (default: 300)")
    parser.add_argument("--kubeconfig", help="how to reach the cluster (default: the pod's own account, else kubectl's configuration)")
    options = parser.parse_args(arguments)
    service = build_service(options.name, options.namespace, options.model_uri)
    try:
        text = asyncio.run(_run(options.kubeconfig, service, options.timeout_seconds))
    except (TestFailed, ApiError, ConfigException) as error:
        print(f"gantline: the test failed: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("gantline: the test was ended before it was done", file=sys.stderr)
        return 1
    print(f"answered: {text!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
