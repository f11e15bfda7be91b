"""Small embedding models for the tests, and what a recovered model computes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from recovery import session

from dccompile import reference
from dccompile.frontend.gate import read
from dccompile.frontend.recover import Recovered, recover
from dccompile.workload import EmbeddingTables


def evaluate(recovered: Recovered, feeds):
    """Outputs of a recovered model: its bags by the reference, its interactions by numpy."""

    class DccEmbeddingBag(OpRun):
        op_domain = "dccompile"

        def _run(self, index, *rest, site=None):
            found = recovered.bags[site]
            work, operands = found.workload, list(rest)
            kept = index.shape[: index.ndim - found.trailing]
            if work.layout == "fixed":
                index, cuts = index.reshape(-1, work.tables, work.pooling), None
            else:
                index, cuts = index.reshape(-1), operands.pop(0)
            weight = operands.pop(0).reshape(index.shape) if work.weighted else None
            assert not operands and str(index.dtype) == {"s32": "int32", "s64": "int64"}[work.index]
            assert work.bags in (None, len(index) if cuts is None else work.bags)
            tables = EmbeddingTables(list(found.arrays), found.tables)
            y = reference.embedding_bag(work, tables, index, cuts, weight)
            return (y.reshape(*kept, work.dim) if cuts is None else y[:, 0],)

    class DccInteraction(OpRun):
        op_domain = "dccompile"

        def _run(self, dense, rows, site=None):
            return (interact(recovered.interactions[site].workload, dense, rows),)

    onnx.checker.check_model(recovered.model)
    own = [DccEmbeddingBag, DccInteraction]
    return ReferenceEvaluator(recovered.model, new_ops=own).run(None, feeds)


def interact(work, dense, rows):
    """The interaction in float64."""
    x = np.concatenate([dense[:, None], rows], axis=1).astype(np.float64)
    products = x @ x.transpose(0, 2, 1)
    pairs = [(i, j) for i in range(work.vectors) for j in work.row(i)]
    taken = [products[:, i, j] for i, j in pairs]
    return np.concatenate([dense, np.stack(taken, axis=1)], axis=1).astype(np.float32)


def agree(model, feeds, embedding="keep") -> Recovered:
    """Recovers, compares with ONNX Runtime on `feeds`, returns what was recovered."""
    before = model.SerializeToString()
    recovered = recover_model(model, embedding)
    assert model.SerializeToString() == before
    wanted = session(model).run(None, feeds)
    for got, want in zip(evaluate(recovered, feeds), wanted, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    return recovered


def recover_model(model, embedding="keep") -> Recovered:
    graph = read(model)
    return recover(graph.model, graph.constants, embedding=embedding)


def only_bag(recovered):
    (site,) = recovered.bags.values()
    return site.workload


def kinds(recovered):
    return [node.op_type for node in recovered.model.graph.node]
