"""The shape of the graph: names, producers, order, operators that exist, functions.

Every check walks the protos in Python, bounded in depth, and reports all it finds; nothing
reaches onnx's C++ code before these pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import onnx
from onnx import GraphProto, NodeProto

from dccompile.errors import Problem

MIN_OPSET, MAX_OPSET = 11, 25
MAX_SUBGRAPHS = 32  # levels; protobuf stops at about 33
CONTRIB = "com.microsoft"
STAMP = "dccompile.where"


def domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def stamp(model: onnx.ModelProto) -> None:
    """Names nameless nodes ``#17`` and notes in each node where in the file it stands.

    The note (metadata property `STAMP`) survives sorting, inlining and rewriting, so that
    every later message can name the node as the user's file does: see `where`.
    """
    _stamp(model.graph.node, "")
    for function in model.functions:
        _stamp(function.node, f" of function {short(function_name(function))}")


def _stamp(nodes: Iterable[NodeProto], scope: str) -> None:
    for index, node in enumerate(nodes):
        node.name = node.name or f"#{index}"
        kind = node.op_type if domain(node.domain) == "" else f"{node.domain}::{node.op_type}"
        here = f"{short(repr(kind)[1:-1])} {short(node.name)!r} (node {index}{scope})"
        for i in reversed(range(len(node.metadata_props))):
            if node.metadata_props[i].key == STAMP:
                del node.metadata_props[i]
        node.metadata_props.add(key=STAMP, value=here)
        for name, graph in subgraphs(node):
            _stamp(graph.node, f" in {name} of {here}")


def where(node: NodeProto) -> str:
    """How a message names a node of a read graph: ``Conv 'layer4.2.conv3' (node 118)``."""
    for entry in node.metadata_props:
        if entry.key == STAMP:
            return entry.value
    return f"{node.op_type} {node.name!r}"


def short(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {domain(entry.domain): entry.version for entry in imports}


def nodes_of(model: onnx.ModelProto) -> Iterator[tuple[NodeProto, dict[str, int]]]:
    """Every node of the graph, its subgraphs and the function bodies, with its opsets."""
    bodies = [(model.graph.node, model.opset_import)]
    bodies += [(function.node, function.opset_import) for function in model.functions]
    for nodes, imports in bodies:
        versions = opsets(imports)
        for node in nested(nodes):
            yield node, versions


def nested(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for _, graph in subgraphs(node):
            yield from nested(graph.node)


def function_name(function: onnx.FunctionProto) -> str:
    return f"{function.domain or 'ai.onnx'}::{function.name}"


# -- header ------------------------------------------------------------------------------------


def check_header(model: onnx.ModelProto) -> list[Problem]:
    """IR version, opset imports, training parts, nesting depth."""
    problems = []
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        found = f"IR version {model.ir_version}; 3 to {onnx.IR_VERSION} are allowed"
        fix = "export with an IR version that this onnx package knows, or update onnx"
        problems.append(Problem("DC3003", "model", found, fix))
    scopes = [("model", model.opset_import)]
    scopes += [(f"function {function_name(f)!r}", f.opset_import) for f in model.functions]
    for place, imports in scopes:
        seen: dict[str, int] = {}
        for entry in imports:
            name = domain(entry.domain)
            if seen.setdefault(name, entry.version) != entry.version:
                found = f"domain {name or 'ai.onnx'!r} imported as {seen[name]} and {entry.version}"
                fix = "keep one opset_import per domain"
                problems.append(Problem("DC3004", place, f"{found}; one is allowed", fix))
        if place == "model" and "" not in seen:
            found = f"no opset for domain 'ai.onnx'; {MIN_OPSET} to {MAX_OPSET} are allowed"
            problems.append(Problem("DC3004", place, found, "export the model again"))
        elif not MIN_OPSET <= seen.get("", MIN_OPSET) <= MAX_OPSET:
            found = f"opset {seen['']}; {MIN_OPSET} to {MAX_OPSET} are allowed"
            fix = "export with opset_version=18, or use onnx.version_converter"
            problems.append(Problem("DC3004", place, found, fix))
    if len(model.training_info):
        found = "training_info is present; inference graphs are supported"
        problems.append(Problem("DC3104", "model", found, "export the model for inference"))
    stack = [(graph, 1) for graph in [model.graph]]
    stack += [(g, 2) for f in model.functions for n in f.node for _, g in subgraphs(n)]
    while stack:
        graph, depth = stack.pop()
        if depth > MAX_SUBGRAPHS:
            found = f"subgraphs nested {depth} deep; at most {MAX_SUBGRAPHS} are allowed"
            fix = "flatten the nested If, Loop or Scan nodes"
            problems.append(Problem("DC3009", "model", found, fix))
            break
        stack += [(inner, depth + 1) for node in graph.node for _, inner in subgraphs(node)]
    return problems


# -- names, producers, order ------------------------------------------------------------------


def sort_and_check(model: onnx.ModelProto) -> list[Problem]:
    """Sorts every node list by its data flow; reports duplicates, gaps and cycles."""
    problems: list[Problem] = []
    _scope(model.graph, frozenset(), "graph", problems)
    for function in model.functions:
        place = f"function {short(function_name(function))!r}"
        inputs, outputs = list(function.input), list(function.output)
        _order(function.node, inputs, [], outputs, frozenset(), place, problems)
        known = frozenset(inputs).union(*(node.output for node in function.node))
        for node in function.node:
            for name, graph in subgraphs(node):
                _scope(graph, known, f"{name} of {where(node)}", problems)
    return problems


def _scope(graph: GraphProto, outer: frozenset[str], place: str, problems: list[Problem]) -> None:
    inputs = [value.name for value in graph.input]
    constants = [tensor.name for tensor in graph.initializer]
    constants += [tensor.values.name for tensor in graph.sparse_initializer]
    outputs = [value.name for value in graph.output]
    _order(graph.node, inputs, constants, outputs, outer, place, problems)
    known = outer.union(inputs, constants, *(node.output for node in graph.node))
    for node in graph.node:
        for name, inner in subgraphs(node):
            _scope(inner, known, f"{name} of {where(node)}", problems)


def replace(nodes, kept: list[NodeProto]) -> None:
    """Puts `kept`, members of the repeated field `nodes` in any order, in its place."""
    copies = []
    for node in kept:
        copies.append(NodeProto())
        copies[-1].CopyFrom(node)
    del nodes[:]
    nodes.extend(copies)


def _reads(node: NodeProto) -> set[str]:
    """Names a node needs from its own scope: its inputs and what its subgraphs capture."""
    names = {name for name in node.input if name}
    for _, graph in subgraphs(node):
        inside = {value.name for value in graph.input}
        inside.update(tensor.name for tensor in graph.initializer)
        inside.update(tensor.values.name for tensor in graph.sparse_initializer)
        wanted = {value.name for value in graph.output}
        for inner in graph.node:
            wanted |= _reads(inner)
            inside.update(inner.output)
        names |= wanted - inside
    return names


def _order(
    nodes,
    inputs: list[str],
    constants: list[str],
    outputs: list[str],
    outer: frozenset[str],
    place: str,
    problems: list[Problem],
) -> None:
    """Sorts `nodes` in place, keeping the file's order where it can."""
    fix = "give every tensor one producer and its own name"
    for kind, names in (("input", inputs), ("initializer", constants)):
        for name in _repeated(names):
            found = f"{kind} {short(name)!r} is declared twice; once is allowed"
            problems.append(Problem("DC3006", place, found, fix))
    given = set(inputs) | set(constants)
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in given or name in producer:
                other = "an input or initializer"
                other = where(nodes[producer[name]]) if name in producer else other
                found = f"output {short(name)!r} is also given by {other}; one is allowed"
                problems.append(Problem("DC3006", where(node), found, fix))
            else:
                producer[name] = index
    available = given | outer
    needs = [_reads(node) for node in nodes]
    fix = "the file is incomplete: export the model again"
    for node, wanted in zip(nodes, needs, strict=True):
        for name in sorted(n for n in wanted if n not in available and n not in producer):
            found = f"input {short(name)!r} has no producer; a node output, graph input or "
            found += "initializer of that name must exist"
            problems.append(Problem("DC3007", where(node), found, fix))
    for name in outputs:
        if name not in producer and name not in available:
            found = f"output {short(name)!r} has no producer; a node must compute it"
            problems.append(Problem("DC3007", place, found, fix))
    order, cycles = _topological(needs, producer)
    for cycle in cycles:
        chain = " -> ".join(where(nodes[i]) for i in cycle[:8])
        chain += " -> ..." if len(cycle) > 8 else ""
        found = f"its output reaches its own input through {chain}; a graph without cycles "
        found += "is allowed"
        here = where(nodes[cycle[0]])
        problems.append(Problem("DC3008", here, found, "break the cycle, or use Loop or Scan"))
    if order != sorted(order):
        replace(nodes, [nodes[i] for i in order])


def _repeated(names: list[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _topological(
    needs: list[set[str]], producer: dict[str, int]
) -> tuple[list[int], list[list[int]]]:
    before = [{producer[name] for name in names if name in producer} for names in needs]
    after: list[list[int]] = [[] for _ in needs]
    for index, sources in enumerate(before):
        for source in sources:
            after[source].append(index)
    waiting = [len(sources) for sources in before]
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    cycles: list[list[int]] = []
    done: set[int] = set()
    start = 0
    while len(order) < len(needs):
        while ready:
            index = heapq.heappop(ready)
            order.append(index)
            done.add(index)
            for user in after[index]:
                waiting[user] -= 1
                if waiting[user] == 0 and user not in done:
                    heapq.heappush(ready, user)
        if len(order) < len(needs):  # every node left waits for a cycle: walk back into one
            while start in done:
                start += 1
            path = [start]
            position = {path[0]: 0}
            while True:
                source = min(s for s in before[path[-1]] if s not in done)
                if source in position:
                    break
                position[source] = len(path)
                path.append(source)
            cycle = path[position[source] :][::-1]
            cycles.append(cycle)
            for index in cycle:
                waiting[index] = 0
            ready = sorted(cycle)
    return order, cycles
