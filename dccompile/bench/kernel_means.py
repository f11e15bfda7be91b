"""Geometric means over the rows of ``bench --kernels``."""

from __future__ import annotations

from typing import Any

from . import measure

Row = dict[str, Any]


def summary(rows: list[Row]) -> dict[str, list[Row]]:
    """Means per kernel, form and family, and, several kernels sharing one, per family and form."""
    return {
        "geometric_means": [
            {"kernel": kernel, **_means(members)}
            for (kernel, *_), members in _groups(rows, "kernel").items()
        ],
        "family_means": [_means(members) for members in _groups(rows).values()],
    }


def _groups(rows: list[Row], *more: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in (*more, "form", "machine", "family"))
        groups.setdefault(key, []).append(row)
    return groups


def _means(members: list[Row]) -> Row:
    """% of peak over the large shapes, ratios to each peer and to the best."""
    large = [r for r in members if r["large"]]
    peers = dict.fromkeys(name for r in members for name in r["peers"])
    ratios = {
        name: [r["peers"][name]["ratio"] for r in members if "ratio" in r["peers"].get(name, {})]
        for name in peers
    }
    best = [r["best_ratio"] for r in members if r["best_ratio"] is not None]
    return {
        "form": members[0]["form"],
        "machine": members[0]["machine"],
        "family": members[0]["family"],
        "shapes": len(members),
        "peak_share_large": mean([r["peak_share"] for r in large]),
        "peak_share_large_min": min((r["peak_share"] for r in large), default=None),
        "ratio": {name: mean(values) for name, values in ratios.items() if values},
        "best": mean(best),
        "best_large": mean([r["best_ratio"] for r in large if r["best_ratio"]]),
        "best_min": min(best, default=None),
        "faster": sum(r > 1 for r in best),
    }


def mean(values: list[float]) -> float | None:
    return round(measure.geometric_mean(values), 4) if values else None
