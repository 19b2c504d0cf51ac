"""Tunes the scales of a quantized UNet: on a few pictures and prompts (personalisation), on what fp16 answers (repair), or both.

The loss on pictures is the usual one of noise prediction, through the VAE's encoder (TuneQDM's, as DreamBooth's). What keeps all else
in place is not a second set of pictures but recorded answers of the reference UNet on other prompts: the same term that repairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, ModelError
from ...quant.timestep import NUM_TIMESTEPS
from ...quant.tuning.scale_set import ScaleSet
from ...quant.tuning.training import Progress, TuningSettings, TuningState, train
from .trajectory import Trajectory, map_tensors
from .tune_layers import empty_scale_set, from_logs, scaled

# A mean over a latent's 65,536 values leaves gradients below what fp16 holds.
FP16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class Examples:
    """Pictures to learn. latents: (P, 4, h, w), as the UNet sees them. conditions: of each, keyword arguments of the UNet, batch 1."""

    latents: Tensor
    conditions: Sequence[dict[str, object]]


@torch.inference_mode()
def encode_examples(pipeline, pictures: Tensor, prompts: Sequence[str]) -> Examples:
    """What the pipeline's own VAE and text encoders make of pictures (P, 3, H, W) fp32 in [0, 1] and a prompt each.

    Raises: CalibrationError unless there is one prompt a picture.
    """
    if len(pictures) == 0 or len(pictures) != len(prompts):
        raise CalibrationError(f"tuning: {len(pictures)} pictures and {len(prompts)} prompts; one prompt for each picture is needed.")
    vae = pipeline.vae
    latents = []
    for picture in pictures.split(1):
        encoded = vae.encode((picture * 2 - 1).to(vae.device, vae.dtype))
        latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        latents.append(latent.float() * vae.config.scaling_factor)
    size = pictures.shape[-2:]
    conditions = [map_tensors(_condition(pipeline, prompt, size), torch.clone) for prompt in prompts]
    return Examples(torch.cat(latents).clone(), conditions)


def tune(
    pipeline,
    unet: nn.Module,
    examples: Examples | None,
    reference: Trajectory | None,
    settings: TuningSettings,
    start: TuningState | None = None,
    progress: Progress | None = None,
    on_cancel: Callable[[TuningState], None] | None = None,
    exact: bool = False,
) -> ScaleSet:
    """A trained scale set for `unet`, which is left as it was.

    Args:
        pipeline: whose scheduler knows the noise. unet: quantized, of the pipeline's shape.
        examples: pictures to learn; None for repair alone.
        reference: recorded answers to come near (repair) or to keep (personalisation); None for none.
        start, progress, on_cancel: as of training.train.
        exact: train on the engine's own products, with rounded activations; else on floats, twice as fast (tune_layers.scaled).
    Raises: CalibrationError if there is nothing to learn from, `start` does not fit, or training diverges; ModelError if the UNet is
        not quantized, or does not predict noise.
    """
    if examples is None and reference is None:
        raise CalibrationError("tuning: neither pictures nor prompts to learn from. Give one of them.")
    terms: list[tuple[float, Callable]] = []
    if examples is not None:
        terms.append((1.0, _picture_loss(pipeline, unet, examples, settings.batch_size)))
    if reference is not None and (examples is None or settings.prior_weight > 0):
        terms.append((settings.prior_weight if examples is not None else 1.0, _answer_loss(unet, reference)))

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return sum(weight * term(generator) for weight, term in terms)

    scales = empty_scale_set(unet, settings.experts)
    with torch.enable_grad(), scaled(unet, scales, trainable=True, float_products=not exact) as logs:
        state = train(logs, loss, settings, start, progress, on_cancel, FP16_LOSS_SCALE if unet.dtype is torch.float16 else 1.0)
        summary = {"kind": "pictures" if examples is not None else "repair", "steps_done": state.step, **asdict(settings)}
        return from_logs(scales, logs, summary)


def _picture_loss(pipeline, unet: nn.Module, examples: Examples, batch_size: int) -> Callable[[torch.Generator], Tensor]:
    """Mean squared error of the predicted noise, at timesteps drawn evenly."""
    scheduler = pipeline.scheduler
    if scheduler.config.prediction_type != "epsilon":
        raise ModelError(
            f"tuning: the model predicts {scheduler.config.prediction_type}; pictures are learnt by models that predict noise."
        )
    device = next(unet.parameters()).device
    kept = scheduler.alphas_cumprod.float()

    def loss(generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(examples.latents), (batch_size,), generator=generator)
        # One timestep in each of batch_size equal parts of the schedule: less noise in the gradient than independent ones.
        share = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        timestep = (share * NUM_TIMESTEPS).long().clamp_max(NUM_TIMESTEPS - 1)
        noise = torch.randn(batch_size, *examples.latents.shape[1:], generator=generator)
        signal = kept[timestep].sqrt()[:, None, None, None]
        noisy = signal * examples.latents[picked].cpu() + (1 - signal.square()).sqrt() * noise
        conditions = _batched([examples.conditions[index] for index in picked.tolist()])
        answer = unet(noisy.to(device, unet.dtype), timestep.to(device), return_dict=False, **conditions)[0]
        return (answer.float() - noise.to(device)).square().mean()

    return loss


def _answer_loss(unet: nn.Module, reference: Trajectory) -> Callable[[torch.Generator], Tensor]:
    """Squared error to the recorded answer of one call, relative to the mean square of all answers."""
    device = next(unet.parameters()).device

    def loss(generator: torch.Generator) -> Tensor:
        call = reference.calls[int(torch.randint(len(reference.calls), (1,), generator=generator))]
        answer = unet(**map_tensors(call.arguments, lambda tensor: tensor.to(device)), return_dict=False)[0]
        wanted = call.output.to(device).float()
        return (answer.float() - wanted).square().mean() / wanted.square().mean()

    return loss


def _condition(pipeline, prompt: str, size: tuple[int, int]) -> dict[str, object]:
    """As StableDiffusionXLPipeline hands a prompt to its UNet, without negative prompt."""
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device=pipeline.unet.device, do_classifier_free_guidance=False)
    ids = torch.tensor([[*size, 0, 0, *size]], dtype=embeds.dtype, device=embeds.device)
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


def _batched(conditions: Sequence[dict[str, object]]) -> dict[str, object]:
    """Conditions of single pictures as one of a batch."""
    first = conditions[0]
    return {
        key: _batched([one[key] for one in conditions]) if isinstance(value, dict) else torch.cat([one[key] for one in conditions])
        for key, value in first.items()
    }
