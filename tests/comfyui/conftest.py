"""Finds a real ComfyUI and makes it importable; without one this folder's tests are left out, with the reason.

On the CPU, unless STEPQUANT_TEST_DEVICE says `gpu` (with dynamic VRAM, as ComfyUI starts on NVIDIA) or `gpu-classic` (without): only
the contracts are written for these.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OLDEST_COMFYUI = "0.33.0"
DEVICE = os.environ.get("STEPQUANT_TEST_DEVICE", "cpu")


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, else the ComfyUI this pack is installed in, else the usual place of comfy-cli."""
    places = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    places += [HERE.parents[3], Path.home() / "comfy" / "ComfyUI"]
    return next((place for place in places if (place / "comfy" / "model_patcher.py").is_file()), None)


COMFYUI = find_comfyui()
REASON = ""
if COMFYUI is None:
    REASON = f"left out, no ComfyUI found: set COMFYUI_PATH to a ComfyUI {OLDEST_COMFYUI} or newer, whose requirements are installed here"
elif not (COMFYUI / "comfy" / "quant_ops.py").is_file():
    REASON = f"left out, the ComfyUI in {COMFYUI} is too old: {OLDEST_COMFYUI} or newer is needed"
    COMFYUI = None
if COMFYUI is None:
    collect_ignore_glob = ["*"]
else:
    sys.path[:0] = [str(COMFYUI), str(HERE)]
    # ComfyUI reads its options from the command line once, at its first import.
    arguments, folder = sys.argv, os.getcwd()
    sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention", "--database-url", "sqlite:///:memory:"]
    try:
        if DEVICE == "cpu":
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args
        else:
            from stepquant.benchmarks.comfyui_session import start_comfyui

            if start_comfyui(dynamic=DEVICE == "gpu") != (DEVICE == "gpu"):
                raise RuntimeError("dynamic VRAM did not start; set STEPQUANT_TEST_DEVICE to gpu-classic to test without it")
            import comfy.cli_args
    finally:
        sys.argv = arguments
        os.chdir(folder)


def pytest_report_header() -> str:
    return f"tests/comfyui: {REASON or f'with ComfyUI in {COMFYUI}'}"


if COMFYUI is not None:
    import comfy.sd
    import comfy.utils
    import tiny_sdxl
    import torch
    from sampling_run import sample_latent

    from stepquant.hosts.comfy.lora import quantized_layers
    from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model
    from stepquant.quant.recipe import Recipe
    from stepquant.quant.scheme import ActivationMode, ComputeType, Scheme

    tiny_sdxl.register()
    # Between two calls on a GPU nothing may differ but what a test changes.
    torch.backends.cudnn.deterministic = True

    @pytest.fixture(scope="session")
    def comfyui_path() -> Path:
        return COMFYUI

    @pytest.fixture(autouse=True)
    def inference_mode():
        """ComfyUI runs a whole prompt in one inference-mode block; tensors born inside it cannot be updated outside."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the tiny model is all overhead
        with torch.inference_mode():
            yield
        torch.set_num_threads(threads)

    @pytest.fixture(scope="session")
    def unet_file(tmp_path_factory) -> str:
        path = tmp_path_factory.mktemp("models") / "tiny_unet.safetensors"
        tiny_sdxl.write_unet(path)
        return str(path)

    @pytest.fixture(scope="session")
    def checkpoint_file(tmp_path_factory) -> str:
        path = tmp_path_factory.mktemp("models") / "tiny_checkpoint.safetensors"
        tiny_sdxl.write_checkpoint(path)
        return str(path)

    @pytest.fixture
    def model(unet_file):
        """The fp MODEL, as UNETLoader gives it. A fresh one for each test."""
        return comfy.sd.load_diffusion_model(unet_file)

    @pytest.fixture
    def quantized(model):
        return quantize_model(model, "w8a8-token")

    @pytest.fixture
    def weight_only(model):
        """int8 weights, float activations: then the dequantized model is an exact reference."""
        scheme = Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)
        return quantize_model(model, Recipe({name: scheme for name in quantizable_layers(model)}, "test", "test"))

    @pytest.fixture
    def dequantized(unet_file):
        """A float MODEL with the weights that a quantized one's codes stand for."""

        def make(quantized):
            plain = comfy.sd.load_diffusion_model(unet_file)
            for key, module in quantized_layers(quantized.model):
                comfy.utils.copy_to_param(plain.model, key, module.weight.dequantize())
            return plain

        return make

    @pytest.fixture(scope="session")
    def sample():
        return sample_latent

    @pytest.fixture(scope="session")
    def add_lora():
        def add(model, strength: float = 1.0, seed: int = 0, only: str = ""):
            return comfy.sd.load_lora_for_models(model, None, tiny_sdxl.lora_tensors(seed, only), strength, 0)[0]

        return add

    @pytest.fixture(scope="session")
    def unet_call():
        """One UNet call as a sampler makes it, with a noise level per sample; the MODEL stays loaded as it is."""

        def call(patcher, sigmas) -> torch.Tensor:
            batch, device = len(sigmas), patcher.load_device
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(batch, 4, 8, 8, generator=generator) * torch.tensor(sigmas).view(-1, 1, 1, 1)
            context = torch.randn(batch, 77, tiny_sdxl.CLIP_L + tiny_sdxl.CLIP_G, generator=generator)
            patcher.patch_model(load_weights=False)
            try:
                patcher.pre_run()
                y = torch.zeros(batch, tiny_sdxl.CLIP_G + 1536, device=device)
                return patcher.model.apply_model(x.to(device), torch.tensor(sigmas, device=device), c_crossattn=context.to(device), y=y)
            finally:
                patcher.unpatch_model(unpatch_weights=False)

        return call

    @pytest.fixture(scope="session")
    def relative_error():
        """|test - reference| / |reference|"""
        return lambda test, reference: ((test - reference).norm() / reference.norm()).item()

    @pytest.fixture(scope="session")
    def snapshot():
        """Every tensor of a MODEL, copied: quantized weights as their buffers."""

        def take(model) -> dict[str, torch.Tensor]:
            tensors = {**dict(model.model.named_parameters()), **dict(model.model.named_buffers())}
            return {name: getattr(tensor, "_qdata", tensor).clone() for name, tensor in tensors.items()}

        return take
