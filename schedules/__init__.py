"""The list of kernels: one line gives a kernel its selection, tests, bench and tuning."""
