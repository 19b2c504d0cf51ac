"""UNet parameter names of SDXL's topology: LDM (ComfyUI, checkpoints) <-> diffusers, both ways, from block structure.

Pure string functions: they know neither torch nor shapes, and leave prefixes such as `model.diffusion_model.` to the caller.
"""

from __future__ import annotations

import re

from ..errors import ModelError

# SDXL: three levels, two residual blocks a level. input_blocks = conv_in, then per level two residual
# blocks and (except on the last level) one downsampler; output_blocks = per level three residual blocks.
LEVELS = 3
RESNETS_PER_LEVEL = 2

_STEMS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_STEMS_BACK = {diffusers: ldm for ldm, diffusers in _STEMS.items()}

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {diffusers: ldm for ldm, diffusers in _RESNET.items()}


class UnknownUNetKey(ModelError, KeyError):  # noqa: N818
    """A name that is no UNet parameter or module of SDXL's topology; its text is the whole message."""

    def __str__(self) -> str:
        return str(self.args[0])


def ldm_to_diffusers(key: str) -> str:
    """Name of an LDM UNet parameter or module in diffusers' `UNet2DConditionModel`.

    `input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight` ->
    `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight`.
    Args:
        key: without prefix; a module's name (no `.weight`) works as well.
    Raises: UnknownUNetKey if the name is outside SDXL's topology (another model's, or with a prefix left on).
    """
    stem, rest = _split_stem(key, _STEMS)
    if stem is not None:
        return _join(_STEMS[stem], _map_inner(rest, _RESNET, ".resnets." in _STEMS[stem]))
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)(?:\.(.+))?$", key)
    if match is None:
        raise _unknown(key, "an LDM name such as input_blocks.4.1.proj_in.weight")
    side, block, child, rest = match[1], int(match[2]), int(match[3]), match[4] or ""
    stem = _input_stem(block, child) if side == "input" else _output_stem(block, child, rest)
    if stem is None:
        raise _unknown(key, "an LDM name such as input_blocks.4.1.proj_in.weight")
    if stem.endswith("samplers.0"):
        return _join(stem, re.sub(r"^op(?=\.|$)", "conv", rest))
    return _join(stem, _map_inner(rest, _RESNET, ".resnets." in stem))


def diffusers_to_ldm(key: str) -> str:
    """Inverse of `ldm_to_diffusers`; same arguments, same error."""
    stem, rest = _split_stem(key, _STEMS_BACK)
    if stem is not None:
        return _join(_STEMS_BACK[stem], _map_inner(rest, _RESNET_BACK, ".resnets." in stem))
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?$", key)
    if match is None:
        raise _unknown(key, "a diffusers name such as down_blocks.1.attentions.0.proj_in.weight")
    side, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5] or ""
    stem = _down_stem(level, kind, index) if side == "down" else _up_stem(level, kind, index)
    if stem is None:
        raise _unknown(key, "a diffusers name such as down_blocks.1.attentions.0.proj_in.weight")
    if kind == "downsamplers":
        rest = re.sub(r"^conv(?=\.|$)", "op", rest)
    return _join(stem, _map_inner(rest, _RESNET_BACK, kind == "resnets"))


def _input_stem(block: int, child: int) -> str | None:
    level, index = divmod(block - 1, RESNETS_PER_LEVEL + 1)
    if block < 1 or level >= LEVELS:
        return None
    if index == RESNETS_PER_LEVEL:
        return f"down_blocks.{level}.downsamplers.0" if child == 0 and level < LEVELS - 1 else None
    return _block_child(f"down_blocks.{level}", index, child)


def _output_stem(block: int, child: int, rest: str) -> str | None:
    level, index = divmod(block, RESNETS_PER_LEVEL + 1)
    if level >= LEVELS:
        return None
    # The upsampler is the last child of a level's last block: child 2 behind a transformer, child 1
    # without one. A Conv named `conv` tells it from a transformer, whose children have other names.
    last = index == RESNETS_PER_LEVEL and level < LEVELS - 1
    if last and (child == 2 or (child == 1 and re.match(r"conv(\.|$)", rest))):
        return f"up_blocks.{level}.upsamplers.0"
    return _block_child(f"up_blocks.{level}", index, child)


def _block_child(block: str, index: int, child: int) -> str | None:
    if child > 1:
        return None
    return f"{block}.{'attentions' if child else 'resnets'}.{index}"


def _down_stem(level: int, kind: str, index: int) -> str | None:
    if level >= LEVELS:
        return None
    first = 1 + level * (RESNETS_PER_LEVEL + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + RESNETS_PER_LEVEL}.0" if index == 0 and level < LEVELS - 1 else None
    if kind == "upsamplers" or index >= RESNETS_PER_LEVEL:
        return None
    return f"input_blocks.{first + index}.{int(kind == 'attentions')}"


def _up_stem(level: int, kind: str, index: int) -> str | None:
    if level >= LEVELS:
        return None
    first = level * (RESNETS_PER_LEVEL + 1)
    if kind == "upsamplers":
        # Both upsamplers of SDXL stand behind a transformer, hence child 2.
        return f"output_blocks.{first + RESNETS_PER_LEVEL}.2" if index == 0 and level < LEVELS - 1 else None
    if kind == "downsamplers" or index > RESNETS_PER_LEVEL:
        return None
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}"


def _split_stem(key: str, stems: dict[str, str]) -> tuple[str | None, str]:
    for stem in stems:
        if key == stem or key.startswith(stem + "."):
            return stem, key[len(stem) + 1 :]
    return None, key


def _map_inner(rest: str, names: dict[str, str], is_resnet: bool) -> str:
    """Rename the children of a residual block; a transformer's children have the same names in both."""
    if not is_resnet or not rest:
        return rest
    stem, tail = _split_stem(rest, names)
    if stem is None:
        raise _unknown(rest, f"a residual block's child, one of {', '.join(names)}")
    return _join(names[stem], tail)


def _join(stem: str, rest: str) -> str:
    return f"{stem}.{rest}" if rest else stem


def _unknown(key: str, needed: str) -> UnknownUNetKey:
    return UnknownUNetKey(f"{key}: no UNet name of SDXL's topology; needed {needed}. Remove any prefix, or convert an SDXL model.")
