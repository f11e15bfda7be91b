"""dccompile: a kernel compiler for deep-learning inference in data centers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    AccuracyError,
    Error,
    IncompatibleError,
    InputError,
    ModelError,
    TuningError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from .checker import check
    from .compiler import compile
    from .quantization.accuracy import accuracy
    from .quantization.quantize import quantize
    from .runtime.loader import load
    from .tuning.tune import tune

__version__ = "0.1.0"
__all__ = [
    "AccuracyError",
    "Error",
    "IncompatibleError",
    "InputError",
    "ModelError",
    "TuningError",
    "UnsupportedError",
    "__version__",
    "accuracy",
    "check",
    "compile",
    "load",
    "quantize",
    "tune",
]

_LAZY = {
    "accuracy": "quantization.accuracy",
    "check": "checker",
    "compile": "compiler",
    "load": "runtime.loader",
    "quantize": "quantization.quantize",
    "tune": "tuning.tune",
}


def __getattr__(name: str) -> Any:
    """Imports a verb's module when it is first used: ``import dccompile`` stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dccompile' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
