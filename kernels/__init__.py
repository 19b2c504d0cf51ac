"""int8 operations: plain torch references, Triton kernels, one dispatch point. Imports neither Triton nor CUDA by itself."""
