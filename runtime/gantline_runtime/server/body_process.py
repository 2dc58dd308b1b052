"""The process that reads long bodies for `body_reader.py`: JSON, and what is wrong with it.

parent -> child   (model, body, whether prefixes are wanted)                               (pickled, as `helper_process.py` passes it on)
child -> parent   ("parsed", model's object, prefixes) or ("refused", message, code, param)
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable

import pydantic

from gantline_runtime.prompt_prefixes import read_prefixes
from gantline_runtime.server import protocol_prompts, protocol_responses
from gantline_runtime.server.errors import translate_validation
from gantline_runtime.server.helper_process import answer_messages

__all__ = ["answer"]

_MODELS = (protocol_prompts, protocol_responses)
"""Imported before the first message, as all that they import."""


def answer(message: bytes) -> bytes:
    model, data, with_prefixes = pickle.loads(message)
    try:
        parsed = model.model_validate_json(data)
    except pydantic.ValidationError as error:
        refusal = translate_validation(error)
        return pickle.dumps(("refused", str(refusal), refusal.code, refusal.param))
    return pickle.dumps(("parsed", parsed, list(read_prefixes(data)) if with_prefixes else []), protocol=5)


def _prepare() -> Callable[[bytes], bytes]:
    gc.disable()  # what a message makes has no cycles, and is gone with it
    return answer


if __name__ == "__main__":
    answer_messages(_prepare)
