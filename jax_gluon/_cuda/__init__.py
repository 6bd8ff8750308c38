"""Attention on NVIDIA GPUs: cuDNN's fused kernels, for operands of 16 bits."""
