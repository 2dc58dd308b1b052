"""Triton's interpreter, made to work with numpy of today and to do the same thing once: for a process with TRITON_INTERPRET=1.

Most of what the interpreter (Triton 3.6) takes for a small kernel is not arithmetic: it patches the whole language at each launch and at
each call of a function by a kernel, and works out the same types of the same shapes for each value anew. Here the language stays patched
once it is, and types are made once. What a kernel computes, and by which of the interpreter's operations, is as before.
"""

from __future__ import annotations

import builtins
import math
from types import ModuleType
from typing import Any

from triton import language
from triton.language import core
from triton.runtime import interpreter


def prepare() -> None:
    """Once for a process, before its first launch."""
    _let_scalars_count()
    _patch_the_language_once()
    _know_types_of_numpy()
    _make_block_types_once()
    _make_shapes_once()


def _let_scalars_count() -> None:
    """The interpreter holds scalars as arrays of one element, which numpy 2.4 no longer takes for integers."""
    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: object, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_count


def _patch_the_language_once() -> None:
    patch, patched = interpreter._patch_lang, set[ModuleType]()
    nothing_to_restore = interpreter._LangPatchScope()

    def patch_once(function: Any) -> Any:
        seen = {value for value in function.__globals__.values() if value is language or value is core}
        if not seen <= patched:
            patch(function)  # and let nobody restore it
            patched.update(seen)
        return nothing_to_restore

    interpreter._patch_lang = patch_once


def _know_types_of_numpy() -> None:
    find, found = interpreter._get_np_dtype, dict[str, Any]()

    def find_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    interpreter._get_np_dtype = find_once


def _make_block_types_once() -> None:
    make, made = core.block_type.__init__, dict[Any, dict[str, Any]]()

    def make_once(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not core.dtype:  # a pointer's name does not tell everything
            make(self, element_ty, shape)
            return
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in made:
            make(self, element_ty, shape)
            made[key] = self.__dict__.copy()
        self.__dict__.update(made[key])

    core.block_type.__init__ = make_once


def _make_shapes_once() -> None:
    """Of tensors: a tuple of constants, and their product."""
    made = dict[Any, builtins.tuple[Any, Any]]()

    def make(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = builtins.tuple(type.shape) if type.is_block() else ()
        if sizes not in made:
            made[sizes] = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))
        self.shape, self.numel = made[sizes]

    core.tensor.__init__ = make
