"""How 4-bit weights are rounded."""
