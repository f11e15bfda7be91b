"""Measuring: interleaved timing, the peers, whole models and single kernels."""
