"""A diffusers UNet quantized in place, saved and loaded: quality, memory, timesteps, and nothing changed on refusal."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stepquant.errors import CalibrationError, FormatError, ModelError, SchemeError, WeightError
from stepquant.hosts.diffusers.layers import QuantizedModule
from stepquant.hosts.diffusers.quantize import attach_counter, quantize_unet, quantized_layers, state_of, unet_shapes, weight_bytes
from stepquant.hosts.diffusers.timestep_tap import TimestepTap
from stepquant.hosts.diffusers.unet_file import load, save
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.calibration import Calibration
from stepquant.quant.layers import dynamic_low, find_layers
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.observer import LayerStatistics
from stepquant.quant.recipe import Recipe, preset_recipe
from stepquant.quant.scheme import TOKEN16, ActivationMode, ComputeType, Scheme, token_scheme
from stepquant.quant.sqnr import sqnr_db

diffusers = pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")

STATIC_CONV = "input_blocks.1.0.in_layers.2"
WEIGHT_ONLY = Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)


@pytest.fixture(scope="module")
def original(tiny_sdxl_config):
    """A random UNet of SDXL's topology whose weights are exact in fp16, as a checkpoint's are."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**tiny_sdxl_config).half().float()
    return unet.eval().requires_grad_(False)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


def ask(unet, timestep=500, batch=2):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    context = torch.randn(batch, 77, 48, generator=generator)
    conditions = {"text_embeds": torch.randn(batch, 16, generator=generator), "time_ids": torch.ones(batch, 6)}
    with torch.inference_mode():
        return unet(sample, torch.as_tensor(timestep), context, added_cond_kwargs=conditions).sample


def token_recipe(unet):
    return preset_recipe("w8a8-token", find_layers(unet_shapes(unet)))


def static_calibration(unet, low=-4.0, high=4.0):
    """Every layer saw the same range in the first and the last timestep bucket, ten times wider in the last."""
    layers = {}
    for name, spec in find_layers(unet_shapes(unet)).items():
        widths = torch.tensor([[1.0], [10.0]]).expand(2, spec.in_channels)
        layers[name] = LayerStatistics(
            buckets=torch.tensor([0, 63]),
            count=torch.tensor([1, 1]),
            range_min=low * widths,
            range_max=high * widths,
            token_absmax=torch.ones(2),
            rows=torch.empty(0, spec.in_channels, dtype=torch.float16),
            row_bucket=torch.empty(0, dtype=torch.long),
        )
    return Calibration(layers, {"prompts": ["a"]})


def test_quantize_unet_keeps_the_output_when_token(original, unet):
    quantize_unet(unet, token_recipe(unet))
    # Random weights: 28.9 dB measured at the worst of the three.
    assert min(sqnr_db(ask(original, t), ask(unet, t)) for t in (10, 500, 990)) > 27


def test_quantize_unet_runs_every_quantizable_layer_as_integers(unet):
    names = set(find_layers(unet_shapes(unet)))
    counter = MacCounter()
    attach_counter(quantize_unet(unet, token_recipe(unet)), counter)
    ask(unet)
    assert set(counter.total_by_layer) == names
    assert counter.integer_share() == 1.0


def test_quantize_unet_leaves_codes_and_sixteen_bit_parts_only(unet):
    shapes = {name: spec.shape for name, spec in find_layers(unet_shapes(unet)).items()}
    before = weight_bytes(unet)
    quantize_unet(unet, token_recipe(unet))
    codes = sum(torch.Size(shape).numel() for shape in shapes.values())
    scales = sum(4 * shape[0] for shape in shapes.values())
    sums = sum(4 * 16 * shape[0] for name, shape in shapes.items() if dynamic_low(name) is not None)  # of the convolutions' zero points
    assert weight_bytes(unet) == before - 4 * codes + codes + scales + sums


def test_16_bit_codes_run_every_layer_as_integers_with_the_weights_noise_alone(original, unet, tmp_path):
    counter, layers = MacCounter(), find_layers(unet_shapes(unet))
    exact = quantize_unet(copy.deepcopy(original), Recipe(dict.fromkeys(layers, WEIGHT_ONLY), "test", "test"))
    attach_counter(quantize_unet(unet, Recipe(dict.fromkeys(layers, TOKEN16), "test", "test")), counter)
    assert sqnr_db(ask(exact), ask(unet)) > 70  # 8-bit codes: 30
    assert counter.integer_share() == 1.0
    save(unet, tmp_path / "wide.safetensors")
    assert torch.equal(ask(load(copy.deepcopy(original), tmp_path / "wide.safetensors")), ask(unet))


def test_quantize_unet_skips_layers_that_the_recipe_leaves_out(original, unet):
    recipe = Recipe({STATIC_CONV: Scheme()}, "one", "test")
    assert set(quantized_layers(quantize_unet(unet, recipe))) == {STATIC_CONV}
    assert sqnr_db(ask(original), ask(unet)) > 38  # measured 40.9


def test_static_scales_follow_the_timestep_of_each_sample_in_a_mixed_batch(unet):
    recipe = preset_recipe("w8a8-static", find_layers(unet_shapes(unet)))
    quantize_unet(unet, recipe, static_calibration(unet))
    mixed = ask(unet, [5, 995])
    assert torch.equal(mixed[0], ask(unet, [5, 5])[0])
    assert torch.equal(mixed[1], ask(unet, [995, 995])[1])
    assert not torch.equal(mixed[0], ask(unet, [995, 995])[0])


@pytest.mark.parametrize("timestep", [999, 999.0, torch.tensor(999), torch.tensor([999, 999])], ids=["int", "float", "scalar", "batch"])
def test_tap_gives_a_bucket_to_every_sample(unet, timestep):
    tap = TimestepTap(unet)
    ask(unet, timestep)
    assert tap.buckets == [63, 63]


def test_tap_converts_the_noise_of_edm_schedulers(unet):
    tap = TimestepTap(unet)
    tap.follow(diffusers.EDMEulerScheduler())
    # SDXL's schedule ends at sigma 14.6 and begins at 0.029: 0.25 ln of them.
    ask(unet, [0.67, -0.88])
    assert tap.buckets == [63, 0]
    tap.follow(diffusers.EulerDiscreteScheduler())
    ask(unet, [999.0, 0.0])
    assert tap.buckets == [63, 0]


def test_deep_copy_of_a_quantized_unet_has_a_tap_of_its_own(unet):
    quantize_unet(unet, token_recipe(unet))
    copied = copy.deepcopy(unet)
    ask(copied, 999)
    assert state_of(copied).tap.buckets == [63, 63]
    assert state_of(unet).tap.buckets == []
    assert all(layer.tap is state_of(copied).tap for layer in quantized_layers(copied).values())


def test_half_keeps_scales_in_fp32(unet):
    quantize_unet(unet, token_recipe(unet))
    before = {name: layer.weight_scale.clone() for name, layer in quantized_layers(unet).items()}
    unet.half()
    for name, layer in quantized_layers(unet).items():
        assert torch.equal(layer.weight_scale, before[name]), name
        assert layer.bias is None or layer.bias.dtype is torch.float16


def test_half_keeps_fp8_codes(original, unet):
    quantize_unet(unet, preset_recipe("w8a8-fp8", find_layers(unet_shapes(unet))))
    quantized, before = ask(unet, 500), {name: layer.qweight.clone() for name, layer in quantized_layers(unet).items()}
    assert sqnr_db(ask(original, 500), quantized) > 15  # random weights amplify
    assert any(layer.scheme.is_fp8 for layer in quantized_layers(unet).values())
    unet.half()
    for name, layer in quantized_layers(unet).items():
        assert layer.qweight.dtype is (torch.float8_e4m3fn if layer.scheme.is_fp8 else torch.int8), name
        assert torch.equal(layer.qweight.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("preset", ["w8a8-token", "w8a8-static", "w8a8-fp8"])
def test_save_then_load_gives_the_same_bits(original, unet, tmp_path, preset):
    recipe = preset_recipe(preset, find_layers(unet_shapes(unet)))
    quantize_unet(unet, recipe, static_calibration(unet))
    save(unet, tmp_path / "q.safetensors", {"name": "tiny", "sha256": None})
    loaded = load(copy.deepcopy(original), tmp_path / "q.safetensors")
    assert torch.equal(ask(loaded, [5, 995]), ask(unet, [5, 995]))
    assert state_of(loaded).recipe == recipe
    assert state_of(loaded).base_model == {"name": "tiny", "sha256": None}
    save(loaded, tmp_path / "again.safetensors")
    first, second = load_file(tmp_path / "q.safetensors"), load_file(tmp_path / "again.safetensors")
    raw = [{key: tensor.contiguous().view(torch.uint8) for key, tensor in file.items() if tensor.ndim} for file in (first, second)]
    assert first.keys() == second.keys() and all(torch.equal(raw[0][key], raw[1][key]) for key in raw[0])


def test_load_fills_a_unet_without_memory(original, unet, tiny_sdxl_config, tmp_path):
    quantize_unet(unet, token_recipe(unet))
    save(unet, tmp_path / "q.safetensors")
    with torch.device("meta"):
        empty = diffusers.UNet2DConditionModel(**tiny_sdxl_config).eval()
    assert torch.equal(ask(load(empty, tmp_path / "q.safetensors")), ask(unet))


def test_saved_file_uses_sdxl_names_and_sixteen_bit_where_exact(unet, tmp_path):
    quantize_unet(unet, token_recipe(unet))
    save(unet, tmp_path / "q.safetensors")
    with safe_open(str(tmp_path / "q.safetensors"), "pt") as file:
        conv = file.get_tensor(f"model.diffusion_model.{STATIC_CONV}.qweight")
        assert conv.dtype is torch.int8 and tuple(conv.shape) == (32, 3, 3, 32)
        assert file.get_tensor("model.diffusion_model.out.2.weight").dtype is torch.float16


def test_load_refuses_a_file_of_another_model_and_changes_nothing(original, unet, tiny_sdxl_config, tmp_path):
    quantize_unet(unet, token_recipe(unet))
    save(unet, tmp_path / "q.safetensors")
    other = diffusers.UNet2DConditionModel(**{**tiny_sdxl_config, "cross_attention_dim": 32}).eval()
    with pytest.raises(FormatError, match=r"attn2\.to_k\.weight: \(64, 48\) in the file, \(64, 32\) in the model"):
        load(other, tmp_path / "q.safetensors")
    assert not quantized_layers(other) and not other._forward_pre_hooks


def test_quantize_unet_names_the_layer_and_changes_nothing_when_a_weight_is_nan(unet):
    last = list(find_layers(unet_shapes(unet)))[-1]
    unet.get_submodule(ldm_to_diffusers(last)).weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=last):
        quantize_unet(unet, token_recipe(unet))
    assert not any(isinstance(module, QuantizedModule) for module in unet.modules())
    assert not unet._forward_pre_hooks


def test_quantize_unet_refuses_what_it_cannot_do(unet):
    static = preset_recipe("w8a8-static", find_layers(unet_shapes(unet)))
    with pytest.raises(CalibrationError, match="there is no calibration"):
        quantize_unet(unet, static)
    with pytest.raises(CalibrationError, match="not in this calibration"):
        quantize_unet(unet, static, Calibration({}))
    with pytest.raises(SchemeError, match=r"input_blocks\.0\.0: in the recipe"):
        quantize_unet(unet, Recipe({"input_blocks.0.0": Scheme()}, "bad", "test"))
    assert not unet._forward_pre_hooks
    quantize_unet(unet, Recipe({STATIC_CONV: Scheme()}, "one", "test"))
    with pytest.raises(ModelError, match="already quantized"):
        quantize_unet(unet, static)


def test_quantize_unet_refuses_sd15():
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=48, attention_head_dim=2)
    with pytest.raises(ModelError, match="not of SDXL's topology"):
        quantize_unet(unet, Recipe({}, "none", "test"))


def test_save_refuses_a_unet_that_is_not_quantized(unet, tmp_path):
    with pytest.raises(ModelError, match="not quantized"):
        save(unet, tmp_path / "q.safetensors")
    assert not list(tmp_path.iterdir())


def test_quantize_unet_rounds_by_second_moments_where_it_has_them(unet):
    layers = find_layers(unet_shapes(unet))
    names = [name for name, spec in layers.items() if name.endswith((".in_layers.2", ".attn1.to_q"))][:4]
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for name in names[:2]:
        K = torch.Size(layers[name].shape[1:]).numel()
        rows = torch.randn(2 * K, K, generator=generator) + 2 * torch.randn(2 * K, 1, generator=generator)
        moments[name] = rows.t() @ rows / (2 * K)
    recipe = Recipe({name: token_scheme(name) for name in names}, "test", "test")
    plain, rounded = (quantized_layers(quantize_unet(copy.deepcopy(unet), recipe, moments=one)) for one in (None, moments))
    assert [torch.equal(plain[name].qweight, rounded[name].qweight) for name in names] == [False, False] + [True] * (len(names) - 2)
