"""Tuning records, winners only: ``<target>/<kernel>.jsonl``."""
