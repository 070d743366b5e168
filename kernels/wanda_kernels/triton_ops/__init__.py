"""Triton kernels, one operation a file. Importing one imports Triton, which then reads TRITON_INTERPRET."""
