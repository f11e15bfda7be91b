"""Values that decide whether a node can run: attributes, operand types, constant operands.

onnx's checker and shape inference let many of these pass. What is refused here would otherwise
divide by zero, read outside a buffer or fail without a name in a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from dccompile.errors import Problem

from . import rules, sandbox, scales
from .infer import type_name, types_of
from .operands import operands
from .structure import domain, nodes_of, opsets, where


def check_nodes(model: onnx.ModelProto) -> list[Problem]:
    """Attributes and numbers of inputs and outputs, per node, by onnx's checker."""
    problems = []
    _, texts = sandbox.call("check_nodes", model)
    for (node, _), text in zip(nodes_of(model), texts, strict=True):
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                found = f"attribute {attribute.name!r} refers to {attribute.ref_attr_name!r}; "
                found += "only nodes of functions may refer to an attribute"
                problems.append(Problem("DC3012", where(node), found, "give it a value"))
        if text:
            text = " ".join(text.split("\n\n==>")[0].split())[:300]
            found = f"{text}; what the operator's definition lists is allowed"
            fix = "export the model again with an exporter for its opset"
            problems.append(Problem("DC3012", where(node), found, fix))
    return problems


def check_types(model: onnx.ModelProto) -> list[Problem]:
    """Element types of operands and results against the operator's definition, main graph."""
    types = types_of(model.graph)
    versions = opsets(model.opset_import)
    problems = []
    for node in model.graph.node:
        for result in node.output:
            kind = types[result].tensor_type.elem_type if result in types else 0
            if kind not in TensorProto.DataType.values():
                found = f"output {result!r} has {type_name(kind)}; "
                found += "the types of onnx.TensorProto are allowed"
                fix = "correct the attribute that names the type"
                problems.append(Problem("DC3013", where(node), found, fix))
        name = domain(node.domain)
        if name not in versions or not onnx.defs.has(node.op_type, name):
            continue
        schema = onnx.defs.get_schema(node.op_type, versions[name], name)
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        bound: dict[str, tuple[str, str]] = {}
        for index, tensor in enumerate(node.input):
            given = _type_string(types.get(tensor))
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            if given is None or not tensor:
                continue
            variadic = not formal.is_homogeneous
            known, first = bound.setdefault(formal.type_str, (given, tensor))
            if given not in allowed.get(formal.type_str, [formal.type_str]):
                choices = sorted(allowed.get(formal.type_str, [formal.type_str]))
                found = f"input {tensor!r} is {given}; {', '.join(choices)} are allowed"
            elif known != given and not variadic and formal.type_str in allowed:
                found = f"inputs {first!r} and {tensor!r} are {known} and {given}; "
                found += "the same type is allowed"
            else:
                continue
            problems.append(Problem("DC3013", where(node), found, "insert a Cast node"))
    return problems


def _type_string(kind: onnx.TypeProto | None) -> str | None:
    if kind is None or kind.WhichOneof("value") != "tensor_type":
        return None
    elem_type = kind.tensor_type.elem_type
    if elem_type == 0 or elem_type not in TensorProto.DataType.values():
        return None
    return f"tensor({TensorProto.DataType.Name(elem_type).lower()})"


def check_values(
    model: onnx.ModelProto, constants: Mapping[str, np.ndarray], skip: set[str]
) -> list[Problem]:
    """Quantization parameters, attribute values and constant operands; not of nodes in `skip`."""
    problems = []
    for node in operands(model, constants):
        here = where(node.node)
        if here in skip:
            continue
        problems += [Problem("DC3015", here, *finding) for finding in scales.check(node)]
        for found in rules.check(node) if domain(node.node.domain) == "" else ():
            problems.append(Problem("DC3016", here, found, scales.EXPORT))
    return problems
