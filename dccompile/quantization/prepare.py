"""The float model in the form that is quantized: checked, constants folded, batch norms folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from dccompile.errors import ModelError, Problem
from dccompile.frontend import gate
from dccompile.frontend.batch_norm import fold_batch_norms
from dccompile.frontend.bias import fold_biases
from dccompile.frontend.dims import unify
from dccompile.frontend.editor import Editor
from dccompile.frontend.fold import fold

OPSET = 13  # the first with a scale per channel
_MOST = 2**31 - 2**26  # bytes of one protobuf message, less what pairs and names add
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger",
              "ConvInteger")  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A float model to quantize. `model` is standard ONNX with types of all values.

    Names of nodes and tensors are those of the model given; a convolution that took in its batch
    norm keeps its own name and makes the batch norm's tensor. `quantized` says which nodes are
    quantized already.
    """

    model: onnx.ModelProto
    inputs: tuple[gate.Value, ...]
    quantized: tuple[str, ...]

    def constants(self) -> dict[str, np.ndarray]:
        """The initializers."""
        return {t.name: onnx.numpy_helper.to_array(t) for t in self.model.graph.initializer}


def float_model(model: Any) -> Prepared:
    """Reads a path, bytes or onnx.ModelProto.

    Raises ModelError or UnsupportedError with every problem; DC3200 where the opset is too old to
    be raised, DC3202 for more weights than one ONNX file holds.
    """
    graph = gate.read(model)
    if sum(value.nbytes for value in graph.constants.values()) > _MOST:
        found = f"more than {_MOST >> 20} MiB of weights; one ONNX file holds no more"
        fix = "quantize its layers alone, and its tables with compile --embedding"
        raise ModelError([Problem("DC3202", "model", found, fix)])
    raised = _raise_opset(graph)
    editor = Editor(graph.model, graph.constants) if raised is None else Editor(raised)
    unify(editor)
    fold(editor, weights=False)
    fold_batch_norms(editor)
    fold_biases(editor)
    _restore_names(editor)
    quantized = tuple(n.name for n in editor.nodes if _is_quantized(n))
    return Prepared(editor.finish(), graph.inputs, quantized)


def _is_quantized(node: onnx.NodeProto) -> bool:
    return node.op_type in _QUANTIZED or node.op_type.startswith(("QLinear", "QGemm"))


def _raise_opset(graph: gate.Graph) -> onnx.ModelProto | None:
    """The model in opset 13 if its own is older, with types inferred anew."""
    version = max(o.version for o in graph.model.opset_import if o.domain in ("", "ai.onnx"))
    if version >= OPSET:
        return None
    try:
        raised = onnx.version_converter.convert_version(graph.embedded(), OPSET)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        found = f"opset {version} cannot be raised to {OPSET}, which scales per channel need"
        fix = "export the model with a newer opset"
        raise ModelError([Problem("DC3200", "model", f"{found} ({reason})", fix)]) from None
    return gate.read(raised).embedded()


def _restore_names(editor: Editor) -> None:
    """Gives nodes that stand for several of the model's the name of the first."""
    taken = {node.name for node in editor.nodes}
    for node in editor.nodes:
        first = editor.origin[node.name][0]
        if first != node.name and first not in taken:
            editor.origin[first] = editor.origin.pop(node.name)
            taken.add(first)
            node.name = first
