"""Calibrate, and open a saved calibration. The work is in hosts/comfy/calibrate.py and quant/calibration.py."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from .file_names import checked_name, file_state
from .preview import show
from .quantize import CATEGORY, CalibrationType
from .sampler_inputs import conditioning_inputs, sampling_inputs

CALIBRATION_FOLDER = "stepquant_calibrations"


class StepQuantCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantCalibrate",
            display_name="Calibrate (StepQuant)",
            category=CATEGORY,
            description="Runs your model on your prompt and records what its layers are given, per timestep. Needed for w8a8-static only.",
            search_aliases=["calibration", "activation statistics", "static quantization", "observer"],
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit SDXL model that will be quantized, with the LoRAs you will use."),
                *conditioning_inputs(),
                *sampling_inputs(),
                io.Int.Input(
                    "runs",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="How many sampling runs are observed, each with the next seed. More runs make the scales safer "
                    "and take longer: usually 4 to 16.",
                ),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip=f"If given, the calibration is also saved under this name in models/{CALIBRATION_FOLDER}. Usually empty.",
                ),
                CalibrationType.Input(
                    "add_to",
                    optional=True,
                    tooltip="An earlier calibration of the same model that this one is added to: chain several Calibrate nodes, "
                    "one per prompt. Usually not connected.",
                ),
            ],
            outputs=[
                CalibrationType.Output("calibration", display_name="calibration", tooltip="For Quantize SDXL with w8a8-static."),
                io.String.Output("summary", display_name="summary", tooltip="What was observed."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
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
        file_name: str = "",
        add_to=None,
    ) -> io.NodeOutput:
        from ..hosts.comfy.calibrate import calibrate
        from ..hosts.comfy.sampling import SamplerSettings
        from ..quant.calibration import merge

        path = _path_to_write(file_name) if file_name.strip() else None
        settings = SamplerSettings(steps, cfg, sampler_name, scheduler, denoise)
        calibration = calibrate(model, positive, negative, latent_image, seed, settings, runs)
        if add_to is not None:
            calibration = merge(add_to, calibration)
        if path is not None:
            calibration.save(path)
        summary = _summary(calibration, path)
        return io.NodeOutput(calibration, summary, ui=show(cls, summary))


class StepQuantLoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantLoadCalibration",
            display_name="Load calibration (StepQuant)",
            category=CATEGORY,
            description=f"Opens a calibration that Calibrate saved in models/{CALIBRATION_FOLDER}.",
            search_aliases=["open calibration", "calibration file"],
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=_saved_calibrations(),
                    tooltip="A calibration of the model that will be quantized. One of another model is refused.",
                ),
            ],
            outputs=[CalibrationType.Output("calibration", display_name="calibration", tooltip="For Quantize SDXL with w8a8-static.")],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str) -> str:
        return file_state(folder_paths.get_full_path(CALIBRATION_FOLDER, file_name))

    @classmethod
    def validate_inputs(cls, file_name: str) -> bool | str:
        if folder_paths.get_full_path(CALIBRATION_FOLDER, file_name) is None:
            return f"{file_name}: not in models/{CALIBRATION_FOLDER}. Save one with Calibrate (StepQuant), or refresh and choose again."
        return True

    @classmethod
    def execute(cls, file_name: str) -> io.NodeOutput:
        from ..quant.calibration import Calibration

        path = folder_paths.get_full_path_or_raise(CALIBRATION_FOLDER, file_name)
        calibration = Calibration.load(path)
        return io.NodeOutput(calibration, ui=show(cls, _summary(calibration, None)))


def _saved_calibrations() -> list[str]:
    return [name for name in folder_paths.get_filename_list(CALIBRATION_FOLDER) if name.endswith(".safetensors")]


def _path_to_write(file_name: str) -> str:
    """Checked before the long run, so that a bad name costs nothing."""
    folder = folder_paths.get_folder_paths(CALIBRATION_FOLDER)[0]
    return checked_name(file_name, folder)


def _summary(calibration, path: str | None) -> str:
    buckets = {int(bucket) for layer in calibration.layers.values() for bucket in layer.buckets}
    lines = [f"{len(calibration.layers)} layers observed in {len(buckets)} of 64 timestep buckets"]
    if path is not None:
        lines.append(f"saved as {os.path.basename(path)}, {os.path.getsize(path) / 2**20:.1f} MiB")
    return "\n".join(lines)


NODES = [StepQuantCalibrate, StepQuantLoadCalibration]
