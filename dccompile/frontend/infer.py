"""Types and shapes of every tensor: inferred from the inputs, then compared with the claims.

What a model declares about its intermediate and output shapes is not trusted: exporters bake
in the batch they traced with. Types are inferred afresh; a declaration that contradicts one is
an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto

from dccompile.errors import Problem

from . import contrib, sandbox
from .ceiling import settle
from .contrib import shape_function
from .external import MAX_DIM, MAX_RANK, MAX_TENSOR_BYTES, bits
from .growth import check_ranks
from .shapes import Range
from .structure import CONTRIB, domain, nodes_of, subgraphs, where

Dims = list[int | str | None]


def infer(model: onnx.ModelProto) -> list[Problem]:
    """Puts the inferred types into graph.value_info and graph.output of `model`, in place."""
    problems = check_ranks(model)
    if problems:
        return problems
    declared = {v.name: v for v in [*model.graph.value_info, *model.graph.output]}
    done, texts, places, opaque, work = _run(model, declared)
    first = types_of(done.graph) if done else {}
    while done and settle(model, types_of(done.graph)):
        done, texts, places, opaque, work = _run(model, declared)
    outside = {name for node in opaque for name in node.output}
    indexed = [found for text in texts for found in _explain(text, places)]
    if opaque and indexed:
        tainted = _downstream(work.graph, outside)
        indexed = [(index, p) for index, p in indexed if index not in tainted]
    problems = [problem for _, problem in indexed]
    types = types_of(done.graph) if done else {}
    producers = {name: where(node) for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    for name, value in declared.items():
        if name in types:
            here = producers.get(name, f"output {name!r}")
            found = _compare(value, types[name], here, name in outputs)
            if found and (name not in first or _compare(value, first[name], here, False)):
                problems += found  # onnx's own claims are no contradiction
    del model.graph.value_info[:]
    for name in producers:
        if name in types and name not in outputs:
            model.graph.value_info.add(name=name).type.CopyFrom(types[name])
    for value in model.graph.output:
        claim = onnx.TypeProto()
        claim.CopyFrom(value.type)
        value.type.Clear()
        if value.name in types:
            value.type.CopyFrom(types[value.name])
        _finish_output(value, claim, producers.get(value.name, "graph"), problems)
    return problems


def _run(
    model: onnx.ModelProto, declared: Mapping[str, onnx.ValueInfoProto]
) -> tuple[Any, list[str], list[str], list[onnx.NodeProto], onnx.ModelProto]:
    """Types a copy of the model.

    Returns the typed model, or None, what onnx found, the place of every node, the nodes that onnx
    knows nothing of, and the copy they are in.
    """
    work = onnx.ModelProto()
    work.CopyFrom(model)
    places = [where(node) for node, _ in nodes_of(work)]
    for index, (node, _) in enumerate(nodes_of(work)):
        node.name = f"@{index}"
    opaque = _add_contrib_functions(work)
    outside = {name for node in opaque for name in node.output}
    del work.graph.value_info[:]
    work.graph.value_info.extend(v for name, v in declared.items() if name in outside)
    for value in work.graph.output:
        if value.name not in outside:
            value.ClearField("type")
    done, texts = sandbox.call("infer", work)
    return done, texts, places, opaque, work


def _typed(kind: onnx.TypeProto) -> bool:
    return kind.WhichOneof("value") is not None


def type_of(tensor: TensorProto) -> onnx.TypeProto:
    """The type of an initializer."""
    return onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))


def _explain(text: str, places: list[str]) -> list[tuple[int | None, Problem]]:
    """onnx collects ``(op_type:Conv, node name: @3): [Kind] reason`` for every node it rejects."""
    parts = re.split(r"\(op_type:[^()]*?, node name: @([0-9]+)\): ?", text)
    fix = "export the model again with shapes that fit, or give other input shapes"
    if len(parts) == 1:
        found = f"shape inference failed: {_clean(text)}; a well-typed graph is allowed"
        return [(None, Problem("DC3014", "graph", found, fix))]
    problems: dict[int, Problem] = {}
    for index, reason in zip(map(int, parts[1::2]), parts[2::2], strict=True):
        found = f"{_clean(reason)}; shapes and types that fit the operator are allowed"
        problems.setdefault(index, Problem("DC3014", places[index], found, fix))
    return list(problems.items())


def _clean(text: str) -> str:
    text = re.sub(r"\[(?:Shape|Type)InferenceError\] ?|Inference error\(s\): ?", "", text)
    text = re.sub(r"\s+", " ", text.split("\n==>")[0]).strip()
    return (text[:297] + "...") if len(text) > 300 else text or "no reason given"


def _add_contrib_functions(work: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Makes com.microsoft nodes calls of functions that inference knows; returns the others."""
    opaque = []
    for node, _ in nodes_of(work):
        if domain(node.domain) == CONTRIB:
            function = shape_function(node, f"f{node.name[1:]}")
            if function is None:
                opaque.append(node)
                continue
            work.functions.append(function)
            node.op_type, node.domain = function.name, contrib.DOMAIN
            del node.attribute[:]
    if work.functions:
        work.opset_import.add(domain=contrib.DOMAIN, version=1)
    return opaque


def _downstream(graph: onnx.GraphProto, names: set[str]) -> set[int]:
    """Numbers (``@n``) of the nodes that depend on tensors of unknown type."""
    unknown = set(names)
    found: set[int] = set()
    for node in graph.node:
        inner = [n for _, g in subgraphs(node) for n in _all_nodes(g)]
        if not unknown.isdisjoint(name for n in [node, *inner] for name in n.input):
            found.update(int(n.name[1:]) for n in [node, *inner])
            unknown.update(node.output)
    return found


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes = list(graph.node)
    return nodes + [n for node in nodes for _, g in subgraphs(node) for n in _all_nodes(g)]


def dims_of(kind: onnx.TypeProto) -> Dims | None:
    """Dims of a tensor type: number, symbol or None; None for an unknown rank."""
    if not kind.tensor_type.HasField("shape"):
        return None
    return [
        d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param or None
        for d in kind.tensor_type.shape.dim
    ]


def _compare(
    value: onnx.ValueInfoProto, inferred: onnx.TypeProto, here: str, output: bool
) -> list[Problem]:
    """A declared element type, rank or fixed dim that contradicts the inferred one."""
    fix = "the declared type is wrong: export the model again, or remove the declaration"
    name = f"{'graph output' if output else 'tensor'} {value.name!r}"
    declared = value.type
    if not _typed(declared):
        return []
    if declared.WhichOneof("value") != inferred.WhichOneof("value"):
        kinds = [str(k.WhichOneof("value")).removesuffix("_type") for k in (declared, inferred)]
        found = f"{name} is declared as a {kinds[0]}; the operator gives a {kinds[1]}"
        return [Problem("DC3013", here, found, fix)]
    have, want = declared.tensor_type.elem_type, inferred.tensor_type.elem_type
    if have and want and have != want:
        found = f"{name} is declared {type_name(have)}; the operator gives {type_name(want)}"
        return [Problem("DC3013", here, found, fix)]
    claimed, true = dims_of(declared), dims_of(inferred)
    if claimed is None or true is None:
        return []
    wrong = len(claimed) != len(true) or any(
        isinstance(a, int) and isinstance(b, int) and a != b and a >= 0
        for a, b in zip(claimed, true, strict=False)
    )
    if wrong:
        found = f"{name} is declared with shape {_spell(claimed)}; the operator gives "
        return [Problem("DC3013", here, found + _spell(true), fix)]
    return []


def _spell(dims: Dims) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in dims) + "]"


def type_name(elem_type: int) -> str:
    try:
        return TensorProto.DataType.Name(elem_type).lower()
    except ValueError:
        return f"element type {elem_type}"


def _finish_output(
    value: onnx.ValueInfoProto, claimed: onnx.TypeProto, here: str, problems: list[Problem]
) -> None:
    """Fills what inference left open from the declaration: dtype, rank and symbol names."""
    which = value.type.WhichOneof("value") or claimed.WhichOneof("value")
    if which is None:
        value.type.tensor_type.SetInParent()
        return
    if which != "tensor_type":
        found = f"graph output {value.name!r} is a {which.removesuffix('_type')}; "
        fix = "export the model with dense tensors as outputs"
        problems.append(Problem("DC3103", here, found + "tensors are supported", fix))
        return
    tensor, claim = value.type.tensor_type, claimed.tensor_type
    tensor.elem_type = tensor.elem_type or claim.elem_type
    if not tensor.HasField("shape") and claim.HasField("shape"):
        tensor.shape.CopyFrom(claim.shape)
    for dim, other in zip(tensor.shape.dim, claim.shape.dim, strict=False):
        open_dim = dim.WhichOneof("value") is None or dim.dim_param.startswith("unk__")
        if open_dim and other.dim_param:
            dim.dim_param = other.dim_param


def types_of(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    """Type of every tensor of the main graph that is known."""
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {v.name: v.type for v in values if _typed(v.type)}
    types.update((t.name, type_of(t)) for t in graph.initializer)
    return types


def check_sizes(model: onnx.ModelProto, symbols: Mapping[str, Range]) -> list[Problem]:
    """No tensor may exceed the budget, with ranged symbols at their largest value."""
    problems = []
    types = types_of(model.graph)
    large: set[str] = set()
    steps = [(f"input {v.name!r}", [v.name], list[str]()) for v in model.graph.input]
    steps += [(where(n), list(n.output), list(n.input)) for n in model.graph.node]
    for place, names, inputs in steps:
        checked = (_oversize(name, types[name], symbols) for name in names if name in types)
        findings = [found for found in checked if found]
        if findings and large.isdisjoint(inputs):  # what follows from it is not reported again
            fix = "use smaller dims, or a smaller --shape"
            problems += [Problem("DC3017", place, found, fix) for found in findings]
        if findings:
            large.update(names)
    return problems


def _oversize(name: str, kind: onnx.TypeProto, symbols: Mapping[str, Range]) -> str | None:
    dims = dims_of(kind) or []
    if len(dims) > MAX_RANK:
        return f"tensor {name!r} has {len(dims)} dims; at most {MAX_RANK} are allowed"
    sizes = []
    for dim in dims:
        low, high = symbols.get(dim, (1, None)) if isinstance(dim, str) else (dim or 1, None)
        sizes.append(high or low)
    if not all(0 <= size <= MAX_DIM for size in sizes):
        rule = f"dims of 0 to {MAX_DIM} are allowed"
        return f"tensor {name!r} has shape {_spell(dims)}; {rule}"
    size = math.prod(sizes) * bits(kind.tensor_type.elem_type) // 8
    if size > MAX_TENSOR_BYTES:
        rule = f"at most {MAX_TENSOR_BYTES} (64 GiB) are allowed in one tensor"
        return f"tensor {name!r} of shape {_spell(dims)} needs {size} bytes; {rule}"
    return None
