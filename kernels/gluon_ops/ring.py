"""Device functions that sum int8 or fp8 products over K for one output tile: tensor copies into a ring of stages, sums in flight.

Triton's own loop waits for int32 sums in every step (WGMMAPipeline.cpp, rule 2.1, Triton 3.6 to 3.9: only fp32 sums may stay in
flight), and Triton decides where an epilogue's operands and results lie; here both are said.

A tile's columns are BLOCK_N and, beyond them, REST_N (0: none), each with sums of its own. weights, rests: tensor descriptors,
one or three, of which `which` chooses. GATED: the first half of either columns are values, and the second half their gates,
N rows of the weight later.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .copies import copy_in


@gluon.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """As of triton_ops/accumulate.py."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = gl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@gluon.jit
def _copy_columns(weight, into, n, N, k, ready, wanted, COLUMNS: gl.constexpr, GATED: gl.constexpr):
    if GATED:
        copy_in(weight, [n, k], ready, into.slice(0, COLUMNS // 2), wanted)
        copy_in(weight, [N + n, k], ready, into.slice(COLUMNS // 2, COLUMNS // 2), wanted)
    else:
        copy_in(weight, [n, k], ready, into, wanted)


@gluon.jit
def _copy_step(
    step, steps, ring, codes, weights, rests, which, m, n, N,
    GATED: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Start the copies of a step, if it is one."""
    codes_s, weight_s, rest_s, ready = ring
    slot = step % STAGES
    wanted = step < steps
    k = step * BLOCK_K
    barrier = ready.index(slot)
    mbarrier.expect(barrier, codes.block_type.nbytes + (BLOCK_N + REST_N) * BLOCK_K, wanted)
    copy_in(codes, [m, k], barrier, codes_s.index(slot), wanted)
    FIRST_REST: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    for number in gl.static_range(len(weights)):
        its = wanted & (which == number)
        _copy_columns(weights[number], weight_s.index(slot), n, N, k, barrier, its, BLOCK_N, GATED)
        if REST_N:
            _copy_columns(rests[number], rest_s.index(slot), n + FIRST_REST, N, k, barrier, its, REST_N, GATED)


@gluon.jit
def start(
    K, codes, weights, rests, which, m, n, N,
    GATED: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The ring, with copies of all but its last stage under way."""
    dtype: gl.constexpr = codes.dtype
    codes_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], codes.layout)
    weight_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], weights[0].layout)
    rest_s = weight_s
    if REST_N:
        rest_s = gl.allocate_shared_memory(dtype, [STAGES, REST_N, BLOCK_K], rests[0].layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    ring = (codes_s, weight_s, rest_s, ready)
    for step in gl.static_range(STAGES - 1):
        _copy_step(step, gl.cdiv(K, BLOCK_K), ring, codes, weights, rests, which, m, n, N, GATED, STAGES, BLOCK_N, REST_N, BLOCK_K)
    return ring


@gluon.jit
def sums(
    ring, K, codes, weights, rests, which, m, n, N, layout: gl.constexpr, rest_layout: gl.constexpr, ACC: gl.constexpr,
    GATED: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) and (BLOCK_M, REST_N) ACC; the second are meaningless without a rest."""
    codes_s, weight_s, rest_s, ready = ring
    steps = gl.cdiv(K, BLOCK_K)
    acc = gl.full([BLOCK_M, BLOCK_N], 0, ACC, layout=layout)
    rest = gl.full([BLOCK_M, REST_N if REST_N else 8], 0, ACC, layout=rest_layout)
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        acc = warpgroup_mma(codes_s.index(slot), weight_s.index(slot).permute((1, 0)), acc, is_async=True)
        # This step's products stay in flight; the one's before are done, and its stage can be filled again.
        if REST_N:
            rest = warpgroup_mma(codes_s.index(slot), rest_s.index(slot).permute((1, 0)), rest, is_async=True)
            acc, rest = warpgroup_mma_wait(2, deps=(acc, rest))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        _copy_step(
            step + STAGES - 1, steps, ring, codes, weights, rests, which, m, n, N, GATED, STAGES, BLOCK_N, REST_N, BLOCK_K
        )  # fmt: skip
    if REST_N:
        acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    return acc, rest
