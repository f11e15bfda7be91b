"""Finds what hand-written kernels compute; here matrix multiplications, as nodes ``DccGemm``.

A DccGemm (domain "dccompile", attribute "site") computes the workload.Gemm of that site:
inputs A (..., k), and with `runtime` a_zero and, unless the output is s32, a_scale, of one element
each; output (..., n).

Quantized models come as DequantizeLinear - MatMul or Gemm - QuantizeLinear, as MatMulInteger with
its Cast and Mul, or as the operators that `normalize` spells out in these. Every rounding of the
model between 8-bit tensors stays: a multiplication ends at its first QuantizeLinear. The factor of
the accumulator is rounded as ONNX Runtime's QLinearMatMul does it,
fl(fl(fl(alpha * a_scale) * b_scale[n]) / y_scale), and a float bias is fl(bias / y_scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from dccompile import outliers
from dccompile.workload import Gemm, GemmWeights, accumulator_bound

from . import accumulation, bags, code_tables, convolutions, interaction
from .bags import BagSite, recover_bags
from .batch_norm import fold_batch_norms
from .bias import fold_biases
from .code_tables import make_tables
from .convolutions import ConvSite, recover_convolutions
from .dims import unify
from .editor import Editor, attribute, is_op, operand, static_size
from .epilogue import Epilogue, Tail, column_constant, take_activation, take_bias
from .fold import fold
from .hoist import hoist_quantize
from .interaction import InteractionSite, recover_interactions
from .layout import channels_last
from .normalize import normalize
from .products import Product, check_scale, integer_product, matrix_weights, product
from .quantized import Constant, Refused, constant_operand
from .requantize import requantize
from .shuffles import absorb_shuffles
from .sink import sink_dequantize
from .spread import spread_dequantize
from .unsigned import unsign

DOMAIN, OP = "dccompile", "DccGemm"


@dataclass(frozen=True)
class GemmSite:
    """One recovered multiplication: what it computes, with what, in place of which nodes."""

    name: str
    workload: Gemm
    weights: GemmWeights
    nodes: tuple[str, ...]  # of the model
    inputs: tuple[str, ...]
    output: str
    a_rank: int
    precision: str  # int8 | int8-dynamic | int8-weights | fp16-weights | float32
    error: float | None = None  # of weights that the compiler quantized, relative (mean square)


@dataclass
class Recovered:
    """The rewritten model, what was recovered by site, and every node of the model given.

    nodes: dicts of name, op, precision (that of its site, "folded" for what is computed at compile
    time, or the dtype of the output), reason ("" or why no hand-written kernel runs it, or not in
    8 bits) and site (the recovered node that computes the node, or ""). origin: of every node of
    the rewritten model, the nodes of the model given that it stands for.
    """

    model: onnx.ModelProto
    nodes: list[dict[str, str]]
    gemms: dict[str, GemmSite]
    bags: dict[str, BagSite] = field(default_factory=dict)
    interactions: dict[str, InteractionSite] = field(default_factory=dict)
    convs: dict[str, ConvSite] = field(default_factory=dict)
    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)


def recover(
    model: onnx.ModelProto,
    constants: Mapping[str, np.ndarray] | None = None,
    precision: str = "keep",
    embedding: str = "keep",
    facts: accumulation.Facts | None = None,
) -> Recovered:
    """Rewrites a valid model whose shapes are inferred; the model given is not changed.

    `constants` gives the data of initializers (the gate's may lie outside of the model). precision
    "fp16-weights" rounds float32 weights of matrix multiplications to float16 where all of them
    stay finite, "int8-weights" to 8 bits with a scale per column. embedding is the storage of the
    tables of embedding bags: keep, fp16, int8 or int4. `facts` are calibration's about 16-bit
    sums, given where the user allows sums that are not exact for any input.
    """
    editor = Editor(model, constants)
    known = accumulation.applicable(editor, facts or {})
    unify(editor)
    normalize(editor)
    fold(editor, weights=False)
    fold_batch_norms(editor)
    fold_biases(editor)
    hoist_quantize(editor)
    sink_dequantize(editor)
    fold(editor, weights=False)
    unsign(editor)
    make_tables(editor)
    recovery = _Recovery(editor, precision, known)
    recovery.bags = recover_bags(editor, embedding)
    recovery.interactions = recover_interactions(editor)
    recovery.convs = recover_convolutions(editor)
    absorb_shuffles(editor, recovery.convs.sites)
    for found in (recovery.bags, recovery.interactions, recovery.convs):
        recovery.reasons.update(found.reasons)
    for node in editor.nodes:
        if is_op(node, "MatMul", "Gemm", "MatMulInteger"):
            try:
                recovery.visit(node)
            except Refused as refused:
                recovery.reasons.setdefault(node.name, str(refused))
    editor.rewrite(recovery.changes)
    fold(editor, weights=True)
    channels_last(editor)
    requantize(editor)
    fold(editor, weights=True)
    spread_dequantize(editor)
    report = recovery.report()
    sites = recovery.gemms, recovery.bags.sites, recovery.interactions.sites, recovery.convs.sites
    return Recovered(editor.finish(), report, *sites, editor.origin)


class _Recovery:
    def __init__(
        self, editor: Editor, precision: str, facts: Mapping[str, Mapping[str, int]]
    ) -> None:
        self.editor = editor
        self.facts = facts
        self.precision = precision
        self.bags = bags.Found()
        self.interactions = interaction.Found()
        self.convs = convolutions.Found()
        self.gemms: dict[str, GemmSite] = {}
        self.changes: dict[str, list[NodeProto]] = {}
        self.reasons: dict[str, str] = {}

    def visit(self, node: NodeProto) -> None:
        """Plans the replacement of one multiplication and its epilogue; raises Refused."""
        editor = self.editor
        shape = editor.shape(node.input[0])
        if not shape:
            raise Refused("rank of the activations is not known")
        if static_size(shape[:-1]) == 0:
            raise Refused("activations are empty")
        rank, epilogue = len(shape), Epilogue()
        if node.op_type == "MatMulInteger":
            found, tail = integer_product(editor, node, rank)
            if found.scale is not None:
                self._take(tail, epilogue, found, rank)
            self._emit(node, found, tail, epilogue)
            return
        weights = matrix_weights(editor, node, rank)
        gemm = node.op_type == "Gemm"
        alpha = np.float32(attribute(node, "alpha", 1.0) if gemm else 1)
        found = product(editor, node, weights, alpha, self.precision)
        tail = Tail(editor, node)
        if gemm and attribute(node, "transA", 0):
            self._transpose(found, node)
        beta = np.float32(attribute(node, "beta", 1.0) if gemm else 1)
        bias, c = None, operand(node, 2)
        if c and found.alpha == 1:
            bias = column_constant(constant_operand(editor, c), found.b.shape[1], rank)
            if bias is not None and beta != 1:
                bias = Constant(bias.dequantize().astype(np.float32) * beta, bias.nodes)
            epilogue.bias = bias
        if found.alpha == 1 and (not c or bias is not None):
            self._take(tail, epilogue, found, rank)
            self._emit(node, found, tail, epilogue)
        else:
            inner = editor.fresh(f"{node.name}_product")
            editor.set_type(inner, TensorProto.FLOAT, editor.shape(node.output[0]))
            self._emit(node, found, tail, epilogue, inner)
            self.changes[node.name] += self._apart(node, inner, found.alpha, beta)

    def _take(self, tail: Tail, epilogue: Epilogue, found: Product, rank: int) -> None:
        """Extends the tail as far as the kernels' epilogues go."""
        if epilogue.bias is None and found.sums_bias is None:
            epilogue.bias = take_bias(tail, found.b.shape[1], rank)
        static = found.integer and found.scale is not None and not found.runtime
        take_activation(tail, epilogue, quantize=static)

    def _transpose(self, found: Product, source: NodeProto) -> None:
        """Lets the product read A (k, m) as kernels take it."""
        editor = self.editor
        shape = editor.shape(found.a)
        node = editor.node("Transpose", [found.a], source, perm=[1, 0])
        turned = None if shape is None else shape[::-1]
        editor.set_type(node.output[0], editor.dtype(found.a), turned)
        found.a = node.output[0]
        found.before.append(node)

    def _apart(
        self, node: NodeProto, inner: str, alpha: np.float32, beta: np.float32
    ) -> list[NodeProto]:
        """alpha * inner + beta * C in operators of their own, as the Gemm rounds them."""
        editor, c = self.editor, operand(node, 2)
        nodes: list[NodeProto] = []

        def times(name: str, factor: np.float32) -> str:
            if factor == 1:
                return name
            constant = editor.add_constant(np.asarray(factor), f"{node.name}_factor")
            nodes.append(editor.node("Mul", [name, constant], node))
            editor.set_type(nodes[-1].output[0], TensorProto.FLOAT, editor.shape(name))
            return str(nodes[-1].output[0])

        product = times(inner, alpha)
        if c:
            nodes.append(editor.node("Add", [product, times(c, beta)], node))
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _emit(
        self,
        node: NodeProto,
        found: Product,
        tail: Tail,
        epilogue: Epilogue,
        output: str = "",
    ) -> None:
        """Puts the DccGemm where the tail ends and notes its site."""
        editor = self.editor
        weights = found.weights(None if epilogue.bias is None else _bias(found, epilogue))
        bias = weights.bias
        out = "s32" if found.integer and found.scale is None else "f32"
        bounded = False
        if epilogue.y_scale is not None and weights.scale is not None:
            out = epilogue.y_dtype
            with np.errstate(all="ignore"):
                weights.scale = weights.scale / epilogue.y_scale
            check_scale(weights.scale)
            bounded = _bounded(weights, found.a_dtype)
        shape = editor.shape(found.a) or ()
        k, n = found.b.shape
        workload = Gemm(
            m=static_size(shape[:-1]),
            n=n,
            k=k,
            a=found.a_dtype,
            b={"float32": "f32", "float16": "f16", "int8": "s8"}[found.b.dtype.name],
            out=out,
            bias="none" if bias is None else "s32" if bias.dtype == np.int32 else "f32",
            runtime=bool(found.runtime),
            b_zero=found.b_zero is not None,
            b_bits=7 if found.integer and np.abs(found.b.astype(np.int16)).max() <= 64 else 8,
            zero_point=epilogue.zero_point,
            clamp=epilogue.clamp,
            activation=epilogue.activation,
            clip=epilogue.clip,
            bounded=bounded,
            outliers=outliers.counts(found.b) if found.integer else (),
            spill=self._spill(node, found),
        )
        output = output or tail.value
        inputs = [found.a, *found.runtime]
        new = editor.node(OP, inputs, node, output=output, domain=DOMAIN, site=node.name)
        covered = [*tail.nodes, *found.nodes, *(epilogue.bias.nodes if epilogue.bias else ())]
        origins = [name for other in covered for name in editor.origin[other.name]]
        editor.origin[new.name] = tuple(dict.fromkeys(origins))
        self.changes[tail.nodes[-1].name] = [*found.before, new]
        if found.reason:
            self.reasons[node.name] = found.reason
        precision = "int8-dynamic" if workload.runtime else "int8"
        if not found.integer:
            stored = {"f32": "float32", "f16": "fp16-weights", "s8": "int8-weights"}
            precision = stored[workload.b]
        self.gemms[node.name] = GemmSite(
            node.name,
            workload,
            weights,
            editor.origin[new.name],
            tuple(inputs),
            output,
            len(shape),
            precision,
            found.error,
        )

    def _spill(self, node: NodeProto, found: Product) -> int:
        if not found.integer or found.b_zero is not None:
            return 0
        origins = self.editor.origin[node.name]
        facts = next((self.facts[name] for name in origins if name in self.facts), None)
        return accumulation.period(facts, found.b, found.a_dtype)

    def report(self) -> list[dict[str, str]]:
        """One entry for every node of the model given, in its order."""
        editor = self.editor
        for node in editor.nodes:
            quantized = any(editor.producer(name, "DequantizeLinear") for name in node.input)
            moves = is_op(node, "QuantizeLinear", "Transpose", "Reshape")
            if quantized and node.domain != DOMAIN and not moves:
                reason = f"no 8-bit kernel for {node.op_type}: computed between two conversions"
                self.reasons.setdefault(node.name, reason)
        sites: dict[str, GemmSite | BagSite | InteractionSite | ConvSite] = {}
        for found in (self.gemms, self.bags.sites, self.interactions.sites, self.convs.sites):
            for site in found.values():
                for name in site.nodes:
                    sites.setdefault(name, site)
        alive = {name for node in editor.nodes for name in editor.origin[node.name]}
        tables = [node for node in editor.nodes if node.op_type == code_tables.OP]
        looked_up = {name for node in tables for name in editor.origin[node.name]}
        reasons = {
            origin: reason
            for name, reason in self.reasons.items()
            for origin in editor.origin[name]
        }
        report = []
        for name, op, outputs in editor.original:
            entry = {"name": name, "op": op, "precision": "folded", "reason": "", "site": ""}
            if name in sites:
                entry["precision"], entry["site"] = sites[name].precision, sites[name].name
            elif name in looked_up:
                entry["precision"] = "int8"
            elif name in alive:
                kind = TensorProto.DataType.Name(editor.dtype(outputs[0])).lower()
                entry["precision"] = {"float": "float32", "double": "float64"}.get(kind, kind)
            if entry["precision"] != "folded":
                entry["reason"] = reasons.get(name, "")
            report.append(entry)
        return report


def _bias(found: Product, epilogue: Epilogue) -> np.ndarray:
    """The bias as s32 where it is quantized with the accumulator's own scale, else as f32."""
    constant = epilogue.bias
    assert constant is not None
    if (
        found.integer
        and found.scale is not None
        and not found.runtime
        and constant.scale is not None
        and constant.values.dtype == np.int32
        and not np.any(constant.zero)
        # Tools compute this product in float32 or in float64: equal to a rounding or two.
        and np.allclose(constant.scale, found.scale, rtol=1e-6, atol=0)
    ):
        weights = found.weights(np.ascontiguousarray(constant.values))
        if accumulator_bound(weights, found.a_dtype).max() < 2**31:
            return np.ascontiguousarray(constant.values)
    bias = constant.dequantize().astype(np.float32)
    return bias if epilogue.y_scale is None else bias / epilogue.y_scale


def _bounded(weights: GemmWeights, a: str) -> bool:
    """Whether |y| < 2**31 for every input, with room for its rounding and the zero point."""
    assert weights.scale is not None
    bound = accumulator_bound(weights, a) * np.abs(weights.scale.astype(np.float64))
    if weights.bias is not None and weights.bias.dtype == np.float32:
        bound = bound + np.abs(weights.bias.astype(np.float64))
    return bool(bound.max() * 1.0001 + 512 < 2**31)
