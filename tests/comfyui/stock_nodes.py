"""ComfyUI's own nodes that patch the UNet, as functions of a MODEL, by the name an artist knows them by."""

from __future__ import annotations


def _node(module: str, name: str, **inputs):
    def apply(patcher):
        node = getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name)
        result = node.execute(patcher, **inputs)
        return result[0] if isinstance(result, tuple) else result.result[0]

    return apply


NODES = {
    "FreeU": _node("nodes_freelunch", "FreeU", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "PerturbedAttention": _node("nodes_pag", "PerturbedAttentionGuidance", scale=3.0),
    "SelfAttentionGuidance": _node("nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "HyperTile": _node("nodes_hypertile", "HyperTile", tile_size=32, swap_size=1, max_depth=2, scale_depth=False),
    "TokenMerging": _node("nodes_tomesd", "TomePatchModel", ratio=0.5),
    "DeepShrink": _node(
        "nodes_model_downscale", "PatchModelAddDownscale", block_number=3, downscale_factor=2.0, start_percent=0.0, end_percent=1.0,
        downscale_after_skip=True, downscale_method="bilinear", upscale_method="bilinear",
    ),
}  # fmt: skip
