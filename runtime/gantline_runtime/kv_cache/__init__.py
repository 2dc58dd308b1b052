"""The paged key-value cache: which blocks exist, who holds them, and which prompts' beginnings they remember.

`BlockPool` counts references and evicts, `PrefixCache` knows contents, `CacheManager` is what the scheduler talks to.
None of them touches a tensor: blocks are numbers, and the model runner owns the memory they name.
"""

from gantline_runtime.kv_cache.block_pool import BlockPool
from gantline_runtime.kv_cache.manager import CacheManager
from gantline_runtime.kv_cache.prefix_cache import PrefixCache

__all__ = ["BlockPool", "CacheManager", "PrefixCache"]
