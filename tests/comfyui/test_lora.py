"""Stock LoraLoader and model merging on a quantized MODEL: exact beside the codes, merged where that cannot be, gone afterwards."""

import comfy.lora
import comfy_extras.nodes_model_merging as merging
import pytest
import torch
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter

from stepquant.hosts.comfy.lora import can_run_beside, make_branch, quantized_layers

TO_Q = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"


def _adapter(up, down, alpha=4.0, mid=None, dora=None, reshape=None):
    return LoRAAdapter(set(), (up, down, alpha, mid, dora, reshape))


def _branches(model):
    return [key for key, module in quantized_layers(model.model) if module.branch is not None]


def test_lora_is_exact_and_leaves_no_trace(weight_only, dequantized, sample, add_lora, relative_error, snapshot):
    base, before = sample(weight_only), snapshot(weight_only)
    plain = dequantized(weight_only)
    assert relative_error(base, sample(plain)) < 1e-5
    with_lora = add_lora(weight_only)
    result, expected = sample(with_lora), sample(add_lora(plain))
    assert relative_error(expected, base) > 0.05
    assert relative_error(result, expected) < 1e-4
    assert torch.equal(sample(weight_only), base)
    after = snapshot(weight_only)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_clones_with_different_loras_do_not_see_each_other(weight_only, sample, add_lora):
    base = sample(weight_only)
    first, second = add_lora(weight_only), add_lora(weight_only, -0.7, seed=5, only="input_blocks")
    results = [sample(first), sample(second)]
    assert not torch.equal(results[0], results[1])
    assert torch.equal(sample(first), results[0]) and torch.equal(sample(second), results[1])
    assert torch.equal(sample(weight_only), base)


def test_stacked_loras_share_one_exact_branch(weight_only, dequantized, sample, add_lora, relative_error):
    plain = dequantized(weight_only)
    both = add_lora(add_lora(weight_only, 0.8), -0.5, seed=5)
    expected = sample(add_lora(add_lora(plain, 0.8), -0.5, seed=5))
    assert relative_error(sample(both), expected) < 1e-4
    assert dict(quantized_layers(both.model))[TO_Q].branch.down.shape[0] == 8


def test_branch_memory_is_counted(weight_only, sample, add_lora):
    sample(weight_only)
    without = weight_only.loaded_size()
    loaded = add_lora(weight_only)
    sample(loaded)
    branches = [module.branch for _, module in quantized_layers(loaded.model) if module.branch is not None]
    assert loaded.loaded_size() - without == sum(branch.nbytes for branch in branches) > 0


def test_branches_are_freed_when_the_model_is_unloaded(weight_only, sample, add_lora):
    loaded = add_lora(weight_only)
    sample(loaded)
    assert len(_branches(loaded)) == 4
    loaded.detach()
    assert not _branches(loaded)


@pytest.mark.parametrize("shape", [pytest.param((24, 20), id="linear"), pytest.param((24, 20, 3, 3), id="conv3x3")])
@pytest.mark.parametrize("flat", [False, True], ids=["shaped", "flattened"])
def test_branch_equals_the_merge(shape, flat):
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(24, 4, generator=generator), torch.randn(4, *shape[1:], generator=generator)
    adapter = _adapter(up if flat else up.view(24, 4, *[1] * (len(shape) - 2)), down.flatten(1) if flat else down)
    patches = [(0.7, adapter, 1.0, None, None)]
    merged = comfy.lora.calculate_weight(patches, torch.zeros(shape), "key")
    assert can_run_beside(patches, shape)
    branch = make_branch(patches, shape, torch.device("cpu"), torch.float32)
    product = (branch.up.flatten(1) @ branch.down.flatten(1)).view(shape)
    assert torch.allclose(product, merged, atol=1e-5)


def test_only_plain_loras_run_beside():
    up, down = torch.zeros(24, 4), torch.zeros(4, 20)
    plain = _adapter(up, down)
    assert can_run_beside([(1.0, plain, 1.0, None, None)], (24, 20))
    for patch in (
        (1.0, plain, 0.5, None, None),
        (1.0, plain, 1.0, (0, 0, 12), None),
        (1.0, plain, 1.0, None, lambda a: a),
        (1.0, _adapter(up, down, dora=torch.ones(24)), 1.0, None, None),
        (1.0, _adapter(up, down, mid=torch.ones(4, 4, 1, 1)), 1.0, None, None),
        (1.0, _adapter(up, down, reshape=(24, 40)), 1.0, None, None),
        (1.0, _adapter(torch.zeros(12, 4), down), 1.0, None, None),
        (1.0, LoHaAdapter(set(), ()), 1.0, None, None),
        (1.0, ("diff", (torch.zeros(24, 20),)), 1.0, None, None),
    ):
        assert not can_run_beside([(1.0, plain, 1.0, None, None), patch], (24, 20))


def test_weight_diff_is_merged_and_restored(weight_only, dequantized, sample, relative_error):
    base, plain = sample(weight_only), dequantized(weight_only)
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * 0.2
    patched, expected = weight_only.clone(), plain.clone()
    for one in (patched, expected):
        one.add_patches({TO_Q: ("diff", (delta,))})
    result = sample(patched)
    effect = relative_error(sample(expected), base)
    assert relative_error(result, sample(expected)) < 0.2 * effect
    assert torch.equal(sample(patched), result)
    assert torch.equal(sample(weight_only), base)


@pytest.mark.parametrize("order", ["quantized_first", "float_first"])
def test_merge_with_a_float_model(weight_only, dequantized, sample, relative_error, order, tmp_path):
    import comfy.sd
    import tiny_sdxl

    tiny_sdxl.write_unet(tmp_path / "other.safetensors", seed=9)
    other, plain, base = comfy.sd.load_diffusion_model(str(tmp_path / "other.safetensors")), dequantized(weight_only), sample(weight_only)
    pair, reference = ((weight_only, other), (plain, other)) if order == "quantized_first" else ((other, weight_only), (other, plain))
    result = sample(merging.ModelMergeSimple().merge(*pair, 0.5)[0])
    expected = sample(merging.ModelMergeSimple().merge(*reference, 0.5)[0])
    assert relative_error(result, expected) < 0.2
    assert relative_error(expected, base) > 0.5
    assert torch.equal(sample(weight_only), base)


def test_merge_of_two_quantized_models(weight_only, quantized, sample):
    result = sample(merging.ModelMergeSimple().merge(weight_only, quantized, 0.5)[0])
    assert torch.isfinite(result).all()
