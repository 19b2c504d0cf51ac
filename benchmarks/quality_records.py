"""The quality table's records: fixed fields first, then what explains them. Measures nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from quality_general import Setting
from quality_measure import Adherence, Closeness, Difference
from quality_rows import Row

from stepquant.demo.prompts import CALIBRATION
from stepquant.demo.record import command_line, environment, quality_record
from stepquant.quant.layer_noise import stored_bytes
from stepquant.quant.sqnr import StepSqnr


def append(file: Path, record: dict[str, object]) -> None:
    """After every row, so that a run cut short leaves what it measured."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def closeness_record(bench, row: Row | str, closeness: Closeness | None, found: Adherence | None, simulated: int = 0) -> dict[str, object]:
    """One row of the table. bench: quality.Bench. closeness None: fp16 itself, whose `row` is its name."""
    mode = row if isinstance(row, str) else row.mode
    size = _size_bytes(bench, None if isinstance(row, str) else row)
    record = _record("quality", bench, mode, size)
    if closeness is not None:
        record |= {
            "sqnr_db": _rounded(closeness.steps.mean_db()),
            "sqnr_worst_db": _rounded(closeness.steps.worst_db()),
            "latent_sqnr_db": _rounded(closeness.latent_sqnr_db),
            "psnr_db": _rounded(closeness.psnr_db),
            "integer_mac_share": round(closeness.integer_share, 4),
            "step_sqnr_db": [_rounded(value) for value in closeness.steps.per_step_db()],
            "activation_bits": row.bits,
            "simulated_layers": simulated,
            "channel_groups": _channel_groups(bench, row),
            "wide_mac_share": round(_wide_share(row, closeness.macs), 4),
        }
    if found is not None:
        record |= {"adherence": _rounded(found.share), **_difference("adherence_diff", found.all)}
        record |= {"seen": _difference("diff", found.seen), "heldout": _difference("diff", found.heldout), "judged": found.all.count}
    return {**record, "settings": _settings(bench), **_environment(bench)}


def general_record(bench, row: Row, setting: Setting, steps: StepSqnr, change_db: float, simulated: int) -> dict[str, object]:
    """One setting that was not calibrated on. change_db: against the calibrated setting."""
    record = _record("general", bench, row.mode, _size_bytes(bench, row))
    record |= {"sqnr_db": _rounded(steps.mean_db()), "sqnr_worst_db": _rounded(steps.worst_db())}
    record |= {"setting": setting.name, "change_db": _rounded(change_db), "simulated_layers": simulated}
    return {**record, "settings": _settings(bench) | {"steps": setting.steps}, **_environment(bench)}


def _record(kind: str, bench, mode: str, size_bytes: int) -> dict[str, object]:
    record = quality_record(kind, bench.model, mode, None, size_bytes, command_line())
    record["commit"] = record["commit"] or os.environ.get("STEPQUANT_COMMIT")
    return record


def _channel_groups(bench, row: Row) -> dict[str, list[int]]:
    """Effective number of groups, and channels per block, of every layer that has channel groups."""
    found = {}
    for (name, _groups, bits, scheme), grouping in bench.cache.items():
        if row.bits == bits and name in row.plans and row.plans[name].scheme == scheme:
            found[name] = [grouping.groups, grouping.granularity]
    return found


def _wide_share(row: Row, macs: Mapping[str, int]) -> float:
    """Of the multiply-adds, those of 16-bit codes, which are done twice."""
    wide = [name for name, plan in row.plans.items() if plan.scheme is not None and plan.scheme.is_wide]
    return sum(macs.get(name, 0) for name in wide) / max(1, sum(macs.values()))


def _size_bytes(bench, row: Row | None) -> int:
    """Of the UNet's file, headers left out."""
    total = bench.other_bytes
    for name, spec in bench.layers.items():
        plan = None if row is None else row.plans.get(name)
        total += stored_bytes(spec, None) if plan is None else plan.stored_bytes(spec)
    return total


def _difference(name: str, found: Difference) -> dict[str, float]:
    return {name: _rounded(found.mean), "ci_low": _rounded(found.low), "ci_high": _rounded(found.high)}


def _settings(bench) -> dict[str, object]:
    args = bench.args
    settings = {"prompts": args.prompts, "steps": args.steps, "guidance": args.guidance, "batch": args.batch}
    return settings | {"calibration_prompts": len(CALIBRATION), "device": args.device}


def _environment(bench) -> dict[str, object]:
    return environment() | {"dtype": str(bench.pipeline.unet.dtype).removeprefix("torch."), "gpu": _gpu(bench.args.device)}


def _gpu(device: str) -> str | None:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
