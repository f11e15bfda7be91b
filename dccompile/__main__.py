"""``python -m dccompile``."""

from .cli import entry

entry()
