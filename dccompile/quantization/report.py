"""What `quantize` says about its work."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """How a model was quantized.

    settings: every choice · samples: that were seen · tensors: a dict for every range · layers: a
    dict for every layer · selective: the search for layers to leave in float, if there was one ·
    spills: of layers with 16-bit accumulation, period, largest sum and chance to overflow ·
    islands: count and nodes of what computes in float between integers, and how many switches
    of precision there are · techniques: a line on what each did · notes: what is worth knowing.
    Signal to noise in dB, shares from 0 to 1.
    """

    settings: dict[str, Any]
    samples: int = 0
    tensors: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    selective: dict[str, Any] | None = None
    spills: dict[str, Any] = field(default_factory=dict)
    islands: dict[str, Any] = field(default_factory=dict)
    techniques: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
