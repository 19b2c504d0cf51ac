"""Renders docs/contracts.md from benchmarks/results/contracts.json, which the contract suite writes. Tries nothing itself.

STEPQUANT_RECORD_CONTRACTS=1 COMFYUI_PATH=<ComfyUI> python -m pytest tests/comfyui/contracts && python benchmarks/contracts_table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "contracts.json", ROOT / "docs" / "contracts.md"
MODES = ("plain", "fused", "graph")
THEMES = {
    "test_loras.py": "LoRAs",
    "test_hooks.py": "LoRAs per prompt and per step (hooks)",
    "test_controls.py": "ControlNet, adapters",
    "test_patches.py": "Nodes that patch the UNet",
    "test_merges.py": "Merging",
    "test_variants.py": "Kinds of SDXL, samplings, few-step schedules",
    "test_prompts.py": "Prompts, sizes, batches",
    "test_memory.py": "Loading, saving, rebuilding",
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


def render(rows: list[dict]) -> str:
    """The page. rows: as in contracts.json."""
    by_contract: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_contract.setdefault(row["contract"], {})[row["mode"]] = row
    parts = [_head(rows, by_contract)]
    for file, title in THEMES.items():
        chosen = {name: modes for name, modes in by_contract.items() if _file(modes) == file}
        if chosen:
            table = ["| contract | StepQuant: plain | fused | graph | ComfyUI int8 |", "|---|---|---|---|---|"]
            parts.append("\n".join([f"## {title}\n", *table, *(_line(name, modes) for name, modes in sorted(chosen.items()))]) + "\n")
    return "\n".join(parts)


def _head(rows: list[dict], by_contract: dict) -> str:
    days = sorted({row["utc"][:10] for row in rows})
    ours = sum(all(row["ours"] == "holds" for row in modes.values()) for modes in by_contract.values())
    native = sum(next(iter(modes.values()))["native"] == "holds" for modes in by_contract.values())
    summary = f"Of {len(by_contract)} contracts, StepQuant holds {ours} in every mode; ComfyUI's int8 holds {native}."
    return HEAD.format(
        comfyui=", ".join(sorted({row["comfyui"] for row in rows})), days=" to ".join(dict.fromkeys((days[0], days[-1]))), summary=summary
    )


def _line(name: str, modes: dict[str, dict]) -> str:
    first = next(iter(modes.values()))
    path, _, test = first["test"].partition("::")
    cells = [_cell(modes[mode]["ours"], modes[mode]["ours_error"]) if mode in modes else "" for mode in MODES]
    return f"| [{name}](../{path}#L{_line_number(path, test)}) | {' | '.join(cells)} | {_cell(first['native'], first['native_error'])} |"


def _cell(verdict: str, error: float | None) -> str:
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
