"""Many queued runs that alternate models and LoRAs: memory must not grow. Opt-in: STEPQUANT_ENDURANCE=200 runs that many."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_sdxl
from safetensors.torch import save_file

from . import workflows as w
from .conftest import PACK_FOLDER, ROOT
from .graph_process import GraphProcess

VARIABLE = "STEPQUANT_ENDURANCE"
RESULTS = ROOT / "benchmarks" / "results" / "endurance.json"
WARM_UP = 20  # caches fill, the allocator finds its size
CYCLE = 12  # runs until models and LoRAs come in the same order again
LARGEST_GROWTH = 0.02
CHECKPOINTS, LORAS = ("tiny_0.safetensors", "tiny_1.safetensors"), ("", "lora_0.safetensors", "lora_1.safetensors")
TINY_ARCHITECTURE = """
import sys
sys.path.insert(0, {folder!r})
import tiny_sdxl
tiny_sdxl.register()
NODE_CLASS_MAPPINGS = {{}}
"""


@pytest.fixture
def tiny_graphs(comfyui_path, tmp_path):
    """A ComfyUI process with two tiny checkpoints and two LoRAs."""
    base, models = tmp_path / "base", tmp_path / "base" / "models"
    for folder in ("checkpoints", "loras", "diffusion_models"):
        (models / folder).mkdir(parents=True)
    (base / "custom_nodes" / "tiny").mkdir(parents=True)
    (base / "custom_nodes" / PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
    folder = str(Path(tiny_sdxl.__file__).parent)
    (base / "custom_nodes" / "tiny" / "__init__.py").write_text(TINY_ARCHITECTURE.format(folder=folder))
    for number, name in enumerate(CHECKPOINTS):
        tiny_sdxl.write_checkpoint(models / "checkpoints" / name, seed=10 * number)
    for number, name in enumerate(LORAS[1:]):
        save_file(tiny_sdxl.lora_tensors(number), str(models / "loras" / name))
    process = GraphProcess(comfyui_path, base)
    yield process
    process.stop()
    shutil.rmtree(base)


def _graph(run: int) -> dict:
    """Another model, LoRA, seed and prompt than in the run before."""
    parts = w.stock_parts()
    parts["load"]["inputs"]["ckpt_name"] = CHECKPOINTS[run // 2 % len(CHECKPOINTS)]
    parts["positive"]["inputs"]["text"] = f"a red apple, number {run}"
    parts["latent"]["inputs"].update(width=64, height=64)
    graph, model = parts | w.quantize(), "quantize"
    if lora := LORAS[run % len(LORAS)]:
        graph["lora"] = w.node("LoraLoaderModelOnly", model=[model, 0], lora_name=lora, strength_model=0.8)
        model = "lora"
    graph |= w.sample(model=model, prefix="endurance")
    graph["sampler"]["inputs"].update(seed=run, steps=1)
    return graph


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"minutes long: set {VARIABLE}=200 to run 200 graphs")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
def test_memory_does_not_grow_over_many_runs(tiny_graphs):
    runs, measured = int(os.environ[VARIABLE]), []
    for run in range(runs):
        tiny_graphs.outputs(_graph(run))
        measured.append(tiny_graphs.memory_bytes())
        if run + 1 >= WARM_UP + CYCLE and (run + 1) % 10 == 0:
            record = _record(measured)
            RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    assert record["growth"] <= LARGEST_GROWTH, record


def _record(measured: list[int]) -> dict:
    """Means over a whole cycle of models and LoRAs, since what ComfyUI keeps in memory depends on where in it a run is."""
    early, late = (sum(part) // CYCLE for part in (measured[WARM_UP : WARM_UP + CYCLE], measured[-CYCLE:]))
    return {
        "runs": len(measured),
        "after_20_runs_bytes": early,
        "at_the_end_bytes": late,
        "growth": round(late / early - 1, 5),
        "bytes_every_10_runs": measured[9::10],
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
