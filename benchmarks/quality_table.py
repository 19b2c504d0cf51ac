"""Renders benchmarks/results/quality.jsonl as Markdown, with what had to be reached. Measures nothing.

    python benchmarks/quality_table.py [--records benchmarks/results/quality.jsonl] [--out benchmarks/results/quality.md]

The last record of a model, kind, mode and setting counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Record = Mapping[str, object]
HEAD = (
    "| mode | SQNR, dB | worst step, dB | latents, dB | PSNR, dB | adherence, points (95 %) | integer | UNet, MB "
    "| channel groups: layers | run |"
)
RULE = "|---|---|---|---|---|---|---|---|---|---|"
MODELS = ("stepquant-demo-xs", "stepquant-demo-xs-hard")
TITLES = {MODELS[0]: "Demo model", MODELS[1]: "Hard variant: the same function, activations as hard as SDXL-Turbo's"}
WORST_CHANGE_DB = -2.0
# Kinds of rows in the order of the table; the first that fits.
ORDER = ("fp16$", "comfy", "gguf", "w8a8-plan", "w8a8-(token|static|fp8)", "w8a8-full", "w8a8", "w4a8-(best|plan)", "w4a8", "w8a6")
_FLOOR_PLAN = re.compile(r"w8a8-plan-\d")


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.md")
    args = parser.parse_args()
    records = [json.loads(line) for line in args.records.read_text(encoding="utf-8").splitlines() if line.strip()]
    args.out.write_text(render(records), encoding="utf-8")


def render(records: Sequence[Record]) -> str:
    """The whole page."""
    lines = ["# Quality against fp16", "", *_introduction(records)]
    for model in MODELS:
        own = [record for record in records if record["model"] == model]
        if own:
            found = sorted(_latest(own, "quality").values(), key=_place)
            lines += ["", f"## {TITLES[model]}", "", HEAD, RULE, *(_line(record) for record in found)]
            lines += _general(own)
    return "\n".join([*lines, "", "## What had to be reached", "", *_verdicts(records)]) + "\n"


def _introduction(records: Sequence[Record]) -> list[str]:
    settings = next(record for record in reversed(records) if record["kind"] == "quality")["settings"]
    return [
        "SQNR is that of the UNet's output on fp16's own trajectory: energies summed over prompts per step, mean of dB over steps.",
        f"{settings['steps']} steps, guidance {settings['guidance']}; static scales from {settings['calibration_prompts']} other prompts. "
        "Every row is the last run of its mode.",
        "Its prompts, device and commit (+: and changes that were committed after the run) are in the last column; other prompts alone",
        "can change a row by 1 dB. Rows of different commits compare: the same recipe comes out the same to 0.001 dB; `plan` rows are",
        "planned anew in each run.",
        "",
        "Rows are plain min-max (one symmetric scale per tensor, weights too, for all timesteps), each method added to it alone,",
        "then all of them. `comfy-int8` and `comfy-fp8`: Linears alone, as ComfyUI does them; convolutions stay 16 bit. ~ marks rows",
        "that run in floats, in whole or in part: fewer than 8 bits, fp8, and channel groups finer than the GPU kernels take.",
        "`plan`: the best that 98 % integer products allow. `plan-52`: the fastest that is predicted to reach 52 dB; its layers may have",
        "16-bit codes, whose products are done twice. `gptq`: weights rounded by GPTQ, as both plans' are. `w4a8-best`: a plan's, by",
        "block reconstruction.",
        "Figures of this small model rank methods; they do not predict SDXL's.",
    ]


def _latest(records: Sequence[Record], kind: str) -> dict[str, Record]:
    return {record["mode"]: record for record in records if record["kind"] == kind}


def _place(record: Record) -> tuple[int, str]:
    fits = [place for place, pattern in enumerate(ORDER) if re.match(pattern, record["mode"])]
    return (fits[0] if fits else len(ORDER), record["mode"])


def _line(record: Record) -> str:
    mode = f"{record['mode']}{' ~' if record.get('simulated_layers') else ''}"
    share = record["integer_mac_share"]
    cells = [mode, *(_number(record[key]) for key in ("sqnr_db", "sqnr_worst_db", "latent_sqnr_db", "psnr_db")), _adherence(record)]
    integer = "" if share is None else f"{100 * share:.1f} %{_twice(record)}"
    cells += [integer, f"{record['size_bytes'] / 1e6:.1f}", _channel_groups(record), _run(record)]
    return "| " + " | ".join(cells) + " |"


def _twice(record: Record) -> str:
    share = record.get("wide_mac_share")
    return f", {100 * share:.1f} % twice" if share else ""


def _adherence(record: Record) -> str:
    if record["adherence_diff"] is None:
        return ""
    if record["mode"] == "fp16":
        return f"{record['adherence']:.1f} % of {record['judged']}"
    return f"{record['adherence_diff']:+.2f} [{record['ci_low']:+.2f}, {record['ci_high']:+.2f}]"


def _channel_groups(record: Record) -> str:
    """Layers by effective number of groups and channels per block."""
    counts = Counter(tuple(found) for found in record.get("channel_groups", {}).values())
    return ", ".join(f"{layers} in {groups} of {size}" for (groups, size), layers in sorted(counts.items()))


def _run(record: Record) -> str:
    """Rows of different runs stand in one table."""
    gpu = (record.get("gpu") or "CPU").removeprefix("NVIDIA ").split(" ")[0]
    commit, changed, _ = record["commit"].partition("-dirty")
    return f"{record['settings']['prompts']} prompts, {gpu}, {commit[:7]}{'+' if changed else ''}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _general(records: Sequence[Record]) -> list[str]:
    found = {(record["setting"], record["mode"]): record for record in records if record["kind"] == "general"}
    if not found:
        return []
    settings, modes = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    lines = ["", "Settings that were not calibrated on: SQNR in dB, and its change against the first.", ""]
    lines += ["| setting | " + " | ".join(modes) + " |", "|---|" + "---|" * len(modes)]
    for setting in settings:
        cells = [found.get((setting, mode)) for mode in modes]
        texts = ["" if cell is None else f"{cell['sqnr_db']:.2f} ({cell['change_db']:+.2f})" for cell in cells]
        lines.append(f"| {setting} | " + " | ".join(texts) + " |")
    return lines


@dataclass(frozen=True)
class Must:
    """mode's figure less the other's is at least `least`; other None: the figure itself."""

    model: str
    mode: str
    other: str | None
    least: float
    key: str = "sqnr_db"


MUSTS = (
    Must(MODELS[1], "w8a8-full-static", "w8a8-min-max", 8.0),
    Must(MODELS[0], "w8a8-full-static", "w8a8-min-max", 3.0),
    *(Must(model, "w8a8-plan", "comfy-int8", -1.0) for model in MODELS),
    *(Must(model, "w8a8-plan", None, 0.98, "integer_mac_share") for model in MODELS),
    *(Must(model, "w8a8-plan", None, -2.0, "ci_low") for model in MODELS),
    Must(MODELS[1], "w8a6-full-static", "w8a6-no-grouping", 6.0),
    *(Must(model, "w4a8-best", "w4a8-plain", 4.0) for model in MODELS),
    *(Must(model, "w4a8-best", "w4a8-dgq", 3.0) for model in MODELS),
    *(Must(model, "w4a8-best", None, -3.0, "ci_low") for model in MODELS),
)


def _floor_musts(records: Sequence[Record]) -> list[Must]:
    """What a plan must reach, for those that were given a floor of quality."""
    plans = sorted({(record["model"], record["mode"]) for record in records if _FLOOR_PLAN.match(record["mode"])})
    needed = (("comfy-int8", -1.0, "sqnr_db"), (None, 0.98, "integer_mac_share"), (None, -2.0, "ci_low"))
    return [Must(model, mode, *one) for model, mode in plans for one in needed]


def _verdicts(records: Sequence[Record]) -> list[str]:
    lines = ["| model | what | must | measured | |", "|---|---|---|---|---|"]
    for must in (*MUSTS, *_floor_musts(records)):
        own = _latest([record for record in records if record["model"] == must.model], "quality")
        pair = [own.get(mode) for mode in (must.mode, must.other) if mode is not None]
        if any(record is None or record[must.key] is None for record in pair):
            continue
        value = pair[0][must.key] - (pair[1][must.key] if len(pair) > 1 else 0)
        what = f"{must.mode}: {must.key}" + (f" above {must.other}" if must.other else "")
        lines.append(f"| {must.model} | {what} | {must.least:+.2f} | {value:+.2f} | {_verdict(value >= must.least)} |")
    general = {(r["model"], r["mode"], r["setting"]): r for r in records if r["kind"] == "general" and r["mode"].startswith("w8a8-plan")}
    for model, mode in sorted({key[:2] for key in general}):
        worst = min((r for key, r in general.items() if key[:2] == (model, mode)), key=lambda record: record["change_db"])
        verdict = _verdict(worst["change_db"] >= WORST_CHANGE_DB)
        what = f"{mode}: worst change, {worst['setting']}"
        lines.append(f"| {model} | {what} | {WORST_CHANGE_DB:+.2f} | {worst['change_db']:+.2f} | {verdict} |")
    return lines


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"


if __name__ == "__main__":
    main()
