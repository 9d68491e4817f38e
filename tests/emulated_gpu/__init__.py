"""A CUDA device for machines without a GPU; README.md describes what it covers and how to use it.

`cuda.c` replaces the CUDA runtime and driver: device memory is host memory, and no kernel can be launched. `mode.py`
computes every operator that would launch one with the CPU's kernel on the same memory. `log.py` records what happened.
"""
