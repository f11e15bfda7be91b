"""``inspect --asm``: the machine code of a kernel, read from the artifact without running it.

Of a GPU's kernels it is the PTX, which is a text; for SASS there are ``cuobjdump`` and the cubin.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Error, UsageError

_FUNCTION = re.compile(r"^([0-9a-f]+) <(.+)>:$")
_LINE = re.compile(r"^ *([0-9a-f]+):\t")
_REFERENCE = re.compile(r"\b(?:call +([0-9a-f]+) <|lea .*# ([0-9a-f]+) <)")


def disassemble(artifact: Any, kernel: str, target: str | None) -> Iterator[str]:
    """Lines of all functions that belong to `kernel`: a symbol, a kernel or a node name.

    That is what the symbol names and the bodies of its parallel loops, which have no names and
    are found where it refers to them. `target` picks the variant, by default the first. Raises
    UsageError where nothing has that name, Error where there is no disassembler.
    """
    variant = _variant(artifact.manifest, target)
    symbols = _symbols(variant, kernel)
    if "images" in variant:
        yield from _ptx(artifact, variant, symbols)
        return
    tool = shutil.which("objdump") or shutil.which("llvm-objdump")
    if tool is None:
        raise Error("--asm: no objdump on PATH. Fix: install binutils", "DC1020")
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        library = Path(folder) / "library.so"
        library.write_bytes(artifact.entry(variant["library"]))
        command = [tool, "-d", "--no-show-raw-insn", "-M", "intel", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise Error(f"--asm: {tool}: {reason}. Fix: check that tool", "DC1021")
    yield from _select(done.stdout.splitlines(), symbols)


def _ptx(artifact: Any, variant: dict[str, Any], symbols: set[str]) -> Iterator[str]:
    """The PTX of the images whose kernels were made of these functions."""
    for image in variant["images"]:
        if any(k == s or k.startswith(f"{s}_kernel") for k in image["kernels"] for s in symbols):
            yield from bytes(artifact.entry(image["ptx"])).decode().rstrip("\0").splitlines()


def _select(lines: list[str], wanted: set[str]) -> Iterator[str]:
    """The functions named in `wanted`, each followed by the nameless ones that it refers to."""
    functions = _functions(lines)
    for body in functions.values():
        if body.name is None or body.name.removeprefix("__tvm_ffi_") not in wanted:
            continue
        yield from body.lines
        for start in body.refers:
            part = functions.get(start)
            if part is not None and part.name is None:
                yield f"{start:016x} <{body.name}, parallel loop>:"
                yield from part.lines


@dataclass
class _Body:
    """A function of the listing; `refers` holds the addresses that it calls or passes on."""

    name: str | None
    lines: list[str] = field(default_factory=list)
    refers: list[int] = field(default_factory=list)


def _functions(lines: list[str]) -> dict[int, _Body]:
    """Functions by address: where a name stands, and where some code calls or points into code."""
    names: dict[int, str] = {}
    code: list[tuple[int, str]] = []
    for line in lines:
        if head := _FUNCTION.match(line):
            names[int(head[1], 16)] = head[2]
        elif found := _LINE.match(line):
            code.append((int(found[1], 16), line))
    inside = {address for address, _ in code}
    targets = {t for _, line in code for t in _references(line) if t in inside}
    functions: dict[int, _Body] = {}
    for address, line in code:
        if not functions or address in names or address in targets:
            functions[address] = current = _Body(names.get(address))
            if current.name:
                current.lines.append(f"{address:016x} <{current.name}>:")
        current.lines.append(line)
        current.refers += _references(line)
    return functions


def _references(line: str) -> list[int]:
    match = _REFERENCE.search(line)
    return [int(match[1] or match[2], 16)] if match else []


def _variant(manifest: dict[str, Any], target: str | None) -> dict[str, Any]:
    variants = {v["target"]: v for v in manifest["variants"]}
    if target is None:
        return next(iter(variants.values()))
    if target not in variants:
        raise UsageError(
            f"--target '{target}': the artifact has no such variant. "
            f"Fix: name one of {', '.join(variants)}"
        )
    return variants[target]


def _symbols(variant: dict[str, Any], kernel: str) -> set[str]:
    found = {
        k["symbol"] for k in variant["kernels"] if kernel in (k["symbol"], k["name"], k["node"])
    }
    steps = set(variant.get("steps", [])) | {k["symbol"] for k in variant["kernels"]}
    if kernel in steps:
        found.add(kernel)
    if not found:
        raise UsageError(
            f"--asm '{kernel}': {variant['target']} has no such kernel. "
            f"Fix: name one of {', '.join(sorted(steps))}"
        )
    return found
