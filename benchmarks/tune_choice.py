"""Which of the timed designs a table keeps: at most a dozen compiled kernels, for the least time a step. No timing here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepquant.kernels.design import GLUON, TRITON, Design
from stepquant.kernels.sdxl_products import SdxlProduct

MAX_VARIANTS = 4  # GEGLU, and products of two segments
MAX_KERNELS = 12  # per compute type: compiled in under 10 s from an empty cache


@dataclass(frozen=True)
class Timing:
    """Time of one product with one design."""

    product: SdxlProduct
    dtype: str
    design: Design
    us: float

    @property
    def shape(self) -> tuple[str, str, int, int, int, int]:
        """What a table row is found by: roles of one shape share a row, and so a design."""
        return self.product.op, self.dtype, len(self.product.K), self.product.M, self.product.N, sum(self.product.K)

    @property
    def step_us(self) -> float:
        """Time a step; what is cached between steps counts as one call."""
        return self.us * (1 if self.product.cached else self.product.count)

    def kernels(self, roles: dict[tuple, set[tuple]]) -> set[tuple]:
        """The compiled kernels that this design of this shape needs: one for each epilogue of its roles."""
        label = self.design.label
        return {(*self.shape[:3], label, *epilogue) for epilogue in roles[self.shape]} if self.design.backend in (TRITON, GLUON) else set()

    def row(self) -> dict[str, Any]:
        op, dtype, segments, M, N, K = self.shape
        return {"op": op, "dtype": dtype, "segments": segments, "M": M, "N": N, "K": K, "design": self.design.label}

    def record(self) -> dict[str, Any]:
        tops = self.product.operations / self.us / 1e6
        role = {"role": self.product.role, "addend": self.product.addend, "count": self.product.count}
        return {**role, **self.row(), "us": round(self.us, 2), "tops": round(tops)}


def by_shape(timings: list[Timing]) -> dict[tuple, list[Timing]]:
    """Shape -> one Timing per design that all its roles can use, us and count weighted over the roles."""
    roles: dict[tuple, dict[str, list[Timing]]] = {}
    for timing in timings:
        roles.setdefault(timing.shape, {}).setdefault(timing.design.label, []).append(timing)
    merged: dict[tuple, list[Timing]] = {}
    for shape, designs in roles.items():
        most = max(len(found) for found in designs.values())
        for found in designs.values():
            if len(found) == most:
                costliest = max(found, key=lambda timing: timing.step_us)
                total = sum(timing.step_us for timing in found)
                us = total / (1 if costliest.product.cached else costliest.product.count)
                merged.setdefault(shape, []).append(Timing(costliest.product, costliest.dtype, costliest.design, us))
    return merged


def choose(timings: list[Timing], limit: int = MAX_KERNELS) -> list[Timing]:
    """One Timing per shape. Starts with each shape's best and gives up, one by one, the design whose loss costs the least."""
    kept: list[Timing] = []
    for dtype in sorted({timing.dtype for timing in timings}):
        for variant in (False, True):  # a kernel that replaces another need not share the others' dozen
            kept += _choose([t for t in timings if t.dtype == dtype and t.product.variant == variant], MAX_VARIANTS if variant else limit)
    return kept


def _choose(timings: list[Timing], limit: int) -> list[Timing]:
    roles: dict[tuple, set[tuple]] = {}
    for timing in timings:
        roles.setdefault(timing.shape, set()).add((bool(timing.product.addend), timing.product.asymmetric))
    options = by_shape(timings)
    best = {shape: min(found, key=lambda timing: timing.step_us) for shape, found in options.items()}
    while len(set().union(*(timing.kernels(roles) for timing in best.values()))) > limit:
        moves = [move for move in _moves(best, options) if _kernel_count(best | move, roles) < _kernel_count(best, roles)]
        if not moves:
            break
        best |= min(moves, key=lambda move: sum(new.step_us - best[shape].step_us for shape, new in move.items()))
    return list(best.values())


def _moves(best: dict[tuple, Timing], options: dict[tuple, list[Timing]]) -> list[dict[tuple, Timing]]:
    """Ways to replace one design by another in all shapes of a kind (op and segments) that use it."""
    moves = []
    for kind in {shape[:3] for shape in best}:
        used = {timing.design.label for shape, timing in best.items() if shape[:3] == kind}
        for old in used:
            for new in used - {old}:
                move = {}
                for shape, timing in best.items():
                    if shape[:3] == kind and timing.design.label == old:
                        move[shape] = next((option for option in options[shape] if option.design.label == new), None)
                if move and all(move.values()):
                    moves.append(move)
    return moves


def _kernel_count(best: dict[tuple, Timing], roles: dict[tuple, set[tuple]]) -> int:
    return len(set().union(*(timing.kernels(roles) for timing in best.values())))


def step_ms(chosen: list[Timing], dtype: str) -> float:
    """Milliseconds of all products of a step."""
    return sum(timing.step_us for timing in chosen if timing.dtype == dtype and not timing.product.variant) / 1e3
