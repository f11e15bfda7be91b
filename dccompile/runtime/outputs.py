"""What a call returns."""

from __future__ import annotations

from collections.abc import ItemsView, KeysView, Sequence, ValuesView
from math import prod
from typing import Any, ClassVar


class Outputs(tuple):
    """The outputs of a call, by position or by name: always a tuple, always a mapping."""

    _index: ClassVar[dict[str, int]] = {}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            try:
                key = self._index[key]
            except KeyError:
                raise KeyError(f"no output {key!r}, there are {', '.join(self._index)}") from None
        return tuple.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._index if isinstance(key, str) else any(v is key for v in self)

    def __reduce__(self) -> Any:
        return _outputs, (tuple(self._index), tuple(self))

    def __repr__(self) -> str:
        return f"Outputs({', '.join(f'{k}={v!r}' for k, v in self.items())})"

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._index else default

    def _mapping(self) -> dict[str, Any]:
        return dict(zip(self._index, self, strict=True))

    def keys(self) -> KeysView[str]:
        return self._index.keys()

    def values(self) -> ValuesView[Any]:
        return self._mapping().values()

    def items(self) -> ItemsView[str, Any]:
        return self._mapping().items()


def outputs_class(names: Sequence[str]) -> type[Outputs]:
    return type("Outputs", (Outputs,), {"_index": {name: i for i, name in enumerate(names)}})


def cut(buffer: Any, dims: Sequence[int]) -> Any:
    """The row-major tensor of `dims` at the start of an array's memory, or of a torch tensor's."""
    if tuple(buffer.shape) == tuple(dims):
        return buffer
    return buffer.reshape(-1)[: prod(dims)].reshape(dims)


def _outputs(names: Sequence[str], values: Sequence[Any]) -> Outputs:
    return outputs_class(names)(values)
