"""Draws scenes on the device that trains: sprites and avatars placed on colours by bilinear sampling. No captions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import SIZE, Banks
from .scenes import BACKGROUNDS, Scene

MAX_PLACEMENTS = 4
# Below this side a sprite is taken from the half-size bank, else bilinear sampling would alias.
HALF_SIZE_BELOW = 0.55


class Composer:
    """Holds the rendered banks on a device and turns scenes into pictures.

    Sprites are kept with premultiplied alpha, at full and half size, uint8; avatars at full size.
    """

    def __init__(self, banks: Banks, device: str | torch.device):
        self.device = torch.device(device)
        sprites = torch.from_numpy(np.array(banks.sprites)).permute(0, 3, 1, 2)
        self._full = torch.cat([self._premultiply(part.to(self.device)) for part in sprites.split(256)])
        self._half = torch.cat([_halve(part) for part in self._full.split(256)])
        avatars = torch.from_numpy(np.array(banks.avatars)).permute(0, 3, 1, 2)
        self._avatars = avatars.contiguous().to(self.device)
        self._colours = torch.tensor(list(BACKGROUNDS.values()), device=self.device) / 255.0  # (12, 3)

    @staticmethod
    def _premultiply(sprites: Tensor) -> Tensor:
        alpha = sprites[:, 3:].float() / 255.0
        return torch.cat([(sprites[:, :3] * alpha).round().to(torch.uint8), sprites[:, 3:]], dim=1)

    def draw(self, scenes: list[Scene], zooms: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, 256, 256) fp32 in [-1, 1].

        Args:
            scenes: B of them.
            zooms: (B, 3) fp32 on any device: factor >= 1 by which the scene is enlarged, then left and top
                of the 256 px window as fractions of the unenlarged scene; left out: whole scenes.
        """
        words = list(BACKGROUNDS)
        background = torch.tensor([words.index(scene.background) for scene in scenes], device=self.device)
        canvas = self._colours[background][:, :, None, None].expand(-1, -1, SIZE, SIZE).contiguous()
        if zooms is None:
            zooms = torch.tensor([[1.0, 0.0, 0.0]]).expand(len(scenes), 3)
        zooms = zooms.tolist()
        for slot in range(MAX_PLACEMENTS):
            for bank in (self._full, self._half, self._avatars):
                self._draw_slot(canvas, scenes, zooms, slot, bank)
        return canvas * 2 - 1

    def _draw_slot(self, canvas: Tensor, scenes: list[Scene], zooms: list, slot: int, bank: Tensor) -> None:
        """Blend the slot-th placement of all scenes that take it from this bank into the canvas, in place."""
        chosen = [i for i, scene in enumerate(scenes) if slot < len(scene.placements) and self._bank(scene) is bank]
        if not chosen:
            return
        places = [scenes[i].placements[slot] for i in chosen]
        thetas = torch.tensor([_theta(place, *zooms[i]) for i, place in zip(chosen, places, strict=True)])
        index = torch.tensor(chosen, device=self.device)
        rows = torch.tensor([place.row for place in places], device=self.device)
        grid = F.affine_grid(thetas.to(self.device), (len(chosen), 1, SIZE, SIZE), align_corners=False)
        layer = F.grid_sample(bank[rows].float() / 255.0, grid, align_corners=False)
        if bank is self._avatars:
            inside = (grid.abs() <= 1).all(-1)[:, None]
            canvas[index] = torch.where(inside, layer, canvas[index])
        else:
            canvas[index] = canvas[index] * (1 - layer[:, 3:]) + layer[:, :3]

    def _bank(self, scene: Scene) -> Tensor:
        if scene.kind == "avatar":
            return self._avatars
        return self._half if scene.placements[0].side < HALF_SIZE_BELOW else self._full


def _theta(place, zoom: float, left: float, top: float) -> list[list[float]]:
    """Affine map from output coordinates in [-1, 1] to the sprite's own, for `affine_grid`."""
    # Scene coordinate u = left + (o + 1) / (2 zoom); sprite coordinate s = 2 (u - centre) / side.
    scale = 1.0 / (zoom * place.side)
    return [
        [scale, 0.0, 2.0 * (left - place.x) / place.side + scale],
        [0.0, scale, 2.0 * (top - place.y) / place.side + scale],
    ]


def _halve(sprites: Tensor) -> Tensor:
    return F.avg_pool2d(sprites.float(), 2).round().to(torch.uint8)
