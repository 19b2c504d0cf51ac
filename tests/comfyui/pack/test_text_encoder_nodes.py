"""Save text encoders and Load text encoders in ComfyUI's own executor: the file, what it refuses, and its list."""

from __future__ import annotations

from stepquant.quant.text_encoder import read_text_encoders

from . import workflows as w
from .test_nodes import text


def save(**inputs: object) -> dict:
    return {"save": w.node("StepQuantSaveTextEncoders", clip=["load", 1], **({"file_name": "clip8", "overwrite": False} | inputs))}


def load(file_name: str = "clip8.safetensors") -> dict:
    encode = w.node("CLIPTextEncode", text="a red apple", clip=["clip", 0])
    return {
        "clip": w.node("StepQuantLoadTextEncoders", file_name=file_name),
        "encode": encode,
        "show": w.node("PreviewAny", source=["encode", 0]),
    }


def test_text_encoders_are_saved_once_listed_and_of_another_size_refused(graphs):
    folder = graphs.base / "models" / "text_encoders"
    outputs = graphs.outputs(w.stock_parts() | save())
    size = (folder / "clip8.safetensors").stat().st_size
    assert f"{size / 2**20:.0f} MiB" in text(outputs, "save")
    assert any(key.endswith(".comfy_quant") for key in read_text_encoders(folder / "clip8.safetensors"))
    assert "exists already" in graphs.failure(w.stock_parts() | save(file_name="clip8.safetensors"))
    graphs.outputs(w.stock_parts() | save(overwrite=True))
    options = graphs.schemas()["StepQuantLoadTextEncoders"]["input"]["required"]["file_name"]
    assert "clip8.safetensors" in str(options)
    # The demo model's encoders are smaller than SDXL's, which the node opens.
    assert "not SDXL's text encoders" in graphs.failure(load())


def test_a_text_encoder_file_that_is_not_there_is_refused_before_anything_runs(graphs):
    answer = graphs.run(load("gone.safetensors"))
    assert not answer.get("success") and "gone.safetensors" in str(answer)
