"""The generic route: legalization, fusion and the schedule of operators without a kernel."""
