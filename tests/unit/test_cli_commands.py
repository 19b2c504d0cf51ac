"""The commands that make pictures, on the demo model with few steps, and the ones that need none."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

pytest.importorskip("typer", reason="the command line needs typer and rich (stepquant[demo])")
pytest.importorskip("diffusers", reason="pictures need diffusers (stepquant[demo])")

from typer.testing import CliRunner

from stepquant.cli.app import app
from stepquant.cli.checkpoint_pipeline import load_pipeline
from stepquant.cli.output import one_sentence_errors
from stepquant.demo.checkpoint import write_checkpoint
from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.hosts.diffusers.quantize import is_quantized
from stepquant.quant.calibration import Calibration
from stepquant.quant.sensitivity import LayerSensitivity
from stepquant.version import VERSION


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def demo_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new folder"
    result = run("demo", "--out", out, "--prompts", 1, "--steps", 1, "--json")
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


def test_demo_reports_every_format_with_its_figures(demo_out):
    out, report = demo_out
    assert [entry["mode"] for entry in report["formats"]] == ["fp16", "w8a8-token", "w8a8-static", "w4a8-mixed"]
    reference, *quantized = report["formats"]
    assert reference["sqnr_db"] is None and reference["integer_mac_share"] is None
    for entry in quantized:
        assert entry["integer_mac_share"] >= 0.98
        assert entry["sqnr_worst_db"] <= entry["sqnr_db"] and entry["sqnr_db"] > 15
        assert entry["size_bytes"] == (out / entry["file"]).stat().st_size < 0.6 * reference["size_bytes"]
        assert entry["peak_bytes"] < reference["peak_bytes"]
    assert json.loads((out / "report.json").read_text()) == report


def test_demo_writes_the_sheet_and_files_that_inspect_reads(demo_out):
    out, report = demo_out
    sheet = Image.open(out / "sheet.png")
    assert sheet.width > 3 * 256 and sheet.height > 256
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["report.json", "sheet.png", *(entry["file"] for entry in report["formats"][1:])]
    )
    inspected = json.loads(run("inspect", out / report["formats"][2]["file"], "--json").stdout)
    assert inspected["preset"] == "w8a8-static" and inspected["base_model"]["sha256"]


def test_compare_judges_the_file_that_demo_wrote(demo_out, tmp_path):
    out, report = demo_out
    quantized = out / report["formats"][1]["file"]
    result = run("compare", "demo", quantized, "--count", 1, "--steps", 1, "--out", tmp_path / "c.png", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["sqnr_db"] == pytest.approx(report["formats"][1]["sqnr_db"], abs=0.5)
    assert figures["integer_mac_share"] == 1.0
    assert Image.open(tmp_path / "c.png").width > 2 * 256


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The demo model as one whole checkpoint, and that quantized."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole, quantized = write_checkpoint(folder / "whole.safetensors"), folder / "quantized.safetensors"
    assert run("quantize", whole, quantized).exit_code == 0
    return whole, quantized


def test_compare_opens_whole_checkpoints_and_judges_quantized_ones(checkpoints, tmp_path):
    whole, quantized = checkpoints
    result = run("compare", whole, quantized, "--out", tmp_path / "c.png", "--count", 1, "--steps", 1, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["sqnr_db"] > 15 and figures["integer_mac_share"] == 1.0


def test_load_pipeline_opens_checkpoints_quantized_or_not(checkpoints):
    first, second, shipped = *map(load_pipeline, checkpoints), load_demo_pipeline()
    assert not is_quantized(first.unet) and is_quantized(second.unet)
    for pipeline, parts in ((first, ("unet", "vae", "text_encoder", "text_encoder_2")), (second, ("vae", "text_encoder"))):
        for part in parts:
            wanted, found = getattr(shipped, part).state_dict(), getattr(pipeline, part).state_dict()
            assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted), part
    assert first.config["force_zeros_for_empty_prompt"] is False


def test_compare_says_what_is_missing_when_the_reference_is_a_unet_alone(demo_out, tmp_path):
    out, report = demo_out
    unet = out / report["formats"][1]["file"]
    result = run("compare", unet, unet, "--out", tmp_path / "c.png", "--device", "cpu")
    assert result.exit_code == 1 and "Give a whole SDXL checkpoint" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_calibrate_saves_what_quantize_can_use(tmp_path):
    (tmp_path / "prompts.txt").write_text("3d render of a cat\n\n")
    file, out = tmp_path / "c.safetensors", tmp_path / "q.safetensors"
    result = run("calibrate", "demo", file, "--prompts", tmp_path / "prompts.txt", "--steps", 1, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["prompts"] == ["3d render of a cat"]
    assert len(Calibration.load(file).layers) > 100
    assert run("quantize", "demo", out, "--preset", "w8a8-static", "--calibration", file).exit_code == 0


@pytest.fixture(scope="module")
def probed_calibration(tmp_path_factory):
    """A calibration of the demo model with made-up sensitivities: measuring them takes minutes."""
    file = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    prompts = file.parent / "prompts.txt"
    prompts.write_text("3d render of a cat\n")
    assert run("calibrate", "demo", file, "--prompts", prompts, "--steps", 2, "--device", "cpu").exit_code == 0
    calibration = Calibration.load(file)
    calibration.sensitivity = {
        name: LayerSensitivity(torch.tensor([30]), torch.tensor([0.01]), torch.tensor([1.0])) for name in calibration.layers
    }
    calibration.save(file)
    return file


def test_plan_writes_a_recipe_that_quantize_follows(probed_calibration, tmp_path):
    recipe, out = tmp_path / "plan.json", tmp_path / "q.safetensors"
    protected = "middle_block.1.proj_in"
    result = run("plan", "demo", probed_calibration, recipe, "--protect", protected, "--groups", 2, "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["integer_mac_share"] >= 0.98 and protected in plan["kept_16_bit"]
    assert plan["layers"][protected] == {"choice": "fp16", "sqnr_db": None, "noise_share": 0.0}
    result = run("quantize", "demo", out, "--recipe", recipe, "--calibration", probed_calibration)
    assert result.exit_code == 0, result.stderr
    found = json.loads(run("inspect", out, "--json").stdout)
    assert found["preset"] == "plan" and found["quantizable_layers_in_16_bit"] == sorted(plan["kept_16_bit"])
    assert abs(out.stat().st_size - plan["size_bytes"]) < 0.02 * plan["size_bytes"] + 500_000, "the header is not counted"


def test_plan_says_in_a_sentence_what_does_not_fit(probed_calibration, tmp_path):
    result = run("plan", "demo", probed_calibration, tmp_path / "plan.json", "--max-size-mb", 1, "--grouping", "uniform")
    assert result.exit_code == 1 and "the smallest file is 14." in " ".join(result.stderr.split())
    assert not (tmp_path / "plan.json").exists()


def test_quantize_says_so_when_a_recipe_needs_a_calibration_or_is_none(probed_calibration, tmp_path):
    recipe = tmp_path / "plan.json"
    arguments = ("--grouping", "uniform", "--min-sqnr-db", 20)
    assert run("plan", "demo", probed_calibration, recipe, *arguments).exit_code == 0
    result = run("quantize", "demo", tmp_path / "q.safetensors", "--recipe", recipe)
    assert result.exit_code == 1 and "plan: needs --calibration FILE" in " ".join(result.stderr.split())
    recipe.write_text("{")
    result = run("quantize", "demo", tmp_path / "q.safetensors", "--recipe", recipe)
    assert result.exit_code == 1 and "cannot read the recipe" in " ".join(result.stderr.split())


def test_plan_with_a_floor_may_use_16_bit_codes_and_prints_nothing_but_json(probed_calibration, tmp_path, capfd):
    found = []
    for floor in (20, 42):
        result = run("plan", "demo", probed_calibration, tmp_path / "plan.json", "--grouping", "uniform", "--min-sqnr-db", floor, "--json")
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(result.stdout))
    assert not capfd.readouterr().out, "the solver's own lines"
    assert [plan["sqnr_db"] >= floor for plan, floor in zip(found, (20, 42), strict=True)] == [True, True]
    wide = [sorted(name for name, layer in plan["layers"].items() if layer["choice"] == "token16") for plan in found]
    assert not wide[0] and wide[1]
    assert found[0]["wide_mac_share"] == 0 < found[1]["wide_mac_share"] < 1
    assert json.loads((tmp_path / "plan.json").read_text())["schemes"][wide[1][0]]["activation"] == "token16"


def test_calibrate_refuses_an_unknown_mode(tmp_path):
    result = run("calibrate", "demo", tmp_path / "c.safetensors", "--mode", "some")
    assert result.exit_code == 1 and "Choose one of full, srm, progressive, noisiest" in result.stderr


def test_calibrate_refuses_an_empty_list_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    result = run("calibrate", "demo", tmp_path / "c.safetensors", "--prompts", tmp_path / "prompts.txt")
    assert result.exit_code == 1 and "holds no prompts" in result.stderr
    assert not (tmp_path / "c.safetensors").exists()


def test_demo_says_so_when_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("demo", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1 and "cannot make this folder" in " ".join(result.stderr.split())


def test_check_reports_every_device_and_its_kernels():
    report = json.loads(run("check", "--json").stdout)
    assert report["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu" and report["devices"][0]["backend"]
    assert "cpu" in run("check").stdout


def test_device_that_is_not_there_is_one_sentence(tmp_path):
    result = run("compare", "demo", "demo", "--device", "tpu", "--out", tmp_path / "c.png")
    assert result.exit_code == 1 and "Choose auto, cpu or cuda" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "Stopped."),
        (OSError(28, "No space left on device", "/out/a.png"), 1, "/out/a.png: No space left on device. Free disk space"),
        (ModuleNotFoundError("No module named 'diffusers'", name="diffusers"), 1, 'pip install "stepquant[demo]"'),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "not enough memory"),
    ],
    ids=["ctrl-c", "disk-full", "extra-missing", "out-of-memory"],
)
def test_foreseen_faults_are_one_sentence(error, code, sentence):
    import typer

    lone = typer.Typer()

    @lone.command()
    @one_sentence_errors
    def command() -> None:
        raise error

    result = CliRunner().invoke(lone, [])
    assert result.exit_code == code
    assert sentence in " ".join(result.stderr.split())


def test_module_says_what_to_install_when_typer_is_missing():
    hide = "import sys; sys.modules['typer'] = None; from stepquant.__main__ import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr == 'Error: typer is not installed. Run: pip install "stepquant[demo]"\n'


def test_module_prints_its_version():
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.strip() == VERSION
