"""Gluon's tensor copies under one name: Triton 3.9 renamed them."""

from triton.experimental.gluon.language.nvidia.hopper import tma

copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
wait_for_copies_out = tma.store_wait
