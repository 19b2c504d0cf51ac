"""Tune scales: trains a scale LoRA in the graph, on pictures or on what the 16-bit model answers. The work is in hosts/comfy/tune.py."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..errors import CalibrationError
from ..quant.tuning.scale_set import EXPERTS
from .file_names import EXTENSION, checked_name
from .preview import show
from .quantize import CATEGORY
from .sampler_inputs import conditioning_inputs, sampling_inputs
from .scale_lora import SCALE_LORA_FOLDER

STATE_ENDING = ".state"


class StepQuantTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantTune",
            display_name="Tune scales (StepQuant)",
            category=CATEGORY,
            description="Trains nothing but the scales of a quantized model: towards the original's answers, or on a few pictures.",
            search_aliases=["train", "TuneQDM", "dreambooth", "personalisation", "fine tuning", "scale LoRA"],
            inputs=[
                io.Model.Input("model", tooltip="The quantized model whose scales are tuned, without LoRAs."),
                io.Model.Input(
                    "original", tooltip="The 16-bit model that it was made from. Its answers are what is repaired, or what is kept."
                ),
                *conditioning_inputs(),
                *sampling_inputs(),
                io.Int.Input(
                    "runs",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="How many samplings of the original are recorded, each with the next seed. Usually 4 to 16.",
                ),
                io.Int.Input(
                    "tuning_steps",
                    default=300,
                    min=1,
                    max=100_000,
                    tooltip="Training steps. More come nearer and take longer. Usually 200 to 400.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=0.1,
                    step=0.0001,
                    round=0.00001,
                    tooltip="How far scales move in a step. Usually 0, which takes 0.01 for pictures and 0.001 for repair.",
                ),
                io.Combo.Input(
                    "experts",
                    options=[str(one) for one in EXPERTS],
                    default="1",
                    advanced=True,
                    tooltip="Scale sets along the schedule; the file grows with them. Usually 1.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="With images: how much everything else is to stay as it is. Usually 1 to 3; 0 forgets other things sooner.",
                ),
                io.String.Input(
                    "file_name",
                    default="my-scales",
                    tooltip=f"Saved under this name in models/{SCALE_LORA_FOLDER}. An existing file is replaced.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="4 to 10 pictures of one subject, to learn it. Leave open to repair the model."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Needed with images: encodes them."),
                io.Conditioning.Input(
                    "subject", optional=True, tooltip="Needed with images: a prompt that names the subject by a rare word."
                ),
                io.Int.Input(
                    "batch", default=4, min=1, max=64, optional=True, advanced=True, tooltip="Pictures in one training step. Usually 4."
                ),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Go on with the tuning of this file_name that was cancelled, with the same settings. Usually off.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The quantized model with the tuned scales."),
                io.String.Output("summary", display_name="summary", tooltip="What was trained and where it was saved."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        original,
        positive,
        negative,
        latent_image,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float = 1.0,
        runs: int = 4,
        tuning_steps: int = 300,
        learning_rate: float = 0.0,
        experts: str = "1",
        prior_weight: float = 1.0,
        file_name: str = "my-scales",
        images=None,
        vae=None,
        subject=None,
        batch: int = 4,
        resume: bool = False,
    ) -> io.NodeOutput:
        from ..hosts.comfy.sampling import SamplerSettings
        from ..hosts.comfy.scale_lora import with_scale_lora
        from ..hosts.comfy.tune import tune_model
        from ..quant.tuning.scale_file import load_scale_set, save_scale_set
        from ..quant.tuning.training import REPAIR_RATE, SUBJECT_RATE, TuningSettings, load_state
        from ..version import VERSION

        path = checked_name(file_name, folder_paths.get_folder_paths(SCALE_LORA_FOLDER)[0])
        state_file = path.removesuffix(EXTENSION) + STATE_ENDING
        pictures = _pictures(images, vae, subject)
        rate = learning_rate or (REPAIR_RATE if pictures is None else SUBJECT_RATE)
        settings = TuningSettings(tuning_steps, rate, batch, int(experts), prior_weight, seed)
        scales = tune_model(
            model,
            original,
            positive,
            negative,
            latent_image,
            seed,
            SamplerSettings(steps, cfg, sampler_name, scheduler, denoise),
            runs,
            settings,
            pictures,
            load_state(state_file) if resume else None,
            lambda state: state.save(state_file),
        )
        save_scale_set(scales, path, VERSION)
        scales = load_scale_set(path)  # with the file's rounding: the picture of today is that of tomorrow
        if os.path.isfile(state_file):
            os.remove(state_file)
        kind = "repair" if pictures is None else f"{len(pictures.latents)} pictures"
        lines = [f"{scales.values} scales tuned in {tuning_steps} steps, {kind}"]
        lines.append(f"saved as {os.path.basename(path)}, {os.path.getsize(path) / 1e6:.2f} MB")
        summary = "\n".join(lines)
        return io.NodeOutput(with_scale_lora(model, scales, 1.0, os.path.basename(path)), summary, ui=show(cls, summary))


def _pictures(images, vae, subject):
    """Raises CalibrationError if images are given without what they need."""
    from ..hosts.comfy.tune import Pictures

    if images is None:
        return None
    if vae is None or subject is None:
        missing = "vae" if vae is None else "subject"
        raise CalibrationError(
            f"Tune scales: images are connected and {missing} is not. Connect it, or leave images open to repair the model."
        )
    return Pictures(vae.encode(images[..., :3]), subject)


NODES = [StepQuantTune]
