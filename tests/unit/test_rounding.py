"""GPTQ and its Hessians: errors are made up for, sweeps never hurt, files hold what was seen, and refusals name the layer."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import CalibrationError, SchemeError, WeightError
from stepquant.quant.int4 import quantize_int4
from stepquant.quant.layers import find_layers
from stepquant.quant.rounding.gptq import gptq_int4
from stepquant.quant.rounding.hessian import HessianFolder, HessianObserver, hessian_bytes, input_of, readers
from stepquant.quant.rounding.method import Rounding, RoundingMethod, rounding_cost, rounding_method

LAYER = "middle_block.1.transformer_blocks.0.attn1.to_q"


def _correlated(K: int, rows: int = 2000) -> torch.Tensor:
    """Rows whose channels are mixtures of K / 4 sources and a little noise, with energies over two decades."""
    generator = torch.Generator().manual_seed(1)
    sources = torch.randn(rows, K // 4, generator=generator)
    x = sources @ torch.randn(K // 4, K, generator=generator) + torch.randn(rows, K, generator=generator)
    return x * torch.logspace(-1, 1, K)[torch.randperm(K, generator=generator)]


def _weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _output_sqnr_db(weight: torch.Tensor, restored: torch.Tensor, x: torch.Tensor) -> float:
    return float(10 * torch.log10((x @ weight.t()).square().sum() / (x @ (restored - weight).t()).square().sum()))


def test_gptq_worked_example():
    # Two inputs that are always equal: only the sum of their weights matters, and the second makes up for the first's error.
    weight = torch.zeros(1, 64)
    weight[0, :3] = torch.tensor([-8.0, 0.4, 0.4])
    hessian = torch.eye(64)
    hessian[1:3, 1:3] = 1.0
    plain, gptq = quantize_int4(weight, "layer"), gptq_int4(weight, hessian, "layer")
    assert plain.codes[0, :3].tolist() == [-8, 0, 0]
    assert gptq.codes[0, :3].tolist() in ([-8, 0, 1], [-8, 1, 0])


@pytest.mark.parametrize("by_activation", [False, True], ids=["stored order", "by activation"])
def test_gptq_beats_plain_rounding_on_correlated_inputs(by_activation):
    x, weight = _correlated(256), _weight(96, 256)
    plain = _output_sqnr_db(weight, quantize_int4(weight, LAYER).dequantize(), x)
    gptq = _output_sqnr_db(weight, gptq_int4(weight, x.t() @ x, LAYER, by_activation).dequantize(), x)
    assert gptq > plain + 4


def test_gptq_holds_on_rows_that_it_has_not_seen():
    x, weight = _correlated(256, 4000), _weight(96, 256)
    seen, unseen = x[:2000], x[2000:]
    plain = _output_sqnr_db(weight, quantize_int4(weight, LAYER).dequantize(), unseen)
    assert _output_sqnr_db(weight, gptq_int4(weight, seen.t() @ seen, LAYER).dequantize(), unseen) > plain + 3


def test_gptq_sweeps_never_raise_the_error():
    x, weight = _correlated(128), _weight(64, 128)
    found = [_output_sqnr_db(weight, gptq_int4(weight, x.t() @ x, LAYER, sweeps=sweeps).dequantize(), x) for sweeps in (0, 1, 4)]
    assert found[0] < found[1] <= found[2] + 1e-3


def test_gptq_is_plain_rounding_when_inputs_are_independent():
    weight = _weight(32, 128)
    plain, gptq = quantize_int4(weight, LAYER), gptq_int4(weight, torch.eye(128), LAYER)
    assert torch.equal(plain.codes, gptq.codes)
    assert torch.equal(plain.group_scale, gptq.group_scale)


def test_gptq_leaves_its_inputs_unchanged_and_takes_half_precision():
    x, weight = _correlated(128), _weight(32, 128).half()
    hessian = x.t() @ x
    before = weight.clone(), hessian.clone()
    gptq_int4(weight, hessian, LAYER)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_gptq_takes_inputs_that_are_always_zero_and_fewer_rows_than_channels():
    x, weight = _correlated(128, 20), _weight(32, 128)
    x[:, 5] = 0
    quantized = gptq_int4(weight, x.t() @ x, LAYER)
    assert bool(torch.isfinite(quantized.dequantize()).all())
    assert _output_sqnr_db(weight, quantized.dequantize(), x) > _output_sqnr_db(weight, quantize_int4(weight, LAYER).dequantize(), x)


@pytest.mark.parametrize(
    ("weight", "hessian", "error", "message"),
    [
        (torch.zeros(4, 100), torch.eye(100), WeightError, f"{LAYER}: K = 100 is no multiple"),
        (torch.zeros(4, 64), torch.eye(128), CalibrationError, rf"{LAYER}: a Hessian of shape \(128, 128\).*for 64 input channels"),
        (torch.zeros(4, 64), torch.full((64, 64), torch.nan), CalibrationError, f"{LAYER}.*not finite"),
    ],
    ids=["uneven K", "other layer's", "NaN"],
)
def test_gptq_names_the_layer_that_it_refuses(weight, hessian, error, message):
    with pytest.raises(error, match=message):
        gptq_int4(weight, hessian, LAYER)


def test_hessian_folder_gives_back_what_was_seen(tmp_path):
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(3))
    observer = HessianObserver(64)
    for call in x:
        observer.update(call.half())
    folder = HessianFolder(tmp_path / "hessians", {"prompts": ["a"]})
    assert not folder.has(input_of(LAYER))
    folder.write(input_of(LAYER), observer)
    assert folder.has(input_of(LAYER))
    rows = x.half().float().flatten(0, 1)
    assert torch.allclose(folder.read(LAYER), rows.t() @ rows / 150, atol=1e-6)
    # to_v reads the same input.
    assert torch.equal(folder.read(LAYER.replace("to_q", "to_v")), folder.read(LAYER))


def test_hessian_folder_refuses_to_mix_settings_and_names_what_is_missing(tmp_path):
    observer = HessianObserver(64)
    observer.update(torch.ones(2, 64))
    HessianFolder(tmp_path, {"steps": 20}).write("a.proj_in", observer)
    with pytest.raises(CalibrationError, match=r"a\.proj_in\.safetensors: gathered with other settings.*20"):
        HessianFolder(tmp_path, {"steps": 30}).has("a.proj_in")
    with pytest.raises(CalibrationError, match=r"b\.proj_in: .*is missing, and GPTQ needs it"):
        HessianFolder(tmp_path).read("b.proj_in")
    with pytest.raises(CalibrationError, match="c: 0 rows seen"):
        HessianFolder(tmp_path).write("c", HessianObserver(64))


def test_layers_that_read_one_tensor_share_its_hessian():
    block = "input_blocks.4.1.transformer_blocks.0"
    assert len(readers([f"{block}.attn1.to_{part}" for part in "qkv"])) == 1
    assert len(readers([f"{block}.attn2.to_q", f"{block}.attn1.to_q", f"{block}.ff.net.2"])) == 3
    layers = find_layers({f"{block}.attn1.to_{part}.weight": (64, 128) for part in "qkv"})
    assert hessian_bytes(layers) == 4 * 128**2


def test_rounding_cost_grows_with_the_method():
    layers = find_layers({f"{LAYER}.weight": (256, 128)})
    plain, gptq = (rounding_cost(method, layers) for method in (RoundingMethod.PLAIN, RoundingMethod.GPTQ))
    assert 0 < plain.operations < gptq.operations
    assert plain.disk_bytes == 0
    assert gptq.disk_bytes == 2 * 128**2
    assert plain.seconds(plain.operations) == 1


def test_rounding_uses_the_method_that_was_asked_for():
    x, weight = _correlated(128), _weight(32, 128)
    rounding = Rounding(RoundingMethod.GPTQ, lambda layer: x.t() @ x)
    assert torch.equal(rounding.round(weight, LAYER).codes, gptq_int4(weight, x.t() @ x, LAYER).codes)
    assert torch.equal(Rounding().round(weight, LAYER).codes, quantize_int4(weight, LAYER).codes)


@pytest.mark.parametrize("reader", ["input_blocks.4.1.transformer_blocks.0.attn2.to_v", "input_blocks.4.0.emb_layers.1"])
def test_rounding_of_what_reads_the_prompt_or_the_timestep_is_plain(reader):
    def gathered(layer):
        raise AssertionError(f"{layer} needs no Hessian")

    weight = _weight(32, 128)
    codes = Rounding(RoundingMethod.GPTQ, gathered).round(weight, reader).codes
    assert torch.equal(codes, quantize_int4(weight, reader).codes)


def test_rounding_refuses_unknown_methods_and_gptq_without_hessians():
    with pytest.raises(SchemeError, match=r"rounding 'magic': unknown; choose one of plain, gptq"):
        rounding_method("magic")
    with pytest.raises(CalibrationError, match="rounding gptq: there are no Hessians"):
        Rounding(RoundingMethod.GPTQ)
