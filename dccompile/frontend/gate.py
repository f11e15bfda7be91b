"""The gate: an ONNX model in, a checked graph out, or every reason why not.

Nothing behind this module meets an invalid model. `read` collects what it finds, stage by stage
(a stage runs when those before it found nothing), and raises one error:

====== ========================================================================================
code   finding
====== ========================================================================================
DC2010 a requested shape is misspelled or out of range
DC2011 a shape for an input that the model does not have
DC2012 a requested shape contradicts the model or itself
DC3001 the file cannot be read
DC3002 not a serialized ONNX model: truncated, damaged, another format
DC3003 IR version
DC3004 opset imports
DC3005 declared types of inputs and outputs
DC3006 a name given twice
DC3007 a tensor without producer: missing node or initializer
DC3008 a cycle
DC3009 nesting, recursion or expansion of subgraphs and functions
DC3010 an initializer whose data do not fit its shape and type
DC3011 external data: outside the folder, missing, too short, not a plain file
DC3012 a node with wrong attributes, or a wrong number of inputs or outputs
DC3013 a declared type that contradicts the operator, or an operand of a type it does not take
DC3014 shapes that do not fit the operator
DC3015 quantization parameters: scale, zero point, axis
DC3016 an attribute or constant operand with a value that the operator does not allow
DC3017 dims or sizes beyond the budget
DC3018 any other rule of the ONNX checker, or a model that breaks the checker
DC3101 unknown domain
DC3102 unknown operator
DC3103 strings, sequences, maps, optionals, sparse tensors
DC3104 training graphs
====== ========================================================================================

DC30xx raise ModelError, DC31xx UnsupportedError; where both occur, ModelError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from dccompile.errors import ModelError, Problem, UnsupportedError

from . import external, infer, sandbox, source, structure, values
from .equal import unify
from .functions import check_functions, lift_constants, unknown_operators
from .shapes import Dim, Range, bind, check_interface, parse_shape
from .structure import where

__all__ = ["Graph", "Value", "parse_shape", "read", "unknown_operators", "where"]

_MAX_TEXT = 600  # characters of a finding: some quote shapes, which may be endless
_IR_VERSION = 8  # from 4 initializers need not be inputs, from 8 functions exist
_HELD_BYTES = 8192  # initializers above this bypass onnx's C++ code, which would copy them


@dataclass(frozen=True)
class Value:
    """An input or output; open dims are symbols, unknown ones ``"?"``, an unknown rank None."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass
class Graph:
    """A model that passed the gate.

    `model` is sorted, without functions, Constant nodes and default inputs; types of all
    tensors that can be inferred are in graph.value_info. `symbols` gives each open input dim
    its smallest and largest value (None: no limit). External data above 64 KiB stay mapped:
    their initializers in `model` are headers without data, so read data from `constants`.
    """

    model: onnx.ModelProto
    symbols: dict[str, Range]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[str, np.ndarray]

    def embedded(self) -> onnx.ModelProto:
        """`model` with all mapped data copied in, for code that knows only protos."""
        for tensor in self.model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                external.embed(tensor, self.constants[tensor.name])
        return self.model


@dataclass
class _Constants(Mapping[str, np.ndarray]):
    """The initializers as read-only arrays, decoded when first asked for."""

    tensors: dict[str, TensorProto]
    mapped: dict[str, np.ndarray]
    decoded: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.decoded:
            self.decoded[name] = external.as_array(self.tensors[name], self.mapped.get(name))
        return self.decoded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto,
    shapes: Mapping[str, Sequence[Dim]] | None = None,
) -> Graph:
    """Reads, checks and normalises a model; `shapes` fixes or ranges dims of inputs.

    Raises ModelError or UnsupportedError with every problem found, UsageError for `shapes`.
    """
    sandbox.start()
    proto, folder = source.load(model)
    _raise(structure.check_header(proto))
    proto.ir_version = max(proto.ir_version, _IR_VERSION)
    structure.stamp(proto)
    problems: list[Problem] = []
    lift_constants(proto, problems)
    mapped = _load_data(proto, folder, problems)
    problems += check_interface(proto.graph)
    problems += check_functions(proto)
    problems += structure.sort_and_check(proto)
    problems += unknown_operators(proto)
    _raise(problems)
    held = _hold(proto)
    _inline(proto)
    lift_constants(proto, problems)
    graph = proto.graph
    tensors = {tensor.name: tensor for tensor in [*graph.initializer, *held]}
    constants = _Constants(tensors, mapped)
    problems += values.check_nodes(proto)
    problems += values.check_values(proto, constants, skip={p.where for p in problems})
    _raise(problems or _check_model(proto))
    symbols, problems = bind(proto, shapes)
    _raise(problems)
    problems = _infer(proto, symbols, constants)
    _release(proto, held)
    problems += infer.check_sizes(proto, symbols)
    problems += values.check_values(proto, constants, skip={p.where for p in problems})
    _raise(problems)
    inputs, outputs = _values(graph.input), _values(graph.output)
    return Graph(proto, symbols, inputs, outputs, constants)


def _infer(
    model: onnx.ModelProto, symbols: dict[str, Range], constants: _Constants
) -> list[Problem]:
    """Infers types, again after each round in which operators forced input dims together."""
    while True:
        problems = infer.infer(model) + values.check_types(model)
        if problems:
            return problems
        changed, problems = unify(model, symbols, constants)
        if problems or not changed:
            return problems


def _raise(problems: Sequence[Problem]) -> None:
    problems = [replace(p, found=structure.short(p.found, _MAX_TEXT)) for p in problems]
    problems = list(dict.fromkeys(problems))
    if problems:
        problems.sort(key=lambda p: p.code.startswith("DC31"))
        valid = problems[0].code.startswith("DC31")
        raise (UnsupportedError if valid else ModelError)(problems)


def _load_data(
    model: onnx.ModelProto, folder: Path | None, problems: list[Problem]
) -> dict[str, np.ndarray]:
    """Checks every tensor; embeds external data, but maps the large ones of the main graph."""
    mapped = {}
    for tensor, here, main in _tensors(model):
        problem = external.check_tensor(tensor, here)
        if problem is None and tensor.data_location == TensorProto.EXTERNAL:
            data = external.load_external(tensor, folder, here)
            if isinstance(data, Problem):
                problem = data
            elif main and data.nbytes > external.EMBED_LIMIT:
                mapped[tensor.name] = data
                del tensor.external_data[:]  # so that nothing opens the file by its name again
            else:
                external.embed(tensor, data)
        problems += [problem] if problem else []
    return mapped


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[TensorProto, str, bool]]:
    graphs = [(model.graph, True)]
    for node, _ in structure.nodes_of(model):
        graphs += [(graph, False) for _, graph in structure.subgraphs(node)]
        for attribute in node.attribute:
            here = f"attribute {attribute.name!r} of {where(node)}"
            for tensor in [*[attribute.t] * attribute.HasField("t"), *attribute.tensors]:
                yield tensor, here, False
    for graph, main in graphs:
        for tensor in graph.initializer:
            yield tensor, f"initializer {tensor.name!r}", main


def _hold(model: onnx.ModelProto) -> list[TensorProto]:
    """Takes large initializers out, each replaced by an input of its type."""
    kept: list[TensorProto] = []
    held: list[TensorProto] = []
    for tensor in model.graph.initializer:
        (held if external.byte_size(tensor) > _HELD_BYTES else kept).append(tensor)
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for tensor in held:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    return held


def _release(model: onnx.ModelProto, held: list[TensorProto]) -> None:
    names = {tensor.name for tensor in held}
    inputs = [v for v in model.graph.input if v.name in names]
    for value in inputs:
        model.graph.input.remove(value)
    model.graph.initializer.extend(held)


def _inline(model: onnx.ModelProto) -> None:
    if not model.functions:
        return
    done, texts = sandbox.call("inline", model)
    if done is None:
        found = (
            f"its functions cannot be inlined: {' '.join(texts[0].split())[:200] or 'no reason'}"
        )
        fix = "export the model without local functions"
        raise ModelError([Problem("DC3009", "model", found, fix)])
    model.CopyFrom(done)
    left = unknown_operators(model)
    if model.functions or left:
        fix = "export function bodies with the model's own opset"
        found = "a function whose opset differs from the model's and cannot be converted"
        _raise(left or [Problem("DC3009", "model", found, fix)])


def _check_model(model: onnx.ModelProto) -> list[Problem]:
    """onnx's own checker, on a copy with shape fields, which it wants and exporters leave out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in [*copy.graph.input, *copy.graph.output]:
        tensor = value.type.tensor_type
        tensor.elem_type = tensor.elem_type or TensorProto.FLOAT
        tensor.shape.SetInParent()
    _, texts = sandbox.call("check_model", copy)
    fix = "export the model again"
    return [
        Problem("DC3018", "model", f"the ONNX checker says: {' '.join(text.split())[:300]}", fix)
        for text in texts
    ]


def _values(infos: Sequence[onnx.ValueInfoProto]) -> tuple[Value, ...]:
    result = []
    for info in infos:
        tensor = info.type.tensor_type
        dtype = (
            str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
            if (tensor.elem_type)
            else "?"
        )
        dims = (
            d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param or "?"
            for d in tensor.shape.dim
        )
        shape = tuple(dims) if tensor.HasField("shape") else None
        result.append(Value(info.name, dtype, shape))
    return tuple(result)
