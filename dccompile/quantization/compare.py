"""The error of every quantized step of a model, and of its outputs, against its float form.

Both run as our own compiled code, in one graph: see `isolate`. Names match them: see `steps`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from dccompile.errors import ModelError, UsageError
from dccompile.frontend import gate
from dccompile.frontend.editor import Editor

from . import observe
from .isolate import Joined
from .noise import Noise, Pairs, decibels
from .placement import reader_bounds
from .steps import Quantized, Step

Feeds = Iterable[dict[str, np.ndarray]]
Shapes = Mapping[str, Sequence[int | str]] | None

_NEAR = 3  # steps from a tensor back to the layer that a Relu or the like follows
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Layer:
    """What one step costs. Errors are signal to noise ratios in dB, inf where there is none.

    `node` and `op` made the float tensor `tensor`; `layer`: they multiply by constant weights.
    `own`: the error of this step alone, from the float model's values; `sqnr`: all of it in the
    quantized model; `inherited`: the rest. `cosine`: of the angle between the tensors.
    Values that the readers of a tensor do not tell apart, as those below -3 in front of a
    HardSwish, count as equal. `max_error`: the largest difference; `relative_max`: over the
    largest value. What the whole model tells is None where it makes a tensor of another shape than
    the float model. `clipped`: share of the float values beyond [low, high], the reals of the
    first and last code.
    `precision`: of a layer its operands, as in u8s8, else that of the tensor. `flag`: the option
    of quantize that leaves the node in float, "" where there is none.
    """

    node: str
    op: str
    tensor: str
    layer: bool
    precision: str
    own: float
    sqnr: float | None
    inherited: float | None
    cosine: float | None
    max_error: float | None
    relative_max: float | None
    clipped: float | None
    low: float | None
    high: float | None
    scale: float | None
    flag: str


@dataclass(frozen=True)
class Output:
    """An output of the model as in `Layer`. `equal`: share of values that are the same.

    Of integers nothing but that is known, and nothing of outputs of different shapes.
    """

    name: str
    dtype: str
    sqnr: float | None
    cosine: float | None
    max_error: float | None
    relative_max: float | None
    equal: float | None


@dataclass(frozen=True)
class Comparison:
    """All steps, the worst own error first; outputs; steps that the float model has no name of."""

    layers: tuple[Layer, ...]
    outputs: tuple[Output, ...]
    unmatched: tuple[str, ...]
    observed: observe.Observed


def compare(
    float_model: ModelProto,
    quantized_model: ModelProto,
    feeds: Feeds,
    shapes: Shapes = None,
    threads: int | None = None,
    progress: Callable[..., Any] | None = None,
) -> Comparison:
    """Runs both models, with types of their values as the gate infers them, on every feed.

    Raises ModelError, DC3201, where nothing is quantized; UsageError, DC2050, where the models
    have no names in common; what `observe.watch` raises.
    """
    view = Quantized(quantized_model, _tensors(float_model.graph))
    _check(view)
    joined, pairs = Joined(float_model, view), Pairs()
    floats = Editor(float_model)
    makers = {name: node for node in float_model.graph.node for name in node.output}
    found = []
    for step in view.steps:
        whole = pairs.add(step.target, joined.whole(step.start))
        alone = pairs.add(step.target, joined.alone(step))
        whole.bounds = alone.bounds = reader_bounds(floats, step.target)
        if step.codes is not None and step.codes.scale is not None:
            assert step.codes.low is not None and step.codes.high is not None
            whole.low = step.codes.low - step.codes.scale / 2
            whole.high = step.codes.high + step.codes.scale / 2
        found.append((step, whole, alone, _flag(step, makers)))
    ends = []
    for value in float_model.graph.output:
        if joined.is_constant(joined.whole(value.name)):
            continue
        kind = value.type.tensor_type.elem_type
        names = [value.name, joined.whole(value.name)]
        if kind not in _FLOATS:
            names = [joined.cast(name) for name in names]
        ends.append((value.name, kind, pairs.add(*names)))
    joined.arrange(pairs.names())
    observed = observe.watch(
        joined.model,
        pairs.names(),
        feeds,
        pairs.visit,
        shapes=shapes,
        threads=threads,
        finite=[want for want, _ in pairs.noises],
        progress=progress,
    )
    layers = sorted((_layer(*known) for known in found), key=lambda layer: layer.own)
    outputs = tuple(_output(*known) for known in ends)
    return Comparison(tuple(layers), outputs, tuple(view.unmatched), observed)


def own_errors(
    float_model: ModelProto,
    quantized_model: ModelProto,
    feeds: Feeds,
    shapes: Shapes = None,
    threads: int | None = None,
) -> list[Layer]:
    """The layers, worst first: by their own noise power over the signal's at what they make."""
    floats, quantized = (gate.read(m).embedded() for m in (float_model, quantized_model))
    found = compare(floats, quantized, feeds, shapes, threads)
    return [layer for layer in found.layers if layer.layer]


def _check(view: Quantized) -> None:
    if not view.steps and not view.unmatched:
        raise ModelError(
            "model: nothing is quantized, there are no QuantizeLinear/DequantizeLinear pairs and "
            "no layers with quantized weights. Fix: give the result of dccompile quantize, or "
            "another QDQ model",
            "DC3201",
        )
    if not view.steps:
        names = ", ".join(map(repr, view.unmatched[:3]))
        raise UsageError(
            f"reference: it has none of the model's {len(view.unmatched)} quantized tensors by "
            f"name ({names} ..). Fix: give the float model that it was made from",
            "DC2050",
        )


def _tensors(graph: GraphProto) -> Iterable[str]:
    """The float tensors that a graph computes or gets."""
    values = [*graph.input, *graph.value_info, *graph.output]
    return (v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT)


def _flag(step: Step, makers: Mapping[str, NodeProto]) -> str:
    """The option that leaves the step's node in float, if the float model has that node there.

    Nodes without a name are called by their place, which need not be the same in both models; one
    of integers may have another name, but makes the same tensor.
    """
    near = [step.target]
    for _ in range(_NEAR):
        near += [name for tensor in near if tensor in makers for name in makers[tensor].input]
    found = step.node if step.node in {makers[n].name for n in near if n in makers} else ""
    if not found and step.codes is None:
        found = makers[step.target].name
    return f"--exclude {shlex.quote(found)}" if found else ""


def _layer(step: Step, whole: Noise, alone: Noise, flag: str) -> Layer:
    codes, known = step.codes, not whole.misshapen
    rest = max(0.0, whole.noise - alone.noise)
    ranged = codes is not None and codes.scale is not None
    return Layer(
        step.node,
        step.op,
        step.tensor,
        step.layer,
        step.precision,
        own=alone.sqnr,
        sqnr=whole.sqnr if known else None,
        inherited=decibels(whole.signal, rest) if known else None,
        cosine=whole.cosine if known else None,
        max_error=whole.largest_error if known else None,
        relative_max=whole.relative if known else None,
        clipped=whole.share(whole.beyond) if known and ranged else None,
        low=codes.low if codes else None,
        high=codes.high if codes else None,
        scale=codes.scale if codes else None,
        flag=flag,
    )


def _output(name: str, kind: int, noise: Noise) -> Output:
    dtype = str(helper.tensor_dtype_to_np_dtype(kind))
    if noise.misshapen:
        return Output(name, dtype, None, None, None, None, None)
    equal = noise.share(noise.equal)
    if kind not in _FLOATS:
        return Output(name, dtype, None, None, None, None, equal)
    return Output(name, dtype, noise.sqnr, noise.cosine, noise.largest_error, noise.relative, equal)
