"""Tunes the codes and scales of 4-bit feed-forward and time layers so that the quantized UNet answers what the float one does.

Source: QuEST (arXiv 2402.03666): time-embedding layers first, then feed-forward ones, each for its own output and for the UNet's. Layers
are taken in parts that fit a given memory, in the UNet's order; parts that are done stay as they are. Differences: the losses are relative
to what they were at the start, call by call, since late steps' errors would else be all that counts; activations keep dynamic scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, SchemeError
from ...quant.calibration import Calibration
from ...quant.file_format import QuantizedLayer
from ...quant.int4 import Int4Weight, unpacked
from ...quant.low_rank import LowRank
from ...quant.recipe import Recipe
from ...quant.rounding.folder import RoundedFolder
from ...quant.rounding.method import Rounding
from ...quant.rounding.tuned import COPIES, TunedLinear
from ...quant.scheme import ActivationMode
from ...quant.tuning.scale_set import ScaleSet
from ...quant.tuning.training import TuningSettings, load_state, train
from ...quant.weight import INT8_MAX
from ..key_mapping import ldm_to_diffusers
from .quantize import build_layer, quantize_unet, quantized_layers, replace_layer, state_of
from .reconstruct import sharing_copy
from .trajectory import Progress, Sampling, UNetCall, map_tensors, recorded_calls
from .tune import FP16_LOSS_SCALE
from .tune_layers import scaled

GIB = 1 << 30
TIME, FEED_FORWARD = ".emb_layers.1", (".ff.net.0.proj", ".ff.net.2")
START = "start"  # the file of the layers that are not tuned
# QuEST's total: the layers' own losses once, the UNet's output twice.
OUTPUT_WEIGHT = 2.0
HELD_OUT = 8  # every so many-th call is not trained on, and tells whether a part is better than before


@dataclass(frozen=True)
class Quest:
    """sampling, batch_size, calls: as of trajectory.recorded_calls. training: of each part; its batch_size and experts are not used.

    memory_bytes: for what is in training at a time; one feed-forward, or time layer, at least.
    exact: layers run on codes, inputs are rounded, and activations are computed anew for the gradients: the least memory. False: all
        weights as floats, the fastest.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling(steps=6))
    calls: int = 3
    batch_size: int = 2
    training: TuningSettings = field(default_factory=lambda: TuningSettings(steps=300, learning_rate=3e-3))
    memory_bytes: int = 2 * GIB
    exact: bool = False


def quest_parts(unet: nn.Module, recipe: Recipe, memory_bytes: int) -> dict[str, list[str]]:
    """Part's name -> LDM names of the 4-bit layers that are tuned together: time layers first, then feed-forward ones in order.

    Raises: SchemeError if the recipe has none.
    """
    names = [name for name, scheme in recipe.schemes.items() if scheme.is_int4]
    parts: list[list[str]] = []
    for stage in ((TIME,), FEED_FORWARD):
        units: dict[str, list[str]] = {}
        for name in names:
            if name.endswith(stage):
                units.setdefault(name.partition(".ff.")[0], []).append(name)  # a feed-forward's two layers stay together
        taken = memory_bytes + 1
        for unit in units.values():
            size = 4 * COPIES * sum(unet.get_submodule(ldm_to_diffusers(name)).weight.numel() for name in unit)
            if taken + size > memory_bytes:
                parts.append([])
                taken = 0
            parts[-1] += unit
            taken += size
    if not parts:
        raise SchemeError("QuEST: the recipe has no feed-forward or time layers with 4 bits. Use a recipe with 4-bit weights.")
    return {part[0]: part for part in parts}


def quest(
    pipeline,
    recipe: Recipe,
    prompts: Sequence[str],
    folder: str | Path,
    how: Quest | None = None,
    rounding: Rounding | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> RoundedFolder:
    """Codes and scales of all the recipe's 4-bit layers: a file for each part, and one of those that are not tuned.

    A part that is there already is not done again, and one that was cancelled goes on where it was.
    Args:
        pipeline: an SDXL pipeline whose UNet is not quantized; left as it was, also after an error or a cancel.
        folder: made if it is not there; must hold nothing of other settings.
        rounding: that 4-bit layers start from; None for plain. calibration: needed if a scheme is static.
        progress: called with (training steps done, steps in all). Raising in it cancels.
    Raises: as quantize_unet; CalibrationError if there are no prompts, the folder is of other settings, or training diverges;
        SchemeError if nothing can be tuned; FormatError if the folder cannot be written.
    """
    how = how or Quest()
    if not prompts:
        raise CalibrationError("QuEST: no prompts; at least one is needed. Usual is 24 or more.")
    parts = quest_parts(pipeline.unet, recipe, how.memory_bytes)
    files = RoundedFolder(Path(folder), _summary(pipeline, recipe, prompts, how, rounding))
    missing = [part for part in parts if not files.has(part)]
    if not missing and files.has(START):
        return files
    quantized = _own_tensors(quantize_unet(sharing_copy(pipeline.unet), recipe, calibration, rounding))
    state_of(quantized).tap.follow(pipeline.scheduler)
    if not files.has(START):
        tuned = {name for names in parts.values() for name in names}
        files.write(START, {name: weight for name, weight in _stored_weights(quantized).items() if name not in tuned})
    calls = recorded_calls(pipeline, prompts, how.sampling, how.batch_size, how.calls)
    for number, (part, names) in enumerate(parts.items()):
        if part in missing:
            after = _after(progress, number, len(parts), how.training.steps)
            with _tunable(quantized, pipeline.unet, names, how.exact) as layers:
                found = _tune_part(pipeline, quantized, layers, calls, how, files.folder / f"{part}.state", after)
            files.write(part, found)
            (files.folder / f"{part}.state").unlink(missing_ok=True)
        _install(quantized, {name: files.find(name, layer_shape(quantized, name)) for name in names})
    return files


def layer_shape(quantized: nn.Module, name: str) -> tuple[int, int]:
    return quantized_layers(quantized)[name].stored().weight_shape


def _summary(pipeline, recipe: Recipe, prompts: Sequence[str], how: Quest, rounding: Rounding | None) -> dict[str, object]:
    schemes = {name: scheme.to_json() for name, scheme in recipe.schemes.items()}
    start = (rounding or Rounding()).method.value
    return {"prompts": list(prompts), "scheduler": type(pipeline.scheduler).__name__, "schemes": schemes, "start": start, **asdict(how)}


def _own_tensors(quantized: nn.Module) -> nn.Module:
    """Parameters of its own, which stay where they are while the float UNet is put aside; all large ones are codes by now."""
    for module in quantized.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return quantized


def _stored_weights(quantized: nn.Module) -> dict[str, Int4Weight]:
    return {name: _weight_of(layer.stored()) for name, layer in quantized_layers(quantized).items() if layer.scheme.is_int4}


def _weight_of(layer: QuantizedLayer) -> Int4Weight:
    branch = None if layer.branch_down is None else LowRank(layer.branch_down, layer.branch_up)
    return Int4Weight(unpacked(layer.qweight, layer.group_scale.shape[0]), layer.group_scale, layer.weight_scale, branch)


@contextmanager
def _tunable(quantized: nn.Module, unet: nn.Module, names: Sequence[str], exact: bool) -> Iterator[dict[str, TunedLinear]]:
    """The part's layers in training while the block runs; the UNet can be differentiated then, with checkpoints."""
    before = {name: quantized_layers(quantized)[name] for name in names}
    layers = {}
    for name, layer in before.items():
        levels = INT8_MAX if exact and layer.scheme.activation is not ActivationMode.FP16 else None
        linear = unet.get_submodule(ldm_to_diffusers(name))
        layers[name] = TunedLinear(linear, _weight_of(layer.stored()), levels).to(layer.qweight.device)
        replace_layer(quantized, ldm_to_diffusers(name), layers[name])
    others = {name: torch.zeros(1, layer.weight_scale.shape[0]) for name, layer in quantized_layers(quantized).items()}
    if exact:
        quantized.enable_gradient_checkpointing()
    try:
        with torch.inference_mode(False), torch.enable_grad(), scaled(quantized, ScaleSet(1, others, {}), float_products=not exact):
            yield layers
    finally:
        quantized.disable_gradient_checkpointing()
        for name, layer in before.items():
            replace_layer(quantized, ldm_to_diffusers(name), layer)


def _tune_part(
    pipeline,
    quantized: nn.Module,
    layers: Mapping[str, TunedLinear],
    calls: Sequence[UNetCall],
    how: Quest,
    state_file: Path,
    progress: Callable[[int, int, float], None] | None,
) -> dict[str, Int4Weight]:
    """The part's layers trained; as they were if that made held-out calls no better."""
    device = next(quantized.parameters()).device
    own = [name for name in layers if not name.endswith(FEED_FORWARD[0])]  # a feed-forward's output is its second layer's
    targets = _float_outputs(pipeline.unet, own, calls)
    start = {name: layer.result().to("cpu") for name, layer in layers.items()}

    def errors(index: int) -> Tensor:
        """(1 + own layers,) squared errors of the UNet's output and the layers' own, with gradients."""
        answer, outputs = _answer(quantized, calls[index], own, layers.get)
        pairs = [(answer, calls[index].output), *((outputs[name], targets[index][name]) for name in own)]
        return torch.stack([(found.float() - wanted.to(device).float()).square().mean() for found, wanted in pairs])

    with torch.no_grad():
        before = torch.stack([errors(index) for index in range(len(calls))]).clamp_min(1e-20)
    weights = torch.tensor([OUTPUT_WEIGHT, *(1 / len(own) for _ in own)], device=device) / before
    held_out = range(0, len(calls), HELD_OUT) if len(calls) >= HELD_OUT else range(0)
    trained = [index for index in range(len(calls)) if index not in held_out]

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        index = trained[int(torch.randint(len(trained), (1,), generator=generator))]
        return (errors(index) * weights[index]).sum()

    parameters = {f"{name}.{part}": parameter for name, layer in layers.items() for part, parameter in layer.named_parameters()}
    resumed = load_state(state_file) if state_file.is_file() else None
    scale = FP16_LOSS_SCALE if quantized.dtype is torch.float16 else 1.0
    with _aside(pipeline.unet, device):
        train(parameters, loss, how.training, resumed, progress, lambda state: state.save(state_file), scale)
    with torch.no_grad():
        after = [float((errors(index)[0] / before[index, 0]).log()) for index in held_out]
    better = not after or sum(after) < 0
    return {name: layer.result().to("cpu") for name, layer in layers.items()} if better else start


@contextmanager
def _aside(unet: nn.Module, device: torch.device) -> Iterator[None]:
    """The float UNet waits in RAM while the quantized one is trained on a GPU."""
    try:
        yield unet.to("cpu")
    finally:
        unet.to(device)


def _float_outputs(unet: nn.Module, names: Sequence[str], calls: Sequence[UNetCall]) -> list[dict[str, Tensor]]:
    """What the float UNet's layers give in each call, on the CPU in its dtype."""
    found = []
    with torch.no_grad():
        for call in calls:
            _, outputs = _answer(unet, call, names, lambda name: unet.get_submodule(ldm_to_diffusers(name)))
            found.append({name: output.cpu() for name, output in outputs.items()})
    return found


def _answer(
    unet: nn.Module, call: UNetCall, names: Sequence[str], layer_of: Callable[[str], nn.Module]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The UNet's answer, and the outputs of some of its layers."""
    device, outputs = next(unet.parameters()).device, {}
    handles = [layer_of(name).register_forward_hook(_keeping(outputs, name)) for name in names]
    try:
        answer = unet(**map_tensors(call.arguments, lambda tensor: tensor.to(device)), return_dict=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    return answer, outputs


def _keeping(outputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
    def after_layer(module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs[name] = output

    return after_layer


def _install(quantized: nn.Module, weights: Mapping[str, Int4Weight]) -> None:
    """Put a finished part's codes into the quantized UNet: the parts to come see what they do."""
    for name, weight in weights.items():
        layer = quantized_layers(quantized)[name]
        stored = layer.stored()
        stored.qweight, stored.weight_scale, stored.group_scale = (
            part.to(stored.qweight.device) for part in (weight.packed(), weight.scale, weight.group_scale)
        )
        path = ldm_to_diffusers(name)
        replace_layer(quantized, path, build_layer(name, layer.scheme, stored, quantized.get_submodule(path), state_of(quantized).tap))


def _after(progress: Progress | None, part: int, parts: int, steps: int) -> Callable[[int, int, float], None] | None:
    return None if progress is None else lambda done, _total, _loss: progress(part * steps + done, parts * steps)
