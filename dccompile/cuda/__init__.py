"""CUDA: machine code for NVIDIA GPUs, made with or without one."""
