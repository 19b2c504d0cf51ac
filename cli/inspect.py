"""`inspect`: what a StepQuant file holds, read and checked whole; any fault is one sentence."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .output import console, print_json, size_text

SCALES = ("weight_scale", "group_scale", "act_scale", "act_zero_point", "channel_order", "channel_exponents")


def inspect(
    file: Annotated[Path, typer.Argument(help="A quantized model or a calibration made by StepQuant.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer's scheme.")] = False,
) -> None:
    """Show a file's header, schemes, timestep groups and sizes, after checking all of it."""
    from ..hosts.checkpoint_file import open_tensor_file
    from ..quant.calibration import CALIBRATION_KEY

    with open_tensor_file(file) as tensors:
        is_calibration = CALIBRATION_KEY in tensors.metadata
    report = _describe_calibration(file) if is_calibration else _describe_model(file)
    if as_json:
        print_json(report)
        return
    (_show_calibration if is_calibration else _show_model)(report, layers)


def _describe_model(file: Path) -> dict[str, object]:
    from ..quant.file_format import BRANCH_PARTS, read_header, read_model
    from ..quant.layers import find_layers

    header = read_header(file)
    model = read_model(file)
    sizes = {
        "codes": sum(_bytes(layer.qweight) for layer in model.layers.values()),
        "scales": sum(_bytes(*(getattr(layer, part) for part in SCALES)) for layer in model.layers.values()),
        "branches": sum(_bytes(*(getattr(layer, part) for part in BRANCH_PARTS)) for layer in model.layers.values()),
        "unet_16_bit": _bytes(*model.rest.values()) + sum(_bytes(layer.bias) for layer in model.layers.values()),
        "text_encoders_and_vae": _bytes(*model.extra.values()),
    }
    kept = find_layers({name: tuple(tensor.shape) for name, tensor in model.rest.items()})
    return {
        "file": str(file),
        "format": header.version,
        "stepquant": header.library_version,
        "kind": header.kind,
        "base_model": header.base_model,
        "preset": header.recipe.preset,
        "chosen_by": header.recipe.chosen_by,
        "grouping": header.recipe.grouping,
        "curve_points": header.recipe.curve_points,
        "timestep_groups": len(set(header.recipe.groups)),
        "layers_with_own_groups": len(header.recipe.layer_groups),
        "groups": list(header.recipe.groups),
        "schemes": _count_schemes(header.recipe.schemes),
        "quantizable_layers_in_16_bit": sorted(kept),
        "layers": {name: _describe_layer(scheme, model.layers[name]) for name, scheme in header.recipe.schemes.items()},
        "calibration": header.calibration,
        "size_bytes": file.stat().st_size,
        "part_bytes": sizes,
    }


def _describe_layer(scheme, layer) -> dict[str, object]:
    """The scheme; of channel groups also how many the layer really has, which is at most what the scheme allows."""
    found = scheme.to_json()
    return found | {"effective_groups": len(layer.channel_exponents.unique())} if scheme.is_grouped else found


def _count_schemes(schemes) -> list[dict[str, object]]:
    counted = Counter((s.weight_bits, s.activation.value, s.symmetric, s.compute.value) for s in schemes.values())
    fields = ("weight_bits", "activation", "symmetric", "compute")
    return [{**dict(zip(fields, key, strict=True)), "layers": count} for key, count in counted.most_common()]


def _describe_calibration(file: Path) -> dict[str, object]:
    from ..quant.calibration import Calibration, describe

    summary = describe(Calibration.load(file))
    return {"file": str(file), "kind": "calibration", "size_bytes": file.stat().st_size, **summary}


def _bytes(*tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _show_model(report: dict, with_layers: bool) -> None:
    base = report["base_model"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("file", f"{report['file']} ({size_text(report['size_bytes'])}, {report['kind']})")
    table.add_row("made by", f"StepQuant {report['stepquant']}, file format {report['format']}")
    table.add_row("base model", f"{base.get('name') or 'unknown'}{_short_hash(base.get('sha256'))}")
    table.add_row("recipe", f"{report['preset']}, chosen by {report['chosen_by']}")
    for scheme in report["schemes"]:
        zero_point = "" if scheme["symmetric"] else " with zero point"
        table.add_row("", f"{scheme['layers']} layers: W{scheme['weight_bits']}, {scheme['activation']}{zero_point}, {scheme['compute']}")
    if ranks := sorted(layer["rank"] for layer in report["layers"].values() if "rank" in layer):
        table.add_row("branches", ", ".join(f"{len(list(run))} layers of rank {rank}" for rank, run in groupby(ranks)))
    if grouped := [layer for layer in report["layers"].values() if "effective_groups" in layer]:
        table.add_row("channel groups", _channel_groups_text(grouped))
    if kept := report["quantizable_layers_in_16_bit"]:
        table.add_row("", f"{len(kept)} quantizable layers kept in 16 bit")
    if report["timestep_groups"] > 1:
        table.add_row("timestep groups", _groups_text(report))
    for part, size in report["part_bytes"].items():
        if size:
            table.add_row(part.replace("_", " "), size_text(size))
    if calibration := report["calibration"]:
        table.add_row("calibrated on", _calibration_text(calibration))
    console.print(table)
    if with_layers:
        for name, scheme in report["layers"].items():
            console.print(f"{name}: W{scheme['weight_bits']} {scheme['activation']}{_own_groups_text(scheme)}", soft_wrap=True)


def _show_calibration(report: dict, with_layers: bool) -> None:
    console.print(f"{report['file']}: a calibration ({size_text(report['size_bytes'])})", soft_wrap=True)
    console.print(_calibration_text(report), soft_wrap=True)


def _calibration_text(summary: dict) -> str:
    prompts = summary.get("prompts")
    parts = [f"{summary['layers']} layers", f"{len(summary['buckets'])} timestep buckets"] if "buckets" in summary else []
    parts += [f"{len(prompts)} prompts"] if isinstance(prompts, list) else []
    parts += [f"{key} {summary[key]}" for key in ("scheduler", "sampler", "steps", "guidance", "cfg", "seed") if key in summary]
    return ", ".join(parts) or "unknown"


def _channel_groups_text(layers: list[dict]) -> str:
    counts = Counter((layer["effective_groups"], layer["granularity"]) for layer in layers)
    return ", ".join(f"{layers} layers in {groups} of {granularity}" for (groups, granularity), layers in sorted(counts.items()))


def _own_groups_text(scheme: dict) -> str:
    if "effective_groups" not in scheme:
        return ""
    groups = f"{scheme['effective_groups']} of at most {scheme['channel_groups']} groups, granularity {scheme['granularity']}"
    return f" on {scheme['group_base']}, {groups}"


def _groups_text(report: dict) -> str:
    if report["curve_points"]:
        return f"none: scales on a curve of {report['curve_points']} coefficients a layer"
    if own := report["layers_with_own_groups"]:
        return f"{report['timestep_groups']}, {report['grouping']}: {own} layers have their own"
    return f"{report['timestep_groups']}, {report['grouping']}: buckets {_group_ranges(report['groups'])}"


def _group_ranges(groups: list[int]) -> str:
    ranges, first = [], 0
    for _, run in groupby(groups):
        length = len(list(run))
        ranges.append(f"{first}-{first + length - 1}")
        first += length
    return " ".join(ranges)


def _short_hash(sha256: str | None) -> str:
    return f" (sha256 {sha256[:12]})" if sha256 else ""
