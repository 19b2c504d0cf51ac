"""Memory as ComfyUI sees it: honest sizes, partial loads, weights fetched from wherever they are."""

import comfy.ops
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.hosts.comfy.layouts import is_quantized
from stepquant.hosts.comfy.loader import load_quantized
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.ops import StepQuantOps
from stepquant.hosts.comfy.save import save_quantized


def _bytes(model):
    tensors = [*model.model.diffusion_model.parameters(), *model.model.diffusion_model.buffers()]
    return sum(getattr(tensor, "_qdata", tensor).nbytes for tensor in tensors)


def test_model_size_is_what_the_weights_take(quantized, model):
    assert quantized.model_size() == pytest.approx(_bytes(quantized), rel=0.05)
    assert quantized.model_size() < 0.3 * model.model_size()  # fp32 on a CPU


def test_every_key_that_comfyui_sees_is_an_attribute(quantized):
    # get_key_patches, which merges and hooks begin with, does a getattr on each.
    assert set(quantized.get_key_patches()) == set(quantized.model_state_dict())


def test_state_dict_shows_outer_shapes_and_no_codes(quantized, model):
    ours, plain = quantized.model.diffusion_model.state_dict(), model.model.diffusion_model.state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in plain.items()}
    assert all(tensor.dtype != torch.int8 for tensor in ours.values())


def test_state_dict_makes_no_copy_of_a_weight(quantized):
    """Merge nodes ask for it once for each weight."""
    first, second = (quantized.model.diffusion_model.state_dict() for _ in range(2))
    layers = [key.removeprefix("diffusion_model.") for key, _ in quantized_layers(quantized.model)]
    assert layers and all(first[key] is second[key] for key in layers)
    quantized.model.half()  # another dtype is another weight
    halved = quantized.model.diffusion_model.state_dict()
    assert all(halved[key].dtype == torch.float16 for key in layers)


def _load_partly(patcher, memory):
    patcher.detach()
    patcher.load(torch.device("cpu"), lowvram_model_memory=memory, full_load=False)


@pytest.mark.parametrize("memory", [1, 2_000_000, 6_000_000])
def test_partial_load_computes_the_same(quantized, unet_call, memory):
    full = unet_call(quantized, (3.0,))
    _load_partly(quantized, memory)
    assert torch.equal(unet_call(quantized, (3.0,)), full)


def test_lora_is_exact_in_a_partial_load(weight_only, dequantized, unet_call, add_lora, relative_error):
    with_lora = add_lora(weight_only)
    reference = add_lora(dequantized(weight_only))
    reference.load(torch.device("cpu"), full_load=True)
    expected = unet_call(reference, (3.0,))
    _load_partly(with_lora, 2_000_000)
    assert relative_error(unet_call(with_lora, (3.0,)), expected) < 1e-4
    with_lora.detach()
    with_lora.load(torch.device("cpu"), full_load=True)
    # Unloads layers one by one, and attaches merge patches to them that reconcile must notice.
    with_lora.partially_unload(torch.device("cpu"), 3_000_000)
    assert any(getattr(module, "weight_function", None) for module in with_lora.model.modules())
    assert relative_error(unet_call(with_lora, (3.0,)), expected) < 1e-4


def test_merge_patch_is_exact_in_a_partial_load(weight_only, dequantized, unet_call, relative_error):
    key = "diffusion_model.input_blocks.4.0.in_layers.2.weight"
    delta = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(3)) * 0.05
    patched, reference, base = weight_only.clone(), dequantized(weight_only), unet_call(weight_only, (3.0,))
    for one in (patched, reference):
        one.add_patches({key: ("diff", (delta,))})
    reference.load(torch.device("cpu"), full_load=True)
    expected = unet_call(reference, (3.0,))
    _load_partly(patched, 1)
    assert relative_error(unet_call(patched, (3.0,)), expected) < 1e-4
    assert relative_error(base, expected) > 1e-3
    patched.detach()
    assert torch.equal(unet_call(weight_only, (3.0,)), base)


def test_weight_wrappers_see_a_float_weight(quantized, sample):
    seen = []

    def wrapper(weight):
        seen.append((type(weight), tuple(weight.shape)))
        return weight * 0

    key = "diffusion_model.input_blocks.4.0.in_layers.2.weight"
    wrapped, base = quantized.clone(), sample(quantized)
    wrapped.add_weight_wrapper(key, wrapper)
    assert not torch.equal(sample(wrapped), base)
    assert seen[0] == (torch.Tensor, (64, 32, 3, 3))
    assert torch.equal(sample(quantized), base)


def test_loading_allocates_no_float_model(quantized, model, tmp_path):
    save_quantized(quantized, tmp_path / "q.safetensors")
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty.memory_format and result.device.type != "meta" and result.is_floating_point():
                sizes.append(result.nbytes)
            return result

    with Allocations():
        load_quantized(tmp_path / "q.safetensors")
    assert sum(sizes) < 0.2 * model.model_size()


def test_setting_an_unpatched_weight_keeps_the_codes(quantized):
    # What dynamic VRAM does with small modules: the weight is converted, not patched, and set again.
    for key, module in list(quantized_layers(quantized.model))[:5]:
        before = module.weight._qdata.clone()
        quantized.patch_weight_to_device(key, device_to=torch.device("cpu"), force_cast=True)
        assert is_quantized(module.weight) and torch.equal(module.weight._qdata, before)


def test_plain_layer_behaves_as_manual_cast():
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(24, 20, generator=generator), "bias": torch.randn(24, generator=generator)}
    x = torch.randn(3, 20, generator=generator)
    outputs = []
    for operations in (StepQuantOps, comfy.ops.manual_cast):
        layer = operations.Linear(20, 24, dtype=torch.float16)
        layer.load_state_dict(weights)
        assert layer.weight.dtype == torch.float16
        outputs.append(layer(x))
    assert torch.equal(*outputs)


def test_circular_padding_is_honoured(quantized, sample, relative_error):
    # Seamless-tiling nodes change the padding mode of convolutions in place.
    module = quantized.model.diffusion_model.input_blocks[4][0].in_layers[2]
    # What the layer is given in its place: its dynamic scale relies on SiLU's lowest value.
    x = torch.nn.functional.silu(torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0)))
    zeros = module(x)
    module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    circular = module(x)
    padded = torch.nn.functional.pad(x, [1, 1, 1, 1], mode="circular")
    expected = torch.nn.functional.conv2d(padded, module.weight.dequantize(), module.bias)
    assert torch.allclose(circular, expected, atol=1e-5)
    assert relative_error(circular[:, :, 1:-1, 1:-1], zeros[:, :, 1:-1, 1:-1]) < 0.05
