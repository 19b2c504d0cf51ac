"""ComfyUI operations whose Linear and Conv2d may hold int8 weights. A layer without codes behaves as comfy.ops.manual_cast's.

Given to ComfyUI as `custom_operations`. What an operation owes ComfyUI: run_every_op, weights fetched through
cast_bias_weight (dynamic and low VRAM), weight functions honoured, convert_weight and set_weight for LoRA and merges.
"""

from __future__ import annotations

from collections.abc import Callable
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
from ...quant.file_format import QuantizedLayer
from ...quant.mac_counter import MacCounter
from ...quant.scheme import Scheme
from .. import compute
from .layouts import is_quantized, make_weight, unpack
from .low_rank import LowRankBranch
from .tap import TimestepTap

STORED_PARTS = ("weight_scale", "bias", "act_scale", "act_zero_point")


class StoredWeight(Tensor):
    """What state_dict() shows of an int8 weight: its outer shape and dtype, no data, and as nbytes what it really takes.

    A reader that wants data gets an error and not codes that it would take for weights.
    """

    stored_bytes: int

    @property
    def nbytes(self) -> int:
        return self.stored_bytes


class QuantizableOp:
    """What Linear and Conv2d share. The class attributes are what a layer is until attach.py knows better."""

    layer_name = ""
    scheme = Scheme()
    tap: TimestepTap | None = None
    observes_timestep = False
    branch: LowRankBranch | None = None
    branch_patches: list | None = None  # what the branch was made of
    merged: tuple | None = None  # (weight that lora.py made, patches that are in it)
    counter: MacCounter | None = None

    def _start_empty(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Forget the meta tensors of construction: a 5 GB model must not be allocated before its 2.5 GB arrive."""
        self._shapes = {name: None if p is None else tuple(p.shape) for name, p in self._parameters.items()}
        self._placement = {"device": device, "dtype": dtype}
        # Dynamic VRAM reads these; ComfyUI sets them from parameters, which do not exist yet when it looks.
        self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = dtype
        self.weight = self.bias = None
        self.register_buffer("act_scale", None)
        self.register_buffer("act_zero_point", None)

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._placement["dtype"] or torch.get_default_dtype()

    def install(self, layer: QuantizedLayer) -> None:
        """Take the codes, scales and tables of a stored layer; they are copied.

        Raises: FormatError if the shapes are not this layer's.
        """
        expected = self._shapes["weight"]
        if len(expected) == 4:
            expected = (expected[0], expected[2], expected[3], expected[1])
        if tuple(layer.qweight.shape) != expected or (layer.bias is None) != (self._shapes["bias"] is None):
            raise FormatError(
                f"{self.layer_name}: qweight of shape {tuple(layer.qweight.shape)}, {'no' if layer.bias is None else 'a'} bias; "
                f"this UNet needs {expected}, {'no' if self._shapes['bias'] is None else 'a'} bias. "
                "The file is of another architecture or damaged; download or make it again."
            )
        weight = make_weight(layer.qweight, layer.weight_scale, layer.act_zero_point is not None, self.compute_dtype)
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
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_quantized:
            weight = self.weight
            stored = torch.empty(weight.shape, dtype=weight.dtype, device="meta").as_subclass(StoredWeight)
            stored.stored_bytes = weight._qdata.nbytes
            destination[prefix + "weight"] = stored

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

    def _forward_quantized(self, x: Tensor) -> Tensor:
        with comfy.ops.CastBiasWeightContext(
            self,
            x,
            dtype=self.weight.dtype,  # any other would make ComfyUI dequantize
            bias_dtype=x.dtype,
            offloadable=True,
            compute_dtype=comfy.model_management.lora_compute_dtype(x.device),
            want_requant=True,
        ) as (weight, bias):
            if isinstance(weight, QuantizedTensor) and self._kernels_fit():
                y = self._quantized(x, self._tensors(weight, bias, x.device), self._bucket(x.device))
            else:  # a weight function has edited the float weight: exact, without integer compute
                weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
                y = self._count_float(self._float(x, weight.to(x.dtype), bias))
        return y if self.branch is None else y + self._beside(x, self.branch.on(x.device, x.dtype))

    def _tensors(self, weight: QuantizedTensor, bias: Tensor | None, device: torch.device) -> compute.LayerTensors:
        parts = unpack(weight)
        # In low VRAM the layer's tables stay on the CPU with it.
        act_scale = None if self.act_scale is None else self.act_scale.to(device)
        act_zero_point = None if self.act_zero_point is None else self.act_zero_point.to(device)
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
        )

    def _bucket(self, device: torch.device) -> Tensor:
        if self.tap is None:
            return torch.zeros(1, dtype=torch.int64, device=device)
        return self.tap.bucket.to(device)

    def _count_float(self, y: Tensor) -> Tensor:
        if self.counter is not None:
            outputs = y.numel() // self.weight.shape[0]
            self.counter.record(self.layer_name, outputs * self.weight.numel(), integer=False)
        return y

    def _kernels_fit(self) -> bool:
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        comfy.ops.run_every_op()
        if self.observes_timestep and self.tap is not None:
            self.tap.observe(x)
        if self.is_quantized:
            return self._forward_quantized(x)
        return self._count_float(self.forward_comfy_cast_weights(x))


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

    class Conv2d(QuantizableOp, comfy.ops.manual_cast.Conv2d):
        def __init__(self, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, device="meta", dtype=dtype, **kwargs)
            self._start_empty(device, dtype)

        def _kernels_fit(self) -> bool:
            # Seamless-tiling nodes change the padding mode, or replace _conv_forward on the instance.
            return self.padding_mode == "zeros" and "_conv_forward" not in self.__dict__ and self.groups == 1 and self.dilation == (1, 1)

        def _quantized(self, x: Tensor, layer: compute.LayerTensors, bucket: Tensor) -> Tensor:
            return compute.conv2d(x, layer, bucket, self.stride[0], self.padding[0])

        def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._conv_forward(x, weight, bias)

        def _beside(self, x: Tensor, branch: LowRankBranch) -> Tensor:
            return F.conv2d(self._conv_forward(x, branch.down, None), branch.up)
