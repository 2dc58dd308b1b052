# mypy: disable-error-code="no-untyped-def"
"""GPUs that are not there: an engine's steps run on them up to every launch of a Triton kernel, which is noted instead.

Tensors of the device `cuda:i` are torch's fake ones: shapes, strides and types without memory. Each has the address that it would have in
the memory of a real GPU as far as Triton looks at it, which is whether 16 divides it: torch's allocator begins tensors at multiples of 512
bytes, and a part of one begins where its offset says. What the host asks of a GPU is answered from a table, each device being a chip of
another kind. So what is noted are the very kernels that a process on such a GPU would compile.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import JITFunction

__all__ = ["CHIPS", "AbsentGpus", "Chip", "NotedLaunch", "absent_gpus"]

_ALIGNMENT = 512
"""Where torch's allocator begins tensors, in bytes."""


@dataclass(frozen=True)
class Chip:
    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def target(self) -> int:
        """As Triton numbers architectures: 90 for 9.0."""
        return 10 * self.capability[0] + self.capability[1]

    @property
    def index(self) -> int:
        """Of its device."""
        return CHIPS.index(self)


CHIPS = (
    Chip("A100", (8, 0), 108),
    Chip("A10", (8, 6), 72),
    Chip("L4", (8, 9), 58),
    Chip("L40", (8, 9), 142),
    Chip("H100", (9, 0), 132),
    Chip("H20", (9, 0), 78),
    Chip("B200", (10, 0), 148),
    Chip("RTX PRO 6000", (12, 0), 188),
)
"""Kinds of GPU by what decides about kernels: architecture and number of multiprocessors. Others of an architecture lie between (the H200
is an H100 here). Eight at most: torch's fake tensors know no more devices."""


@dataclass(frozen=True)
class NotedLaunch:
    """A kernel that would have been compiled, as Triton's `compile` takes it."""

    source: Any
    target: GPUTarget
    options: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.source.name
        return name

    @cached_property
    def key(self) -> str:
        """By which Triton keeps it: launches with the same one share a compiled kernel."""
        backend = triton.compiler.make_backend(self.target)
        text = get_cache_key(self.source, backend, backend.parse_options(dict(self.options)), env_vars={})
        return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")

    def compile(self) -> Any:
        """The compiled kernel, from the cache where it is in it."""
        return triton.compiler.compile(self.source, target=self.target, options=self.options, _env_vars={})


@dataclass
class AbsentGpus:
    """Stands for Triton's driver too: what that asks of a GPU."""

    current: Chip = CHIPS[0]
    launches: list[NotedLaunch] = field(default_factory=list)
    functions: set[Any] = field(default_factory=set)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.current.target, 32)

    def get_current_device(self) -> int:
        return self.current.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def chip(self, device: Any = None) -> Chip:
        """Of a device as torch's functions name it: a number, a torch.device, or None for the current one."""
        index = getattr(device, "index", device)
        return self.current if index is None else CHIPS[index]

    def note(self, function: Any, key, signature, device, constexprs, options, attrs, warmup) -> object:
        """In place of JITFunction._do_compile, which compiles what a launch needs and keeps it for further ones."""
        kernels, _, target, _, _ = function.device_caches[device]
        self.launches.append(NotedLaunch(ASTSource(function, signature, constexprs, attrs), target, dict(options.__dict__)))
        self.functions.add(function)
        kernels[key] = object()
        return kernels[key]

    def forget(self) -> None:
        """Have Triton take none of this for kernels that it has compiled."""
        for function in self.functions:
            function.device_caches.clear()


@contextmanager
def absent_gpus(*, compiles: bool = False) -> Iterator[AbsentGpus]:
    """Within it, each device `cuda:i` is a GPU of the kind `CHIPS[i]`. Set `current` of what it gives to the one that launches, and find
    what is launched in `launches`, the same only once. `compiles`: instead of being noted, kernels are compiled, or loaded from a cache,
    as for a GPU that is there.

    For a process that has nothing else to do: GPUs that are there cannot be used meanwhile, nor afterwards by what ran here.
    """
    gpus = AbsentGpus()
    run = JITFunction.run
    answers = {
        "is_available": lambda: False,  # or fake tensors would ask the real ones for memory
        "get_device_capability": lambda device=None: gpus.chip(device).capability,
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=gpus.chip(device).multiprocessors),
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": lambda: False,
        "Event": lambda: SimpleNamespace(record=lambda: None),
    }
    with ExitStack() as stack:
        stack.callback(gpus.forget)
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)))
        stack.enter_context(patch.object(FakeTensor, "data_ptr", _address, create=True))
        if not compiles:
            stack.enter_context(patch.object(JITFunction, "_do_compile", lambda function, *args: gpus.note(function, *args)))
        stack.enter_context(patch.object(JITFunction, "run", lambda function, *args, **kw: run(function, *args, **(kw | {"warmup": True}))))
        stack.enter_context(patch.object(triton.runtime.driver, "_active", gpus))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield gpus


def _address(tensor: torch.Tensor) -> int:
    return _ALIGNMENT + tensor.storage_offset() * tensor.element_size()
