"""Compiles grammars in a process of its own: they come from clients, and no time or memory limit holds inside a process.

    parent -> child   {"model_dir", "vocab_size", "stop_token_ids"}, then {"grammar", "limit_s"} any number of times
    child -> parent   {"tokenizer"}, then {"compiled"} or {"error"} for each       (4 bytes of length, then MessagePack)

What goes back is xgrammar's own serialization. The child may take `MEMORY_BYTES` beyond what it has once its tokenizer is loaded. A grammar
that takes more than `limit_s` seconds of processor time (a busy machine is no client's fault) ends it by SIGXCPU. It dies with its parent.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

import msgspec
import numpy as np

from gantline_runtime.errors import CheckpointError
from gantline_runtime.grammar.library import VOCABULARY_RAW, load_library
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["main", "read_message", "write_message"]

MEMORY_BYTES = 1 << 30
_PR_SET_PDEATHSIG = 1
_MAX_THREADS = 4
_TRIED_TOKENS = 32
_TRIALS = (0.0, 0.38, 1.0)
"""Which of the allowed tokens is taken each time: the first, one in between, the last."""
_TRIAL_S = 0.5
"""Of processor time, for all of them: thousands of times what grammars usually take."""
_PLACE = re.compile(r"^(\[[^\]]*\] |\S+\.(?:cc|h):\d+: )*")
_MAX_DEPTH = 1000
"""Of rules within rules while a grammar is parsed: more than any schema needs, less than a thread's stack holds."""


def write_message(stream: IO[bytes], message: dict[str, Any]) -> None:
    data = msgspec.msgpack.encode(message)
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()


def read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None at the end of the stream (also in the midst of a message: the other side died)."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "little")
    data = stream.read(size)
    message: dict[str, Any] | None = msgspec.msgpack.decode(data) if len(data) == size else None
    return message


def main() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers, requests = _own_stdout(), sys.stdin.buffer
    setup = read_message(requests)
    if setup is None:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # not to be imported: half a gigabyte that is of no use here
    library = load_library()
    try:
        tokenizer = _tokenizer_info(library, **setup)
    except CheckpointError as error:
        write_message(answers, {"error": str(error)})
        return
    compiler = library.GrammarCompiler(tokenizer, _MAX_THREADS, False, -1)  # without a cache of its own
    library.config.set_max_recursion_depth(_MAX_DEPTH)
    write_message(answers, {"tokenizer": str(tokenizer.serialize_json())})
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while (request := read_message(requests)) is not None:
        _limit_time(request["limit_s"])
        try:
            compiled = compiler.compile_structural_tag(request["grammar"])
            _try_out(library, compiled, setup["stop_token_ids"], setup["vocab_size"])
            answer = {"compiled": str(compiled.serialize_json())}
        except MemoryError:
            answer = {"error": "it takes more memory than is allowed"}
        except Exception as error:  # whatever the library finds wrong with what a client wrote
            answer = {"error": describe(error)}
        write_message(answers, answer)


def _own_stdout() -> IO[bytes]:
    """The pipe to the parent, moved away from file descriptor 1: what the library prints belongs into the log."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(pipe, "wb")


def _tokenizer_info(library: Any, model_dir: str, vocab_size: int, stop_token_ids: Sequence[int]) -> Any:
    """Special tokens begin with a byte that no text has, so that no grammar allows them but by their number. So do those that hold whole
    characters and a part of one: xgrammar 0.2.8 has some in a mask that it refuses afterwards, and whatever they write, others can."""
    tokenizer = Tokenizer.load(model_dir)
    known = min(vocab_size, tokenizer.vocab_size)
    texts = [_spelled(tokenizer, token) for token in range(known)]
    return library.TokenizerInfo(texts, VOCABULARY_RAW, vocab_size, list(stop_token_ids), False)  # no space is put before a text


def _spelled(tokenizer: Tokenizer, token: int) -> bytes:
    spelled = tokenizer.token_bytes(token)
    return b"\xff" + spelled if token in tokenizer.special_ids or _mixes(spelled) else spelled


def _mixes(spelled: bytes) -> bool:
    """Whether it begins or ends within a character, and is more than a part of that one."""
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return spelled[0] < 0x80 or len(spelled) > 3 or not all(0x80 <= byte < 0xC0 for byte in spelled[1:])
    return False


def _try_out(library: Any, compiled: Any, stop_token_ids: Sequence[int], vocab_size: int) -> None:
    """Follow a grammar along some tokens. Raises ValueError where that takes so long that it would hold up the engine, and where there is
    none to begin with: a rule that needs itself, which the library takes for an empty text, is no grammar that anyone wants."""
    bits = np.empty((1, -(-vocab_size // 32)), dtype=np.int32)
    began = time.thread_time()
    for share in _TRIALS:
        matcher = library.GrammarMatcher(compiled, list(stop_token_ids) or None, not stop_token_ids, -1, None)
        for num_taken in range(_TRIED_TOKENS):
            matcher.fill_next_token_bitmask(bits, 0, False)
            flags = np.unpackbits(bits.view(np.uint8)[0], bitorder="little")[:vocab_size]
            flags[list(stop_token_ids)] = 0
            allowed = np.flatnonzero(flags)
            if not len(allowed) and not num_taken:
                raise ValueError("no text but the empty one matches it")
            if not len(allowed) or not matcher.accept_token(int(allowed[int(share * (len(allowed) - 1))]), False):
                break
            if time.thread_time() - began > _TRIAL_S:
                raise ValueError("following it takes too long; use a simpler one")


def _limit_time(seconds: float) -> None:
    """Let the kernel end this process when it has computed for `seconds` more."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def describe(error: Exception) -> str:
    """The library's message without its place in the library's own source."""
    text = " ".join(str(error).split())
    return _PLACE.sub("", text).rstrip(". ")[:500] or type(error).__name__


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
