"""The embedded engine: StepQuant on diffusers' SDXL pipelines, without ComfyUI.

Reading order: timestep_tap, layers, quantize, unet_file, trajectory (what a UNet was asked), calibrate, fidelity.
"""
