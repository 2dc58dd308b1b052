"""The smoke request: what a server asks itself before it says that it is ready.

Two short requests go all the way through the engine. One is what clients ask most, so that the first of them does not pay for what is
made at first use; the other wants its token's log-probability, which is no number where weights are damaged or were quantized wrongly
though every file is well formed. A server whose smoke request fails ends with `SmokeRequestFailed` and is never ready: under the
operator its revision is rolled back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gantline_runtime.engine_client import EngineClient, RequestFailed
from gantline_runtime.errors import GantlineError
from gantline_runtime.messages import EngineRequest, SamplingParams, TokenOutput
from gantline_runtime.termination import Reason

__all__ = ["ask", "judge", "judged_request"]

_CURE = "Copy or quantize the model again; if it answers elsewhere, report this with the server's log."


async def ask(engine: EngineClient, prompt_ids: list[int]) -> None:
    """Raises GantlineError (SmokeRequestFailed) for an answer that no client should get, EngineUnavailable if the engine is gone."""
    outputs = list[TokenOutput]()
    try:
        for request in _requests(prompt_ids):  # one by one: where each step raises, two in a step would look like an engine that is lost
            group, ended = engine.open_group(), False
            group.submit(request)
            while not ended:
                outputs += await group.next()
                ended = outputs[-1].finish_reason is not None
    except RequestFailed as error:
        raise _failed(f"the engine refused it: {error}") from error
    judge(outputs)


def judge(outputs: Iterable[TokenOutput]) -> None:
    """Raises GantlineError (SmokeRequestFailed) where something is wrong with the answers to the smoke requests."""
    answers = list(outputs)
    if not all(answer.token_ids for answer in answers):
        raise _failed(next((answer.error for answer in answers if answer.error), "no token came back"))
    logprobs = [entry.chosen for answer in answers for entry in answer.logprobs or ()]
    # A log-probability is at most 0; NaN fails every comparison.
    if not logprobs or not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):
        raise _failed(f"the log-probability of its token is no such number: {logprobs or 'none'}")


def judged_request(prompt_ids: list[int]) -> EngineRequest:
    """One token, with its log-probability."""
    sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True, num_logprobs=0)
    return EngineRequest(request_id="smoke", prompt_ids=prompt_ids, sampling=sampling)


def _requests(prompt_ids: list[int]) -> list[EngineRequest]:
    usual = SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True)
    return [EngineRequest(request_id="warm-up", prompt_ids=prompt_ids, sampling=usual), judged_request(prompt_ids)]


def _failed(problem: str) -> GantlineError:
    return GantlineError(f"the smoke request failed: {problem}", reason=Reason.SMOKE_REQUEST_FAILED, cure=_CURE)
