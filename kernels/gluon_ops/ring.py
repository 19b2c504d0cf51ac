"""Device functions that sum int8 or fp8 products over K for one output tile: tensor copies into a ring of stages, sums in flight.

Triton's own loop waits for int32 sums in every step (WGMMAPipeline.cpp, rule 2.1, Triton 3.6 to 3.9: only fp32 sums may stay in
flight), and Triton decides where an epilogue's operands and results lie; here both are said.

A tile's columns are BLOCK_N and, beyond them, REST_N (0: none), each with sums of its own. weights, rests: tensor descriptors,
one to three, of which `which` chooses.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .copies import copy_in


@gluon.jit
def _copy_step(
    step, steps, ring, codes, weights, rests, which, m, n,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Start the copies of a step, if it is one."""
    codes_s, weight_s, rest_s, ready = ring
    slot = step % STAGES
    wanted = step < steps
    k = step * BLOCK_K
    barrier = ready.index(slot)
    mbarrier.expect(barrier, codes.block_type.nbytes + (BLOCK_N + REST_N) * BLOCK_K, wanted)
    copy_in(codes, [m, k], barrier, codes_s.index(slot), wanted)
    for number in gl.static_range(len(weights)):
        its = wanted & (which == number)
        copy_in(weights[number], [n, k], barrier, weight_s.index(slot), its)
        if REST_N:
            copy_in(rests[number], [n + BLOCK_N, k], barrier, rest_s.index(slot), its)


@gluon.jit
def start(
    K, codes, weights, rests, which, m, n,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
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
        _copy_step(step, gl.cdiv(K, BLOCK_K), ring, codes, weights, rests, which, m, n, STAGES, BLOCK_N, REST_N, BLOCK_K)
    return ring


@gluon.jit
def finished(acc, rest, ready, REST_N: gl.constexpr, STAGES: gl.constexpr):
    """acc and rest once no products are in flight; the ring's barriers are of no use after that."""
    if REST_N:
        acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    return acc, rest


@gluon.jit
def sums(
    ring, K, codes, weights, rests, which, m, n, layout: gl.constexpr, rest_layout: gl.constexpr, ACC: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
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
            step + STAGES - 1, steps, ring, codes, weights, rests, which, m, n, STAGES, BLOCK_N, REST_N, BLOCK_K
        )  # fmt: skip
    return finished(acc, rest, ready, REST_N, STAGES)
