"""Factors of a quantized model's scales, and what they are trained with (TuneQDM)."""
