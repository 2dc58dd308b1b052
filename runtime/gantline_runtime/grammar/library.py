"""xgrammar's native classes, without what its Python package imports along.

`import xgrammar` brings transformers, and torch where it is not there yet: three seconds and half a gigabyte, for wrappers of a few lines
around these classes. The engine would stutter for as long in the midst of its streams, and each compiling process would pay it, too. So the
package's `__init__` is left out: an empty module stands for it, in which its other modules are found. The version is pinned for this.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import types
from typing import Any

__all__ = ["VOCABULARY_RAW", "load_library"]

VOCABULARY_RAW = 0
"""xgrammar.VocabType.RAW: tokens are given as the bytes that they stand for."""

_lock = threading.Lock()


def load_library() -> Any:
    """The module that holds TokenizerInfo, GrammarCompiler, CompiledGrammar, GrammarMatcher and BatchGrammarMatcher."""
    with _lock:
        package = sys.modules.get("xgrammar")
        if package is None:
            spec = importlib.util.find_spec("xgrammar")
            assert spec is not None and spec.submodule_search_locations is not None, "xgrammar is a requirement of the runtime"
            os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")  # it would be compiled, for a faster way to pass tensors
            package = types.ModuleType("xgrammar")
            package.__path__ = list(spec.submodule_search_locations)
            package.__spec__ = spec
            sys.modules["xgrammar"] = package
        importlib.import_module("xgrammar.load_binding")
        return importlib.import_module("xgrammar.base")._core
