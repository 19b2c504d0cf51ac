"""Smoothing: exact moves of scale, made only where they lower the noise."""

from __future__ import annotations

import pytest
import torch

from stepquant.quant.calibration import Calibration
from stepquant.quant.observer import LayerObserver
from stepquant.quant.smoothing import choose_smoothing, smoothed_statistics, smoothing_factor

OUTLIER = 5


def observed(x):
    observer = LayerObserver(x.shape[-1])
    observer.update(x, [3])
    return observer.statistics()


@pytest.fixture
def weight():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[:, OUTLIER] /= 30
    return weight


@pytest.fixture
def x():
    x = torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(1))
    x[..., OUTLIER] *= 30
    return x


def test_smoothing_factor_is_smoothquants(weight, x):
    statistics = observed(x)
    factor = smoothing_factor(statistics, [weight], 0.5)
    strength = statistics.range_max.abs().maximum(statistics.range_min.abs()).amax(0) ** 0.5 / weight.abs().amax(0) ** 0.5
    torch.testing.assert_close(factor[1:] / factor[0], strength[0] / strength[1:], rtol=1e-4, atol=0)
    assert float(factor.log().mean()) == pytest.approx(0, abs=1e-5)


def test_smoothing_takes_an_outlier_out_of_the_input(weight, x):
    factor = choose_smoothing(observed(x), [weight])
    assert float(factor[OUTLIER] / factor.median()) == pytest.approx(1 / 30, rel=0.5)


def test_smoothing_leaves_a_layer_alone_that_gains_nothing(weight, x):
    weight[:, OUTLIER] *= 30
    x[..., OUTLIER] /= 30
    assert choose_smoothing(observed(x), [weight]) is None


def test_smoothed_statistics_are_those_of_the_scaled_input(weight, x):
    factor = smoothing_factor(observed(x), [weight], 0.5)
    found, expected = smoothed_statistics(observed(x), factor), observed(x * factor)
    torch.testing.assert_close(found.range_max, expected.range_max)
    torch.testing.assert_close(found.rows.float(), expected.rows.float(), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.token_absmax, expected.token_absmax, rtol=0.3, atol=0)


def test_smooth_unet_keeps_the_function_and_scales_its_calibration():
    diffusers = pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    from stepquant.hosts.diffusers.scale_moves import READERS, move_scales, transformer_blocks
    from stepquant.hosts.diffusers.smoothing import smooth_unet
    from stepquant.hosts.key_mapping import diffusers_to_ldm

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 64),
        transformer_layers_per_block=(0, 1, 1),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    unet = unet.eval().requires_grad_(False)
    # One outlier in every tensor that ff.net.2 reads: what smoothing is to find and undo.
    outlier = torch.ones(256)
    outlier[OUTLIER] = 50.0
    move_scales(unet, {f"{path}.value": outlier for path in transformer_blocks(unet)})
    arguments = {
        "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(1, 77, 48, generator=torch.Generator().manual_seed(2)),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)},
    }
    layers, handles = {}, []
    for path in transformer_blocks(unet):
        for readers in READERS.values():
            for reader in readers:
                name = diffusers_to_ldm(f"{path}.{reader}.weight").removesuffix(".weight")
                layers[name] = LayerObserver(unet.get_submodule(f"{path}.{reader}").in_features)
                hook = lambda _m, args, seen=layers[name]: seen.update(args[0], [3])  # noqa: E731
                handles.append(unet.get_submodule(f"{path}.{reader}").register_forward_pre_hook(hook))
    with torch.inference_mode():
        before = unet(**arguments).sample
        for handle in handles:
            handle.remove()
        calibration, factors = smooth_unet(unet, Calibration({name: layer.statistics() for name, layer in layers.items()}))
        after = unet(**arguments).sample
    assert {site.rpartition(".")[2] for site in factors} >= {"value"}
    assert len([site for site in factors if site.endswith(".value")]) == len(transformer_blocks(unet))
    assert float((after - before).norm() / before.norm()) < 1e-4
    assert calibration.summary["smoothed"] == sorted(factors)
