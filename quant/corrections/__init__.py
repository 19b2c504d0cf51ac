"""Corrections of a quantized UNet that cost nothing at run time, kept only where they help on prompts they were not fitted on."""
