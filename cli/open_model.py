"""Opens what a command was given: a checkpoint's path or the shipped demo model, on the device that was asked for."""

from __future__ import annotations

from ..errors import HostError

DEMO = "demo"


def choose_device(name: str):
    """torch.device of "auto", "cpu" or "cuda". Raises HostError if there is no such GPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise HostError(f"device {name!r}: unknown. Choose auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise HostError("device cuda: this torch sees no GPU. Choose cpu, or run `python -m stepquant check`.")
    return torch.device(name)


def open_pipeline(checkpoint: str, device):
    """A diffusers SDXL pipeline; "demo" is the shipped model (a file of that name is "./demo")."""
    import torch

    if checkpoint == DEMO:
        from ..demo.pipeline import load_demo_pipeline

        return load_demo_pipeline(torch.float32 if device.type == "cpu" else torch.float16, device)
    from .checkpoint_pipeline import load_pipeline

    return load_pipeline(checkpoint, device=device)


def open_candidate(file: str, pipeline):
    """The UNet of a second model, to be sampled with the first one's pipeline.

    A quantized file is installed into an empty UNet of the pipeline's shape: no second 16-bit UNet is ever in memory.
    """
    from accelerate import init_empty_weights

    from ..hosts.checkpoint_file import open_tensor_file
    from ..hosts.diffusers.unet_file import install_model
    from ..quant.file_format import HEADER_KEY, read_model
    from .checkpoint_pipeline import load_unet

    unet = pipeline.unet
    with open_tensor_file(file) as tensors:
        quantized = HEADER_KEY in tensors.metadata
    with init_empty_weights():
        empty = type(unet).from_config(unet.config)
    if quantized:
        install_model(empty, read_model(file), unet.dtype, file)
    else:
        load_unet(empty, file, unet.dtype)
    return empty.eval().requires_grad_(False).to(unet.device)
