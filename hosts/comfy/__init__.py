"""How a quantized UNet lives inside ComfyUI. Importing this package imports nothing of ComfyUI; its modules do."""
