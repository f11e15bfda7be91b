"""Deep learning recommendation model (Naumov et al., 2019), in the proportions of MLPerf.

dense (N, 13) -> bottom MLP; sparse (N, tables, pooling) -> one pooled row of every table; dot
products of all pairs of these vectors; top MLP -> click probability (N, 1).

``python -m dccompile.models.dlrm --export`` writes the graphs and scales of this folder anew;
only that needs PyTorch.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Outputs = list[np.ndarray]
DENSE = 13


@dataclass(frozen=True)
class Config:
    """Sizes; an empty `bottom` leaves the top MLP alone, fed with floats (N, top[0]).

    `graph` names the file that holds the graph, for whatever number of rows.
    """

    graph: str = "dlrm"
    bottom: tuple[int, ...] = (DENSE, 512, 256, 64)
    top: tuple[int, ...] = (512, 512, 256, 1)  # behind the interaction
    tables: int = 26
    rows: int = 1000
    pooling: int = 20


CONFIGS = {
    "dlrm-small": Config(),
    "dlrm": Config(rows=100_000),
    "dlrm-1g": Config(rows=534_000),  # of 72 bytes as int8, in 26 tables: 1.0 GB
    "dlrm-clicks": Config("dlrm-clicks", (DENSE, 32, 16), (64, 32, 1), 8, 500, 4),
    "dlrm-mlp": Config("dlrm-mlp", bottom=(), top=(512, 512, 512, 256, 1), tables=0),
}
_TRACED = ("dlrm-small", "dlrm-clicks", "dlrm-mlp")  # whose graphs and scales lie in this folder


def path(graph: str, suffix: str = "onnx") -> Path:
    """The file of this folder that holds a graph, or with "json" its scales."""
    return Path(__file__).with_name(f"{graph}.{suffix}")


def size(name: str) -> int:
    """Bytes of the tables."""
    config = CONFIGS[name]
    return 4 * config.tables * config.rows * config.bottom[-1] if config.tables else 0


def shapes(name: str, batch: int | str) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the inputs."""
    config = CONFIGS[name]
    if not config.bottom:
        return {"x": (batch, config.top[0])}
    return {"dense": (batch, DENSE), "sparse": (batch, config.tables, config.pooling)}


def batch(name: str, largest: int) -> str | None:
    """Any batch; up to 256 where the tables need a plan for a largest one."""
    return f"1..{max(largest, 256)}" if CONFIGS[name].tables else None


def graph(name: str) -> onnx.ModelProto:
    """The float model without weights."""
    from dccompile.models.weights import resize

    config = CONFIGS[name]
    model = onnx.ModelProto.FromString(path(config.graph).read_bytes())
    resize(model, config.rows)
    return model


def scales(name: str) -> dict[str, list[float]]:
    """Scale and zero point of the inputs of the layers."""
    found: dict[str, list[float]] = json.loads(path(CONFIGS[name].graph, "json").read_text())
    return found


def weights(name: str) -> dict[str, np.ndarray] | None:
    """Trained weights, where there are any."""
    from dccompile.models import clicks

    return clicks.weights() if name == "dlrm-clicks" else None


def inputs(name: str, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Random inputs for a model of this file."""
    config = CONFIGS[name]
    rng = np.random.default_rng(seed)
    if not config.bottom:
        return {"x": rng.standard_normal((batch, config.top[0]), np.float32)}
    indices = rng.integers(0, config.rows, (batch, config.tables, config.pooling))
    return {"dense": rng.standard_normal((batch, DENSE), np.float32), "sparse": indices}


def matched(name: str, ours: Outputs, theirs: Outputs) -> tuple[Outputs, Outputs]:
    """The same: rows are samples."""
    return ours, theirs


def definition(name: str) -> Any:
    """The model as a torch.nn.Module."""
    return module(CONFIGS[name])


def module(config: Config) -> Any:
    """The model as a torch.nn.Module."""
    import torch
    from torch import nn

    def mlp(widths: tuple[int, ...], last: type[nn.Module]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for index in range(len(widths) - 1):
            layers.append(nn.Linear(widths[index], widths[index + 1]))
            layers.append(last() if index == len(widths) - 2 else nn.ReLU())
        return nn.Sequential(*layers)

    class Dlrm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bottom = mlp(config.bottom, nn.ReLU)
            dim, vectors = config.bottom[-1], config.tables + 1
            # Random only so that the exporter does not merge equal tables.
            self.tables = nn.ParameterList(
                torch.randn(config.rows, dim) for _ in range(config.tables)
            )
            rows, columns = np.tril_indices(vectors, -1)
            self.register_buffer("pairs", torch.from_numpy(rows * vectors + columns))
            self.top = mlp((dim + len(rows), *config.top), nn.Sigmoid)

        def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
            z = self.bottom(dense)
            pooled = [
                nn.functional.embedding(sparse[:, index], table).sum(1)
                for index, table in enumerate(self.tables)
            ]
            vectors = torch.stack([z, *pooled], 1)
            products = torch.matmul(vectors, vectors.transpose(1, 2)).flatten(1)
            return self.top(torch.cat([z, products.index_select(1, self.pairs)], 1))

    return Dlrm() if config.bottom else mlp(config.top, nn.Sigmoid)


def trace(name: str) -> onnx.ModelProto:
    """The graph as PyTorch exports it now, weights stripped."""
    from dccompile.models import tracing

    return tracing.trace(module(CONFIGS[name]), inputs(name, 2, 0))


def _export() -> None:
    from dccompile.models import clicks
    from dccompile.models.qdq import calibrate, dump, layer_inputs
    from dccompile.models.weights import fill

    for name in _TRACED:
        model = trace(name)
        graph = CONFIGS[name].graph
        path(graph).write_bytes(model.SerializeToString(deterministic=True))
        if name == "dlrm-clicks":
            fill(model, 0, clicks.weights())
            feeds, _ = clicks.samples(4096, 3)
        else:
            fill(model, 0)
            feeds = inputs(name, 256, 1)
        dump(calibrate(model, [feeds], layer_inputs(model)), path(graph, "json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", action="store_true", required=True)
    parser.parse_args()
    _export()
