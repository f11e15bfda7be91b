"""The converters of this compiler on top of TVM's ONNX importer, and what stays unsupported.

`table` holds what replaces or adds to TVM's own converters: operators that TVM refuses, lowers to
a wrong result, or lets read outside their operands. `hazards` names the uses that remain.
"""

from __future__ import annotations

from .detection import DETECTION
from .hazards import hazards
from .indexing import Div, Gather, GatherElements, GatherND, Mod, ScatterElements, ScatterND
from .integer import INTEGER
from .pointwise import POINTWISE
from .reducing import REDUCING
from .resize import RESIZE
from .sizes import SIZES
from .spatial import SPATIAL

__all__ = ["hazards", "supported", "table"]

_INDEXING = {
    c.__name__: c for c in (Gather, GatherElements, GatherND, ScatterElements, ScatterND, Div, Mod)
}


def table() -> dict[str, type]:
    """Converters by operator type: TVM's, with ours in place of those that are not right."""
    from tvm.relax.frontend.onnx import onnx_frontend

    own = {
        **POINTWISE,
        **INTEGER,
        **REDUCING,
        **_INDEXING,
        **SIZES,
        **DETECTION,
        **SPATIAL,
        **RESIZE,
    }
    return {**_tvm(onnx_frontend), **own}


def _tvm(frontend: object) -> dict[str, type]:
    converters = frontend._get_convert_map()  # type: ignore[attr-defined]
    return {k: v for k, v in converters.items() if v is not None}


def supported() -> set[str]:
    """Operator types that some converter takes."""
    return set(table())
