"""Gluon kernels of Hopper GPUs, for what Triton's compiler leaves lying there: see ring.py. Formulas and checks: ../*.py."""
