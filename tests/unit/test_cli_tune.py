"""`tune` and `corrections` on the command line: a scale LoRA from pictures, and every foreseen fault as one sentence."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stepquant.cli.app import app
from stepquant.quant.tuning.scale_file import load_scale_set
from stepquant.quant.tuning.training import TuningSettings, TuningState


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (300, 200), "teal").save(folder / "first.png")
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "second.webp")
    (folder / "first.txt").write_text("flat icon of a zorp\n", encoding="utf-8")
    return folder


def test_tune_writes_a_scale_lora_from_a_folder_of_pictures(pictures, tmp_path):
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    model, out = tmp_path / "model.safetensors", tmp_path / "scales.safetensors"
    assert run("quantize", "demo", model, "--preset", "w4a8-token").exit_code == 0
    options = ["--images", pictures, "--prompt", "flat icon of a zorp", "--prior-weight", 0, "--steps", 1, "--batch", 1, "--json"]
    result = run("tune", "demo", model, out, *options, "--device", "cpu")
    assert result.exit_code == 0, result.output
    report, scales = json.loads(result.stdout), load_scale_set(out)
    assert report["kind"] == "pictures" and report["scales"] == scales.values and report["steps_done"] == 1
    assert report["size_bytes"] < 0.01 * model.stat().st_size
    assert scales.base["name"] == "unet"
    assert any(bool(table.any()) for table in scales.out.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--images", "nowhere"], "nowhere: no such folder", id="folder"),
        pytest.param(["--images", "empty"], "holds no pictures", id="no-pictures"),
        pytest.param(["--images", "pictures"], "second.webp: no prompt. Write one into second.txt", id="no-prompt"),
        pytest.param(["--resume"], "no such file", id="no-state"),
        pytest.param(["--prompts", "nowhere.txt"], "cannot read the prompts", id="prompts"),
    ],
)
def test_tune_says_in_one_sentence_what_is_missing(options, message, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = run("tune", "demo", "model.safetensors", "out.safetensors", *options)
    assert result.exit_code == 1 and message in " ".join(result.output.split())
    assert not (tmp_path / "out.safetensors").exists()


def test_tune_refuses_a_state_file_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TuningState(1, TuningSettings(), *(torch.zeros(3) for _ in range(3))).save(tmp_path / "other.state")
    (tmp_path / "out.safetensors.state").write_bytes((tmp_path / "other.state").read_bytes()[:40])
    result = run("tune", "demo", "model.safetensors", "out.safetensors", "--resume")
    assert result.exit_code == 1 and "damaged" in result.output


def test_corrections_says_which_prompts_it_cannot_read(tmp_path):
    result = run("corrections", "demo", "model.safetensors", tmp_path / "c.safetensors", "--held-out", tmp_path / "nowhere.txt")
    assert result.exit_code == 1 and "cannot read the prompts" in result.output
