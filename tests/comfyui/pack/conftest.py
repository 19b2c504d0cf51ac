"""A ComfyUI folder with the pack and the demo model in it, and processes that run graphs there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stepquant.demo.checkpoint import write_checkpoint

from .graph_process import GraphProcess

ROOT = Path(__file__).resolve().parents[3]
# Artists clone into whatever name they like. (With a space the nodes work too, but ComfyUI serves no help pages.)
PACK_FOLDER = "some-Pack_v0.1-main"
CHECKPOINT = "demo.safetensors"


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("demo") / CHECKPOINT)


def make_base(folder: Path, checkpoint: Path) -> Path:
    """A ComfyUI base directory: the pack, the registration of the demo model's size, and its checkpoint."""
    custom_nodes, checkpoints = folder / "custom_nodes", folder / "models" / "checkpoints"
    custom_nodes.mkdir(parents=True)
    checkpoints.mkdir(parents=True)
    for name in ("diffusion_models", "unet", "vae", "loras"):
        (folder / "models" / name).mkdir()
    (custom_nodes / PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
    shutil.copytree(ROOT / "demo" / "comfy_arch", custom_nodes / "demo_arch", ignore=shutil.ignore_patterns("__pycache__"))
    (checkpoints / CHECKPOINT).symlink_to(checkpoint)
    return folder


@pytest.fixture(scope="session")
def graphs(comfyui_path, demo_checkpoint, tmp_path_factory):
    """Runs graphs in a ComfyUI process where the command line's extras cannot be imported."""
    process = GraphProcess(comfyui_path, make_base(tmp_path_factory.mktemp("comfy"), demo_checkpoint))
    yield process
    process.stop()
