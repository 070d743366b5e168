"""The compiled CPU and CUDA libraries."""
