"""Collects the statistics of one layer's input during calibration, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_KEPT = 256
ROWS_TAKEN_PER_SAMPLE = 16


@dataclass
class LayerStatistics:
    """What one layer's input looked like. Buckets that were never visited have count 0.

    range_min, range_max: (V, C) fp32 per visited bucket and input channel.
    buckets: (V,) int64, ascending, the visited ones. count: (V,) int64, rows seen.
    token_absmax: (V,) fp32, mean over rows of the row's absmax.
    rows: (R, C) fp16, a uniform random sample; row_bucket: (R,) int64.
    """

    buckets: Tensor
    count: Tensor
    range_min: Tensor
    range_max: Tensor
    token_absmax: Tensor
    rows: Tensor
    row_bucket: Tensor


class LayerObserver:
    """Observes (B, rows, C) inputs. Conv inputs are passed as pixels, (B, H*W, C)."""

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self._slot_of_bucket: dict[int, int] = {}
        self._channels = channels
        self._device = torch.device(device)
        self._range_min: list[Tensor] = []
        self._range_max: list[Tensor] = []
        self._count: list[int] = []
        self._absmax_sum: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = torch.empty(0, channels, dtype=torch.float16)
        self._row_key = torch.empty(0)
        self._row_bucket = torch.empty(0, dtype=torch.long)

    def update(self, x: Tensor, buckets: list[int]) -> None:
        """Add one call's input.

        Args:
            x: (B, rows, C), any float dtype; left unchanged.
            buckets: the timestep bucket of each of the B samples.
        """
        if len(buckets) != x.shape[0]:
            raise ValueError(f"{len(buckets)} buckets for {x.shape[0]} samples")
        for bucket in dict.fromkeys(buckets):
            # All samples of a bucket at once, which a sampler's batch usually is: a loop over them took most of a calibration.
            samples = x if len(set(buckets)) == 1 else x[[other == bucket for other in buckets]]
            rows = samples.detach().reshape(-1, self._channels)
            slot = self._slot(bucket)
            low, high = rows.aminmax(dim=0)
            torch.minimum(self._range_min[slot], low.float(), out=self._range_min[slot])
            torch.maximum(self._range_max[slot], high.float(), out=self._range_max[slot])
            self._count[slot] += rows.shape[0]
            self._absmax_sum[slot] += rows.abs().amax(1).float().sum()
            self._sample_rows(rows, bucket, ROWS_TAKEN_PER_SAMPLE * samples.shape[0])

    def range_of(self, bucket: int) -> tuple[float, float] | None:
        """Lowest and highest value seen in a bucket so far; None if it was not visited. Waits for the device."""
        if bucket not in self._slot_of_bucket:
            return None
        slot = self._slot_of_bucket[bucket]
        return float(self._range_min[slot].min()), float(self._range_max[slot].max())

    def _slot(self, bucket: int) -> int:
        if bucket not in self._slot_of_bucket:
            self._slot_of_bucket[bucket] = len(self._count)
            self._range_min.append(torch.full((self._channels,), torch.inf, device=self._device))
            self._range_max.append(torch.full((self._channels,), -torch.inf, device=self._device))
            self._absmax_sum.append(torch.zeros((), device=self._device))
            self._count.append(0)
        return self._slot_of_bucket[bucket]

    def _sample_rows(self, sample: Tensor, bucket: int, taken: int) -> None:
        # A row's random key decides whether it stays: the R smallest of all keys ever drawn are a uniform sample.
        # Taking 16 of a sample's M rows multiplies their keys' density by 16 / M, undone by scaling the keys.
        taken = min(taken, sample.shape[0])
        index = torch.randperm(sample.shape[0], generator=self._generator)[:taken]
        keys = torch.rand(taken, generator=self._generator) * (taken / sample.shape[0])
        if self._row_key.numel() >= ROWS_KEPT:
            better = keys < self._row_key.max()
            index, keys = index[better], keys[better]
        if not keys.numel():
            return
        picked = sample[index.to(sample.device)].to("cpu", torch.float16)
        self._rows = torch.cat([self._rows, picked])
        self._row_key = torch.cat([self._row_key, keys])
        self._row_bucket = torch.cat([self._row_bucket, torch.full((keys.numel(),), bucket)])
        if self._row_key.numel() > ROWS_KEPT:
            kept = self._row_key.topk(ROWS_KEPT, largest=False).indices
            self._rows, self._row_key, self._row_bucket = self._rows[kept], self._row_key[kept], self._row_bucket[kept]

    def statistics(self) -> LayerStatistics | None:
        """What was seen, on the CPU and ordered by bucket; None if the layer was never called."""
        if not self._count:
            return None
        visited = sorted(self._slot_of_bucket)
        order = [self._slot_of_bucket[bucket] for bucket in visited]
        count = torch.tensor([self._count[slot] for slot in order])
        return LayerStatistics(
            buckets=torch.tensor(visited),
            count=count,
            range_min=torch.stack([self._range_min[slot] for slot in order]).cpu(),
            range_max=torch.stack([self._range_max[slot] for slot in order]).cpu(),
            token_absmax=torch.stack([self._absmax_sum[slot] for slot in order]).cpu() / count,
            rows=self._rows,
            row_bucket=self._row_bucket,
        )
