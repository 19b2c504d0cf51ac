"""Tunes the scales of a quantized MODEL inside ComfyUI: on pictures (a new subject), on what the 16-bit MODEL answers (repair), or both.

ComfyUI runs nodes in inference mode, whose tensors cannot take part in training. So what is trained with is made anew outside of it: a
plain UNet with the weights that the codes stand for, and copies of recorded calls. The quantized MODEL is only read; LoRAs on it are
left out. Weights are floats while training runs, as on every trainer; what is trained runs on codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import ModelError
from ...quant.timestep import NUM_TIMESTEPS
from ...quant.tuning.identity import identity
from ...quant.tuning.scale_set import ScaleSet, expert_of, new_scale_set
from ...quant.tuning.training import TuningSettings, TuningState, train
from .attach import state_of
from .progress_text import TimeLeft
from .sampling import SEEDS, SamplerSettings, sample_latent
from .scale_lora import quantized_layers, reader, scaled_norms
from .tap import TimestepTap

RECORDER_KEY = "stepquant_recorder"
UNET = "diffusion_model."
# Of recorded calls, spread over the run: 2.5 MB each for SDXL at 1024 x 1024 with guidance.
MOST_CALLS = 256
PREVIEW_EVERY = 10
# From so many weights on, a block's activations are made a second time on the way back instead of being kept: a third more time, and
# full-size SDXL, whose twin alone is 4.8 GiB, can be tuned at all on a card of a few GB more.
RECOMPUTES_FROM = 500_000_000
# A mean over a latent's 65,536 values leaves gradients below what fp16 holds.
FP16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class Call:
    """One UNet call, on the CPU. x: (B, 4, h, w) as the UNet is given it. output: (B, 4, h, w)."""

    x: Tensor
    timesteps: Tensor
    context: Tensor
    y: Tensor
    output: Tensor


@dataclass(frozen=True)
class Pictures:
    """What is to be learnt. latents: (P, 4, h, w), as the VAE makes them. conditioning: ComfyUI's, of all of them."""

    latents: Tensor
    conditioning: list


def tune_model(
    model: ModelPatcher,
    original: ModelPatcher,
    positive: list,
    negative: list,
    latent: dict,
    seed: int,
    sampler: SamplerSettings,
    runs: int,
    settings: TuningSettings,
    pictures: Pictures | None = None,
    start: TuningState | None = None,
    on_cancel: Callable[[TuningState], None] | None = None,
) -> ScaleSet:
    """A trained scale set for `model`; both MODELs are left as they were.

    Args:
        model: quantized. original: the 16-bit MODEL it was made from, whose answers are recorded in `runs` samplings, each with the
            next seed: what is repaired, or with pictures is to stay as it is.
        start: an unfinished run of the same settings. on_cancel: given the state if the run is cancelled.
    Raises: ModelError if `model` is not quantized or `original` is, or pictures are to be learnt by a model that does not predict
        noise; CalibrationError if training diverges or `start` does not fit.
    """
    if state_of(model) is None or state_of(original) is not None:
        raise ModelError("Tune: connect a quantized model to model, and the 16-bit model that it was made from to original.")
    if pictures is not None and original.model.model_type is not ModelType.EPS:
        raise ModelError(
            f"Tune: pictures are learnt by models that predict noise; this is {original.model.model_type.name}. Leave images open."
        )
    calls = []
    for run in range(runs):
        calls += record_calls(original, positive, negative, latent, (seed + run) % SEEDS, sampler)
    calls = calls[:: -(-len(calls) // MOST_CALLS)]
    condition = None if pictures is None else _condition(original, pictures, negative, sampler)
    scales = _empty_scale_set(model, settings.experts)
    comfy.model_management.unload_all_models()
    with torch.inference_mode(False), torch.enable_grad():
        trainer = _Trainer(model, scales, settings, calls, pictures, condition)
        scale = FP16_LOSS_SCALE if trainer.dtype is torch.float16 else 1.0
        state = train(trainer.logs, trainer.loss, settings, start, trainer.progress(settings.steps), on_cancel, scale)
        summary = {"kind": "repair" if pictures is None else "pictures", "steps_done": state.step, **asdict(settings)}
        logs = {name: log.detach().float().cpu().clone() for name, log in trainer.logs.items()}
    out, into = ({name: logs[name] for name in table} for table in (scales.out, scales.into))
    return ScaleSet(scales.experts, out, into, scales.base, summary)


def record_calls(model: ModelPatcher, positive: list, negative: list, latent: dict, seed: int, sampler: SamplerSettings) -> list[Call]:
    """Every UNet call of one sampling run with its answer, as plain tensors."""
    calls: list[Call] = []

    def recorder(executor: Callable, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = executor(x, timesteps, context, y, *args, **kwargs)
        calls.append(Call(*(_plain(tensor) for tensor in (x, timesteps, context, y, output))))
        return output

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, RECORDER_KEY, recorder)
    sample_latent(watched, positive, negative, latent, seed, sampler)
    return calls


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU that training may use."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", torch.float32, copy=True).clone()


def _condition(original: ModelPatcher, pictures: Pictures, negative: list, sampler: SamplerSettings) -> Call:
    """What ComfyUI hands the UNet for the pictures' prompt and size: one step of its own sampler, without guidance, shows it."""
    one = replace(sampler, steps=1, cfg=1.0, denoise=1.0)
    return record_calls(original, pictures.conditioning, negative, {"samples": pictures.latents[:1]}, 0, one)[0]


def _empty_scale_set(model: ModelPatcher, experts: int) -> ScaleSet:
    unet = model.model.diffusion_model
    layers = {name: layer.weight.shape[0] for name, layer in quantized_layers(unet)}
    norms = {name: norm.weight.shape[0] for name, norm in scaled_norms(unet)}
    scales = new_scale_set(layers, norms, experts)
    scales.base = identity(reader(model), state_of(model).base_model)
    return scales


class _Trainer:
    """A float twin of the quantized UNet with factors on its layers and norms, and the losses."""

    def __init__(
        self,
        model: ModelPatcher,
        scales: ScaleSet,
        settings: TuningSettings,
        calls: Sequence[Call],
        pictures: Pictures | None,
        condition: Call | None,
    ) -> None:
        self._model, self._settings, self._calls = model, settings, calls
        self._device, self.dtype = model.load_device, model.model.get_dtype_inference()
        self._sampling = model.get_model_object("model_sampling")
        self._tap = TimestepTap()
        self._tap.follow(self._sampling)
        self._bucket = torch.zeros(1, dtype=torch.int64)
        tables = {**scales.out, **scales.into}
        self.logs = {name: nn.Parameter(table.to(self._device).clone()) for name, table in tables.items()}
        self._unet = _float_twin(model, self._device, self.dtype)
        for name in tables:
            self._bind(self._unet.get_submodule(name), name)
        if sum(parameter.numel() for parameter in self._unet.parameters()) >= RECOMPUTES_FROM:
            _recompute_blocks(self._unet)
        self._latents = None if pictures is None else _plain(model.model.process_latent_in(pictures.latents))
        self._condition = condition
        self._denoised: Tensor | None = None

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """Of one step: noise prediction on pictures, the recorded answer of one call, or both."""
        if self._latents is None:
            return self._answer_loss(generator)
        loss = self._picture_loss(generator)
        return loss + self._settings.prior_weight * self._answer_loss(generator) if self._settings.prior_weight else loss

    def progress(self, total: int) -> Callable[[int, int, float], None]:
        """Bar, preview and time left; raises if the artist has cancelled."""
        bar, left = comfy.utils.ProgressBar(total), TimeLeft(total)
        previewer = latent_preview.get_previewer(self._device, self._model.model.latent_format)

        def after_step(done: int, total: int, loss: float) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            preview = None
            if previewer is not None and done % PREVIEW_EVERY == 0:
                preview = previewer.decode_latent_to_preview_image("JPEG", self._denoised)
            bar.update_absolute(done, preview=preview)
            left.show(done)

        return after_step

    def _answer_loss(self, generator: torch.Generator) -> Tensor:
        call = self._calls[int(torch.randint(len(self._calls), (1,), generator=generator))]
        wanted = call.output.to(self._device)
        return (self._ask(call.x, call.timesteps, call.context, call.y) - wanted).square().mean() / wanted.square().mean()

    def _picture_loss(self, generator: torch.Generator) -> Tensor:
        B = self._settings.batch_size
        picked = torch.randint(len(self._latents), (B,), generator=generator)
        # One timestep in each of B equal parts of the schedule: less noise in the gradient than independent ones.
        timesteps = ((torch.arange(B) + torch.rand(B, generator=generator)) / B * NUM_TIMESTEPS).floor()
        noise = torch.randn(B, *self._latents.shape[1:], generator=generator)
        sigma = self._sigma(timesteps)
        x = (self._latents[picked] + sigma * noise) / (sigma.square() + 1).sqrt()
        context, y = (tensor[:1].expand(B, *tensor.shape[1:]) for tensor in (self._condition.context, self._condition.y))
        return (self._ask(x, timesteps, context, y) - noise.to(self._device)).square().mean()

    def _ask(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        x, context, y = (tensor.to(self._device, self.dtype) for tensor in (x, context, y))
        self._bucket = self._tap.bucket_of(timesteps.to(self._device))
        answer = self._unet(x, timesteps.to(self._device), context, y).float()
        sigma = self._sigma(timesteps[:1]).to(self._device)
        self._denoised = (x[:1].float() * (sigma.square() + 1).sqrt() - sigma * answer[:1]).detach()
        return answer

    def _sigma(self, timesteps: Tensor) -> Tensor:
        """(B, 1, 1, 1) on the CPU."""
        return self._sampling.sigma(timesteps.to(self._sampling.sigmas.device)).float().cpu().clone().view(-1, 1, 1, 1)

    def _bind(self, module: nn.Module, name: str) -> None:
        """Multiply a layer's product, without its bias, or a norm's output."""

        def factors(y: Tensor) -> Tensor:
            table = self.logs[name].exp()
            chosen = table.index_select(0, expert_of(self._bucket, table.shape[0])).to(y.dtype)  # (B, width)
            return chosen[:, :, None, None] if y.ndim == 4 else chosen if y.ndim == 2 else chosen[:, None]

        def forward(x: Tensor) -> Tensor:
            if isinstance(module, nn.Conv2d):
                y = F.conv2d(x, module.weight, None, module.stride, module.padding)
            elif isinstance(module, nn.Linear):
                y = F.linear(x, module.weight)
            else:
                y = type(module).forward(module, x)
                return y * factors(y)
            y = y * factors(y)
            return y if module.bias is None else y + (module.bias[:, None, None] if y.ndim == 4 else module.bias)

        module.forward = forward


class _TwinOps(comfy.ops.disable_weight_init):
    """Under dynamic VRAM ComfyUI's own Linear has no weight until one is loaded."""

    class Linear(nn.Linear):
        def reset_parameters(self) -> None:
            """The weights are copied in."""


def _float_twin(model: ModelPatcher, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A plain UNet of ComfyUI's with the weights that the codes stand for, none of them an inference tensor."""
    source = model.model.diffusion_model
    config = {**model.model.model_config.unet_config, "dtype": dtype, "device": device}
    twin = type(source)(**config, operations=_TwinOps)
    state_dict = model.model_state_dict(UNET)
    layers = dict(quantized_layers(source))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            backup = model.backup.get(UNET + name)
            layer = layers.get(name.removesuffix(".weight"))
            live = state_dict[UNET + name] if layer is None else layer.weight
            weight = live if backup is None else backup.weight
            parameter.copy_(weight.dequantize() if layer is not None else weight)
    return twin.eval().requires_grad_(False)


def _recompute_blocks(unet: nn.Module) -> None:
    """Let the blocks keep their inputs only."""
    for block in unet.modules():
        if isinstance(block, ResBlock | BasicTransformerBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
