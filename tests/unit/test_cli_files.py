"""quantize and inspect on files: a real round trip, and one sentence with exit code 1 for everything that can be wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("typer", reason="the command line needs typer and rich (stepquant[demo])")

from typer.testing import CliRunner

from stepquant.cli.app import app
from stepquant.demo.architecture import MODEL_DIR
from stepquant.quant.calibration import Calibration
from stepquant.quant.file_format import read_model
from stepquant.quant.layers import UNET_PREFIX, find_layers
from stepquant.quant.observer import LayerStatistics
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.weight import dequantize_weight

CONV, LINEAR = "input_blocks.1.0.in_layers.2", "middle_block.1.proj_in"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_sentence(result, *parts):
    """The command failed as it should: exit code 1, the reason on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    message = " ".join(result.stderr.split())
    assert message.startswith("Error: ") and "Traceback" not in message
    for part in parts:
        assert part in message


def tiny_unet():
    """Shapes that pass for SDXL: two quantizable layers and what detection looks at."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "input_blocks.0.0.weight": (8, 4, 3, 3),
        "out.2.weight": (4, 8, 3, 3),
        "label_emb.0.0.weight": (8, 8),
        f"{CONV}.weight": (8, 8, 3, 3),
        f"{CONV}.bias": (8,),
        f"{LINEAR}.weight": (16, 8),
    }
    return {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


def write_checkpoint(path, **changes):
    tensors = {UNET_PREFIX + name: tensor for name, tensor in tiny_unet().items()}
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.ones(3).half()
    tensors.update(changes)
    save_file(tensors, path)
    return path


def write_calibration(path, names=(CONV, LINEAR), rows=None):
    """Of 8 channels without recorded rows, or of `rows` (R, K)."""
    absmax = torch.linspace(1, 2, 8) if rows is None else rows.abs().amax(0)
    rows = torch.empty(0, 8) if rows is None else rows
    statistics = {
        name: LayerStatistics(
            buckets=torch.tensor([10]),
            count=torch.tensor([1]),
            range_min=-absmax[None],
            range_max=absmax[None].clone(),
            token_absmax=torch.ones(1),
            rows=rows.half(),
            row_bucket=torch.full((len(rows),), 10),
        )
        for name in names
    }
    Calibration(statistics, {"prompts": ["a", "b"], "steps": 20}).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "in.safetensors")


def test_quantize_replaces_weights_and_copies_the_rest(checkpoint, tmp_path):
    result = run("quantize", checkpoint, tmp_path / "out.safetensors", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"] == 2
    model = read_model(tmp_path / "out.safetensors")
    assert model.layers.keys() == {CONV, LINEAR}
    assert torch.equal(model.layers[CONV].bias, tiny_unet()[f"{CONV}.bias"])
    assert model.layers[CONV].qweight.shape == (8, 3, 3, 8)
    assert model.extra.keys() == {"first_stage_model.decoder.conv_in.weight"}
    assert model.rest.keys() == {"input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight"}
    assert model.base_model["name"] == "in" and len(model.base_model["sha256"]) == 64


def test_quantize_takes_a_bare_unet(tmp_path):
    save_file(tiny_unet(), tmp_path / "unet.safetensors")
    assert run("quantize", tmp_path / "unet.safetensors", tmp_path / "out.safetensors").exit_code == 0
    assert read_model(tmp_path / "out.safetensors").layers.keys() == {CONV, LINEAR}


def test_quantize_file_makes_the_same_codes_as_the_diffusers_engine(tmp_path):
    pytest.importorskip("diffusers")
    from stepquant.demo.pipeline import load_demo_pipeline
    from stepquant.hosts.diffusers.quantize import quantize_unet, unet_shapes
    from stepquant.hosts.diffusers.unet_file import save
    from stepquant.quant.recipe import preset_recipe

    assert run("quantize", MODEL_DIR / "unet.safetensors", tmp_path / "file.safetensors").exit_code == 0
    unet = load_demo_pipeline().unet
    save(quantize_unet(unet, preset_recipe("w8a8-token", find_layers(unet_shapes(unet)))), tmp_path / "engine.safetensors")
    first, second = load_file(tmp_path / "file.safetensors"), load_file(tmp_path / "engine.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and tensor.dtype is second[name].dtype, name


def test_quantize_static_takes_scales_from_the_calibration(checkpoint, tmp_path):
    calibration = write_calibration(tmp_path / "c.safetensors")
    out = tmp_path / "out.safetensors"
    assert run("quantize", checkpoint, out, "--preset", "w8a8-static", "--calibration", calibration, "--groups", "4").exit_code == 0
    model = read_model(out)
    assert model.layers[LINEAR].act_scale.unique().tolist() == pytest.approx([2 / 127])
    assert model.layers[CONV].act_zero_point is not None
    assert len(set(model.recipe.groups)) == 4
    assert model.calibration["prompts"] == ["a", "b"]


def test_inspect_prints_json_of_header_schemes_and_sizes(checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    run("quantize", checkpoint, out, "--preset", "w8a8-static", "--calibration", write_calibration(tmp_path / "c.safetensors"))
    report = json.loads(run("inspect", out, "--json").stdout)
    assert report["format"] == 1 and report["kind"] == "checkpoint" and report["preset"] == "w8a8-static"
    assert report["timestep_groups"] == 8
    assert sum(scheme["layers"] for scheme in report["schemes"]) == 2
    assert report["part_bytes"]["codes"] == 8 * 8 * 9 + 16 * 8
    assert report["size_bytes"] == out.stat().st_size
    assert report["quantizable_layers_in_16_bit"] == []
    text = run("inspect", out, "--layers").stdout
    assert "timestep groups" in text and "0-7 8-15" in text and f"{LINEAR}: W8 static" in text


def test_inspect_shows_each_layers_channel_groups(tmp_path):
    scheme = Scheme(activation=ActivationMode.CHANNEL_GROUP, channel_groups=3, granularity=8, group_base=ActivationMode.TOKEN)
    (tmp_path / "recipe.json").write_text(json.dumps(Recipe({LINEAR: scheme, CONV: Scheme()}, "mixed", "test").to_json()))
    wide = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).half()
    checkpoint = write_checkpoint(tmp_path / "in.safetensors", **{f"{UNET_PREFIX}{LINEAR}.weight": wide})
    rows = torch.randn(32, 24, generator=torch.Generator().manual_seed(2))
    rows[:, ::5] *= 32
    calibration = write_calibration(tmp_path / "c.safetensors", (LINEAR,), rows)
    out = tmp_path / "out.safetensors"
    result = run("quantize", checkpoint, out, "--recipe", tmp_path / "recipe.json", "--calibration", calibration)
    assert result.exit_code == 0, result.output
    report = json.loads(run("inspect", out, "--json").stdout)
    assert (report["layers"][LINEAR]["effective_groups"], report["layers"][LINEAR]["granularity"]) == (2, 8)
    assert "effective_groups" not in report["layers"][CONV]
    text = run("inspect", out, "--layers").stdout
    assert "1 layers in 2 of 8" in text and f"{LINEAR}: W8 channel_group on token, 2 of at most 3 groups, granularity 8" in text


def test_inspect_describes_a_calibration(tmp_path):
    report = json.loads(run("inspect", write_calibration(tmp_path / "c.safetensors"), "--json").stdout)
    assert report["kind"] == "calibration" and report["layers"] == 2 and report["buckets"] == [10]


@pytest.mark.parametrize("command", [["inspect"], ["quantize", "--overwrite"], ["compare"]], ids=lambda parts: parts[0])
@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file"], ids=["missing", "empty", "garbage"])
def test_unreadable_input_is_one_sentence(command, content, tmp_path):
    file = tmp_path / "in.safetensors"
    if content is not None:
        file.write_bytes(content)
    more = [] if command[0] == "inspect" else [tmp_path / "out.png" if command[0] == "compare" else tmp_path / "out.safetensors"]
    if command[0] == "compare":
        more = [file, "--out", *more]
    result = run(command[0], file, *more, *command[1:])
    assert_one_sentence(result, str(file), "no such file" if content is None else "damaged")
    assert sorted(tmp_path.iterdir()) == ([] if content is None else [file])


def test_truncated_quantized_file_is_one_sentence(checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    run("quantize", checkpoint, out)
    out.write_bytes(out.read_bytes()[:-100])
    assert_one_sentence(run("inspect", out), str(out), "damaged or")


def change_header(file, **changes):
    with safe_open(str(file), "pt") as opened:
        header = json.loads(opened.metadata()["stepquant"])
    save_file(load_file(file), file, metadata={"stepquant": json.dumps(header | changes)})


def test_file_of_a_newer_version_asks_for_an_update(checkpoint, tmp_path):
    run("quantize", checkpoint, tmp_path / "out.safetensors")
    change_header(tmp_path / "out.safetensors", version=99)
    assert_one_sentence(run("inspect", tmp_path / "out.safetensors"), "newer StepQuant", "Update StepQuant")


def test_inspect_of_a_foreign_file_says_so(checkpoint):
    assert_one_sentence(run("inspect", checkpoint), "not a StepQuant model")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("input_blocks.0.0.weight", "out.2.weight"), "SD 1.x or 2.x"),
        (("double_blocks.0.img_attn.qkv.weight",), "transformer model"),
        (("down_blocks.0.resnets.0.conv1.weight",), "no SDXL UNet found"),
    ],
    ids=["sd15", "flux", "diffusers-names"],
)
def test_quantize_refuses_what_is_not_sdxl(names, reason, tmp_path):
    save_file({UNET_PREFIX + name: torch.ones(4, 4) for name in names}, tmp_path / "in.safetensors")
    assert_one_sentence(run("quantize", tmp_path / "in.safetensors", tmp_path / "out.safetensors"), reason)
    assert not (tmp_path / "out.safetensors").exists()


def test_quantize_refuses_what_is_quantized_already(checkpoint, tmp_path):
    run("quantize", checkpoint, tmp_path / "once.safetensors")
    result = run("quantize", tmp_path / "once.safetensors", tmp_path / "twice.safetensors")
    assert_one_sentence(result, "already quantized")
    assert not (tmp_path / "twice.safetensors").exists()


def test_quantize_names_the_layer_and_writes_nothing_when_weights_are_nan(tmp_path):
    broken = torch.full((16, 8), torch.nan).half()
    checkpoint = write_checkpoint(tmp_path / "in.safetensors", **{f"{UNET_PREFIX}{LINEAR}.weight": broken})
    assert_one_sentence(run("quantize", checkpoint, tmp_path / "out.safetensors"), LINEAR, "NaN")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_quantize_says_so_before_the_work_when_the_folder_cannot_be_written(checkpoint, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("stepquant.quant.atomic_file.tempfile.mkstemp", refuse)
    monkeypatch.setattr("stepquant.hosts.quantize_file.quantize_layer", lambda *args: pytest.fail("worked before it checked"))
    assert_one_sentence(run("quantize", checkpoint, tmp_path / "out.safetensors"), "cannot write here", "Permission denied")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_quantize_does_not_replace_a_file_unless_asked(checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    assert_one_sentence(run("quantize", checkpoint, out), "exists already", "--overwrite")
    assert_one_sentence(run("quantize", checkpoint, checkpoint, "--overwrite"), "is the file to be read")
    assert out.read_bytes() == b"precious"
    assert run("quantize", checkpoint, out, "--overwrite").exit_code == 0


def test_quantize_static_without_or_with_the_wrong_calibration(checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    assert_one_sentence(run("quantize", checkpoint, out, "--preset", "w8a8-static"), "needs --calibration")
    other = write_calibration(tmp_path / "c.safetensors", names=(CONV,))
    assert_one_sentence(
        run("quantize", checkpoint, out, "--preset", "w8a8-static", "--calibration", other), LINEAR, "not in this calibration"
    )
    assert_one_sentence(run("quantize", checkpoint, out, "--preset", "w4a4"), "w4a4", "choose one of")
    assert not out.exists()


def test_interrupt_leaves_nothing_half_written(checkpoint, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("stepquant.hosts.quantize_file.quantize_layer", interrupt)
    result = run("quantize", checkpoint, tmp_path / "out.safetensors")
    assert result.exit_code == 130 and "Stopped" in result.stderr
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_pickle_files_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02.")
    assert_one_sentence(run("quantize", tmp_path / "model.ckpt", tmp_path / "out.safetensors"), "pickle", "Convert it")


def test_export_writes_a_file_for_stock_comfyui(checkpoint, tmp_path):
    quantized, out = tmp_path / "q.safetensors", tmp_path / "native.safetensors"
    run("quantize", checkpoint, quantized)
    report = json.loads(run("export", quantized, out, "--json").stdout)
    tensors = load_file(out)
    assert report["size_bytes"] == out.stat().st_size
    assert tensors[f"{UNET_PREFIX}{LINEAR}.weight"].dtype is torch.int8 and tensors[f"{UNET_PREFIX}{CONV}.weight"].dtype is torch.float16
    assert "first_stage_model.decoder.conv_in.weight" in tensors
    assert_one_sentence(run("export", quantized, out), "exists already", "--overwrite")
    assert_one_sentence(run("export", checkpoint, tmp_path / "no.safetensors"), "not a StepQuant model")


def test_quantize_folds_the_mean_of_what_rounding_changes_into_biases(checkpoint, tmp_path):
    rows = torch.rand(64, 8, generator=torch.Generator().manual_seed(3)) + 1
    calibration = write_calibration(tmp_path / "c.safetensors", rows=rows)
    plain, corrected = tmp_path / "plain.safetensors", tmp_path / "corrected.safetensors"
    assert run("quantize", checkpoint, plain).exit_code == 0
    assert run("quantize", checkpoint, corrected, "--bias-correction", "--calibration", calibration).exit_code == 0
    before, after = (read_model(path).layers[CONV] for path in (plain, corrected))
    error = tiny_unet()[f"{CONV}.weight"].float() - dequantize_weight(before.qweight, before.weight_scale, torch.float32)
    expected = before.bias.float() + error.sum((2, 3)) @ rows.half().float().mean(0)
    assert torch.equal(before.qweight, after.qweight) and not torch.equal(before.bias, after.bias)
    assert torch.allclose(after.bias.float(), expected, atol=2e-3)
    result = run("quantize", checkpoint, tmp_path / "none.safetensors", "--bias-correction")
    assert result.exit_code == 1 and "Calibrate first" in result.output
