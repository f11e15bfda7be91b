"""Operators that exist, functions that end, constants that become initializers."""

from __future__ import annotations

import onnx
from onnx import AttributeProto

from dccompile.errors import Problem

from .structure import CONTRIB, domain, function_name, nested, nodes_of, replace, short, where

MAX_INLINED_NODES = 1_000_000
_TRAINING = ("ai.onnx.training", "ai.onnx.preview.training")
_KNOWN = ("", "ai.onnx.ml", "ai.onnx.preview", CONTRIB)


def unknown_operators(model: onnx.ModelProto) -> list[Problem]:
    """Every node whose domain or operator does not exist, in subgraphs and functions too.

    Operators of ``com.microsoft`` have no schema in the onnx package: whether they are
    supported is for `frontend.operators` to say.
    """
    local = {(domain(f.domain), f.name, f.overload) for f in model.functions}
    problems = []
    for node, versions in nodes_of(model):
        name, place = domain(node.domain), where(node)
        is_local = (name, node.op_type, node.overload) in local
        if is_local and name in versions:
            continue
        if name in _TRAINING:
            found = f"domain {name!r} is for training; inference operators are supported"
            fix = "export the model for inference"
            problems.append(Problem("DC3104", place, found, fix))
        elif name not in _KNOWN and not is_local:
            found = f"domain {short(name)!r} is unknown; ai.onnx and {CONTRIB} are supported"
            fix = "add its operators to the model as functions, or replace them"
            problems.append(Problem("DC3101", place, found, fix))
        elif name not in versions:
            found = f"no opset_import for domain {name or 'ai.onnx'!r}; one is required"
            fix = "add the opset_import, or export the model again"
            problems.append(Problem("DC3004", place, found, fix))
        elif name != CONTRIB:
            reason = _missing(node.op_type, versions[name], name)
            if reason:
                fix = "replace it, or define it in the model as a function"
                problems.append(Problem("DC3102", place, reason, fix))
    return problems


def _missing(op_type: str, version: int, name: str) -> str | None:
    kind = f"operator {short(op_type)!r}"
    try:
        schema = onnx.defs.get_schema(op_type, version, name)
    except (onnx.defs.SchemaError, TypeError, OverflowError):
        newer = onnx.defs.has(op_type, name)
        rule = "; it came later" if newer else "; known operators are supported"
        return f"{kind} does not exist in opset {version} of {name or 'ai.onnx'}{rule}"
    if schema.deprecated:
        return f"{kind} was removed from opset {schema.since_version}; its successor is supported"
    return None


def check_functions(model: onnx.ModelProto) -> list[Problem]:
    """Functions that call themselves, are defined twice or expand beyond reason."""
    bodies: dict[tuple[str, str, str], onnx.FunctionProto] = {}
    problems = []
    for function in model.functions:
        key = (domain(function.domain), function.name, function.overload)
        if key in bodies:
            found = "is defined twice; one definition is allowed"
            place = f"function {short(function_name(function))!r}"
            problems.append(Problem("DC3006", place, found, "rename one of them"))
        bodies[key] = function
    calls = {key: _calls(function.node, bodies) for key, function in bodies.items()}
    size: dict[tuple[str, str, str], int] = {}
    state: dict[tuple[str, str, str], int] = {}
    for start in bodies:
        stack = [(start, iter(calls[start]))]
        if state.get(start):
            continue
        state[start] = 1
        while stack:
            key, rest = stack[-1]
            callee = next(rest, None)
            if callee is None:
                stack.pop()
                state[key] = 2
                inner = (size.get(c, 0) for c in calls[key])
                size[key] = min(MAX_INLINED_NODES + 1, len(bodies[key].node) + sum(inner))
            elif not state.get(callee):
                state[callee] = 1
                stack.append((callee, iter(calls[callee])))
            elif state[callee] == 1:
                found = "calls itself; a function may call only others"
                place = f"function {short(function_name(bodies[callee]))!r}"
                problem = Problem("DC3009", place, found, "unroll it, or use Loop or Scan")
                if problem not in problems:
                    problems.append(problem)
    total = sum(size.get(key, 0) for key in _calls(model.graph.node, bodies))
    if total > MAX_INLINED_NODES and not problems:
        found = f"its functions expand to over {MAX_INLINED_NODES} nodes; fewer are allowed"
        problems.append(Problem("DC3009", "model", found, "export the model without functions"))
    return problems


def _calls(nodes, bodies) -> list[tuple[str, str, str]]:
    keys = []
    for node in nested(nodes):
        key = (domain(node.domain), node.op_type, node.overload)
        keys += [key] if key in bodies else []
    return keys


def lift_constants(model: onnx.ModelProto, problems: list[Problem]) -> None:
    """Turns the main graph's Constant nodes into initializers; drops constants from its inputs."""
    graph = model.graph
    kept = []
    for node in graph.node:
        tensor = None
        plain = node.op_type == "Constant" and domain(node.domain) == "" and len(node.output) == 1
        if plain and len(node.attribute) == 1 and not node.attribute[0].ref_attr_name:
            tensor = _constant(node.attribute[0], where(node), problems)
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    if len(kept) != len(graph.node):
        replace(graph.node, kept)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for i in reversed(range(len(graph.input))):
        tensor = constants.get(graph.input[i].name)
        if tensor is not None:
            problems += _check_default(graph.input[i], tensor)
            del graph.input[i]


def _check_default(value: onnx.ValueInfoProto, tensor: onnx.TensorProto) -> list[Problem]:
    """An input whose default value is an initializer declares the initializer's type."""
    claim = value.type.tensor_type
    dims = [d.dim_value if d.WhichOneof("value") == "dim_value" else -1 for d in claim.shape.dim]
    plain = value.type.WhichOneof("value") in (None, "tensor_type")
    fits = (
        plain
        and claim.elem_type in (0, tensor.data_type)
        and (
            not claim.HasField("shape")
            or (
                len(dims) == len(tensor.dims)
                and all(a in (-1, b) for a, b in zip(dims, tensor.dims, strict=True))
            )
        )
    )
    if fits:
        return []
    found = f"initializer {short(value.name)!r} does not have the type and shape that the "
    found += "graph input of that name declares; the same are allowed"
    fix = "the file is damaged: export the model again"
    return [Problem("DC3013", f"input {short(value.name)!r}", found, fix)]


def _constant(
    attribute: AttributeProto, place: str, problems: list[Problem]
) -> onnx.TensorProto | None:
    make, types = onnx.helper.make_tensor, onnx.TensorProto
    kind, name = attribute.type, attribute.name
    if name == "value" and kind == AttributeProto.TENSOR:
        return onnx.TensorProto.FromString(attribute.t.SerializeToString())
    if name == "value_float" and kind == AttributeProto.FLOAT:
        return make("", types.FLOAT, [], [attribute.f])
    if name == "value_int" and kind == AttributeProto.INT:
        return make("", types.INT64, [], [attribute.i])
    if name == "value_floats" and kind == AttributeProto.FLOATS:
        return make("", types.FLOAT, [len(attribute.floats)], attribute.floats)
    if name == "value_ints" and kind == AttributeProto.INTS:
        return make("", types.INT64, [len(attribute.ints)], attribute.ints)
    if name in ("sparse_value", "value_string", "value_strings"):
        found = f"a constant given as {name}; dense numbers are supported"
        problems.append(Problem("DC3103", place, found, "store it as a dense numeric tensor"))
    return None
