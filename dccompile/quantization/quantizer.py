"""From statistics to a QDQ model: ranges, weights, biases. Building once more costs a second."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from dccompile.errors import ModelError, Problem
from dccompile.frontend.editor import Editor, attribute, is_op, operand

from . import placement, ranges, weights
from .histogram import Histogram
from .placement import Group, Plan
from .prepare import Prepared
from .ranges import Range
from .rewrite import Layer, write
from .statistics import Statistics
from .weights import Quantized


@dataclass(frozen=True)
class Settings:
    """What a caller chooses; every technique can be switched off to see what it does."""

    method: str = "l2"
    exclude: tuple[str, ...] = ()
    granularity: str = "channel"
    net_aware: bool = True
    fuse_sums: bool = False
    bias_correction: bool = True
    outliers: float | None = None


class Quantizer:
    """Makes QDQ models of one prepared float model that differ in the layers left in float."""

    def __init__(self, prepared: Prepared, settings: Settings) -> None:
        self.model, self.settings = prepared.model, settings
        self.editor = Editor(prepared.model)
        self.nodes = {node.name: node for node in self.editor.nodes}
        self.plan = self.place(())
        self.statistics = Statistics()
        self._found: dict[Group, Range] = {}
        self._made: dict[str, Layer] = {}
        self._weights: dict[tuple[str, int, int], Quantized] = {}

    def place(self, more: Collection[str]) -> Plan:
        """The plan with `more` nodes left in float."""
        excluded = (*self.settings.exclude, *more)
        settings = self.settings
        return placement.place(self.model, excluded, settings.net_aware, settings.fuse_sums)

    def wanted(self) -> tuple[list[str], dict[str, int]]:
        """Tensors whose histograms are needed, and the channel axis of those that layers read."""
        names = [name for group in self.plan.groups for name in group.tensors]
        nodes = [self.nodes[name] for name in self.plan.layers]
        axes = {n.input[0]: 1 if n.op_type.startswith("Conv") else -1 for n in nodes}
        return names, axes if self.settings.bias_correction else {}

    def build(self, left: Collection[str] = ()) -> onnx.ModelProto:
        """The QDQ model with the nodes `left` in float too."""
        plan = self.place(left)
        found = {group: self.range(group) for group in plan.groups}
        layers = {name: self.layer(name) for name in plan.layers}
        return write(self.model, plan, found, layers)

    # ---- what a report says ----
    def tensors(self) -> list[dict[str, Any]]:
        """A dict for every range, the worst first."""
        rows = []
        for group in self.plan.groups:
            found = self.range(group)
            low, high = group.bounds
            rows.append(
                {
                    "tensors": list(group.tensors),
                    "low": found.low,
                    "high": found.high,
                    "scale": found.scale,
                    "zero_point": found.zero,
                    "clipped": found.clipped,
                    "sqnr": found.sqnr if isfinite(found.sqnr) else None,
                    "narrowed": [low if isfinite(low) else None, high if isfinite(high) else None],
                }
            )
        return sorted(rows, key=lambda row: (row["sqnr"] is None, row["sqnr"]))

    def layers(self, left: Collection[str]) -> list[dict[str, Any]]:
        """A dict for every layer, in the order of the graph; `left` were left in float."""
        rows = []
        for name in [n.name for n in self.editor.nodes if placement.is_layer(self.editor, n)]:
            row: dict[str, Any] = {"node": name, "op": self.nodes[name].op_type}
            if name not in self.plan.layers or name in left:
                reason = "excluded" if name not in self.plan.layers else "selective"
                rows.append({**row, "precision": "float32", "reason": reason})
                continue
            found = self.layer(name).weights
            rows.append(
                {
                    **row,
                    "precision": "int8",
                    "scales": len(np.unique(found.scale)),
                    "sqnr": found.sqnr if isfinite(found.sqnr) else None,
                    "outliers": found.outliers,
                }
            )
        return rows

    def techniques(self, left: Collection[str]) -> list[str]:
        """A line for each technique: what it did here."""
        names = [name for name in self.plan.layers if name not in left]
        found = [self.layer(name).weights for name in names]
        sizes = sum(w.codes.size for w in found) or 1
        beyond = sum(w.outliers * w.codes.size for w in found) / sizes
        scales = sum(len(np.unique(w.scale)) for w in found)
        settings, plan = self.settings, self.place(left)
        narrowed = sum(group.bounds != placement.OPEN for group in plan.groups)
        corrected = sum(self.layer(name).corrected for name in names)
        limit = "" if settings.outliers is None else f", at most {settings.outliers:.2%} a filter"
        aware = f"{len(plan.through)} tensors without a range of their own, {narrowed} narrowed"
        return [
            f"fine-grain: {scales} scales of weights, one per {settings.granularity}",
            f"net-aware: {aware if settings.net_aware else 'off'}",
            f"outlier-aware: {beyond:.2%} of the weights beyond +-{weights.MAIN}{limit}",
            f"bias correction: {f'{corrected} layers' if corrected else 'off'}",
        ]

    def notes(self) -> list[str]:
        """What is odd about the statistics: tensors without a range."""
        lines = []
        for group in self.plan.groups:
            seen = [self.statistics.histograms[name] for name in group.observed]
            low, high = min(h.low for h in seen), max(h.high for h in seen)
            if low == high:
                what = f"'{group.tensors[0]}' is {low:g} in all samples"
                lines.append(f"{what}: its range says nothing of other data")
        return lines

    # ---- ranges ----
    def range(self, group: Group) -> Range:
        """The range of a group of tensors."""
        if group not in self._found:
            seen = [self.statistics.histograms[name] for name in group.observed]
            data: Histogram = reduce(Histogram.merge, seen)
            self._found[group] = ranges.choose(data, self.settings.method, group.bounds)
        return self._found[group]

    # ---- weights ----
    def layer(self, name: str) -> Layer:
        """Weights and bias of a layer."""
        if name not in self._made:
            node = self.nodes[name]
            found = self.quantized(node)
            self._made[name] = self._with_bias(node, found)
        return self._made[name]

    def quantized(self, node: NodeProto) -> Quantized:
        """The weights of a layer in 8 bits; layers that share weights share their codes."""
        key = (node.input[1], weights.channel_axis(node), attribute(node, "group", 1))
        if key not in self._weights:
            settings = self.settings
            values = self.editor.constant(node.input[1])
            assert values is not None
            if not np.isfinite(values).all():
                found = f"weights '{node.input[1]}' hold NaN or inf; finite numbers are allowed"
                where = f"{node.op_type} '{node.name}'"
                fix = "export the model again, or --exclude the node"
                raise ModelError([Problem("DC3204", where, found, fix)])
            self._weights[key] = weights.quantize(
                node, values, settings.granularity, settings.outliers
            )
        return self._weights[key]

    def _with_bias(self, node: NodeProto, found: Quantized) -> Layer:
        """The layer with its bias, less what the rounding of the weights adds on average.

        Of a MatMul it is what is added behind it. None if that is not a row of constants.
        """
        channels = len(found.scale)
        plain = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        name = operand(node, 2)
        if node.op_type == "MatMul":
            name = self._added(node)
        bias = self.editor.constant(name) if name else np.zeros(channels, np.float32)
        if bias is None or bias.shape not in ((channels,), (1, channels)) or not plain:
            return Layer(found, None)
        shift = self._shift(node, found)
        if shift is None or (node.op_type == "MatMul" and not name):
            return Layer(found, bias.reshape(-1) if name else None)
        return Layer(found, (bias.reshape(-1) - shift).astype(np.float32), corrected=True)

    def _added(self, node: NodeProto) -> str:
        """The constant of the Add behind a MatMul that nothing else reads, or ""."""
        reader = self.editor.only_user(node.output[0])
        if not is_op(reader, "Add") or reader is None:
            return ""
        names = [n for n in reader.input if self.editor.constant(n) is not None]
        return names[0] if names else ""

    def _shift(self, node: NodeProto, found: Quantized) -> np.ndarray | None:
        """What the rounding of the weights adds to every output channel on average."""
        mean = self.statistics.means.get(node.input[0])
        value = mean.value() if mean is not None and self.settings.bias_correction else None
        if value is None or node.op_type == "ConvTranspose" or attribute(node, "transA", 0):
            return None
        original = self.editor.constant(node.input[1])
        assert original is not None
        error = found.values().astype(np.float64) - original
        if node.op_type in ("Gemm", "MatMul"):
            return error @ value if found.axis == 0 else value @ error
        sums = error.reshape(*error.shape[:2], -1).sum(axis=2)  # filters, channels of a group
        groups = attribute(node, "group", 1)
        parts = value.reshape(groups, -1)
        shift: np.ndarray = np.einsum("gfc,gc->gf", sums.reshape(groups, -1, parts.shape[1]), parts)
        return shift.reshape(-1)
