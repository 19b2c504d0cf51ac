"""Second moments of a running pipeline's layers: the rows that each layer multiplies, what is left out, nothing left behind."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import CalibrationError
from stepquant.hosts.diffusers.second_moments import rows_of


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_a_convolution_give_its_output_with_the_weight_as_it_lies(stride, generator):
    conv = torch.nn.Conv2d(6, 4, 3, stride=stride, padding=1, bias=False)
    x = torch.randn(2, 6, 5, 7, generator=generator)
    rows = rows_of(conv, x, 10_000, generator)
    outputs = (rows @ conv.weight.detach().flatten(1).t()).sum(0)
    torch.testing.assert_close(outputs, conv(x).detach().sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [torch.nn.Conv2d(6, 4, 1), torch.nn.Linear(6, 4)], ids=["1x1", "linear"])
def test_rows_are_drawn_when_there_are_too_many(module, generator):
    x = torch.randn(2, 50, 6, generator=generator)
    x = x.permute(0, 2, 1).reshape(2, 6, 5, 10) if isinstance(module, torch.nn.Conv2d) else x
    rows = rows_of(module, x, 30, generator)
    everything = x.permute(0, 2, 3, 1).flatten(0, 2) if x.ndim == 4 else x.flatten(0, 1)
    assert rows.shape == (30, 6) and all(bool((everything == row).all(1).any()) for row in rows)


def test_a_convolutions_rows_come_from_a_few_images_only(generator):
    conv = torch.nn.Conv2d(2, 4, 3, padding=1)
    x = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 2, 8, 8)
    rows = rows_of(conv, x, 64, generator)
    assert len(rows) == 64 and len(rows[:, 4].unique()) <= 4  # the middle tap tells the image; 4 * 64 pixels of 64 each


class TestGathering:
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")

    @pytest.fixture(scope="class")
    def pipeline(self):
        from stepquant.demo.pipeline import load_demo_pipeline

        return load_demo_pipeline()

    def test_gathers_the_named_layers_and_leaves_the_unet_as_it_was(self, pipeline):
        from stepquant.hosts.diffusers.second_moments import gather_second_moments
        from stepquant.hosts.diffusers.trajectory import Sampling

        names = ["input_blocks.1.0.in_layers.2", "middle_block.1.proj_in", "middle_block.1.transformer_blocks.0.attn2.to_k"]
        found = gather_second_moments(pipeline, ["a red apple"], Sampling(1, 1.0, 0), names=names)
        assert set(found) == set(names[:2]) and found[names[0]].shape == (64 * 9, 64 * 9)
        assert torch.equal(found[names[1]], found[names[1]].t()) or torch.allclose(found[names[1]], found[names[1]].t(), rtol=1e-4)
        assert not any(module._forward_pre_hooks for module in pipeline.unet.modules())

    def test_hessians_of_8_bit_weights_hold_convolutions_and_are_added_to_those_of_4_bits(self, pipeline, tmp_path):
        from stepquant.hosts.diffusers.hessians import gather_hessians
        from stepquant.hosts.diffusers.second_moments import gather_second_moments
        from stepquant.hosts.diffusers.trajectory import Sampling

        conv, linear, prompt = "input_blocks.1.0.in_layers.2", "middle_block.1.proj_in", "middle_block.1.transformer_blocks.0.attn2.to_k"
        once = (["a red apple"], tmp_path, Sampling(1, 1.0, 0))
        four = gather_hessians(pipeline, *once)
        assert not four.covers(conv) and four.find(conv) is None
        before = (tmp_path / f"{linear}.safetensors").stat().st_mtime_ns
        eight = gather_hessians(pipeline, *once, bits=8)
        assert (tmp_path / f"{linear}.safetensors").stat().st_mtime_ns == before
        assert eight.covers(conv) and not eight.covers(prompt)
        # Both take 768 of 1,024 pixels, others each.
        other = gather_second_moments(pipeline, *once[::2], names=[conv])[conv]
        difference = (eight.read(conv) - other).norm() / other.norm()
        assert other.shape == (64 * 9, 64 * 9) and float(difference) < 0.1
        assert not any(module._forward_pre_hooks for module in pipeline.unet.modules())

    def test_refuses_no_prompts(self, pipeline):
        from stepquant.hosts.diffusers.second_moments import gather_second_moments

        with pytest.raises(CalibrationError, match="no prompts"):
            gather_second_moments(pipeline, [])
