"""The engine that answers at once is one that the engine's process can run."""

from __future__ import annotations

from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_process import build_report
from gantline_runtime.messages import EngineRequest, SamplingParams

from benchmarks.http_layer import InstantEngine


def test_it_gives_each_request_its_tokens_and_fares_as_an_engine_does() -> None:
    engine = InstantEngine("", EngineConfig())
    engine.add_request(EngineRequest(request_id="a", prompt_ids=[1], sampling=SamplingParams(max_new_tokens=3)))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [output.finish_reason for output in outputs] == [None, None, "length"] and not engine.has_work()
    assert build_report(engine.stats()).num_running == 0
