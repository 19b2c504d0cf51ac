"""Smooths the transformer blocks of a diffusers UNet before it is quantized, and its calibration with it. The function stays the same."""

from __future__ import annotations

from torch import Tensor, nn

from ...quant.calibration import Calibration, not_calibrated
from ...quant.smoothing import choose_smoothing, smoothed_statistics
from ..key_mapping import diffusers_to_ldm
from .scale_moves import READERS, move_scales, transformer_blocks


def smooth_unet(unet: nn.Module, calibration: Calibration) -> tuple[Calibration, dict[str, Tensor]]:
    """Move scales where that makes less noise, in place.

    Args: calibration: of this UNet; left unchanged. Sensitivities are dropped: those of the layers that write a moved tensor change.
    Returns: the calibration of the smoothed UNet, and the factor of every site that was smoothed, by block and site.
    Raises: CalibrationError if a layer was not observed.
    """
    layers, factors = dict(calibration.layers), {}
    for path, block in transformer_blocks(unet).items():
        for site, readers in READERS.items():
            names = [diffusers_to_ldm(f"{path}.{reader}.weight").removesuffix(".weight") for reader in readers]
            for name in names:
                if name not in layers:
                    raise not_calibrated(name)
            factor = choose_smoothing(layers[names[0]], [block.get_submodule(reader).weight for reader in readers])
            if factor is not None:
                factors[f"{path}.{site}"] = factor
                layers.update((name, smoothed_statistics(layers[name], factor)) for name in names)
    move_scales(unet, factors)
    return Calibration(layers, calibration.summary | {"smoothed": sorted(factors)}), factors
