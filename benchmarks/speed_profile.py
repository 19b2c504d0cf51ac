"""Where a UNet step's GPU time goes, by groups of kernels: for benchmarks/speed.py. Judges nothing."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

# In this order: a name belongs to the first group whose pattern it matches.
GROUPS = {
    "attention": r"flash|fmha|sdpa|attention",
    "conv": r"conv|fprop|implicit",
    "GEMM": r"gemm|gluon_geglu|matmul|cutlass|nvjet|cublas|splitk|wgmma|dot_kernel|gemv",
    "quantize and norm": r"quantize|norm|moments|absmax|image_scale|affine|geglu",
    "copy": r"memcpy|memset|copy|cat|nchw|nhwc|transpose",
    "elementwise": r"elementwise|vectorized|reduce|softmax|index|fill|where|triton_",
}
CALLS = 3


def time_split(call: Callable[[], object]) -> dict[str, object]:
    """Per step: ms and launches of each group of kernels, gaps between kernels, and the twelve longest kernels."""
    events = _kernels(call)
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, duration in ((event["name"], event["dur"] / 1000) for event in events):
        for total in (groups[_group(name)], names[name[:90]]):
            total[0] += duration / CALLS
            total[1] += 1 / CALLS
    return {
        "groups_ms": {name: [round(ms, 3), round(launches)] for name, (ms, launches) in sorted(groups.items(), key=lambda one: -one[1][0])},
        "gaps_ms": round(_gaps(events) / 1000 / CALLS, 3),
        "longest_ms": {name: [round(ms, 3), round(n)] for name, (ms, n) in sorted(names.items(), key=lambda one: -one[1][0])[:12]},
    }


def lines(split: dict) -> list[str]:
    table = [f"    {'group':<20}{'ms':>9}{'launches':>10}"]
    table += [f"    {name:<20}{ms:>9.2f}{launches:>10}" for name, (ms, launches) in split["groups_ms"].items()]
    table.append(f"    {'gaps':<20}{split['gaps_ms']:>9.2f}")
    return table + [f"      {ms:8.3f} ms {launches:4} x {name}" for name, (ms, launches) in split["longest_ms"].items()]


def _kernels(call: Callable[[], object]) -> list[dict]:
    """What ran on the GPU, in order, with start and duration in microseconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    wanted = [event for event in trace if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event]
    return sorted(wanted, key=lambda event: event["ts"])


def _group(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _gaps(events: list[dict]) -> float:
    """Microseconds in which nothing ran, from the first kernel to the last."""
    idle, end = 0.0, None
    for event in events:
        if end is not None:
            idle += max(0.0, event["ts"] - end)
        end = max(end or 0.0, event["ts"] + event["dur"])
    return idle
