"""Records what the launchers would launch for SDXL's products on a given architecture. Nothing runs; no GPU is needed.

The launchers are called with meta tensors and a stand-in for the kernel. Triton compiles one kernel for each distinct
record, by the rules repeated in `specialise`: https://github.com/triton-lang/triton/blob/v3.6.0/python/triton/runtime/jit.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from stepquant.benchmarks.product_calls import call_arguments, launcher, only_int8
from stepquant.kernels.gluon_ops import conv_kernel as gluon_conv
from stepquant.kernels.gluon_ops import conv_launch
from stepquant.kernels.gluon_ops import geglu_kernel as gluon_geglu
from stepquant.kernels.gluon_ops import gemm_kernel as gluon_gemm
from stepquant.kernels.gluon_ops import launch as gluon_launch
from stepquant.kernels.sdxl_products import SdxlProduct
from stepquant.kernels.triton_ops import (
    conv_kernel,
    fp8_geglu_gemm,
    fp8_gemm,
    gemm_kernel,
    int8_conv2d,
    int8_geglu_gemm,
    int8_gemm,
    quantize_image,
    quantize_static,
    quantize_token,
)

OPTIONS = ("num_warps", "num_stages", "maxnreg")
POINTER_NAMES = {
    torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One compiled kernel: its function's name, (name, type) of each argument, constants, arguments divisible by 16, options."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def label(self) -> str:
        """Kernel, tile and what is switched on: for tables and failures."""
        c, o = dict(self.constants), dict(self.options)
        kernel, launch = self.kernel.strip("_").removesuffix("_kernel"), f"w{o['num_warps']}"
        if "ACC" not in c:
            return f"{kernel} {launch}"
        absent = {name for name, value in self.constants if value is None}
        flags = {"tma": c.get("TMA"), "persistent": c.get("PERSISTENT"), "ragged": not c.get("EVEN_K", c.get("EVEN_C", True))}
        columns = f"{c['BLOCK_N']}+{c['REST_N']}" if c.get("REST_N") else c["BLOCK_N"]
        parts = [f"{kernel} {c['BLOCK_M']}x{columns}x{c['BLOCK_K']} {launch} s{o.get('num_stages', c.get('STAGES'))}"]
        parts += [name for name, flag in flags.items() if flag]
        parts += [f"split{c['SPLIT_K']}"] if c.get("SPLIT_K", 1) > 1 else []
        parts += [f"{c['KERNEL']}x{c['KERNEL']}/{c.get('STRIDE', 1)}"] if "KERNEL" in c else []
        names = {
            "codes_2": "concat",
            "zero_point_ptr": "zero_point",
            "addend_ptr": "addend",
            "residual": "residual",
            "out_scale_ptr": "codes",
        }
        arguments = dict(self.signature)
        return " ".join(parts + [text for name, text in names.items() if name in arguments and name not in absent])


class Recorder:
    """Stands in for a kernel."""

    def __init__(self, function: Any, runtime_only: list[str]) -> None:
        self.function = function
        self.runtime_only = runtime_only
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.record

    def record(self, *arguments: Any, **constants: Any) -> None:
        self.launches.append(specialise(self.function, self.runtime_only, arguments, constants))


def specialise(function: Any, runtime_only: list[str], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
    names = function.arg_names
    signature, fixed, aligned = [], [(name, value) for name, value in constants.items() if name not in OPTIONS], []
    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            signature.append((name, POINTER_NAMES[value.dtype]))
            aligned.append(name)  # torch's allocator aligns to 512 bytes, and no launcher passes a view into a tensor
        elif isinstance(value, TensorDescriptor | GluonDescriptor):
            dtype = POINTER_NAMES[value.base.dtype].removeprefix("*")
            layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
            signature.append((name, f"tensordesc<{dtype}[{', '.join(map(str, value.block_shape))}]{layout}>"))
        elif value is None or (value == 1 and name not in runtime_only):
            signature.append((name, "constexpr"))
            fixed.append((name, value))
        else:
            signature.append((name, "i32"))
            aligned += [name] if value % 16 == 0 and name not in runtime_only else []
    signature += [(name, "constexpr") for name in constants if name not in OPTIONS]
    options = tuple((name, constants[name]) for name in OPTIONS if name in constants)
    return Launch(function.__name__, tuple(signature), tuple(fixed), tuple(aligned), options)


@contextlib.contextmanager
def recording(sm: int) -> Iterator[list[Recorder]]:
    """Launchers inside believe to be on `sm` and launch nothing."""
    recorders = [
        Recorder(gemm_kernel._gemm_kernel, gemm_kernel.RUNTIME_ONLY),
        Recorder(conv_kernel._conv2d_kernel, conv_kernel.RUNTIME_ONLY),
        Recorder(int8_geglu_gemm._geglu_gemm_kernel, int8_geglu_gemm.RUNTIME_ONLY),
        Recorder(gluon_gemm._gluon_gemm_kernel, gluon_gemm.RUNTIME_ONLY),
        Recorder(gluon_geglu._gluon_geglu_kernel, gluon_geglu.RUNTIME_ONLY),
        Recorder(gluon_conv._gluon_conv_kernel, gluon_conv.RUNTIME_ONLY),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(int8_gemm, "_gemm_kernel", recorders[0]))
        stack.enter_context(mock.patch.object(int8_conv2d, "_conv2d_kernel", recorders[1]))
        stack.enter_context(mock.patch.object(int8_geglu_gemm, "_geglu_gemm_kernel", recorders[2]))
        stack.enter_context(mock.patch.object(gluon_launch, "_gluon_gemm_kernel", recorders[3]))
        stack.enter_context(mock.patch.object(gluon_launch, "_gluon_geglu_kernel", recorders[4]))
        stack.enter_context(mock.patch.object(conv_launch, "_gluon_conv_kernel", recorders[5]))
        stack.enter_context(
            mock.patch.object(quantize_token, "_quantize_token_kernel", Recorder(quantize_token._quantize_token_kernel, []))
        )
        for module in (int8_gemm, int8_geglu_gemm, int8_conv2d, fp8_gemm, fp8_geglu_gemm, gluon_launch):
            stack.enter_context(mock.patch.object(module, "compute_capability", lambda device: sm))
        yield recorders


def launches(products: list[SdxlProduct], sm: int, dtype: str = "int8", static: bool = True) -> dict[Launch, list[SdxlProduct]]:
    """The distinct compiled kernels of these products, and who needs them. static: with zero points where they may occur."""
    needed: dict[Launch, list[SdxlProduct]] = {}
    for product in products:
        if dtype == "fp8" and only_int8(product):
            continue
        with recording(sm) as recorders:
            launcher(product, dtype)(**call_arguments(product, dtype, "meta", static))
        for launch in [found for recorder in recorders for found in recorder.launches]:
            needed.setdefault(launch, []).append(product)
    return needed


def quantizer_launches() -> list[Launch]:
    """The compiled kernels that quantize SDXL's fp16 tensors."""
    kernels = {
        quantize_token: ["_quantize_token_kernel"],
        quantize_static: ["_quantize_static_kernel", "_quantize_flat_kernel"],
        quantize_image: ["_slice_absmax_kernel", "_image_scale_kernel"],
    }
    with contextlib.ExitStack() as stack, torch.device("meta"):
        recorders = []
        for module, names in kernels.items():
            for name in names:
                recorders.append(Recorder(getattr(module, name), getattr(module, "RUNTIME_ONLY", [])))
                stack.enter_context(mock.patch.object(module, name, recorders[-1]))
        image = torch.empty(2, 320, 128, 128, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        for width, dtype in (
            (1280, torch.float16),
            (1280, torch.bfloat16),
            (1280, torch.float32),
            (5120, torch.float16),
            (333, torch.float16),
        ):
            quantize_token.quantize_token(torch.empty(2048, width, dtype=dtype))
        quantize_image.quantize_image(image)
        quantize_image.quantize_image(image, -0.25)
        bucket = torch.empty(2, dtype=torch.int64)
        for x in (image, image.contiguous()):
            quantize_static.quantize_static(x, torch.empty(64), torch.empty(64, dtype=torch.int32), bucket)
        quantize_static.quantize_static(torch.empty(2048, 1280, dtype=torch.float16), torch.empty(64), None, bucket)
    return list(dict.fromkeys(launch for recorder in recorders for launch in recorder.launches))
