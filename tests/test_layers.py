"""Imports point one way: a module may import only from the layers below it."""

from __future__ import annotations

import ast
from pathlib import Path

import dccompile

LAYERS = (
    {"errors", "lines", "machine", "sls"},
    {"workload", "kernel", "outliers", "runtime"},
    {"streams"},
    {"reference", "tables", "columns", "linker", "cache", "environment", "console", "fingerprint"},
    {"threadpool", "schedules", "records"},
    {"lookup"},
    {"registry", "generic", "models"},
    {"cuda"},
    {"codegen"},
    {"frontend", "arena"},
    {"aot"},
    {"pipeline"},
    {"worker", "compiler", "checker"},
    {"sources"},
    {"bench", "quantization"},
    {"tuning"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ROOT = Path(dccompile.__file__).parent


def imported(path: Path, package: tuple[str, ...]) -> set[str]:
    """First-level names inside dccompile that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, a.name]) for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("dccompile.") and n.count(".")}
    return found & set(LEVEL)


PACKAGES = ("runtime", "generic", "cuda", "frontend", "bench", "quantization", "tuning", "cli")


def modules() -> list[tuple[str, Path, tuple[str, ...]]]:
    """Layer name, file and package of every module."""
    out = [(p.stem, p, ("dccompile",)) for p in ROOT.glob("*.py") if p.stem != "__init__"]
    folders = [(name, ROOT / name) for name in PACKAGES] + [("models", ROOT.parent / "models")]
    for name, folder in folders:
        out += [(name, path, ("dccompile", name)) for path in folder.glob("*.py")]
    return out


def test_every_module_has_a_layer() -> None:
    assert {name for name, _, _ in modules()} <= set(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        f"{path.name} imports {other}"
        for name, path, package in modules()
        for other in imported(path, package)
        if LEVEL[other] > LEVEL[name]
    ]
    assert wrong == []


def test_the_runtime_needs_no_compiler() -> None:
    for path in (ROOT / "runtime").glob("*.py"):
        names = imported(path, ("dccompile", "runtime"))
        assert names <= {"errors", "machine", "runtime"}, path.name


def test_only_the_registry_reaches_schedules() -> None:
    users = {name for name, path, package in modules() if "schedules" in imported(path, package)}
    assert users == {"registry"}


def test_schedules_know_only_contracts_and_siblings() -> None:
    folder = ROOT.parent / "schedules" / "x86"
    for path in folder.glob("*.py"):
        names = imported(path, ("dccompile", "schedules", "x86"))
        allowed = {"errors", "machine", "workload", "kernel", "outliers", "schedules"}
        assert names <= allowed, path.name
