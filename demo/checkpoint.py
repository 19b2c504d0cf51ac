"""Writes the demo model as one checkpoint file that ComfyUI's stock loader opens once `comfy_arch` is registered.

python -m stepquant.demo.checkpoint OUT.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

from .ldm_state import expand_token_tables

MODEL_DIR = Path(__file__).parent / "model"
VOCAB_SIZE = 49408


def write_checkpoint(path: str | Path) -> Path:
    """Write UNet, both text encoders with whole token tables, and VAE, fp16, under SDXL's key names.

    Returns: the path written. An existing file is replaced.
    """
    state = {}
    for name in ("unet", "text_encoders", "vae"):
        state.update(load_file(MODEL_DIR / f"{name}.safetensors"))
    state = {key: value.contiguous() for key, value in expand_token_tables(state, VOCAB_SIZE).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"modelspec.title": "StepQuant demo model"})
    return path


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m stepquant.demo.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="file to write, for example ComfyUI/models/checkpoints/stepquant_demo.safetensors")
    print(write_checkpoint(parser.parse_args().out))  # noqa: T201


if __name__ == "__main__":
    main()
