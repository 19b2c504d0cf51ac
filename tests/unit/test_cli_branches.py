"""Branches and QuEST on the command line: what is offered, what it takes and how large it gets are said before anything starts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("typer", reason="the command line needs typer and rich (stepquant[demo])")

from typer.testing import CliRunner

from stepquant.cli.app import app
from stepquant.quant.calibration import Calibration
from stepquant.quant.file_format import read_header, read_model
from stepquant.quant.observer import LayerObserver
from stepquant.quant.recipe import Recipe
from stepquant.quant.rounding.folder import RoundedFolder
from stepquant.quant.rounding.hessian import HessianFolder, HessianObserver
from stepquant.quant.rounding.method import Rounding
from stepquant.quant.sensitivity import LayerSensitivity

LINEAR, CONV = "middle_block.1.proj_in", "middle_block.0.in_layers.2"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def unet(tmp_path):
    """A file that passes for an SDXL UNet, with one Linear: four strong directions and noise, which a branch is good at."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"input_blocks.0.0.weight": (8, 4, 3, 3), "out.2.weight": (4, 8, 3, 3), "label_emb.0.0.weight": (8, 8)}
    shapes |= {f"{LINEAR}.bias": (192,), f"{CONV}.weight": (8, 8, 3, 3)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    strong = torch.randn(192, 4, generator=generator) @ torch.randn(4, 192, generator=generator)
    tensors[f"{LINEAR}.weight"] = 10 * strong + torch.randn(192, 192, generator=generator)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, tmp_path / "unet.safetensors")
    return tmp_path / "unet.safetensors"


def _rows():
    return torch.randn(400, 192, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calibration(tmp_path):
    observers = {LINEAR: LayerObserver(192), CONV: LayerObserver(8)}
    observers[LINEAR].update(_rows()[None], [3])
    observers[CONV].update(_rows()[None, :, :8], [3])
    found = Calibration({name: observer.statistics() for name, observer in observers.items()})
    found.sensitivity = {name: LayerSensitivity(torch.tensor([3]), torch.ones(1), torch.ones(1)) for name in observers}
    found.save(tmp_path / "calibration.safetensors")
    return tmp_path / "calibration.safetensors"


@pytest.fixture
def hessians(tmp_path):
    observer = HessianObserver(192)
    observer.update(_rows())
    HessianFolder(tmp_path / "hessians").write(LINEAR, observer)
    return tmp_path / "hessians"


def _plan(unet, calibration, tmp_path, megabytes, *options):
    out = tmp_path / "plan.json"
    result = run("plan", unet, calibration, out, "--int4", "--max-size-mb", megabytes, *options)
    assert result.exit_code == 0, result.output
    return Recipe.from_json(json.loads(out.read_text()), "plan")


def test_a_plan_takes_a_branch_where_it_pays_and_quantize_says_how_large_it_is(unet, calibration, hessians, tmp_path):
    # Room for 4 bits and a branch of rank 4 (3 kB), none for 8 bits (18 kB more).
    options = ("--low-rank", "4", "--hessians", hessians)
    recipe = _plan(unet, calibration, tmp_path, 0.03, *options)
    assert recipe.schemes[LINEAR].rank == 4
    out = tmp_path / "out.safetensors"
    result = run(
        "quantize",
        unet,
        out,
        "--recipe",
        tmp_path / "plan.json",
        "--rounding",
        "gptq",
        "--hessians",
        hessians,
        "--calibration",
        calibration,
    )
    assert result.exit_code == 0, result.output
    assert "branches beside 1 layer: " in " ".join(result.stdout.split())
    assert tuple(read_model(out).layers[LINEAR].branch_up.shape) == (192, 4) and read_header(out).version == 2
    report = json.loads(run("inspect", out, "--json").stdout)
    assert report["part_bytes"]["branches"] == 2 * 4 * (192 + 192)
    assert "rank 4" in " ".join(run("inspect", out).stdout.split())


def test_a_plan_takes_8_bits_instead_where_the_weight_has_no_strong_directions_and_the_file_may_be_larger(unet, calibration, tmp_path):
    tensors = load_file(unet)
    tensors[f"{LINEAR}.weight"] = torch.randn(192, 192, generator=torch.Generator().manual_seed(3)).half()
    save_file(tensors, unet)
    small, large = (_plan(unet, calibration, tmp_path, size, "--low-rank", "4").schemes[LINEAR] for size in (0.03, 1))
    assert small.rank == 4
    assert large.weight_bits == 8


def test_branches_are_off_unless_asked_for_and_need_4_bits(unet, calibration, tmp_path):
    assert not any(scheme.rank for scheme in _plan(unet, calibration, tmp_path, 0.03).schemes.values())
    result = run("plan", unet, calibration, tmp_path / "other.json", "--low-rank", "4")
    assert result.exit_code == 1 and "--low-rank: branches run beside 4-bit weights. Give --int4 too." in " ".join(result.stderr.split())


def test_quantize_takes_what_quest_tuned(unet, tmp_path):
    weight = load_file(unet)[f"{LINEAR}.weight"]
    tuned = Rounding().round(0.9 * weight.float(), LINEAR)
    RoundedFolder(tmp_path / "tuned").write("start", {LINEAR: tuned})
    out = tmp_path / "out.safetensors"
    result = run("quantize", unet, out, "--preset", "w4a8-token", "--rounding", "quest", "--blocks", tmp_path / "tuned")
    assert result.exit_code == 0, result.output
    assert torch.equal(read_model(out).layers[LINEAR].qweight, tuned.packed())
    assert torch.equal(read_model(out).layers[LINEAR].weight_scale, tuned.scale)
    result = run("quantize", unet, tmp_path / "none.safetensors", "--preset", "w4a8-token", "--rounding", "quest")
    assert result.exit_code == 1 and "rounding quest: nothing was learned. Run `quest` first" in " ".join(result.stderr.split())


def test_quest_says_what_it_would_take(tmp_path):
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    result = run("quest", "demo", tmp_path / "tuned", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["parts"] == 1 and report["values"] > 1e6 and not report["tuned"]
    text = " ".join(run("quest", "demo", tmp_path / "tuned", "--dry-run").stdout.split())
    assert "weights in 1 part: " in text and "min here" in text and "of RAM" in text and "on disk" in text
    assert not (tmp_path / "tuned").exists()
