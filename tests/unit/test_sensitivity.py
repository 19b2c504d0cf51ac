"""How much of a layer's noise reaches the output: measured on networks where it is known, stored, merged and interpolated."""

import pytest
import torch
from torch import nn

from stepquant.hosts.sensitivity import SensitivityProbe
from stepquant.quant.calibration import Calibration, merge
from stepquant.quant.observer import LayerObserver
from stepquant.quant.sensitivity import LayerSensitivity, input_noise, merge_sensitivity, probe_buckets, probe_groups


class TwoBranches(nn.Module):
    """y = loud(x) + 0.1 quiet(x): noise of `quiet` reaches the output with a hundredth of its energy."""

    def __init__(self):
        super().__init__()
        self.loud, self.quiet = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.loud, self.quiet):
            layer.weight.data = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]

    def forward(self, x, control=None):
        taken = control["output"].pop() if control is not None else 0.0
        return (self.loud(x) + 0.1 * self.quiet(x) + taken,)


def probed(buckets, **arguments):
    unet, bucket = TwoBranches(), [0]
    probe = SensitivityProbe(unet, {"loud": unet.loud, "quiet": unet.quiet}, lambda: bucket, probes=2)
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(1))
    with probe.attached():
        for bucket[0] in buckets:
            unet(x, **{name: make() for name, make in arguments.items()})
    assert not unet._forward_hooks and not unet.loud._forward_hooks
    return probe


def test_probe_finds_the_gain_of_a_known_network():
    found = probed([63, 40, 3]).sensitivity()
    assert found["loud"].buckets.tolist() == [3, 40], "after bucket 60 and after bucket 4 are the two calls that are repeated"
    # |y|^2 = 1.01 |x|^2; both layers keep the energy of their input
    assert found["loud"].gain.tolist() == pytest.approx([1 / 1.01] * 2, rel=0.05)
    assert found["quiet"].gain.tolist() == pytest.approx([0.01 / 1.01] * 2, rel=0.05)
    assert found["quiet"].energy_ratio.tolist() == pytest.approx([1.0] * 2, rel=0.01)


def test_probe_repeats_calls_with_a_controlnet_whose_residuals_are_used_up():
    found = probed([40, 3], control=lambda: {"output": [torch.ones(1)]}).sensitivity()
    assert found["quiet"].gain.shape == (2,)


def test_probe_leaves_the_answer_as_it_is_and_nothing_on_the_model_after_an_error():
    unet = TwoBranches()
    x = torch.randn(2, 50, 64)
    plain = unet(x)[0]

    def cancel(done, total):
        assert total == 4
        raise KeyboardInterrupt

    probe = SensitivityProbe(unet, {"loud": unet.loud, "quiet": unet.quiet}, lambda: [50], probes=2)
    with probe.attached():
        assert torch.equal(unet(x)[0], plain)
    probe = SensitivityProbe(unet, {"loud": unet.loud, "quiet": unet.quiet}, lambda: [50], probes=2)
    probe.on_tick = cancel
    with pytest.raises(KeyboardInterrupt), probe.attached():
        unet(x)
    assert not probe.running and not unet._forward_hooks and not unet.loud._forward_hooks


def test_probe_without_probes_does_nothing():
    unet = TwoBranches()
    probe = SensitivityProbe(unet, {"loud": unet.loud}, lambda: [50], probes=0)
    with probe.attached():
        unet(torch.randn(1, 2, 64))
    assert probe.repetitions == 0 and not probe.sensitivity()


def test_input_noise_follows_the_rows_of_a_layer_with_a_scale_per_row():
    x = torch.ones(1, 2, 4000)
    x[0, 0] = 80.0  # the start token
    noise = [input_noise(name, x, torch.Generator().manual_seed(0)) for name in ("a.proj_in", "a.attn2.to_k")]
    ratios = [float(one[0, 0].square().mean() / one[0, 1].square().mean()) for one in noise]
    assert ratios == pytest.approx([1.0, 6400.0], rel=0.1)


def test_probe_buckets_descend_along_the_whole_schedule():
    assert probe_buckets(3) == [60, 32, 4] and probe_buckets(1) == [60] and probe_buckets(0) == []


def test_probe_groups_join_successive_blocks_of_a_deep_unet_only():
    deep = [f"middle_block.1.transformer_blocks.{index}.{kind}" for index in range(40) for kind in "abcdefghij"]
    groups = probe_groups(deep)
    assert len(groups) == 10 and all(len(group) == 40 for group in groups)
    assert probe_groups(deep[:20]) == [[name] for name in deep[:20]]


def layer(buckets, gain) -> LayerSensitivity:
    return LayerSensitivity(torch.tensor(buckets), torch.tensor(gain), torch.ones(len(gain)))


def test_sensitivity_is_interpolated_in_the_logarithm_and_level_beyond_its_ends():
    gain, ratio = layer([10, 30], [1.0, 100.0]).at(torch.tensor([0, 20, 63]))
    assert gain.tolist() == pytest.approx([1.0, 10.0, 100.0])
    assert ratio.tolist() == pytest.approx([1.0] * 3)


def test_merged_sensitivity_averages_equal_buckets_and_keeps_the_others():
    merged = merge_sensitivity(layer([10, 30], [1.0, 4.0]), layer([30, 50], [16.0, 2.0]))
    assert merged.buckets.tolist() == [10, 30, 50]
    assert merged.gain.tolist() == pytest.approx([1.0, 8.0, 2.0])


def test_calibration_keeps_sensitivity_through_saving_and_merging(tmp_path):
    observer = LayerObserver(channels=8)
    observer.update(torch.randn(1, 4, 8), [3])
    first = Calibration({"a": observer.statistics()}, {}, {"a": layer([10, 30], [1.0, 4.0])})
    first.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert loaded.layers.keys() == {"a"} and loaded.sensitivity["a"].gain.tolist() == [1.0, 4.0]
    merged = merge(loaded, Calibration({"a": observer.statistics()}))
    assert merged.sensitivity["a"].buckets.tolist() == [10, 30]
