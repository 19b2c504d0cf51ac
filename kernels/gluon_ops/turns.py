"""Device functions of a ring of stages that a warp of its own fills, for two groups of warps that take turns at making tiles.

A ring is (stages of codes, of weights, `filled`, `free`, `turn`): the barriers say of each stage that it was copied, and that its
products are done; and of each group that the other has started all products of the tile before. A barrier knows only whether its last
round was even or odd: a group that did not wait for its turn would take the other's stages for its own.
The k-th step of a program's j-th tile is in stage (j * steps + k) % STAGES.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..triton_ops.accumulate import tile_position
from .copies import copy_in


@gluon.jit
def new_ring(codes, weight, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr):
    """An empty ring."""
    codes_s = gl.allocate_shared_memory(codes.dtype, [STAGES, BLOCK_M, BLOCK_K], codes.layout)
    weight_s = gl.allocate_shared_memory(codes.dtype, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turn.index(group), count=1)
    fence_async_shared()
    return codes_s, weight_s, filled, free, turn


@gluon.jit
def _next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    return gl.where(stage < STAGES, stage, 0), gl.where(stage < STAGES, phase, phase ^ 1)


@gluon.jit
def copy_tiles(
    codes, weight, ring, M, N, K, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """All copies of a program, each as soon as its stage is free. Half of a tile's columns are values; their gates are N rows later."""
    codes_s, weight_s, filled, free, _ = ring
    HALF: gl.constexpr = BLOCK_N // 2
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, HALF)
    stage = 0
    phase = 1  # of `free`: as if the products of a round before the first were done
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        m = tile_m * BLOCK_M
        n = tile_n * HALF
        for step in range(gl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            mbarrier.wait(free.index(stage), phase)
            barrier = filled.index(stage)
            mbarrier.expect(barrier, codes.block_type.nbytes + 2 * weight.block_type.nbytes)
            copy_in(codes, [m, k], barrier, codes_s.index(stage))
            copy_in(weight, [n, k], barrier, weight_s.index(stage).slice(0, HALF))
            copy_in(weight, [N + n, k], barrier, weight_s.index(stage).slice(HALF, HALF))
            stage, phase = _next_stage(stage, phase, STAGES)


@gluon.jit
def start_products(
    ring, who: gl.constexpr, turns, steps, layout: gl.constexpr, ACC: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) ACC, the last step's products still in flight, and that step's stage.

    Args: who: the group, 0 or 1. turns: how many it has had.
    """
    codes_s, weight_s, filled, free, turn = ring
    acc = gl.full([BLOCK_M, BLOCK_N], 0, ACC, layout=layout)
    first_step = (2 * turns + who) * steps
    stage = first_step % STAGES
    phase = (first_step // STAGES) & 1
    # Not `= stage`: a name bound to the same object once more in the loop is taken for unchanged.
    before = first_step % STAGES
    mbarrier.wait(turn.index(who), (turns & 1) ^ (1 - who))  # the first group's first is as if the second had finished
    for step in range(steps):
        mbarrier.wait(filled.index(stage), phase)
        acc = warpgroup_mma(codes_s.index(stage), weight_s.index(stage).permute((1, 0)), acc, is_async=True)
        # This step's products stay in flight; the one's before are done, and its stage can be filled again.
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(free.index(before), pred=step > 0)
        before = stage
        stage, phase = _next_stage(stage, phase, STAGES)
    mbarrier.arrive(turn.index(1 - who))
    return acc, before


@gluon.jit
def finish_products(acc, ring, stage):
    """The sums. Of what start_products returned."""
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring[3].index(stage))
    return acc
