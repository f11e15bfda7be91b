"""Input shapes: the ``x:1..64x13`` spelling, binding of dims and symbols."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from dccompile.errors import Problem, UsageError

from .external import MAX_DIM, MAX_RANK
from .structure import subgraphs

Dim = int | str
Range = tuple[int, int | None]  # smallest and largest value; None: no upper limit
_SPELLING = (
    "NAME:DIMxDIM..., each DIM a number, a range as 1..64, a symbol, or ? (as the model has it)"
)


def parse_shape(text: str) -> tuple[str, tuple[Dim, ...]]:
    """``"x:1..64x13"`` -> ``("x", ("1..64", 13))``; the last colon ends the input's name."""
    name, colon, dims = text.rpartition(":")
    words = dims.split("x")
    if not colon or not name or not all(words):
        raise UsageError(f"--shape {text!r}: the spelling is {_SPELLING}", "DC2010")
    shape = tuple(int(w) if re.fullmatch(r"-?[0-9]{1,19}", w) else w for w in words)
    for dim in shape:
        _request(dim, f"--shape {text!r}")
    return name, shape


def _request(dim: object, where: str) -> int | Range | str | None:
    """A dim as asked for: a number, a range, a symbol, or None for 'as the model has it'."""
    if isinstance(dim, str):
        dim = dim.strip()
        if dim == "?":
            return None
        limits = re.fullmatch(r"(-?[0-9]{1,19})\.\.(-?[0-9]{1,19})", dim)
        if limits:
            low, high = int(limits[1]), int(limits[2])
            if not 1 <= low <= high <= MAX_DIM:
                rule = f"the range {dim} must satisfy 1 <= min <= max <= {MAX_DIM}"
                raise UsageError(f"{where}: {rule}", "DC2010")
            return low if low == high else (low, high)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", dim):
            raise UsageError(f"{where}: dim {dim!r}; the spelling is {_SPELLING}", "DC2010")
        return dim
    if dim is None or (dim == -1 and not isinstance(dim, bool)):
        return None
    try:
        if isinstance(dim, bool):
            raise TypeError
        number = dim.__index__()  # type: ignore[attr-defined]
    except (TypeError, AttributeError):
        rule = "a number, a range as '1..64', a symbol, or '?' is allowed"
        raise UsageError(f"{where}: dim {dim!r}; {rule}", "DC2010") from None
    if not 1 <= number <= MAX_DIM:
        raise UsageError(f"{where}: dim {number} must lie in 1..{MAX_DIM}", "DC2010")
    return number


def value_infos(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    """Every declared type of a graph and its subgraphs."""
    for group in (graph.input, graph.output, graph.value_info):
        yield from group
    for node in graph.node:
        for _, inner in subgraphs(node):
            yield from value_infos(inner)


def check_interface(graph: onnx.GraphProto) -> list[Problem]:
    """Element types and dims that the inputs and outputs declare."""
    problems = []
    for kind, group in (("input", graph.input), ("output", graph.output)):
        for value in group:
            here = f"{kind} {value.name!r}"
            which = value.type.WhichOneof("value")
            if which is None and kind == "output":
                continue  # inferred
            if which != "tensor_type":
                found = f"a {(which or 'untyped').removesuffix('_type')} value; "
                fix = "export the model with dense tensors as inputs and outputs"
                code = "DC3103" if which else "DC3005"
                problems.append(Problem(code, here, found + "tensors are allowed", fix))
                continue
            tensor = value.type.tensor_type
            if tensor.elem_type == onnx.TensorProto.STRING:
                fix = "convert strings to numbers before the model"
                found = "strings; numeric and boolean tensors are supported"
                problems.append(Problem("DC3103", here, found, fix))
            elif tensor.elem_type not in onnx.TensorProto.DataType.values():
                found = (
                    f"element type {tensor.elem_type}; the types of onnx.TensorProto are allowed"
                )
                problems.append(Problem("DC3005", here, found, "export the model again"))
            elif tensor.elem_type == 0 and kind == "input":
                found = "no element type; one is required"
                problems.append(Problem("DC3005", here, found, "export the model again"))
            problems += _check_dims(tensor, here)
    return problems


def _check_dims(tensor: onnx.TypeProto.Tensor, here: str) -> list[Problem]:
    if len(tensor.shape.dim) > MAX_RANK:
        found = f"{len(tensor.shape.dim)} dims; at most {MAX_RANK} are allowed"
        return [Problem("DC3005", here, found, "export the model again")]
    problems = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.WhichOneof("value") != "dim_value" or dim.dim_value == -1:
            continue
        if not 0 < dim.dim_value <= MAX_DIM and not (dim.dim_value == 0 and "output" in here):
            found = f"dim {axis} is {dim.dim_value}; 1 to {MAX_DIM}, or a symbol, is allowed"
            code = "DC3017" if dim.dim_value > MAX_DIM else "DC3005"
            problems.append(Problem(code, here, found, "export with a valid or dynamic dim"))
    return problems


@dataclass
class _Binding:
    """What the requests say about each symbol of the model."""

    names: dict[str, str] = field(default_factory=dict)  # model's symbol -> wanted symbol
    values: dict[str, tuple[int | Range, str]] = field(default_factory=dict)  # and who said so

    def rename(self, symbol: str, name: str, here: str) -> None:
        if self.names.setdefault(symbol, name) != name:
            both = f"{self.names[symbol]!r} and {name!r}"
            raise UsageError(f"{here}: symbol {symbol!r} cannot be both {both}", "DC2012")

    def set(self, symbol: str, value: int | Range, here: str) -> None:
        known, who = self.values.setdefault(symbol, (value, here))
        if known != value:
            both = f"{_spell(known)} ({who}) and {_spell(value)} ({here})"
            raise UsageError(f"symbol {symbol!r} is bound to both {both}; choose one", "DC2012")


def _spell(value: int | Range) -> str:
    return str(value) if isinstance(value, int) else f"{value[0]}..{value[1]}"


def bind(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[Dim]] | None
) -> tuple[dict[str, Range], list[Problem]]:
    """Fixes, ranges and names the input dims in place; returns the symbols that remain.

    A dim that the model leaves open becomes a symbol: its own dim_param, made an identifier,
    or ``<input>_<axis>``. A symbol bound in one input is bound wherever it stands.
    """
    requests = dict(shapes or {})
    inputs = {value.name: value for value in model.graph.input}
    for name in requests:
        if name not in inputs:
            known = ", ".join(repr(other) for other in inputs) or "none"
            raise UsageError(f"shape for {name!r}: the model's inputs are {known}", "DC2011")
    problems = []
    symbols = _name_dims(model.graph, requests)
    for name, value in inputs.items():
        if not value.type.tensor_type.HasField("shape"):
            fix = f"give it, as --shape {name}:1x3x224x224 or shapes={{{name!r}: (1, 3, 224, 224)}}"
            found = "no shape, not even a rank; a rank is required"
            problems.append(Problem("DC3005", f"input {name!r}", found, fix))
    wanted: list[tuple[str, int | Range, str]] = []
    binding = _Binding()
    for name, shape in requests.items():
        dims = inputs[name].type.tensor_type.shape.dim
        if isinstance(shape, (str, bytes)) or len(shape) != len(dims):
            asked = (
                f"{len(shape)} dims asked for" if not isinstance(shape, (str, bytes)) else "text"
            )
            rule = f"the model has {len(dims)} ({_model_dims(dims)})"
            raise UsageError(f"shape for {name!r}: {asked}; {rule}", "DC2012")
        for axis, (dim, ask) in enumerate(zip(dims, shape, strict=True)):
            here = f"dim {axis} of {name!r}"
            request = _request(ask, here)
            if dim.dim_value and request not in (None, dim.dim_value):
                rule = f"the model fixes it to {dim.dim_value}; {ask!r} was asked for"
                fix = "export the model with a dynamic dim, or leave it out of the shape"
                raise UsageError(f"{here}: {rule}. Fix: {fix}", "DC2012")
            if isinstance(request, str):
                binding.rename(dim.dim_param, request, here)
            elif request is not None and not dim.dim_value:
                wanted.append((dim.dim_param, request, here))
    for symbol, request, here in wanted:
        binding.set(binding.names.get(symbol, symbol), request, here)
    _apply(model.graph, symbols, binding)
    left = {}
    for value in inputs.values():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                limits = binding.values.get(dim.dim_param, ((1, None), ""))[0]
                left[dim.dim_param] = (limits, limits) if isinstance(limits, int) else limits
    return left, problems


def _model_dims(dims) -> str:
    return ", ".join(str(dim.dim_value or dim.dim_param) for dim in dims) or "a scalar"


def _name_dims(graph: onnx.GraphProto, requests: Mapping[str, Sequence[Dim]]) -> dict[str, str]:
    """Gives every open input dim a symbol that is an identifier; returns old name -> new."""
    taken = {
        dim.dim_param for value in value_infos(graph) for dim in value.type.tensor_type.shape.dim
    }
    symbols: dict[str, str] = {}

    def fresh(stem: str) -> str:
        stem = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_") or "dim"
        stem = stem if not stem[0].isdigit() else f"d{stem}"
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        return name

    for value in graph.input:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape") and value.name in requests:
            tensor.shape.SetInParent()
            for _ in requests[value.name]:
                tensor.shape.dim.add()
        for axis, dim in enumerate(tensor.shape.dim):
            if dim.dim_value > 0:
                continue
            old = dim.dim_param
            if old in ("", "?", "-1"):
                dim.dim_param = fresh(f"{value.name}_{axis}")
            elif not re.fullmatch(r"[A-Za-z_]\w*", old, flags=re.ASCII):
                if old not in symbols:
                    symbols[old] = fresh(old)
                dim.dim_param = symbols[old]
    return symbols


def _apply(graph: onnx.GraphProto, symbols: Mapping[str, str], binding: _Binding) -> None:
    final: dict[str, Dim] = {}
    for value in value_infos(graph):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                name = symbols.get(dim.dim_param, dim.dim_param)
                name = binding.names.get(name, name)
                bound = binding.values.get(name, (name, ""))[0]
                final[dim.dim_param] = bound if isinstance(bound, int) else name
    substitute(graph, final)


def substitute(graph: onnx.GraphProto, final: Mapping[str, Dim]) -> None:
    """Replaces symbols by other symbols or numbers in all declared types."""
    for value in value_infos(graph):
        for dim in value.type.tensor_type.shape.dim:
            new = final.get(dim.dim_param) if dim.dim_param else None
            if isinstance(new, int):
                dim.dim_value = new
            elif new is not None:
                dim.dim_param = new
