"""int8_attention by the name that dispatch imports it by. It shares its device functions with log2_attention."""

from .log2_attention import int8_attention

__all__ = ["int8_attention"]
