"""Fits corrections of a quantized UNet's output on some prompts, judges each on others, and runs a UNet with one. Tables are in quant/.

Guided halves are corrected before they are combined: it is the UNet's own output that is corrected. The input's drift is measured
on the model's own sampling with the output already corrected, step after step, all prompts side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from ...errors import CalibrationError
from ...quant.calibration import Calibration
from ...quant.corrections.bias import with_corrected_bias
from ...quant.corrections.correction_file import Corrections, Verdict
from ...quant.corrections.output import CHANNELS, OutputCorrection, OutputStatistics, identity_correction, with_input_bias
from ...quant.sqnr import sqnr_db
from ...quant.timestep import NUM_BUCKETS
from ...quant.tuning.identity import identity
from .fidelity import step_sqnr
from .quantize import quantized_layers, state_of
from .trajectory import Sampling, Trajectory, record_trajectory, replay, sample_latents, unet_in_place
from .tune_layers import reader


@contextmanager
def corrected(unet: nn.Module, correction: OutputCorrection) -> Iterator[None]:
    """The quantized UNet runs with a correction while the block runs."""
    table = correction.on(next(unet.parameters()).device)
    tap = state_of(unet).tap

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "sample" in kwargs:
            return args, kwargs | {"sample": table.correct_input(kwargs["sample"], tap.bucket)}
        return (table.correct_input(args[0], tap.bucket), *args[1:]), kwargs

    def after(module: nn.Module, args: tuple, kwargs: dict, output):
        if isinstance(output, tuple):
            return (table.correct_output(output[0], tap.bucket), *output[1:])
        return type(output)(sample=table.correct_output(output.sample, tap.bucket))

    # The tap's own hook runs first: it was registered when the UNet was quantized.
    handles = [unet.register_forward_hook(after, with_kwargs=True)]
    if correction.touches_input:
        handles.append(unet.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fit_corrections(
    pipeline, unet: nn.Module, prompts: Sequence[str], held_out: Sequence[str], sampling: Sampling, say: Callable[[str], None] | None = None
) -> Corrections:
    """Fit every method on `prompts`, and judge it on `held_out`.

    Args: pipeline: with the unquantized UNet. unet: quantized, of the same model. say: told what is being done.
    Raises: CalibrationError if there are no prompts, or the two lists share one.
    """
    if not prompts or not held_out or set(prompts) & set(held_out):
        raise CalibrationError(
            f"corrections: {len(prompts)} prompts to fit on, {len(held_out)} to judge on, {len(set(prompts) & set(held_out))} in both. "
            "Both lists are needed, without common prompts."
        )
    say = say or (lambda _: None)
    say("recording the reference")
    fitted_on = record_trajectory(pipeline, prompts, sampling, len(prompts))
    judged_on = record_trajectory(pipeline, held_out, sampling, len(held_out))
    state_of(unet).tap.follow(pipeline.scheduler)
    say("fitting")
    statistics = output_statistics(unet, fitted_on)
    tables = {
        "ptqd": statistics.ptqd(),
        "reconstruction": statistics.reconstruction(),
        "least-squares": statistics.reconstruction(0.0, 0.0, 0.0),
    }
    tables["input-bias"] = measure_input_bias(pipeline, unet, prompts, fitted_on, sampling, identity_correction())
    before = judge(pipeline, unet, held_out, judged_on, sampling)
    verdicts = {}
    for name, table in tables.items():
        say(f"judging {name}")
        with corrected(unet, table):
            after = judge(pipeline, unet, held_out, judged_on, sampling)
        verdicts[name] = Verdict(before[0], after[0], before[1], after[1])
    base = identity(reader(unet), state_of(unet).base_model)
    summary = {"prompts": list(prompts), "held_out": list(held_out), "preset": state_of(unet).recipe.preset, **vars(sampling)}
    return Corrections(tables, verdicts, base, summary)


def output_statistics(unet: nn.Module, trajectory: Trajectory) -> OutputStatistics:
    """The UNet's answers to recorded questions beside the recorded answers."""
    statistics = OutputStatistics()
    for call, answer in replay(unet, trajectory):
        statistics.add(call.output, answer, state_of(unet).tap.bucket)
    return statistics


def measure_input_bias(
    pipeline, unet: nn.Module, prompts: Sequence[str], reference: Trajectory, sampling: Sampling, correction: OutputCorrection
) -> OutputCorrection:
    """`correction` with the mean drift of the UNet's own sampling, each step on inputs that the steps before have corrected.

    Args: reference: of the same prompts in one batch, with the same sampling.
    """
    drift = _Drift(reference, correction, state_of(unet).tap)
    handles = [
        unet.register_forward_pre_hook(drift.before, with_kwargs=True),
        unet.register_forward_hook(drift.after, with_kwargs=True),
    ]
    try:
        with unet_in_place(pipeline, unet):
            sample_latents(pipeline, prompts, sampling, len(prompts))
    finally:
        for handle in handles:
            handle.remove()
    return with_input_bias(correction, drift.sums, drift.count)


@dataclass
class _Drift:
    """Hooks of one sampling run that compare the UNet's input with the recorded one and take its mean away."""

    reference: Trajectory
    correction: OutputCorrection
    tap: object
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(NUM_BUCKETS, CHANNELS, dtype=torch.float64))
    count: Tensor = field(default_factory=lambda: torch.zeros(NUM_BUCKETS, dtype=torch.float64))

    def before(self, unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = kwargs["sample"] if "sample" in kwargs else args[0]
        recorded = self.reference.calls[self.step].arguments["sample"].to(x.device)
        each = (x[:, :CHANNELS] - recorded[:, :CHANNELS]).mean((2, 3))  # (B, 4)
        bucket = self.tap.bucket.cpu()
        self.sums.index_add_(0, bucket, each.double().cpu())
        self.count.index_add_(0, bucket, torch.ones(len(bucket), dtype=torch.float64))
        x = torch.cat([x[:, :CHANNELS] - each.mean(0)[None, :, None, None], x[:, CHANNELS:]], 1)
        return (args, kwargs | {"sample": x}) if "sample" in kwargs else ((x, *args[1:]), kwargs)

    def after(self, unet: nn.Module, args: tuple, kwargs: dict, output):
        self.step += 1
        table = self.correction.on(output[0].device)
        return (table.correct_output(output[0], self.tap.bucket), *output[1:])


def correct_biases(unet: nn.Module, weights: Callable[[str], Tensor], calibration: Calibration) -> int:
    """Fold bias correction into a quantized UNet's biases, in place; layers without bias or recorded rows stay as they are.

    Args: weights: reads a layer's float weight by its LDM name. calibration: of the unquantized UNet.
    Returns: how many layers were corrected.
    """
    count = 0
    for name, layer in quantized_layers(unet).items():
        stored = layer.stored()
        better = with_corrected_bias(stored, weights(name).to(stored.qweight.device), calibration.layers.get(name))
        layer.bias = better.bias
        count += better is not stored
    return count


def judge(pipeline, unet: nn.Module, prompts: Sequence[str], reference: Trajectory, sampling: Sampling) -> tuple[float, float]:
    """(mean SQNR of the output over steps, median over prompts of the SQNR of their final latents), dB.

    Args: reference: recorded with the same prompts and sampling.
    """
    steps = step_sqnr(unet, reference)
    with unet_in_place(pipeline, unet):
        latents = sample_latents(pipeline, prompts, sampling, len(prompts))
    return steps.mean_db(), median(sqnr_db(*pair) for pair in zip(reference.latents, latents, strict=True))
