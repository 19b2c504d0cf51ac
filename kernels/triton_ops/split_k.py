"""Split-K: several programs share one output tile; the last to arrive adds the partial sums in order and finishes the tile.

The result does not depend on who is last: integer sums are exact, and float ones are always added in the order of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def is_last_to_arrive(
    acc, partial_ptr, counter_ptr, tile, tiles, split,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Leave this program's sums in the workspace; True if all others of the tile have done so before.

    The last one sets the counter to 0 again, for the next launch.
    """
    tl.store(_partial(partial_ptr, tile, tiles, split, 0, BLOCK_M, BLOCK_N, BLOCK_N), acc)
    tl.debug_barrier()  # all threads have written before one of them says so
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == SPLIT_K - 1
    if is_last:
        tl.store(counter_ptr + tile, 0)
    tl.debug_barrier()  # none of them reads before the last one has been told
    return is_last


@triton.jit
def total(
    partial_ptr, tile, tiles, first_n,
    ACC: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum of all partial sums of WIDTH columns of the tile, in order: (BLOCK_M, WIDTH) ACC."""
    acc = tl.zeros((BLOCK_M, WIDTH), ACC)
    for split in tl.static_range(SPLIT_K):
        # .cg reads the L2, where the other programs' sums are.
        acc += tl.load(_partial(partial_ptr, tile, tiles, split, first_n, BLOCK_M, BLOCK_N, WIDTH), cache_modifier=".cg")
    return acc


@triton.jit
def _partial(partial_ptr, tile, tiles, split, first_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    corner = (split * tiles + tile).to(tl.int64) * (BLOCK_M * BLOCK_N) + first_n
    return partial_ptr + corner + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, WIDTH)[None, :]


# (device, stream) -> partial sums and counters. CAPTURED stands for every stream that is being captured.
_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
CAPTURED = -1
# Workspaces that were too small for a later call: a graph may hold their addresses.
_outgrown: list[tuple[Tensor, Tensor]] = []


def workspace(device: torch.device, programs: int, tiles: int, tile_elements: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for `programs` tiles of partial sums, and `tiles` counters that are 0 between launches.

    Kept per stream, since launches of one stream do not overlap, and once for all graphs of a device, which must be
    replayed one after the other. Every launch leaves its counters at 0, so no call has to clear them. What graphs use is
    made by the first call outside them, their warm-up; without one it is made in the graph and cleared at each replay.
    Returns: (programs * tile_elements,) dtype; (tiles,) int32.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device.type != "cuda" or (capturing and not _fits((device, CAPTURED), programs * tile_elements, tiles)):
        return _allocate(device, programs * tile_elements, tiles, dtype)
    own = CAPTURED if capturing else torch.cuda.current_stream(device).cuda_stream
    for key in ((device, CAPTURED), (device, own)):
        if not _fits(key, programs * tile_elements, tiles):
            if key in _workspaces:
                _outgrown.append(_workspaces[key])
            _workspaces[key] = _allocate(device, programs * tile_elements, tiles, torch.int32)
    partial, counters = _workspaces[(device, own)]
    return partial.view(dtype), counters


def _allocate(device: torch.device, elements: int, tiles: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(elements, dtype=dtype, device=device), torch.zeros(tiles, dtype=torch.int32, device=device)


def _fits(key: tuple[torch.device, int], elements: int, tiles: int) -> bool:
    kept = _workspaces.get(key)
    return kept is not None and kept[0].numel() >= elements and kept[1].numel() >= tiles
