"""API-format graphs for the tests: the demo model in a stock text-to-image graph, with our nodes put in."""

from __future__ import annotations

SIDE = 128
STEPS = 3
SAMPLING = {"seed": 7, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def stock_parts() -> dict:
    """Loader, prompts and latent; output numbers as in ComfyUI: loader 0 = MODEL, 1 = CLIP, 2 = VAE."""
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name="demo.safetensors"),
        "positive": node("CLIPTextEncode", text="a red apple on a blue background", clip=["load", 1]),
        "negative": node("CLIPTextEncode", text="", clip=["load", 1]),
        "latent": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
    }


def quantize(preset: str = "w8a8-token", **inputs: object) -> dict:
    return {"quantize": node("StepQuantQuantize", model=["load", 0], preset=preset, timestep_groups=8, **inputs)}


def calibrate(model: str = "load", **inputs: object) -> dict:
    given = {"runs": 1, "file_name": "", **SAMPLING, **inputs}
    return {
        "calibrate": node(
            "StepQuantCalibrate", model=[model, 0], positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0], **given
        )
    }


def sample(model: str = "quantize", vae: str = "load", prefix: str = "test") -> dict:
    """KSampler, decode, save; `picture` is the saving node."""
    conditioning = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    return {
        "sampler": node("KSampler", model=[model, 0], **conditioning, **SAMPLING),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=[vae, 2]),
        "picture": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
    }


def compare(original: str = "load", quantized: str = "quantize", **inputs: object) -> dict:
    conditioning = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    given = {"runs": 1, **SAMPLING, **inputs}
    return {"compare": node("StepQuantCompare", original=[original, 0], quantized=[quantized, 0], vae=["load", 2], **conditioning, **given)}


def save(file_name: str, whole: bool = True, **inputs: object) -> dict:
    parts = {"clip": ["load", 1], "vae": ["load", 2]} if whole else {}
    return {"save": node("StepQuantSave", model=["quantize", 0], file_name=file_name, **{"overwrite": False, **inputs}, **parts)}


def load_quantized(file_name: str) -> dict:
    """Takes the place of the stock loader: same name, same outputs."""
    return {"load": node("StepQuantLoad", file_name=file_name)}
