"""Renders docs/contracts.md from benchmarks/results/contracts.json, which the contract suite writes. Tries nothing itself.

STEPQUANT_RECORD_CONTRACTS=1 COMFYUI_PATH=<ComfyUI> python -m pytest tests/comfyui/contracts && python benchmarks/contracts_table.py
With STEPQUANT_TEST_DEVICE=gpu, then gpu-classic, the same suite fills the table of the GPU.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "contracts.json", ROOT / "docs" / "contracts.md"
MODES = ("plain", "fused", "graph")
GPU_MODES = ("gpu-plain", "gpu-fused", "gpu-graph", "gpu-classic")
NOT_TRIED = "not tried"
THEMES = {
    "test_loras.py": "LoRAs",
    "test_hooks.py": "LoRAs per prompt and per step (hooks)",
    "test_controls.py": "ControlNet, adapters",
    "test_patches.py": "Nodes that patch the UNet",
    "test_merges.py": "Merging",
    "test_variants.py": "Kinds of SDXL, samplings, few-step schedules",
    "test_prompts.py": "Prompts, sizes, batches",
    "test_memory.py": "Loading, saving, rebuilding",
    "test_compiled.py": "torch.compile",
    "test_dynamic_vram.py": "Dynamic VRAM",
}
HEAD = """# What works with a quantized model

Written by the tests: `benchmarks/contracts_table.py` renders `benchmarks/results/contracts.json`. Each row is a thing an artist does
with a MODEL, tried in a real ComfyUI {comfyui} on a CPU with a thin SDXL of random weights, on {days}. Each links to its test.

- **holds**: the result is that of the float model up to the noise of quantization, and afterwards the model is bit for bit what it was.
- The percentages say how far the latent is from the float model's. In a random UNet noise grows: they compare columns, and say nothing
  about pictures. StepQuant quantizes convolutions too, ComfyUI's own int8 Linears only, so its noise is smaller here.
- **StepQuant**: `w8a8-token`, in the modes *plain* (layer by layer), *fused* (blocks with forwards of our own) and *graph* (the UNet as
  one graph; a CPU has no CUDA graphs, so the recording runs its work again: what is tested is when a graph is made, reused and dropped).
- **ComfyUI int8**: the file that Export native writes of the same model, opened by ComfyUI's own loader.

{summary}
"""
GPU_HEAD = """## On a GPU

The same suite on an {devices}, in fp16, with real CUDA graphs: *plain*, *fused* and *graph* under dynamic VRAM, as ComfyUI starts on
NVIDIA; *classic* is the graph without it, which has no dynamic VRAM to lose weights from. Here "as it was" means within 2 %, less than any
contract's own effect: a GPU may choose another algorithm for the next call. Empty cells were not run with this version.

{summary}

| contract | plain | fused | graph | classic | ComfyUI int8 |
|---|---|---|---|---|---|
"""


def render(rows: list[dict]) -> str:
    """The page. rows: as in contracts.json."""
    on_cpu, on_gpu = (_by_contract(rows, modes) for modes in (MODES, GPU_MODES))
    parts = [_head([row for row in rows if row["mode"] in MODES], on_cpu)]
    for file, title in THEMES.items():
        chosen = {name: modes for name, modes in on_cpu.items() if _file(modes) == file}
        if chosen:
            table = ["| contract | StepQuant: plain | fused | graph | ComfyUI int8 |", "|---|---|---|---|---|"]
            parts.append("\n".join([f"## {title}\n", *table, *(_line(name, chosen[name], MODES) for name in sorted(chosen))]) + "\n")
    if on_gpu:
        devices = sorted({row["device"] for row in rows if row["mode"] in GPU_MODES})
        lines = "\n".join(_line(name, on_gpu[name], GPU_MODES) for name in sorted(on_gpu))
        parts.append(GPU_HEAD.format(devices=", ".join(devices), summary=_summary(on_gpu)) + lines + "\n")
    return "\n".join(parts)


def _by_contract(rows: list[dict], modes: tuple[str, ...]) -> dict[str, dict[str, dict]]:
    """contract -> mode -> row, of these modes."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["mode"] in modes:
            found.setdefault(row["contract"], {})[row["mode"]] = row
    return found


def _head(rows: list[dict], by_contract: dict) -> str:
    days = sorted({row["utc"][:10] for row in rows})
    return HEAD.format(
        comfyui=", ".join(sorted({row["comfyui"] for row in rows})),
        days=" to ".join(dict.fromkeys((days[0], days[-1]))),
        summary=_summary(by_contract),
    )


def _summary(by_contract: dict[str, dict[str, dict]]) -> str:
    ours = sum(all(row["ours"] == "holds" for row in modes.values()) for modes in by_contract.values())
    tried = [modes for modes in by_contract.values() if _native(modes)["native"] != NOT_TRIED]
    native = sum(_native(modes)["native"] == "holds" for modes in tried)
    beside = f"ComfyUI's int8 holds {native}" + ("" if len(tried) == len(by_contract) else f" of the {len(tried)} tried with it")
    return f"Of {len(by_contract)} contracts, StepQuant holds {ours} in every mode tried; {beside}."


def _native(modes: dict[str, dict]) -> dict:
    """A row in which ComfyUI's int8 was tried, if there is one."""
    return next((row for row in modes.values() if row["native"] != NOT_TRIED), next(iter(modes.values())))


def _line(name: str, modes: dict[str, dict], columns: tuple[str, ...]) -> str:
    native = _native(modes)
    path, _, test = native["test"].partition("::")
    cells = [_cell(modes[mode]["ours"], modes[mode]["ours_error"]) if mode in modes else "" for mode in columns]
    cells.append(_cell(native["native"], native["native_error"]))
    return f"| [{name}](../{path}#L{_line_number(path, test)}) | {' | '.join(cells)} |"


def _cell(verdict: str, error: float | None) -> str:
    if verdict == NOT_TRIED:
        return ""
    text = verdict.replace("|", "\\|")
    return f"holds, {100 * error:.1f} %" if verdict == "holds" and error is not None else f"**{text}**"


def _file(modes: dict[str, dict]) -> str:
    return Path(next(iter(modes.values()))["test"].partition("::")[0]).name


def _line_number(path: str, test: str) -> int:
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.search(rf"^def {re.escape(test)}\(", text, re.MULTILINE)
    return text[: found.start()].count("\n") + 1 if found else 1


def main() -> None:
    PAGE.write_text(render(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
