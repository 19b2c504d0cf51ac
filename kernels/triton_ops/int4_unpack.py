"""Device functions that unpack nibbles to int8 codes in registers. Format: ../int4_weight.py.

Nibbles u hold code + 8, so code * s = u * s - 8 s. Four of them lie in one register: with c = 128 - 8 s in each byte, the
bytes of u * s + c stay within 0 and 255 for every |s| <= 15, so one 32-bit multiply-add serves all four without a carry,
and flipping each byte's top bit subtracts the 128 again. That is 3 instructions for four weights, 4 for the high nibbles.
"""

import triton
import triton.language as tl

# 0x80 - 8 s in every byte is one 32-bit difference: in the sum with u * s no byte borrows from the next.
_CODES = "mad.lo.s32 c, s, -134744072, -2139062144; and.b32 t, t, 0x0F0F0F0F; mad.lo.s32 t, t, s, c; xor.b32 $0, t, 0x80808080;}"
LOW_ASM = tl.constexpr("{.reg .b32 s, c, t; bfe.s32 s, $2, 0, 16; mov.b32 t, $1; " + _CODES)
HIGH_ASM = tl.constexpr("{.reg .b32 s, c, t; shr.s32 s, $2, 16; shr.u32 t, $1, 4; " + _CODES)
# Of a pack of four: the result, eight nibbles, and four times the same word. All in one piece, without a scalar operand:
# Triton hoists the change of layout, which would otherwise go through shared memory, only over operations between loads.
CONSTRAINTS = tl.constexpr("=r,r,r,r,r,r")


@triton.jit
def unpack(packed, words, HIGH: tl.constexpr, ASM: tl.constexpr):
    """code * group_scale of one nibble of each byte.

    Args: packed: (BLOCK_N, 64) uint8. words: (BLOCK_N,) int32, each row's scales of the low and the high nibbles' group.
        ASM: False where there is no PTX (Triton's interpreter, AMD). The instructions scale four neighbours in a thread's registers
            by the first one's word: they must be of one row, as they are in an int8 operand of a product and where rows are loaded.
    Returns: (BLOCK_N, 64) int8.
    """
    if ASM:
        asm: tl.constexpr = HIGH_ASM if HIGH else LOW_ASM
        codes = tl.inline_asm_elementwise(asm, CONSTRAINTS, [packed, words[:, None]], dtype=tl.int8, is_pure=True, pack=4)
    else:
        nibble = packed >> 4 if HIGH else packed & 15
        scale = words >> 16 if HIGH else (words << 16) >> 16
        codes = ((nibble.to(tl.int32) - 8) * scale[:, None]).to(tl.int8)
    return codes
