"""Triton kernels and their launchers, one file per operation. Imported by dispatch at first use only: needs Triton."""
