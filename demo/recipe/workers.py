"""One process or several GPUs under torchrun: start, average gradients, share a clock. No DDP wrapper, no data loading."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process among its peers: rank, how many there are, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Replace every gradient by its mean over the processes; one flat fp32 message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        parts = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
        torch._foreach_copy_(gradients, parts)

    def agree(self, value: float) -> float:
        """The main process's number, in every process; a host synchronisation."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def broadcast_module(self, module: torch.nn.Module) -> None:
        """Give every process the main process's parameters and buffers."""
        if self.count > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, 0)


def start_workers() -> Workers:
    """Join torchrun's group if there is one; choose the GPU of this rank, or the CPU."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Workers(rank, count, device)


def stop_workers() -> None:
    """Leave the group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Schedule:
    """Learning-rate course over a budget in seconds or steps, so that it ends exactly when the budget does.

    Args:
        seconds, steps: the budget; steps, where given, decides. start: fraction already done by an earlier run.
    """

    def __init__(self, workers: Workers, seconds: float, steps: int | None = None, start: float = 0.0):
        self._workers, self._seconds, self._steps, self._start = workers, seconds, steps, start
        self._began = time.monotonic()
        self.step = 0
        self.fraction = start

    def advance(self) -> bool:
        """Count one step; False once the budget is spent, at the same step in every process."""
        self.step += 1
        if self._steps is not None:
            done = (self.step - 1) / self._steps
        elif self.step % 10 == 1:
            done = self._workers.agree((time.monotonic() - self._began) / self._seconds)
        else:
            return True
        self.fraction = self._start + (1 - self._start) * done
        return done < 1

    def rate(self, warmup_steps: int, floor: float) -> float:
        """Multiplier of the peak learning rate: linear warm-up, then cosine from 1 to `floor`."""
        warmup = min(1.0, self.step / max(1, warmup_steps))
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, self.fraction))).item())
        return warmup * (floor + (1 - floor) * cosine)
