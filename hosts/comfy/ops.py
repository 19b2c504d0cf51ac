"""ComfyUI operations whose Linear and Conv2d may hold int8 weights. A layer without codes behaves as comfy.ops.manual_cast's.

Given to ComfyUI as `custom_operations`. What an operation owes ComfyUI: run_every_op, weights fetched through
cast_bias_weight (dynamic and low VRAM), weight functions honoured, convert_weight and set_weight for LoRA and merges.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.float
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from ...errors import FormatError
from ...kernels import dispatch
from ...quant.channel_group import granularity_of
from ...quant.file_format import OPTIONAL_PARTS, QuantizedLayer
from ...quant.layers import dynamic_low
from ...quant.mac_counter import MacCounter
from ...quant.saturation import LayerSaturation
from ...quant.scheme import Scheme
from .. import compute
from ..low_rank import LowRankBranch
from . import compiled, norms
from .int4_layout import make_int4_weight
from .layouts import is_quantized, make_weight, unpack
from .residency import ResidentPlain, ResidentWeight
from .scale_bank import ScaleBank
from .stored_weight import shown
from .tap import TimestepTap

STORED_PARTS = ("weight_scale", *OPTIONAL_PARTS)
NOTHING = nullcontext()


class QuantizableOp:
    """What Linear and Conv2d share. The class attributes are what a layer is until attach.py knows better."""

    layer_name = ""
    scheme = Scheme()
    tap: TimestepTap | None = None
    observes_timestep = False
    branch: LowRankBranch | None = None
    branch_patches: list | None = None  # what the branch was made of
    merged: tuple | None = None  # (weight that lora.py made, patches that are in it)
    memory_format = torch.contiguous_format  # of what the kernels put out
    counter: MacCounter | None = None
    saturation: LayerSaturation | None = None  # set by saturation.py
    scales: ScaleBank | None = None  # set by scale_lora.py
    resident: ResidentWeight | ResidentPlain | None = None  # set by residency.py; answers while it holds the weights

    def _start_empty(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Forget the meta tensors of construction: a 5 GB model must not be allocated before its 2.5 GB arrive."""
        self._shapes = {name: None if p is None else tuple(p.shape) for name, p in self._parameters.items()}
        self._placement = {"device": device, "dtype": dtype}
        # Dynamic VRAM reads these; ComfyUI sets them from parameters, which do not exist yet when it looks.
        self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = dtype
        self.weight = self.bias = None
        self.register_buffer("act_scale", None)
        self.register_buffer("act_zero_point", None)
        self.number = compiled.number(self)

    def __setstate__(self, state: dict) -> None:
        """A copy is being made."""
        super().__setstate__(state)
        self.number = compiled.number(self)

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.weight)

    @property
    def has_branch(self) -> bool:
        """Whether a low-rank branch reads the layer's float input: its file's own, or a LoRA's."""
        return self.branch is not None or self.scheme.rank > 0

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the codes that the layer takes."""
        return compute.code_dtype(self.scheme)

    @property
    def is_held(self) -> bool:
        """Whether the layer's tensors, `resident`, stay in place while others are fetched. Not while its multiply-adds are counted."""
        return self.resident is not None and self.resident.lease.held and self.counter is None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._placement["dtype"] or torch.get_default_dtype()

    def install(self, layer: QuantizedLayer) -> None:
        """Take the codes, scales and tables of a stored layer; they are copied.

        Raises: FormatError if the shapes are not this layer's.
        """
        expected = self._shapes["weight"]
        if layer.weight_shape != expected or (layer.bias is None) != (self._shapes["bias"] is None):
            raise FormatError(
                f"{self.layer_name}: a weight of shape {layer.weight_shape}, {'no' if layer.bias is None else 'a'} bias; "
                f"this UNet needs {expected}, {'no' if self._shapes['bias'] is None else 'a'} bias. "
                "The file is of another architecture or damaged; download or make it again."
            )
        has_low = dynamic_low(self.layer_name) is not None and layer.qweight.dtype is not dispatch.FP8
        has_zero_point = layer.act_zero_point is not None or has_low
        if layer.group_scale is not None:
            weight = make_int4_weight(layer, has_zero_point, self.compute_dtype)
        else:
            weight = make_weight(layer.qweight, layer.weight_scale, has_zero_point, self.compute_dtype, _groups_of(layer))
        self.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.to(self.compute_dtype, copy=True), requires_grad=False)
        for name in ("act_scale", "act_zero_point"):
            table = getattr(layer, name)
            setattr(self, name, None if table is None else table.clone())

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        qweight = state_dict.pop(prefix + "qweight", None)
        if qweight is None and self.is_quantized:  # the rest of a model whose codes are installed already
            return
        if qweight is None:
            for name, shape in self._shapes.items():
                if shape is not None:
                    setattr(self, name, nn.Parameter(torch.empty(shape, **self._placement), requires_grad=False))
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        self.layer_name = prefix.removesuffix(".")
        state_dict.pop(prefix + "weight", None)  # the shape that detection read
        self.install(QuantizedLayer(qweight, **{part: state_dict.pop(prefix + part, None) for part in STORED_PARTS}))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Merge nodes ask for the whole dictionary once for each weight, and detaching the weights took two thirds of the time."""
        if not self.is_quantized:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination[prefix + "weight"] = shown(self.weight)
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if name != "weight" and tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Module._apply, which would swap the outside of a QuantizedTensor and leave its buffer."""
        if not self.is_quantized:
            return super()._apply(fn, recurse)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(fn(parameter), requires_grad=False)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The float weight that patches are applied to."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False, **kwargs: Any
    ) -> Tensor | None:
        """Take a patched float weight from ComfyUI.

        inplace_update is how hooks patch: the weight is quantized anew. A load leaves the codes alone: most patches are
        low-rank and run beside them, and lora.reconcile, called when the load is done, merges the others. That also
        keeps the codes when ComfyUI passes back the very weight it got, as it does for small layers.
        """
        if return_weight:  # a saver or an extractor: the float is what it is after
            return weight.to(self.weight.dtype)
        if not self.is_quantized:
            rounded = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed or 0)
            if inplace_update:
                comfy.utils.copy_to_param(self, "weight", rounded)
            else:
                comfy.utils.set_attr_param(self, "weight", rounded)
        elif inplace_update:
            self.requantize(weight)
        else:
            self.weight = nn.Parameter(self.weight.to(weight.device), requires_grad=False)
        return None

    def requantize(self, weight: Tensor) -> None:
        """Replace the codes by those of a float weight. A new tensor: backups may hold the old one."""
        new = self.weight.requantize_from_float(weight).to(self.weight.dtype)
        self.weight = nn.Parameter(new, requires_grad=False)

    def borrow(self, x: Tensor) -> AbstractContextManager[compute.LayerTensors | None]:
        """The layer's tensors on x's device, for as long as the block runs; None if the layer must run its own forward:
        it is not quantized, a weight function edits the float weight, or the kernels do not fit it.

        Low-rank branches are the caller's business: the tensors' own, and a LoRA's in `branch`.
        """
        if not self.kernels_fit():
            return NOTHING
        if self.is_held:
            return self.resident
        return _Borrowed(self, x) if self.is_quantized and not self.weight_function else NOTHING

    def fetch(self, x: Tensor) -> comfy.ops.CastBiasWeightContext:
        """Weight and bias through ComfyUI, from wherever they are and with their patches, until the block ends."""
        return comfy.ops.CastBiasWeightContext(
            self,
            x,
            dtype=self.weight.dtype,  # any other would make ComfyUI dequantize
            bias_dtype=x.dtype,
            offloadable=True,
            compute_dtype=comfy.model_management.lora_compute_dtype(x.device),
            want_requant=True,
        )

    def run(self, x: Tensor, bucket: Tensor) -> Tensor:
        """The quantized layer's forward. bucket: as `self.bucket` gives it."""
        with self.borrow(x) as tensors:
            if tensors is not None:
                y = self._quantized(x, tensors, bucket)
        if tensors is None:
            y = self._forward_edited(x)
        return y if self.branch is None else y + self._beside(x, self.branch.on(x.device, x.dtype))

    def _forward_edited(self, x: Tensor) -> Tensor:
        """A weight function has edited the float weight, or the kernels do not fit: exact, without integer compute."""
        with self.fetch(x) as (weight, bias):
            weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            if self.scales is not None:
                weight = self.scales.multiplied(self.layer_name, weight.transpose(0, -1)).transpose(0, -1)
            return self._count_float(self._float(x, weight.to(x.dtype), bias))

    def tensors_of(
        self, weight: QuantizedTensor, bias: Tensor | None, act_scale: Tensor | None, act_zero_point: Tensor | None
    ) -> compute.LayerTensors:
        """Weight, bias and tables, wherever they were fetched to, as the kernels take them."""
        parts = unpack(weight)
        return compute.LayerTensors(
            self.layer_name,
            self.scheme,
            parts.qweight,
            parts.weight_scale,
            bias,
            parts.weight_sums,
            act_scale,
            act_zero_point,
            self.counter,
            parts.groups,
            self.saturation,
            parts.group_scale,
            parts.branch,
        )

    def bucket(self, device: torch.device) -> Tensor:
        """(B,) int64: the timestep bucket of each sample of the UNet call that is under way, or (1,) zero without a tap."""
        if self.tap is None:
            return torch.zeros(1, dtype=torch.int64, device=device)
        return self.tap.bucket.to(device)

    def _count_float(self, y: Tensor) -> Tensor:
        if self.counter is not None:
            outputs = y.numel() // self.weight.shape[0]
            self.counter.record(self.layer_name, outputs * self.weight.numel(), integer=False)
        return y

    def kernels_fit(self) -> bool:
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        comfy.ops.run_every_op()
        if self.observes_timestep and self.tap is not None:
            self.tap.observe(x)
        if self.is_quantized:
            bucket = self.bucket(x.device)
            return compiled.layer(x, bucket, self.number) if torch.compiler.is_compiling() else self.run(x, bucket)
        if self.is_held and self.resident.weight.dtype == x.dtype:
            return self._float(x, self.resident.weight, self.resident.bias)
        return self._count_float(self.forward_comfy_cast_weights(x))


def _groups_of(layer: QuantizedLayer) -> dispatch.ChannelGroups | None:
    order, exponents = layer.channel_order, layer.channel_exponents
    return None if order is None else dispatch.channel_groups(order, exponents, granularity_of(len(order), len(exponents)))


class _Borrowed:
    """A quantized layer's tensors, fetched through ComfyUI on entering and given back on leaving."""

    def __init__(self, layer: QuantizableOp, x: Tensor) -> None:
        self._layer, self._x = layer, x

    def __enter__(self) -> compute.LayerTensors | None:
        layer, device = self._layer, self._x.device
        self._fetched = layer.fetch(self._x)
        weight, bias = self._fetched.__enter__()
        if not isinstance(weight, QuantizedTensor):
            return None
        # In low VRAM the layer's tables stay on the CPU with it.
        tables = [None if table is None else table.to(device) for table in (layer.act_scale, layer.act_zero_point)]
        tensors = layer.tensors_of(weight, bias, *tables)
        if layer.scales is not None:
            tensors.weight_scale = layer.scales.multiplied(layer.layer_name, tensors.weight_scale)
            if tensors.branch is not None:
                tensors.branch = tensors.branch.scaled(lambda up: layer.scales.multiplied(layer.layer_name, up))
        return tensors

    def __exit__(self, *error: object) -> None:
        self._fetched.__exit__(*error)


class StepQuantOps(comfy.ops.manual_cast):
    """The operations class for ComfyUI's `custom_operations`."""

    class Linear(QuantizableOp, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
            super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
            self._start_empty(device, dtype)

        def _quantized(self, x: Tensor, layer: compute.LayerTensors, bucket: Tensor) -> Tensor:
            return compute.linear(x, layer, bucket)

        def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight, bias)

        def _beside(self, x: Tensor, branch: LowRankBranch) -> Tensor:
            return F.linear(F.linear(x, branch.down), branch.up)

        def output_of(self, x: Tensor) -> Tensor:
            return x.new_empty((*x.shape[:-1], self.out_features))

    class Conv2d(QuantizableOp, comfy.ops.manual_cast.Conv2d):
        memory_format = torch.channels_last

        def __init__(self, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, device="meta", dtype=dtype, **kwargs)
            self._start_empty(device, dtype)

        def kernels_fit(self) -> bool:
            # Seamless-tiling nodes change the padding mode, or replace _conv_forward on the instance.
            return self.padding_mode == "zeros" and "_conv_forward" not in self.__dict__ and self.groups == 1 and self.dilation == (1, 1)

        def _quantized(self, x: Tensor, layer: compute.LayerTensors, bucket: Tensor) -> Tensor:
            return compute.conv2d(x, layer, bucket, self.stride[0], self.padding[0])

        def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._conv_forward(x, weight, bias)

        def _beside(self, x: Tensor, branch: LowRankBranch) -> Tensor:
            return F.conv2d(self._conv_forward(x, branch.down, None), branch.up)

        def output_of(self, x: Tensor) -> Tensor:
            height, width = (
                (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
                for size, padding, dilation, kernel, stride in zip(
                    x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
                )
            )
            return x.new_empty((x.shape[0], self.out_channels, height, width))

    GroupNorm = norms.GroupNorm
    LayerNorm = norms.LayerNorm
