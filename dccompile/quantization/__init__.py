"""From a float model to an 8-bit one: calibration, rewriting, and what it costs in accuracy."""
