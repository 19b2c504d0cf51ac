"""Rounds the 4-bit weights of a diffusers SDXL UNet block by block, each to what the float model's block answers.

Units and order are BRECQ's (arXiv 2102.05426): one transformer block after the other, on the inputs that it gets from the quantized
part of the UNet before it; targets are the float model's outputs on its own inputs. Inputs are of all timesteps, as Q-Diffusion's
(arXiv 2302.04304). Linears outside of transformer blocks, and those that read the prompt, are rounded elsewhere (rounding/method.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, SchemeError
from ...quant.calibration import Calibration
from ...quant.int4 import Int4Weight
from ...quant.recipe import Recipe
from ...quant.rounding.block import RoundedLinear, Training, learn_rounding
from ...quant.rounding.folder import RoundedFolder
from ...quant.rounding.hessian import HessianObserver, uses_hessian
from ...quant.rounding.method import Rounding, RoundingMethod
from ..key_mapping import diffusers_to_ldm, ldm_to_diffusers
from ..quantize_layer import quantize_layer
from .quantize import build_layer, is_quantized, quantize_unet, replace_layer, state_of
from .scale_moves import transformer_blocks
from .trajectory import Progress, Sampling, map_tensors, recorded_calls


@dataclass(frozen=True)
class Reconstruction:
    """sampling, batch_size, calls: as of trajectory.recorded_calls. training: of each block."""

    sampling: Sampling = field(default_factory=lambda: Sampling(steps=6))
    calls: int = 3
    batch_size: int = 2
    training: Training = field(default_factory=Training)


_ORDER = ("down", "mid", "up")  # diffusers registers the middle last
Questions = list[dict[str, object]]


@dataclass
class _Inputs:
    """Of one block, for all samples, on the CPU. exact, noisy: (S, T, C), in the float and the quantized UNet. context: (S, tokens,
    features). buckets: (S,)."""

    path: str
    exact: Tensor
    noisy: Tensor
    context: Tensor
    buckets: Tensor


class _ReachedError(Exception):
    """The UNet has come to the block whose input is wanted."""


def reconstructed_layers(unet: nn.Module, recipe: Recipe) -> dict[str, dict[str, str]]:
    """Transformer block's path -> LDM name of each Linear that is rounded in it -> its path in the block.

    In the order in which the UNet runs them; blocks without any are left out.
    """
    paths = {name: ldm_to_diffusers(name) for name, scheme in recipe.schemes.items() if scheme.is_int4 and uses_hessian(name)}
    found = {}
    for block in sorted(transformer_blocks(unet), key=lambda path: _ORDER.index(path.partition("_")[0])):
        inside = {name: path.removeprefix(f"{block}.") for name, path in paths.items() if path.startswith(f"{block}.")}
        if inside:
            found[block] = inside
    return found


def reconstruct(
    pipeline,
    recipe: Recipe,
    prompts: Sequence[str],
    folder: str | Path,
    how: Reconstruction | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> RoundedFolder:
    """Round the recipe's 4-bit Linears in transformer blocks; a block's file is written when it is done, and found again later.

    Args:
        pipeline: an SDXL pipeline whose UNet is not quantized; left as it was, also after an error or a cancel.
        folder: made if it is not there; must hold nothing of other settings.
        calibration: needed if a scheme is static.
        progress: called with (training steps done, steps in all). Raising in it cancels.
    Raises: as quantize_unet; CalibrationError if there are no prompts, or the folder is of other settings; SchemeError if the recipe
        has no 4-bit Linears in transformer blocks; FormatError if the folder cannot be written.
    """
    how = how or Reconstruction()
    if not prompts:
        raise CalibrationError("Reconstruct: no prompts; at least one is needed. Usual is 24 or more.")
    blocks = reconstructed_layers(pipeline.unet, recipe)
    if not blocks:
        raise SchemeError("Reconstruct: the recipe has no 4-bit Linears in transformer blocks. Use a recipe with 4-bit weights.")
    files = RoundedFolder(Path(folder), _summary(pipeline, recipe, prompts, how))
    quantized = quantize_unet(sharing_copy(pipeline.unet), recipe, calibration)
    state_of(quantized).tap.follow(pipeline.scheduler)
    missing = [path for path in blocks if not files.has(_file_name(path))]
    recorded = recorded_calls(pipeline, prompts, how.sampling, how.batch_size, how.calls) if missing else []
    questions = [call.arguments for call in recorded]
    inputs = None
    for number, (path, layers) in enumerate(blocks.items()):
        if path in missing:
            inputs = _inputs_of(path, inputs, pipeline.unet, quantized, questions, how.training.batch_size)
            after = _after(progress, number, len(blocks), how.training.iterations)
            ranks = {name: recipe.schemes[name].rank for name in layers}
            files.write(_file_name(path), _round_block(pipeline.unet.get_submodule(path), layers, ranks, inputs, how.training, after))
        _install(quantized, pipeline.unet, layers, recipe, calibration, files)
    return files


def _summary(pipeline, recipe: Recipe, prompts: Sequence[str], how: Reconstruction) -> dict[str, object]:
    schemes = {name: scheme.to_json() for name, scheme in recipe.schemes.items()}
    return {"prompts": list(prompts), "scheduler": type(pipeline.scheduler).__name__, "schemes": schemes, **asdict(how)}


def _file_name(path: str) -> str:
    return diffusers_to_ldm(path)


def sharing_copy(unet: nn.Module) -> nn.Module:
    """A copy whose layers can be replaced and whose tensors are the original's: no memory is taken."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})


def _inputs_of(path: str, before: _Inputs | None, unet: nn.Module, quantized: nn.Module, questions: Questions, batch_size: int) -> _Inputs:
    """What the block is given. before: of the block whose turn it was last; its outputs are the next one's inputs."""
    if before is not None and _follows(path, before.path):
        exact = _answers(unet.get_submodule(before.path), before.exact, before, None, batch_size)
        noisy = _answers(quantized.get_submodule(before.path), before.noisy, before, quantized, batch_size)
        return _Inputs(path, exact, noisy, before.context, before.buckets)
    exact, context, _ = _reach(unet, path, questions)
    noisy, _, buckets = _reach(quantized, path, questions)
    return _Inputs(path, exact, noisy, context, buckets)


def _follows(path: str, before: str) -> bool:
    (parent, number), (other, last) = path.rsplit(".", 1), before.rsplit(".", 1)
    return parent == other and int(number) == int(last) + 1


def _reach(unet: nn.Module, path: str, questions: Questions) -> tuple[Tensor, Tensor, Tensor | None]:
    """(S, T, C), context and buckets at a block; the UNet is run no further."""
    found: list[tuple[Tensor, Tensor]] = []
    buckets: list[Tensor] = []
    device = next(unet.parameters()).device
    tap = state_of(unet).tap if is_quantized(unet) else None

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append((args[0].cpu(), kwargs["encoder_hidden_states"].cpu()))
        if tap is not None:
            buckets.append(tap.bucket.cpu())
        raise _ReachedError

    handle = unet.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for arguments in questions:
            with suppress(_ReachedError), torch.no_grad():
                unet(**map_tensors(arguments, lambda tensor: tensor.to(device)), return_dict=False)
    finally:
        handle.remove()
    inputs, contexts = zip(*found, strict=True)
    return torch.cat(inputs), torch.cat(contexts), torch.cat(buckets) if buckets else None


def _answers(block: nn.Module, x: Tensor, inputs: _Inputs, quantized: nn.Module | None, batch_size: int) -> Tensor:
    """The block's outputs for all samples, on the CPU. quantized: the UNet whose layers want to know the timestep."""
    parameter = next(block.parameters())
    parts = []
    for rows in torch.arange(len(x)).split(batch_size):
        if quantized is not None:
            state_of(quantized).tap.bucket = inputs.buckets[rows].to(parameter.device)
        with torch.no_grad():
            given = (part[rows].to(parameter.device, parameter.dtype) for part in (x, inputs.context))
            parts.append(_ask(block, *given).cpu())
    return torch.cat(parts)


def _ask(block: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    return block(x, encoder_hidden_states=context)


def _round_block(
    original: nn.Module,
    layers: dict[str, str],
    ranks: dict[str, int],
    inputs: _Inputs,
    training: Training,
    progress: Callable[[int], None] | None,
) -> dict[str, Int4Weight]:
    """Codes of the block's layers, on the CPU. ranks: of the branches beside them."""
    targets = _answers(original, inputs.exact, inputs, None, training.batch_size)
    block = copy.deepcopy(original).float().requires_grad_(False)
    device = next(block.parameters()).device
    start = _start(block, layers, ranks, inputs, training.batch_size)
    soft = {name: RoundedLinear(block.get_submodule(path), start[name]) for name, path in layers.items()}
    for name, path in layers.items():
        replace_layer(block, path, soft[name])

    def answer(rows: Tensor) -> Tensor:
        return _ask(block, *(part[rows].to(device, torch.float32) for part in (inputs.noisy, inputs.context)))

    found = learn_rounding(soft, answer, targets, training, inputs.path, progress)
    return {name: one.to("cpu") for name, one in found.items()}


def _start(block: nn.Module, layers: dict[str, str], ranks: dict[str, int], inputs: _Inputs, batch_size: int) -> dict[str, Int4Weight]:
    """GPTQ on what the quantized layers before the block give it."""
    with _observed(block, layers) as observers:
        _answers(block, inputs.noisy, inputs, None, batch_size)
    rounding = Rounding(RoundingMethod.GPTQ, lambda name: observers[layers[name]].total)
    return {name: rounding.round(block.get_submodule(path).weight, name, ranks[name]) for name, path in layers.items()}


@contextmanager
def _observed(block: nn.Module, layers: dict[str, str]) -> Iterator[dict[str, HessianObserver]]:
    """Observers by path in the block; their hooks are removed at the block's end."""
    linears = {path: block.get_submodule(path) for path in layers.values()}
    observers = {path: HessianObserver(linear.in_features, linear.weight.device) for path, linear in linears.items()}
    handles = [linear.register_forward_pre_hook(_observing(observers[path])) for path, linear in linears.items()]
    try:
        yield observers
    finally:
        for handle in handles:
            handle.remove()


def _observing(observer: HessianObserver) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, args: observer.update(args[0])


def _install(
    quantized: nn.Module, unet: nn.Module, layers: dict[str, str], recipe: Recipe, calibration: Calibration | None, files: RoundedFolder
) -> None:
    """Put a finished block's codes into the quantized UNet: the blocks to come see what they do."""
    rounding = Rounding(RoundingMethod.RECONSTRUCT, rounded=files.find)
    for name in layers:
        path, scheme = ldm_to_diffusers(name), recipe.schemes[name]
        original = unet.get_submodule(path)
        layer = quantize_layer(name, original.weight, original.bias, scheme, recipe.groups_of(name), calibration, rounding)
        replace_layer(quantized, path, build_layer(name, scheme, layer, original, state_of(quantized).tap))


def _after(progress: Progress | None, block: int, blocks: int, iterations: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(block * iterations + done, blocks * iterations)
