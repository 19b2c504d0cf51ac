"""How much of the UNet runs as one piece: what the nodes' `acceleration` input chooses. Names only."""

from enum import Enum


class Acceleration(str, Enum):
    """AUTO: fused blocks, and on NVIDIA the whole UNet as a CUDA graph. FUSED: without the graph. OFF: layer by layer."""

    AUTO = "auto"
    FUSED = "fused"
    OFF = "off"


OPTIONS = [choice.value for choice in Acceleration]
TOOLTIP = (
    "How much of the model runs as one piece. auto (usual): fused blocks, and on NVIDIA the whole UNet as a CUDA graph, which "
    "spares the processor most of its work. fused: without the graph, which takes a little less VRAM. "
    "off: layer by layer, to find out whether something that looks wrong comes from here."
)
