"""Groups of decoding sequences whose contexts begin with the same blocks, as `paged_attention` takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SharedPrefixes"]


@dataclass(frozen=True)
class SharedPrefixes:
    """Says of the first `num_decodes` sequences of a batch (N of them) who shares what, so that it is read once for all who do.

    A group is sequences whose block tables begin with the same blocks, or with blocks of the same content. What they share is full blocks,
    and less than any member's context. Any number of groups is given, up to G: those that are left are empty.
    """

    lens: torch.Tensor
    """int32 [N]: tokens that a sequence shares with its group, a multiple of the block size; 0: it is in none."""
    members: torch.Tensor
    """int32 [N]: sequence numbers, group by group; entries past the last group's may be anything."""
    starts: torch.Tensor
    """int32 [G + 1]: group g is members[starts[g]] to members[starts[g + 1]], the latter not included; starts[0] is 0."""
    max_own_len: int
    """Bound on what any of the N sequences has beyond its shared part: its whole context if it is in no group."""

    @property
    def num_groups(self) -> int:
        """G, empty groups included: a host integer, as everything that shapes a launch."""
        return len(self.starts) - 1
