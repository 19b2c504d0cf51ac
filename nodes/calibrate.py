"""Calibrate, and open a saved calibration. The work is in hosts/comfy/calibrate.py and quant/calibration.py."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..errors import CalibrationError
from ..hosts.unfinished import RUNS_DONE
from ..quant.calibration_steps import CalibrationMode
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
            description="Runs your model on your prompt and records what its layers are given, per timestep. "
            "Needed for w8a8-static, w8a8-measured and Plan.",
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
                # Last and optional: workflows saved before they existed stay valid.
                io.Combo.Input(
                    "mode",
                    options=[mode.value for mode in CalibrationMode],
                    default=CalibrationMode.FULL.value,
                    optional=True,
                    advanced=True,
                    tooltip="Which steps are looked at. full (usual): all. srm: all of the first run, then a quarter, the least certain "
                    "ones. progressive: all, each on what the quantized steps before it made, twice as slow. noisiest: the first step "
                    "alone, many times faster, with one set of scales for all timesteps.",
                ),
                io.Boolean.Input(
                    "sensitivity",
                    default=False,
                    optional=True,
                    tooltip="Also measure how much each layer's noise matters, which Plan needs. Takes some hundred UNet calls more, once. "
                    "Usually off, on for Plan.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Go on with the calibration of this file_name that was cancelled, with the same settings. Usually off.",
                ),
            ],
            outputs=[
                CalibrationType.Output(
                    "calibration", display_name="calibration", tooltip="For Plan, and for Quantize SDXL with w8a8-static or w8a8-measured."
                ),
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
        mode: str = CalibrationMode.FULL.value,
        sensitivity: bool = False,
        resume: bool = False,
    ) -> io.NodeOutput:
        from ..hosts.comfy.calibrate import PROBES, calibrate
        from ..hosts.comfy.sampling import SamplerSettings
        from ..quant.calibration import merge

        path = _path_to_write(file_name) if file_name.strip() else None
        settings = SamplerSettings(steps, cfg, sampler_name, scheduler, denoise)
        calibration = calibrate(
            model,
            positive,
            negative,
            latent_image,
            seed,
            settings,
            runs,
            mode,
            PROBES if sensitivity else 0,
            _unfinished(path) if resume else None,
            None if path is None else lambda unfinished: unfinished.save(path),
        )
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
            outputs=[
                CalibrationType.Output(
                    "calibration", display_name="calibration", tooltip="For Plan, and for Quantize SDXL with w8a8-static or w8a8-measured."
                )
            ],
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


def _unfinished(path: str | None):
    """Raises FormatError or CalibrationError if there is nothing to go on from."""
    from ..quant.calibration import Calibration

    if path is None:
        raise CalibrationError("resume: no file_name is given. Give that of the calibration that was cancelled, or switch resume off.")
    return Calibration.load(path)


def _path_to_write(file_name: str) -> str:
    """Checked before the long run, so that a bad name costs nothing."""
    folder = folder_paths.get_folder_paths(CALIBRATION_FOLDER)[0]
    return checked_name(file_name, folder)


def _summary(calibration, path: str | None) -> str:
    buckets = {int(bucket) for layer in calibration.layers.values() for bucket in layer.buckets}
    lines = [f"{len(calibration.layers)} layers observed in {len(buckets)} of 64 timestep buckets"]
    if calibration.sensitivity:
        lines.append(f"sensitivity of {len(calibration.sensitivity)} layers measured, for Plan")
    if RUNS_DONE in calibration.summary:
        lines.append(f"unfinished: {calibration.summary[RUNS_DONE]} of {calibration.summary['runs']} runs")
    if path is not None:
        lines.append(f"saved as {os.path.basename(path)}, {os.path.getsize(path) / 2**20:.1f} MiB")
    return "\n".join(lines)


NODES = [StepQuantCalibrate, StepQuantLoadCalibration]
