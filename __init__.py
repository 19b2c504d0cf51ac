"""ComfyUI's way in. Importing this touches neither ComfyUI, CUDA nor Triton: the nodes are built when ComfyUI asks for them."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called once by ComfyUI while it loads the pack; an error raised here becomes one line of its log."""
    from .hosts.comfy.version import check_comfyui

    check_comfyui()
    from .nodes.extension import StepQuantExtension

    return StepQuantExtension()
