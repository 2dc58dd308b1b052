"""Requests that are broken in every way get the replica's verdict, or one in the same shape; what is no request harms nobody."""

from __future__ import annotations

import os
import random
import socket
from collections import Counter

import httpx
import pytest

from tests.gateway.gateway_process import GatewayProcess
from tests.runtime.fuzzing import BODIES, GARBAGE, mutated_request
from tests.runtime.server_process import ServerProcess

COUNT = int(os.environ.get("GANTLINE_FUZZ", "2400")) // 40
OWN = {"missing_parameter", "model_not_found", "ambiguous_model", "invalid_json", "invalid_value", "body_too_large"}
"""Codes with which the gateway answers by itself."""


def test_a_mutated_request_gets_the_replicas_verdict(shared: GatewayProcess, echo: ServerProcess) -> None:
    rng, tally = random.Random(20261126), Counter[str]()
    bodies = {path: [{**body, "model": "echo"} for body in found] for path, found in BODIES.items()}
    with httpx.Client(timeout=30) as client:
        for _ in range(COUNT):
            path, body, headers = mutated_request(rng, bodies)
            if b'"timeout"' in body:
                continue  # what a deadline does depends on the machine
            through = client.post(shared.url + path, content=body, headers=headers)
            context = f"{path} {body[:2000]!r}\n{through.status_code} {through.text[:500]}"
            assert through.status_code in (200, 400, 404, 413, 415), context
            code = "" if through.status_code == 200 else through.json()["error"]["code"]
            if code not in OWN:
                direct = client.post(echo.url + path, content=body, headers=headers)
                assert through.status_code == direct.status_code, f"{context}\n{direct.status_code} {direct.text[:500]}"
            tally[str(through.status_code)] += 1
    print(f"{COUNT} mutated requests: {dict(tally.most_common())}")
    assert tally["200"] > COUNT // 20 and tally["400"] > COUNT // 4, "the walk met both sides"
    assert not [line for line in shared.logs if line["level"] == "error"] and not [line for line in shared.lines if "Traceback" in line]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_not_http_is_refused_and_the_gateway_goes_on(shared: GatewayProcess, garbage: bytes) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        answer = b""
        try:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            pass  # it was closed before we had said everything
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505"))
    assert shared.internal("/healthz").status_code == 200
