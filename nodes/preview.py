"""What a node shows on itself: text and pictures. Everything shown is an output of the node as well."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image


def show(node: type[io.ComfyNode], text: str, pictures: Sequence[torch.Tensor] = ()) -> dict[str, object]:
    """The `ui` part of a NodeOutput.

    Args:
        node: the class ComfyUI executes.
        text: kept in the history as `text`; web/node_panel.js shows it below the node's widgets.
        pictures: (B, H, W, 3) in [0, 1]; of different sizes if need be.
    """
    shown = ui.PreviewText(text).as_dict()
    saved = [image for picture in pictures for image in ui.PreviewImage(picture, cls=node).as_dict()["images"]]
    return {**shown, "images": saved} if saved else shown


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """ComfyUI's IMAGE, (1, H, W, 3) float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def to_picture(image: torch.Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] as a Pillow picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
