"""Tuning: jobs that search the spaces of kernels, and the records they leave."""
