"""In-graph Quantize of a loaded MODEL: what comes out, what it carries, and that the source stays what it was."""

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import tiny_sdxl
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.errors import CalibrationError, ModelError, WeightError
from stepquant.hosts.comfy.attach import counting_macs, state_of
from stepquant.hosts.comfy.layouts import unpack
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model
from stepquant.quant.recipe import Recipe, preset_recipe
from stepquant.quant.scheme import Scheme
from stepquant.quant.sqnr import sqnr_db

TO_Q = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"


def _codes(model):
    return {key: unpack(module.weight).qweight.clone() for key, module in quantized_layers(model.model)}


def _same_codes(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_quantize_samples_close_to_the_source_and_leaves_it_untouched(model, sample, snapshot):
    reference, before = sample(model), snapshot(model)
    quantized = quantize_model(model, "w8a8-token")
    result = sample(quantized)
    assert sqnr_db(reference, result) > 18  # random weights amplify: 20.5 dB measured
    assert torch.equal(sample(quantized), result)
    after = snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(sample(model), reference)


def test_quantize_runs_all_its_layers_as_integers(quantized, sample):
    with counting_macs(quantized.model) as counter:
        sample(quantized)
    assert counter.integer_share() == 1.0
    assert set(counter.total_by_layer) == set(state_of(quantized).recipe.schemes)


def test_layers_left_out_of_the_recipe_stay_float(model, sample):
    names = list(quantizable_layers(model))
    recipe = Recipe({name: Scheme() for name in names[::2]}, "test", "test")
    half = quantize_model(model, recipe)
    assert {key.removeprefix("diffusion_model.").removesuffix(".weight") for key, _ in quantized_layers(half.model)} == set(names[::2])
    with counting_macs(half.model) as counter:
        assert torch.isfinite(sample(half)).all()
    assert 0 < counter.integer_share() < 1


def test_plain_lora_on_the_source_runs_beside_the_codes(model, sample, add_lora):
    plain = quantize_model(model, "w8a8-token")
    with_lora = quantize_model(add_lora(model), "w8a8-token")
    assert _same_codes(_codes(plain), _codes(with_lora))
    assert torch.equal(sample(with_lora), sample(add_lora(plain)))


def test_patch_that_is_no_lora_is_merged_before_quantizing(model, sample):
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * 0.05
    patched = model.clone()
    patched.add_patches({TO_Q: ("diff", (delta,))})
    quantized = quantize_model(patched, "w8a8-token")
    expected = model.model.get_parameter(TO_Q) + delta
    weight = dict(quantized_layers(quantized.model))[TO_Q].weight.dequantize()
    assert sqnr_db(expected, weight) > 35
    assert TO_Q not in quantized.patches and TO_Q in patched.patches
    assert torch.isfinite(sample(quantized)).all()


def test_codes_come_from_the_unpatched_weights_while_a_clone_with_a_lora_is_loaded(model, sample, add_lora):
    clean = _codes(quantize_model(model, "w8a8-token"))
    sample(add_lora(model))  # leaves the shared weights patched in place
    assert _same_codes(_codes(quantize_model(model, "w8a8-token")), clean)


def test_two_clones_with_different_loras_are_quantized_each_with_its_own(model, sample, add_lora):
    first, second = add_lora(model, 1.0), add_lora(model, -0.7, only="input_blocks")
    quantized = [quantize_model(clone, "w8a8-token") for clone in (first, second)]
    base = quantize_model(model, "w8a8-token")
    results = [sample(one) for one in quantized]
    assert torch.equal(results[0], sample(add_lora(base, 1.0)))
    assert torch.equal(results[1], sample(add_lora(base, -0.7, only="input_blocks")))
    assert torch.equal(sample(quantized[0]), results[0])


def test_wrappers_callbacks_options_attachments_and_object_patches_are_carried_over(model, sample):
    import comfy_extras.nodes_model_advanced as advanced

    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append("wrapper")
        return executor(*args, **kwargs)

    carrying = advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]
    carrying.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    carrying.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "test", lambda *_: calls.append("callback"))
    carrying.set_attachments("test", "attached")
    carrying.set_model_unet_function_wrapper(
        lambda apply, args: (calls.append("options"), apply(args["input"], args["timestep"], **args["c"]))[1]
    )
    reference = sample(carrying)
    calls.clear()
    quantized = quantize_model(carrying, "w8a8-token")
    result = sample(quantized)
    assert {"wrapper", "callback", "options"} <= set(calls)
    assert quantized.get_attachment("test") == "attached"
    assert quantized.get_model_object("model_sampling") is carrying.get_model_object("model_sampling")
    assert sqnr_db(reference, result) > 15
    assert sqnr_db(sample(quantize_model(model, "w8a8-token")), result) < 10  # it really is sampled as v-prediction


def test_hook_lora_works_on_the_quantized_model(model, sample, dequantized, relative_error):
    quantized = quantize_model(model, "w8a8-token")
    base = sample(quantized)
    hooks = comfy.hooks.create_hook_lora(lora=tiny_sdxl.lora_tensors(), strength_model=1.0, strength_clip=0.0)
    hooked = sample(quantized, hooks=hooks, negative_hooks=hooks)
    assert relative_error(hooked, sample(dequantized(quantized), hooks=hooks, negative_hooks=hooks)) < 0.5 * relative_error(hooked, base)
    assert torch.equal(sample(quantized), base)


def test_quantize_can_be_made_again_by_comfyui(model, sample, add_lora):
    patched = add_lora(model)
    patched.add_patches({TO_Q: ("diff", (torch.full((64, 64), 0.01),))})
    quantized = quantize_model(patched, "w8a8-token")
    result = sample(quantized)
    again = quantized.clone(disable_dynamic=True, force_deepcopy=True)
    assert again.model is not quantized.model
    assert _same_codes(_codes(again), _codes(quantized))
    assert torch.equal(sample(again), result)


def test_quantize_allocates_no_float_model(model):
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty.memory_format and result.device.type != "meta" and result.is_floating_point():
                sizes.append(result.nbytes)
            return result

    with Allocations():
        quantize_model(model, "w8a8-token")
    assert sum(sizes) < 0.2 * model.model_size()  # what stays float is 12 % of the tiny model


def test_static_preset_runs_from_a_calibration(model, sample):
    from stepquant.hosts.comfy.calibrate import calibrate
    from stepquant.hosts.comfy.sampling import SamplerSettings

    with pytest.raises(CalibrationError, match=r"needs a calibration.*w8a8-token"):
        quantize_model(model, "w8a8-static")
    from sampling_run import conditioning

    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    settings = SamplerSettings(3, 4.0, "euler", "normal")
    calibration = calibrate(model, conditioning(11), conditioning(12), latent, 1, settings)
    reference, quantized = sample(model), quantize_model(model, "w8a8-static", calibration)
    assert sqnr_db(reference, sample(quantized)) > 12
    with counting_macs(quantized.model) as counter:
        sample(quantized)
    assert counter.integer_share() == 1.0


def test_interrupt_half_way_leaves_the_source_usable(model, sample):
    reference, seen = sample(model), []

    def interrupt():
        seen.append(1)
        if len(seen) == 10:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        quantize_model(model, "w8a8-token", check_interrupt=interrupt)
    assert torch.equal(sample(model), reference)


def test_progress_counts_every_layer(model):
    steps = []
    quantize_model(model, "w8a8-token", progress=lambda done, total: steps.append((done, total)))
    total = len(quantizable_layers(model))
    assert steps == [(n + 1, total) for n in range(total)]


def test_quantize_names_the_layer_when_a_weight_is_nan(unet_file, tmp_path):
    tensors = load_file(unet_file)
    tensors["model.diffusion_model.middle_block.1.proj_in.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(WeightError, match=r"middle_block\.1\.proj_in.*NaN"):
        quantize_model(comfy.sd.load_diffusion_model(str(tmp_path / "nan.safetensors")), "w8a8-token")


def test_quantize_names_the_layer_when_a_kept_weight_is_infinite(unet_file, tmp_path):
    tensors = load_file(unet_file)
    tensors["model.diffusion_model.out.2.weight"][0] = torch.inf
    save_file(tensors, tmp_path / "inf.safetensors")
    with pytest.raises(WeightError, match=r"out\.2"):
        quantize_model(comfy.sd.load_diffusion_model(str(tmp_path / "inf.safetensors")), "w8a8-token")


def test_quantize_refuses_a_quantized_model(quantized):
    with pytest.raises(ModelError, match="already quantized"):
        quantize_model(quantized, "w8a8-token")


def test_quantize_refuses_what_is_no_sdxl(model):
    flux = torch.nn.Module()
    flux.diffusion_model = torch.nn.ModuleDict({"double_blocks": torch.nn.Linear(4, 4)})
    patcher = comfy.model_patcher.ModelPatcher(flux, torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ModelError, match="Choose an SDXL"):
        quantize_model(patcher, "w8a8-token")
    with pytest.raises(ModelError, match="cannot be quantized"):
        quantize_model(comfy.model_patcher.ModelPatcher(torch.nn.Module(), torch.device("cpu"), torch.device("cpu")), "w8a8-token")


def test_quantize_refuses_a_replaced_unet(model):
    compiled = model.clone()
    compiled.add_object_patch("diffusion_model", model.model.diffusion_model)
    with pytest.raises(ModelError, match="Put Quantize before"):
        quantize_model(compiled, "w8a8-token")


def test_quantize_refuses_a_recipe_of_another_model(model):
    recipe = preset_recipe("w8a8-token", ["input_blocks.99.0.in_layers.2"])
    with pytest.raises(ModelError, match=r"input_blocks\.99"):
        quantize_model(model, recipe)
