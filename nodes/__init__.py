"""The ComfyUI nodes, thin: schema, checks, one call into hosts/, preview. `extension.py` lists them."""
