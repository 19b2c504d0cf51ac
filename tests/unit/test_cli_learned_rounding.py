"""`quest` and `reconstruct` on the command line, with the training itself left out: what reaches it, and what is said afterwards."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer", reason="the command line needs typer and rich (stepquant[demo])")
pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")

from typer.testing import CliRunner

from stepquant.cli.app import app
from stepquant.hosts.diffusers import quest, reconstruct
from stepquant.quant.layers import find_layers
from stepquant.quant.recipe import preset_recipe

COMMANDS = {"quest": (quest, "tuned"), "reconstruct": (reconstruct, "rounded")}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(params=COMMANDS)
def command(request):
    return request.param


@pytest.fixture
def calls(command, monkeypatch):
    """What the training was called with."""
    known = []
    monkeypatch.setattr(COMMANDS[command][0], command, lambda *arguments: known.append(arguments))
    return known


def test_command_trains_on_the_prompts_given_and_says_what_comes_next(command, calls, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red box\na blue ball\n")
    result = run(command, "demo", tmp_path / "out", "--prompts", prompts, "--guidance", 3, "--seed", 7)
    assert result.exit_code == 0, result.output
    ((pipeline, recipe, texts, out, how, *_, statistics, progress),) = calls
    assert texts == ["a red box", "a blue ball"] and out == tmp_path / "out" and statistics is None and callable(progress)
    assert (how.sampling.guidance, how.sampling.seed, how.training.seed) == (3.0, 7, 7)
    assert any(scheme.weight_bits == 4 for scheme in recipe.schemes.values()) and pipeline.unet is not None
    assert f"Now: quantize --rounding {command} --blocks" in " ".join(result.stdout.split())


def test_command_prints_only_json_when_asked_for(command, calls, tmp_path):
    result = run(command, "demo", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["folder"] == str(tmp_path / "out") and report[COMMANDS[command][1]] and len(calls) == 1


def test_command_needs_the_calibration_of_a_static_recipe(command, calls, tmp_path):
    weight = "middle_block.1.proj_in"
    recipe = preset_recipe("w8a8-static", find_layers({f"{weight}.weight": (64, 64)}))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    result = run(command, "demo", tmp_path / "out", "--recipe", tmp_path / "recipe.json")
    assert result.exit_code == 1 and "Give the --calibration it was planned with" in " ".join(result.stderr.split())
    assert not calls
