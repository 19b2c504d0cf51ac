"""Scale sets: experts and stacking, the file's round trip and its faults, whose model they belong to, and the training loop."""

import json
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepquant.errors import CalibrationError, FormatError, ModelError
from stepquant.quant.tuning.identity import check_identity, identity
from stepquant.quant.tuning.scale_file import HEADER_KEY, load_scale_set, save_scale_set
from stepquant.quant.tuning.scale_set import expert_of, is_scaled_norm, new_scale_set, stacked
from stepquant.quant.tuning.training import TuningSettings, load_state, train

LAYERS = {"middle_block.1.proj_in": 8, "input_blocks.4.1.transformer_blocks.0.attn2.to_k": 6}
NORM = "middle_block.1.norm"


def _scales(experts=2, seed=0):
    scales = new_scale_set(LAYERS, {NORM: 5}, experts)
    generator = torch.Generator().manual_seed(seed)
    for table in (scales.out, scales.into):
        for name in table:
            table[name] = 0.3 * torch.randn(table[name].shape, generator=generator)
    scales.base, scales.summary = {"name": "base"}, {"steps": 3}
    return scales


def test_experts_cut_the_schedule_into_equal_parts_and_keys_and_values_have_one():
    assert expert_of(torch.tensor([0, 31, 32, 63]), 2).tolist() == [0, 0, 1, 1]
    scales = _scales(experts=4)
    assert [tuple(table.shape) for table in scales.out.values()] == [(4, 8), (1, 6)]
    with pytest.raises(FormatError, match="1, 2, 4"):
        new_scale_set(LAYERS, {}, 3)


@pytest.mark.parametrize(
    ("name", "scaled"),
    [
        ("input_blocks.4.1.norm", True),
        ("middle_block.1.transformer_blocks.0.norm3", True),
        ("input_blocks.4.0.in_layers.0", False),
        ("out.0", False),
    ],
)
def test_only_norms_that_linears_read_are_scaled(name, scaled):
    assert is_scaled_norm(name) is scaled


def test_stacked_sets_multiply_with_their_strengths_as_exponents():
    one, two = _scales(experts=1), _scales(experts=2, seed=1)
    experts, out, into = stacked([(one, 0.5), (two, -1.0)])
    assert experts == 2
    name = next(iter(LAYERS))
    expected = one.out[name].exp() ** 0.5 / two.out[name].exp()
    assert torch.allclose(out[name], expected) and out[name].shape == (2, 8)
    assert torch.allclose(into[NORM], (0.5 * one.into[NORM] - two.into[NORM]).exp())
    assert stacked([]) == (1, {}, {})


def test_stacked_refuses_sets_of_different_models():
    other = new_scale_set({"middle_block.1.proj_in": 9}, {}, 1)
    with pytest.raises(FormatError, match=r"middle_block\.1\.proj_in: 8 factors in one scale LoRA, 9 in another"):
        stacked([(_scales(1), 1.0), (other, 1.0)])


def test_scale_file_gives_back_the_factors_to_half_a_code(tmp_path):
    scales, path = _scales(), tmp_path / "s.safetensors"
    save_scale_set(scales, path, "0.1.0")
    loaded = load_scale_set(path)
    assert (loaded.experts, loaded.base, loaded.summary) == (2, {"name": "base"}, {"steps": 3})
    for before, after in ((scales.out, loaded.out), (scales.into, loaded.into)):
        assert before.keys() == after.keys()
        for name, logs in before.items():
            assert (after[name] - logs).abs().max() <= 0.51 * logs.abs().max() / 127


def test_scale_file_of_untrained_factors_changes_nothing(tmp_path):
    save_scale_set(new_scale_set(LAYERS, {NORM: 5}, 1), tmp_path / "s.safetensors", "0.1.0")
    assert all(not logs.any() for logs in load_scale_set(tmp_path / "s.safetensors").out.values())


def test_scale_file_refuses_factors_that_ran_away(tmp_path):
    scales = _scales()
    scales.out["middle_block.1.proj_in"][0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"middle_block\.1\.proj_in.*lower learning rate"):
        save_scale_set(scales, tmp_path / "s.safetensors", "0.1.0")
    assert not list(tmp_path.iterdir())


def _rewritten(path, header=None, **tensors):
    with safe_open(str(path), "pt") as file:
        metadata = dict(file.metadata())
    stored = json.loads(metadata[HEADER_KEY]) | (header or {})
    save_file({**load_file(path), **tensors}, str(path), {**metadata, HEADER_KEY: json.dumps(stored)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"header": {"version": 2}}, "newer StepQuant", id="newer"),
        pytest.param({"header": {"experts": 3}}, "experts", id="experts"),
        pytest.param({"header": {"layers": 99}}, "damaged", id="layers"),
        pytest.param({"out": torch.zeros(3, dtype=torch.int8)}, "3 codes where 22 are listed", id="codes"),
        pytest.param({"step": torch.full((3,), torch.nan)}, "a step out of its range", id="nan"),
        pytest.param({"names": torch.zeros(9, dtype=torch.uint8)}, "list of layers cannot be read", id="names"),
        pytest.param({"more": torch.zeros(1)}, "not those of a scale LoRA", id="tensors"),
    ],
)
def test_scale_file_says_in_one_sentence_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "s.safetensors"
    save_scale_set(_scales(), path, "0.1.0")
    _rewritten(path, **change)
    with pytest.raises(FormatError, match=message) as caught:
        load_scale_set(path)
    assert str(path) in str(caught.value)


def test_scale_file_does_not_inflate_without_end(tmp_path):
    path = tmp_path / "s.safetensors"
    save_scale_set(_scales(), path, "0.1.0")
    bomb = zlib.compress(b" " * (40 << 20), 9)
    _rewritten(path, names=torch.frombuffer(bytearray(bomb), dtype=torch.uint8))
    with pytest.raises(FormatError, match="list of layers cannot be read"):
        load_scale_set(path)


def test_identity_knows_a_model_through_other_dtypes_and_not_another_training():
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def read(name):
        if name not in weights:
            weights[name] = torch.randn(64, 64, generator=generator)
        return weights[name]

    known = identity(read, {"name": "base-xl", "sha256": None})
    check_identity(json.loads(json.dumps(known)), lambda name: weights[name].bfloat16(), {}, "f")
    with pytest.raises(ModelError, match="f: made for base-xl, and this is my-finetune"):
        check_identity(known, lambda name: weights[name] + 0.05 * torch.randn(64, 64, generator=generator), {"name": "my-finetune"}, "f")
    with pytest.raises(ModelError):
        check_identity({"name": "x", "sample": "no list"}, read, {}, "f")


def _quadratic(logs):
    """A loss with its minimum at 0.1, noisy by the step's generator."""
    return lambda step, generator: sum(((one - 0.1 - 0.01 * torch.rand(1, generator=generator)) ** 2).sum() for one in logs.values())


def _logs():
    return {name: torch.nn.Parameter(torch.zeros(2, 3)) for name in ("a", "b")}


def test_train_reaches_the_minimum_and_reports_every_step():
    logs, seen = _logs(), []
    train(logs, _quadratic(logs), TuningSettings(steps=150, learning_rate=0.01), progress=lambda *step: seen.append(step))
    assert len(seen) == 150 and seen[-1][:2] == (150, 150) and seen[-1][2] < seen[0][2]
    assert all(torch.allclose(one, torch.full_like(one, 0.105), atol=0.01) for one in logs.values())


def test_train_resumed_from_its_file_makes_the_same_factors(tmp_path):
    settings, whole = TuningSettings(steps=20, learning_rate=0.02), _logs()
    train(whole, _quadratic(whole), settings)
    stopped, path = _logs(), tmp_path / "state.safetensors"

    def cancel(done, total, loss):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, _quadratic(stopped), settings, progress=cancel, on_cancel=lambda state: state.save(path))
    resumed = _logs()
    state = train(resumed, _quadratic(resumed), settings, load_state(path))
    assert state.step == 20
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    with pytest.raises(CalibrationError, match="resume"):
        train(_logs(), _quadratic(_logs()), TuningSettings(steps=30), load_state(path))


def test_train_stops_in_words_when_the_loss_is_not_finite():
    logs = _logs()
    with pytest.raises(CalibrationError, match="lower learning rate"):
        train(logs, lambda step, generator: logs["a"].sum() * float("nan"), TuningSettings(steps=3))


def test_train_scales_the_loss_back_and_leaves_out_steps_that_overflow():
    plain, scaled = _logs(), _logs()
    settings = TuningSettings(steps=12)
    train(plain, _quadratic(plain), settings)
    train(scaled, _quadratic(scaled), settings, loss_scale=1024.0)
    assert torch.allclose(plain["a"], scaled["a"], atol=1e-6)
    huge = _logs()
    train(huge, lambda step, generator: huge["a"].sum() * 1e18, TuningSettings(steps=4), loss_scale=2.0**70)
    assert bool(huge["a"].isfinite().all()) and bool((huge["a"] < 0).all())
