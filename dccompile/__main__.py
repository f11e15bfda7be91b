"""``python -m dccompile``."""

from .cli.main import entry

entry()
