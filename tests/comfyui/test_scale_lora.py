"""Scale LoRAs on a quantized MODEL: what they compute, that the model without them is untouched, fused blocks, graphs, refusals."""

from dataclasses import replace

import comfy.utils
import pytest
import torch
from fake_graph import use_fake_graphs

from stepquant.errors import ModelError
from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.scale_lora import quantized_layers, scaled_norms, with_scale_lora
from stepquant.quant.tuning.identity import identity
from stepquant.quant.tuning.scale_set import new_scale_set

TO_Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
HIGH, LOW = 10.0, 0.05  # noise levels of the first and the second half of the schedule


def scale_set(model, experts=1, seed=0, size=0.2):
    """Random factors for every scale of a quantized MODEL."""
    unet = model.model.diffusion_model
    layers = {name: layer.weight.shape[0] for name, layer in quantized_layers(unet)}
    norms = {name: norm.weight.shape[0] for name, norm in scaled_norms(unet)}
    scales = new_scale_set(layers, norms, experts)
    generator = torch.Generator().manual_seed(seed)
    for table in (scales.out, scales.into):
        for name in table:
            table[name] = size * torch.randn(table[name].shape, generator=generator)
    scales.base = identity(unet.state_dict().__getitem__, {"name": "tiny", "sha256": None})
    return scales


def one_expert(scales, expert):
    out = {name: table[min(expert, len(table) - 1)][None] for name, table in scales.out.items()}
    return replace(scales, experts=1, out=out, into={name: table[expert][None] for name, table in scales.into.items()})


def scaled_plain(plain, scales):
    """A float MODEL whose weights and norms are multiplied by hand."""
    unet = "diffusion_model."
    for name, log in scales.out.items():
        weight = comfy.utils.get_attr(plain.model, f"{unet}{name}.weight")
        weight.copy_(weight * log[0].exp().view(-1, *[1] * (weight.ndim - 1)))
    for name, log in scales.into.items():
        for part in ("weight", "bias"):
            tensor = comfy.utils.get_attr(plain.model, f"{unet}{name}.{part}")
            tensor.copy_(tensor * log[0].exp())
    return plain


def test_scale_lora_equals_weights_and_norms_multiplied_by_hand(weight_only, dequantized, sample, relative_error):
    scales = scale_set(weight_only)
    base = sample(weight_only)
    expected = sample(scaled_plain(dequantized(weight_only), scales))
    assert relative_error(base, expected) > 0.05
    assert relative_error(sample(with_scale_lora(weight_only, scales, 1.0, "a")), expected) < 1e-3


def test_scale_lora_leaves_the_input_model_and_its_weights_as_they_were(quantized, sample, snapshot):
    base, before = sample(quantized), snapshot(quantized)
    tuned = with_scale_lora(quantized, scale_set(quantized), 1.0, "a")
    result = sample(tuned)
    assert not torch.equal(result, base)
    assert torch.equal(sample(quantized), base) and torch.equal(sample(tuned), result)
    after = snapshot(quantized)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_scale_lora_strength_is_an_exponent_and_stacking_adds(quantized, sample, relative_error):
    scales, other = scale_set(quantized), scale_set(quantized, seed=5)
    assert torch.equal(sample(with_scale_lora(quantized, scales, 0.0, "a")), sample(quantized))
    halves = with_scale_lora(with_scale_lora(quantized, scales, 0.5, "a"), scales, 0.5, "a")
    assert relative_error(sample(halves), sample(with_scale_lora(quantized, scales, 1.0, "a"))) < 1e-3
    both = with_scale_lora(with_scale_lora(quantized, scales, 1.0, "a"), other, -0.5, "b")
    summed = replace(
        scales,
        out={name: log - 0.5 * other.out[name] for name, log in scales.out.items()},
        into={name: log - 0.5 * other.into[name] for name, log in scales.into.items()},
    )
    assert relative_error(sample(both), sample(with_scale_lora(quantized, summed, 1.0, "c"))) < 1e-3


@pytest.mark.parametrize("acceleration", ["off", "auto"])
def test_scale_lora_uses_the_expert_of_the_timestep(model, unet_call, acceleration):
    quantized = quantize_model(model, "w8a8-token", acceleration=acceleration)
    scales = scale_set(quantized, experts=2)
    tuned = with_scale_lora(quantized, scales, 1.0, "a")
    for sigma, expert in ((HIGH, 1), (LOW, 0)):
        alone = unet_call(with_scale_lora(quantized, one_expert(scales, expert), 1.0, "b"), [sigma])
        assert torch.equal(unet_call(tuned, [sigma]), alone)
        assert not torch.equal(unet_call(with_scale_lora(quantized, one_expert(scales, 1 - expert), 1.0, "b"), [sigma]), alone)


def test_scale_lora_runs_the_same_layer_by_layer_as_in_fused_blocks(model, unet_call, relative_error):
    plain, fused = (quantize_model(model, "w8a8-token", acceleration=kind) for kind in ("off", "auto"))
    tuned = [with_scale_lora(one, scale_set(plain, experts=2), 1.0, "a") for one in (plain, fused)]
    # Codes may be 1 apart where a norm's output is not rounded to 16 bit on its way.
    apart = relative_error(unet_call(fused, [HIGH]), unet_call(plain, [HIGH]))
    assert relative_error(unet_call(tuned[1], [HIGH]), unet_call(tuned[0], [HIGH])) < 2 * apart
    assert relative_error(unet_call(tuned[0], [HIGH]), unet_call(plain, [HIGH])) > 10 * apart


def test_scale_lora_with_4_bit_weights_beside_a_lora(model, sample, add_lora, relative_error):
    int4 = quantize_model(model, "w4a8-token")
    tuned = with_scale_lora(int4, scale_set(int4), 1.0, "a")
    result = sample(tuned)
    assert torch.isfinite(result).all() and relative_error(result, sample(int4)) > 0.05
    assert relative_error(sample(add_lora(tuned)), result) > 0.01
    assert torch.equal(sample(tuned), result)


def test_graphs_follow_experts_and_switch_with_the_scale_lora(quantized, sample, relative_error):
    scales = scale_set(quantized, experts=2)
    tuned = with_scale_lora(quantized, scales, 1.0, "a")
    expected = [sample(one, steps=6) for one in (quantized, tuned)]
    recorder = use_fake_graphs(quantized)
    for _ in range(2):
        for one, eager in zip((quantized, tuned), expected, strict=True):
            assert relative_error(sample(one, steps=6), eager) < 1e-5
    assert state_of(tuned).runner.replays > 8
    assert len(recorder.live) == 1


def test_scale_lora_is_refused_in_words_where_it_does_not_belong(model, quantized, unet_file, tmp_path):
    scales = scale_set(quantized)
    with pytest.raises(ModelError, match="Put Quantize SDXL"):
        with_scale_lora(model, scales, 1.0, "mine.safetensors")
    foreign = replace(scales, base={"name": "other-xl", "sample": [-value for value in scales.base["sample"]]})
    with pytest.raises(ModelError, match=r"mine\.safetensors: made for other-xl"):
        with_scale_lora(quantized, foreign, 1.0, "mine.safetensors")
    recipe = state_of(quantized).recipe
    fewer = quantize_model(model, replace(recipe, schemes={name: s for name, s in recipe.schemes.items() if name != TO_Q}))
    with pytest.raises(ModelError, match=f"{TO_Q} is not quantized in this model"):
        with_scale_lora(fewer, scales, 1.0, "mine.safetensors")
