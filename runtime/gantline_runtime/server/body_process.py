"""The process that reads long bodies for `body_reader.py`: JSON, and what is wrong with it.

parent -> child   (model, body) or (model, body, what takes from the model's object)       (pickled, as `helper_process.py` passes it on)
child -> parent   ("parsed", model's object), ("parsed", (the rest of it, what was taken, prefixes)) or ("refused", message, code, param)
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable

import pydantic

from gantline_runtime.prompt_prefixes import read_prefixes
from gantline_runtime.server import protocol_prompts, response_form
from gantline_runtime.server.errors import ApiError, translate_validation
from gantline_runtime.server.helper_process import answer_messages

__all__ = ["answer"]

_MODELS = (protocol_prompts, response_form)
"""Imported before the first message, as all that they import."""


def answer(message: bytes) -> bytes:
    model, data, *take = pickle.loads(message)
    try:
        parsed = model.model_validate_json(data)
        told = (*take[0](parsed), list(read_prefixes(data))) if take else parsed
    except pydantic.ValidationError as error:
        return _refuse(translate_validation(error))
    except ApiError as error:
        return _refuse(error)
    return pickle.dumps(("parsed", told), protocol=5)


def _refuse(error: ApiError) -> bytes:
    return pickle.dumps(("refused", str(error), error.code, error.param))


def _prepare() -> Callable[[bytes], bytes]:
    gc.disable()  # what a message makes has no cycles, and is gone with it
    return answer


if __name__ == "__main__":
    answer_messages(_prepare)
