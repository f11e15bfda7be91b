"""Facts of calibration about 16-bit sums, which a model carries in its metadata.

``dccompile.accumulation`` is JSON: by name of a layer's node or of its weights an object with the
``period`` (k-steps of 4 whose sums stay in 16 bits) and the CRC-32 of the ``weights`` (k, n) that
it was found for. ``margin`` and ``probability`` say how sure it is; more fields are no error.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from dccompile.errors import ModelError

from .editor import Editor

KEY = "dccompile.accumulation"

Facts = Mapping[str, Mapping[str, int]]


def read_facts(model: onnx.ModelProto) -> Facts:
    """The facts by name. Raises ModelError where the model has none or they are misspelled."""
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    if text is None:
        raise ModelError(
            f"accumulation 'calibrated': the model has no metadata '{KEY}'. "
            "Fix: quantize it with dccompile quantize, or compile with accumulation 'exact'",
            "DC3208",
        )
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    entries = facts.values() if isinstance(facts, dict) else [None]
    for entry in entries:
        if not isinstance(entry, dict) or not all(
            type(entry.get(name)) is int and entry[name] >= 0 for name in ("period", "weights")
        ):
            raise ModelError(
                f"metadata '{KEY}': {text[:80]!r}, allowed is JSON of names, each with whole "
                "numbers 'period' and 'weights'. Fix: quantize the model again",
                "DC3209",
            )
    return dict(facts)


def applicable(editor: Editor, facts: Facts) -> dict[str, Mapping[str, int]]:
    """The facts by node name, of layers whose activations are u8 codes in the model as given."""
    found = {}
    for node in editor.nodes:
        source = editor.producer(node.input[0], "DequantizeLinear") if node.input else None
        if source is None or editor.dtype(source.input[0]) != TensorProto.UINT8:
            continue
        weights = node.input[1] if len(node.input) > 1 else ""
        behind = editor.producer(weights, "DequantizeLinear") if weights else None
        for name in (node.name, weights, behind.input[0] if behind is not None else ""):
            if name in facts:
                found[node.name] = facts[name]
                break
    return found


def period(facts: Mapping[str, int] | None, b: np.ndarray, a: str) -> int:
    """K-steps whose sums stay in 16 bits, of weights b (k, n) s8; 0 where nothing is known."""
    if facts is None or a != "u8" or zlib.crc32(b.tobytes()) != facts["weights"]:
        return 0
    return facts["period"]
