"""`accuracy`: the error of every layer and output of a quantized model against float32."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, helper, numpy_helper, version_converter

from dccompile.errors import AccuracyError, UsageError
from dccompile.frontend import gate
from dccompile.frontend.editor import Editor, is_op
from dccompile.frontend.structure import where

from . import feeds
from .compare import Layer, Output, compare
from .steps import INTEGER, Quantized

_Data = str | os.PathLike[str] | Sequence[Any] | Iterable[Mapping[str, np.ndarray]]
_NO_REFERENCE = (
    "no float model given: the reference is the quantized model with its weights dequantized and "
    "its activations clamped to their ranges, not rounded. Errors of weights and of clipping are "
    "not seen"
)


@dataclass(frozen=True)
class Report:
    """What `accuracy` found.

    `layers`: the worst by their own error, of `steps` in all. `unmatched`: quantized tensors
    without a name in the float model. `notes`: what limits the figures. `samples` and times in
    seconds as observed.
    """

    layers: tuple[Layer, ...]
    steps: int
    outputs: tuple[Output, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]
    samples: int
    seconds: float
    compile_seconds: float

    def gate(self, least: float) -> None:
        """Raises AccuracyError, DC5002, naming every float output below `least` dB."""
        known = [(o.name, o.sqnr) for o in self.outputs if o.sqnr is not None]
        low = [f"'{name}' has {sqnr:.1f} dB" for name, sqnr in known if sqnr < least]
        low += [f"'{o.name}' has another shape" for o in self.outputs if o.equal is None]
        if not low and not known:
            low = [f"'{o.name}' is {o.dtype}, which has no SQNR" for o in self.outputs]
        if low:
            worst = next((layer.flag for layer in self.layers if layer.flag), "--exclude NODE")
            raise AccuracyError(
                f"--fail-below {least:g}dB: output {', '.join(low)}; at least {least:g} dB is "
                f"asked for. Fix: leave the worst layers in float, as with quantize {worst}",
                "DC5002",
            )


def accuracy(
    model: Any,
    data: _Data,
    *,
    reference: Any = None,
    top: int = 20,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    threads: int | None = None,
    progress: Callable[..., Any] | None = None,
) -> Report:
    """Compares a QDQ model with its float form on `data`, both compiled for this host.

    `model` and `reference`: paths, bytes or onnx.ModelProto. `reference` is the float model that
    the quantized one was made from; without it one is derived, see `notes` of the Report.
    `data`: as `feeds.read` takes it; further arrays, such as labels, are left aside.

    Raises ModelError or UnsupportedError for what is no model, or (DC3201) is not quantized;
    UsageError for models that don't belong together; InputError for data that don't fit.
    """
    graph = gate.read(model, shapes)
    quantized = graph.embedded()
    notes = []
    if reference is None:
        floats = gate.read(unquantized(quantized), shapes).embedded()
        notes.append(_NO_REFERENCE)
    else:
        floats = gate.read(reference, shapes).embedded()
        _check_interfaces(floats.graph, quantized.graph)
        floats, quantized = _one_opset(floats, quantized)
    found = compare(
        floats,
        quantized,
        feeds.read(data, graph.inputs, what="--data", extra=True),
        shapes,
        threads,
        progress,
    )
    layers = found.layers
    if reference is None:  # the reference is clipped as well
        layers = tuple(replace(layer, clipped=None) for layer in layers)
    shapeless = [layer.tensor for layer in layers if layer.sqnr is None]
    shapeless += [output.name for output in found.outputs if output.equal is None]
    if shapeless:
        notes.append(
            f"{len(set(shapeless))} tensors have other shapes in the quantized model (they depend "
            "on the values, as a number of detections does): of these only own errors are known"
        )
    if found.unmatched:
        names = ", ".join(map(repr, found.unmatched[:4]))
        more = f" and {len(found.unmatched) - 4} more" if len(found.unmatched) > 4 else ""
        notes.append(f"not compared, the float model has no tensor of that name: {names}{more}")
    return Report(
        layers[:top],
        len(layers),
        found.outputs,
        found.unmatched,
        tuple(notes),
        found.observed.samples,
        found.observed.seconds,
        found.observed.compile_seconds,
    )


def unquantized(model: ModelProto) -> ModelProto:
    """A QDQ model in float: activations are not rounded, but clamped to the reals of their codes.

    The clamp stays because the saturation of codes may stand for a Relu or Clip that was dropped.
    Raises UsageError, DC2050, for a model with integer operators.
    """
    view = Quantized(model, ())
    if integers := [node for node in view.editor.nodes if is_op(node, *INTEGER)]:
        raise UsageError(
            f"reference: none given, and {where(integers[0])} has no float form that its operands "
            "tell. Fix: give the float model that this one was made from",
            "DC2050",
        )
    result = ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        quantize = view.quantizer(node.output[0]) if node.output else None
        if quantize is None or quantize.input[0] in view.constants:
            continue
        codes = view.codes(node)
        source = quantize.input[0]
        name, output = node.name, node.output[0]
        node.Clear()
        if codes.low is None or codes.high is None:
            node.CopyFrom(helper.make_node("Identity", [source], [output], name))
            continue
        ends = []
        for end, value in (("low", codes.low), ("high", codes.high)):
            ends.append(view.editor.fresh(f"{output}_{end}"))
            array = np.asarray(value, np.float32)
            result.graph.initializer.append(numpy_helper.from_array(array, ends[-1]))
        node.CopyFrom(helper.make_node("Clip", [source, *ends], [output], name))
    _drop_unread(result.graph)
    return result


def _drop_unread(graph: GraphProto) -> None:
    """Drops nodes whose results nothing reads, as the Quantize nodes of pairs taken out."""
    editor = Editor(ModelProto(graph=graph))
    editor.rewrite({})
    kept = {node.name for node in editor.nodes}
    for index in reversed(range(len(graph.node))):
        if graph.node[index].name not in kept:
            del graph.node[index]


def _check_interfaces(floats: GraphProto, quantized: GraphProto) -> None:
    """Raises UsageError where inputs or outputs are not those of the other model."""
    for what in ("input", "output"):
        kinds = [
            {value.name: value.type.tensor_type.elem_type for value in getattr(graph, what)}
            for graph in (floats, quantized)
        ]
        if kinds[0] != kinds[1]:
            listed = [", ".join(f"{n} {_type(k)}" for n, k in found.items()) for found in kinds]
            raise UsageError(
                f"reference: its {what}s are {listed[0]}, those of the model {listed[1]}; the same "
                "are allowed. Fix: give the float model that it was made from",
                "DC2050",
            )


def _type(kind: int) -> str:
    return str(helper.tensor_dtype_to_np_dtype(kind))


def _one_opset(*models: ModelProto) -> list[ModelProto]:
    """The models in the newest of their opsets, with types inferred anew where one is raised."""
    versions = [Editor(ModelProto(opset_import=m.opset_import)).opset() for m in models]
    newest = max(versions)
    result = []
    for model, version in zip(models, versions, strict=True):
        if version < newest:
            try:
                raised = version_converter.convert_version(model, newest)
            except (RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UsageError(
                    f"reference: one of both models has opset {version}, which cannot be raised "
                    f"to the other's, {newest} ({reason}). Fix: export both with one opset",
                    "DC2050",
                ) from None
            model = gate.read(raised).embedded()
        result.append(model)
    return result
