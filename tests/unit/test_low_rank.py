"""Branches beside 4-bit codes: what they gain, that layers, files, exports and both engines hold them, and what a bad file is told."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.errors import CalibrationError, FormatError, SchemeError, WeightError
from stepquant.hosts import compute
from stepquant.hosts.low_rank import LowRankBranch
from stepquant.hosts.quantize_layer import quantize_layer
from stepquant.kernels import dispatch
from stepquant.quant.calibration import Calibration
from stepquant.quant.file_format import HEADER_KEY, QuantizedModel, read_header, read_model, write_model
from stepquant.quant.int4 import quantize_int4
from stepquant.quant.layer_noise import INT4_TOKEN, candidate_schemes, layer_options, stored_bytes
from stepquant.quant.layers import LayerSpec, find_layers
from stepquant.quant.low_rank import int4_beside_low_rank, low_rank, low_rank_bytes
from stepquant.quant.native_format import native_tensors
from stepquant.quant.observer import LayerObserver
from stepquant.quant.recipe import Recipe, preset_recipe
from stepquant.quant.rounding.folder import RoundedFolder
from stepquant.quant.rounding.gptq import gptq_int4
from stepquant.quant.rounding.method import Rounding, RoundingMethod, rounding_cost
from stepquant.quant.scheme import Scheme
from stepquant.quant.sensitivity import LayerSensitivity
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import dequantize_weight

LINEAR = "middle_block.1.proj_in"
BUCKET = torch.zeros(1, dtype=torch.int64)
WITH_BRANCH = Scheme(weight_bits=4, rank=8)


def _weight(N: int = 96, K: int = 192, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def _rows(K: int = 192, count: int = 2000) -> torch.Tensor:
    """Channels that are mixtures of a few sources, of very different energies."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, K // 8, generator=generator) @ torch.randn(K // 8, K, generator=generator)
    return (mixed + 0.3 * torch.randn(count, K, generator=generator)) * torch.logspace(-1, 1, K)


def _db(weight, rounded, rows):
    return sqnr_db(rows @ weight.t(), rows @ rounded.dequantize().t())


def test_a_weight_that_is_codes_and_a_branch_comes_back():
    codes = quantize_int4(_weight(), LINEAR).dequantize()
    outlier = 40 * torch.outer(_weight(96, 1, 1)[:, 0], _weight(192, 1, 2)[:, 0])
    found = int4_beside_low_rank(codes + outlier, 1, LINEAR, lambda weight: quantize_int4(weight, LINEAR))
    assert found.branch.rank == 1
    assert sqnr_db(codes + outlier, found.dequantize()) > sqnr_db(codes + outlier, quantize_int4(codes + outlier, LINEAR).dequantize()) + 15


def test_low_rank_is_the_best_approximation_in_the_measure_of_the_inputs():
    weight, rows = _weight(), _rows()
    counts = rows.t() @ rows / len(rows)
    factor = torch.linalg.cholesky(counts)
    U, S, V = torch.linalg.svd(weight @ factor, full_matrices=False)
    best = (U[:, :8] * S[:8]) @ V[:8]
    least = float((weight @ factor - best).square().sum())
    found = float(((low_rank(weight, 8, counts).dense() - weight) @ factor).square().sum())
    assert found < 1.01 * least


def test_a_branch_gains_on_rows_that_it_has_not_seen_the_more_so_the_higher_its_rank():
    weight, rows = _weight(), _rows()
    seen, unseen = rows[:1500], rows[1500:]
    hessian = seen.t() @ seen

    def rounded(left):
        return gptq_int4(left, hessian, LINEAR)

    found = [_db(weight, rounded(weight), unseen)]
    found += [_db(weight, int4_beside_low_rank(weight, rank, LINEAR, rounded, hessian), unseen) for rank in (4, 16)]
    assert found[0] + 0.3 < found[1] < found[2] - 1


def test_a_branch_that_knows_the_inputs_beats_plain_svd():
    weight, rows = _weight(), _rows()
    plain = [int4_beside_low_rank(weight, 8, LINEAR, lambda left: quantize_int4(left, LINEAR), H) for H in (None, rows.t() @ rows)]
    assert _db(weight, plain[1], rows) > _db(weight, plain[0], rows) + 3


def test_a_layer_takes_the_rows_of_a_calibration_for_its_branch_where_there_is_no_hessian():
    weight, rows = _weight(), _rows(count=256)
    observer = LayerObserver(192)
    observer.update(rows[None], [3])
    calibration = Calibration({LINEAR: observer.statistics()})
    layers = [quantize_layer(LINEAR, weight, None, WITH_BRANCH, (0,) * 64, one) for one in (None, calibration)]
    found = [sqnr_db(rows @ weight.t(), rows @ _float_weight(layer).t()) for layer in layers]
    assert found[1] > found[0] + 2


def test_a_rank_that_does_not_fit_names_the_layer():
    with pytest.raises(WeightError, match=rf"{LINEAR}: a branch of rank 97 beside a weight \(96, 192\); 1 to 96 fits"):
        int4_beside_low_rank(_weight(), 97, LINEAR, lambda weight: quantize_int4(weight, LINEAR))
    with pytest.raises(CalibrationError, match=f"{LINEAR}: a Hessian of shape"):
        int4_beside_low_rank(_weight(), 4, LINEAR, lambda weight: quantize_int4(weight, LINEAR), torch.eye(64))


@pytest.mark.parametrize("rank", [-1, 257, 4.5, True])
def test_a_scheme_refuses_a_rank_that_no_file_can_mean(rank):
    with pytest.raises(SchemeError, match=f"{LINEAR}: a branch of rank"):
        Scheme.from_json({"weight_bits": 4, "rank": rank}, LINEAR)
    with pytest.raises(SchemeError, match="beside 8-bit weights"):
        Scheme.from_json({"weight_bits": 8, "rank": 8}, LINEAR)


def test_schemes_without_a_branch_are_written_as_ever():
    assert "rank" not in Scheme(weight_bits=4).to_json()
    assert Scheme.from_json(WITH_BRANCH.to_json(), LINEAR) == WITH_BRANCH


def test_learned_codes_are_refused_beside_a_branch_that_they_were_not_learned_with(tmp_path):
    weight = _weight()
    learned = Rounding().round(weight, LINEAR, 4)
    RoundedFolder(tmp_path).write("block", {LINEAR: learned})
    rounding = Rounding(RoundingMethod.RECONSTRUCT, rounded=RoundedFolder(tmp_path).find)
    again = rounding.round(weight, LINEAR, 4)
    assert torch.equal(again.branch.up, learned.branch.up) and torch.equal(again.codes, learned.codes)
    with pytest.raises(CalibrationError, match="a branch of rank 4, and the recipe has rank 0"):
        rounding.round(weight, LINEAR)


def test_bytes_and_cost_count_the_branch():
    spec = LayerSpec(LINEAR, (96, 192))
    assert stored_bytes(spec, WITH_BRANCH) == stored_bytes(spec, replace(WITH_BRANCH, rank=0)) + low_rank_bytes((96, 192), 8)
    assert low_rank_bytes((96, 192), 8) == 2 * 8 * (96 + 192)
    alone, beside = (rounding_cost(RoundingMethod.GPTQ, {LINEAR: spec}, {LINEAR: rank}) for rank in (0, 8))
    assert beside.operations == 4 * alone.operations and beside.peak_bytes > alone.peak_bytes


def test_a_plan_is_offered_branches_only_where_they_are_small_beside_the_codes():
    assert f"{INT4_TOKEN} r16" in candidate_schemes(LayerSpec(LINEAR, (1280, 1280)), int4=True, ranks=(16, 32))
    assert not [label for label in candidate_schemes(LayerSpec(LINEAR, (64, 64)), int4=True, ranks=(16, 32)) if " r" in label]
    assert not [label for label in candidate_schemes(LayerSpec(LINEAR, (1280, 1280)), ranks=(16, 32)) if " r" in label]


def test_a_plan_measures_less_noise_with_a_branch_and_knows_that_it_takes_time():
    rows, weight = _rows(count=256), _weight(192, 192)
    observer = LayerObserver(192)
    observer.update(rows[None], [3])
    spec = LayerSpec(LINEAR, (192, 192))
    schemes = candidate_schemes(spec, int4=True, ranks=(8,))
    sensitivity = LayerSensitivity(torch.tensor([3]), torch.ones(1), torch.ones(1))
    options = layer_options(spec, weight, observer.statistics(), sensitivity, (0,) * 64, schemes, Rounding())
    alone, beside = options.find(INT4_TOKEN), options.find(f"{INT4_TOKEN} r8")
    assert float(beside.noise) < float(alone.noise)
    assert beside.stored_bytes > alone.stored_bytes and beside.time_per_mac > alone.time_per_mac and beside.is_integer


def _layer(scheme: Scheme = WITH_BRANCH, weight: torch.Tensor | None = None):
    bias = torch.randn(96, generator=torch.Generator().manual_seed(5))
    return quantize_layer(LINEAR, _weight() if weight is None else weight, bias, scheme, (0,) * 64, None)


def _float_weight(layer) -> torch.Tensor:
    codes = dispatch.expanded_codes(layer.qweight, dispatch.paired_scales(layer.group_scale), layer.weight_shape[1])
    return dequantize_weight(codes, layer.weight_scale, torch.float32) + layer.branch_up.float() @ layer.branch_down.float()


def test_linear_adds_what_the_branch_makes_of_its_float_input():
    layer, x = _layer(), torch.randn(2, 9, 192, generator=torch.Generator().manual_seed(3))
    paired = dispatch.paired_scales(layer.group_scale)
    branch = LowRankBranch(layer.branch_down, layer.branch_up)
    tensors = compute.LayerTensors(LINEAR, WITH_BRANCH, layer.qweight, layer.weight_scale, layer.bias, group_scale=paired, branch=branch)
    assert sqnr_db(torch.nn.functional.linear(x, _float_weight(layer), layer.bias), compute.linear(x, tensors, BUCKET)) > 38


def _write(path, scheme: Scheme = WITH_BRANCH):
    model = QuantizedModel({LINEAR: _layer(scheme)}, {}, Recipe({LINEAR: scheme}, "test", "test"))
    write_model(path, model, "1")
    return model


def test_a_file_with_a_branch_comes_back_bit_for_bit_and_says_that_older_versions_cannot_read_it(tmp_path):
    written = _write(tmp_path / "branch.safetensors").layers[LINEAR]
    read = read_model(tmp_path / "branch.safetensors").layers[LINEAR]
    assert all(torch.equal(getattr(read, part), tensor) for part, tensor in vars(written).items() if tensor is not None)
    assert read_header(tmp_path / "branch.safetensors").version == 2
    _write(tmp_path / "plain.safetensors", Scheme(weight_bits=4))
    assert read_header(tmp_path / "plain.safetensors").version == 1


DAMAGES = {
    "NaN": lambda tensors, header: tensors[_key("branch_up")].fill_(float("nan")),
    "missing": lambda tensors, header: tensors.pop(_key("branch_down")),
    "another rank": lambda tensors, header: header["recipe"]["schemes"][LINEAR].update(rank=4),
    "another layer's": lambda tensors, header: tensors.update({_key("branch_down"): tensors[_key("branch_down")][:, :64].clone()}),
    "fp32": lambda tensors, header: tensors.update({_key("branch_up"): tensors[_key("branch_up")].float()}),
    "no rank": lambda tensors, header: header["recipe"]["schemes"][LINEAR].pop("rank"),
    "old version": lambda tensors, header: header.update(version=1),
}


def _key(part: str) -> str:
    return f"model.diffusion_model.{LINEAR}.{part}"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_read_names_file_and_layer_when_a_branch_is_not_what_the_recipe_says(damage, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "branch.safetensors"
    _write(path)
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
    tensors = load_file(path)
    damage(tensors, header)
    save_file(tensors, path, {HEADER_KEY: json.dumps(header)})
    with pytest.raises(FormatError, match=f"branch.safetensors: {LINEAR}: branch_down and branch_up must be finite, fp16"):
        read_model(path)


@pytest.mark.parametrize("part", ["branch_down", "branch_up"])
def test_rounded_folder_refuses_a_damaged_branch(part, tmp_path):
    RoundedFolder(tmp_path).write("block", {LINEAR: Rounding().round(_weight(), LINEAR, 4)})
    tensors = load_file(tmp_path / "block.safetensors")
    tensors[f"{LINEAR}.{part}"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "block.safetensors", {"stepquant_rounded": json.dumps({"version": 2, "summary": {}})})
    with pytest.raises(FormatError, match=f"{LINEAR}: damaged"):
        RoundedFolder(tmp_path).find(LINEAR, (96, 192))


def test_a_stock_file_has_the_branch_in_its_weights(tmp_path):
    outlier = _weight() + 20 * torch.outer(_weight(96, 1, 1)[:, 0], _weight(192, 1, 2)[:, 0])
    model = QuantizedModel({LINEAR: _layer(weight=outlier)}, {}, Recipe({LINEAR: WITH_BRANCH}, "test", "test"))
    tensors = native_tensors(model)
    assert sqnr_db(outlier, tensors[f"{LINEAR}.weight"].float() * tensors[f"{LINEAR}.weight_scale"]) > 25


def test_the_embedded_engine_runs_saves_and_loads_branches(tmp_path):
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    from stepquant.demo.pipeline import load_demo_pipeline
    from stepquant.hosts.diffusers.quantize import quantize_unet, quantized_layers, unet_shapes
    from stepquant.hosts.diffusers.tune_layers import float_weight
    from stepquant.hosts.diffusers.unet_file import load, save

    original = load_demo_pipeline().unet
    recipe = preset_recipe("w4a8-mixed", find_layers(unet_shapes(original)))
    inside = "middle_block.1.transformer_blocks.0.ff"
    schemes = {name: replace(scheme, rank=8) if inside in name else scheme for name, scheme in recipe.schemes.items()}
    unet = quantize_unet(copy.deepcopy(original), replace(recipe, schemes=schemes))
    name = f"{inside}.net.2"
    layer = quantized_layers(unet)[name]
    weight = original.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2").weight
    plain = quantize_int4(weight.detach(), name).dequantize()
    assert sqnr_db(weight, float_weight(layer, torch.float32)) > sqnr_db(weight, plain) + 0.5
    assert unet.half().get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2").branch_up.dtype is torch.float16
    save(unet, tmp_path / "unet.safetensors")
    loaded = quantized_layers(load(copy.deepcopy(original), tmp_path / "unet.safetensors"))[name]
    assert torch.equal(loaded.branch_down, layer.branch_down) and torch.equal(loaded.branch_up, layer.branch_up)
    x = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    loaded.tap.bucket = BUCKET
    assert sqnr_db(x @ float_weight(layer, torch.float32).t(), loaded(x) - loaded.bias) > 35
