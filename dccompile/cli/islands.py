"""The line about float islands in the summaries of `check`, `compile` and `inspect`."""

from __future__ import annotations

_NAMED = 4


def island_line(count: int, switches: int, nodes: list[list[str]]) -> str:
    """Where a quantized model computes in float: the first nodes, and how many more."""
    islands = f"{count} float island{'' if count == 1 else 's'}"
    edges = f"{switches} precision switch{'' if switches == 1 else 'es'}"
    sizes = [f" and {len(names) - 1} more" if names[1:] else "" for names in nodes]
    named = [f"'{n[0]}'{more}" for n, more in zip(nodes, sizes, strict=True)]
    if count > _NAMED:
        named[_NAMED:] = [f"{count - _NAMED} more islands"]
    return f"{islands}, {edges}" + (f": {', '.join(named)}" if named else "")
