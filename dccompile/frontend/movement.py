"""Chains of operators that only move elements, understood by running them on element numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from .editor import Editor, is_op

_MOVES = (
    "Concat", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
_SHAPES = ("Shape", "Size", "Cast", "Add", "Sub", "Mul", "Div")
_MOST = 256  # nodes of a chain
LIMIT = 1 << 24  # elements that are numbered: chains over more are not followed


@dataclass
class Chain:
    """Nodes, in order, that make `target` of the elements of `sources` and of constants."""

    target: str
    nodes: list[NodeProto] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def chain(editor: Editor, target: str) -> Chain | None:
    """What moves elements into a value; None where it is too long to follow."""
    found = Chain(target)
    done: set[str] = set()

    def visit(name: str, moving: bool) -> bool:
        if not name or name in done or editor.constant(name) is not None:
            return True
        done.add(name)
        node = editor.producer(name)
        if node is None or not is_op(node, *(_MOVES if moving else (*_MOVES, *_SHAPES))):
            found.sources.append(name)
            return True
        if len(found.nodes) > _MOST:
            return False
        first = node.op_type == "Concat"
        for i, operand in enumerate(node.input):
            if node.op_type != "Shape" and not visit(operand, moving and (first or i == 0)):
                return False
        if node not in found.nodes:
            found.nodes.append(node)
        return True

    return found if visit(target, True) else None


def run(
    editor: Editor, found: Chain, feeds: dict[str, np.ndarray], batch: int, *extra: str
) -> list[np.ndarray] | None:
    """The chain's target, and `extra` values, where its sources hold `feeds`.

    Symbolic dims of shapes are `batch`. None where the chain cannot be run.
    """
    nodes, constants = [], dict(feeds)
    made = {name for node in found.nodes for name in node.output} | feeds.keys()
    for node in found.nodes:
        outside = is_op(node, "Shape") and node.input[0] not in made
        shape = editor.shape(node.input[0]) if outside else None
        if shape is not None:
            dims = [dim if isinstance(dim, int) else batch for dim in shape]
            spot = helper.make_node("Shape", [f"{node.output[0]}:of"], node.output)
            spot.attribute.extend(node.attribute)
            constants[f"{node.output[0]}:of"] = np.empty(dims, np.bool_)
            nodes.append(spot)
            continue
        nodes.append(node)
        for name in node.input:
            value = editor.constant(name)
            if value is not None:
                constants[name] = value
    made = {name for node in nodes for name in node.output}
    wanted = [name for name in (found.target, *extra) if name in made]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, None) for n in constants]
    outputs = [helper.make_tensor_value_info(n, TensorProto.INT64, None) for n in wanted]
    graph = helper.make_graph(nodes, "chain", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", editor.opset())])
    try:
        values = dict(zip(wanted, ReferenceEvaluator(model).run(None, constants), strict=True))
    except Exception:  # what the evaluator cannot do (it raises anything) is left in the graph
        return None
    values.update({name: feeds[name] for name in (found.target, *extra) if name in feeds})
    return [values[name] for name in (found.target, *extra)]
