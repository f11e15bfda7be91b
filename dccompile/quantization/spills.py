"""Facts on 16-bit accumulation for a QDQ model: see `overflow`; `compile` reads its metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from dccompile.frontend.accumulation import KEY

from . import observe, ranges
from .overflow import Spill, spill_period
from .quantizer import Quantizer

_ROWS = 4096  # of a layer's activations, the first ones


def spills(
    quantizer: Quantizer,
    left: Collection[str],
    feeds: Iterable[dict[str, np.ndarray]],
    shapes: Mapping[str, Any] | None,
    threads: int | None,
) -> dict[str, Spill]:
    """For every fully-connected layer in integers how long its sums may stay in 16 bits.

    `left` are the nodes left in float. The activations are the float model's, in codes.
    """
    plan = quantizer.place(left)
    nodes = [quantizer.nodes[name] for name in plan.layers]
    nodes = [node for node in nodes if node.op_type in ("Gemm", "MatMul")]
    groups = plan.group_of()
    rows: dict[str, list[np.ndarray]] = {node.input[0]: [] for node in nodes}

    def visit(name: str, values: np.ndarray) -> None:
        room = _ROWS - sum(map(len, rows[name]))
        if room > 0:
            some = values.reshape(-1, values.shape[-1])[:room]
            rows[name].append(ranges.quantize(some, quantizer.range(groups[name])))

    if nodes:
        observe.watch(quantizer.model, [*rows], feeds, visit, shapes=shapes, threads=threads)
    found = {}
    for node in nodes:
        weights = quantizer.layer(node.name).weights
        codes = weights.codes.T if weights.axis == 0 else weights.codes
        found[node.name] = spill_period(np.ascontiguousarray(codes), rows[node.input[0]])
    return found


def metadata(found: Mapping[str, Spill]) -> tuple[str, str]:
    """Key and value for the metadata of the model."""
    return KEY, json.dumps({name: spill.to_json() for name, spill in found.items()}, sort_keys=True)
