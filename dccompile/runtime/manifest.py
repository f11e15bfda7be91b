"""What a manifest must say before the runtime believes a word of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

FORMAT = 1
RUNTIME = "runtime/libdccpool.so"
DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
)  # fmt: skip
GPU = "cuda:"  # the targets of variants with images of GPU code begin so
NAME = re.compile("[A-Za-z_$][A-Za-z0-9_$]{0,1023}", re.ASCII)
VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})", re.ASCII)
ALIGN = 64  # of constants in params
_MAX_RANK = 32
_MAX_DIM = 1 << 48


def check_manifest(manifest: Any, error: Callable[[str], Exception]) -> None:
    """Raises ``error(found)`` at the first statement that does not have the agreed form."""

    def need(good: bool, found: str) -> None:
        if not good:
            raise error(found)

    def listed(where: Any, key: str) -> list[Any]:
        value = where.get(key) if isinstance(where, dict) else None
        need(isinstance(value, list), f"{key!r} is no list")
        return value  # type: ignore[return-value]

    def named(rows: list[Any], key: str, what: str) -> list[str]:
        names = [row.get(key) if isinstance(row, dict) else None for row in rows]
        need(all(isinstance(n, str) and n for n in names), f"{what} without {key}")
        need(len(set(names)) == len(names), f"two {what} of the same {key}")
        return names  # type: ignore[return-value]

    def natural(value: Any, most: int = _MAX_DIM) -> bool:
        return type(value) is int and 0 <= value <= most

    need(isinstance(manifest, dict), "it is no object")
    need(manifest.get("format") == FORMAT, f"format {str(manifest.get('format'))[:40]}")

    symbols = listed(manifest, "symbols")
    named(symbols, "name", "symbols")
    for row in symbols:
        most = row.get("max")
        good = natural(row.get("min")) and (most is None or natural(most))
        need(good and (most is None or row["min"] <= most), f"the range of symbol {row['name']!r}")
        need(type(row.get("computed", False)) is bool, f"whether {row['name']!r} is computed")
    inputs = {row["name"] for row in symbols if not row.get("computed")}

    seen: set[str] = set()
    for side in ("inputs", "outputs"):
        for row, name in zip(
            rows := listed(manifest, side), named(rows, "name", side), strict=True
        ):
            what = f"{side[:-1]} {name!r}"
            need(row.get("dtype") in DTYPES, f"the dtype of {what}")
            shape = listed(row, "shape")
            need(len(shape) <= _MAX_RANK, f"the rank of {what}")
            for dim in shape:
                if isinstance(dim, str):
                    need(side == "outputs" or dim in inputs, f"a dimension of {what}: {dim[:40]!r}")
                    seen |= {dim} if side == "inputs" else set()
                else:
                    need(natural(dim), f"a dimension of {what}")
    need(bool(manifest["outputs"]), "no outputs")
    need(seen == inputs, "a symbol that no input has")

    entries = manifest.get("entries")
    need(isinstance(entries, dict), "'entries' is no object")
    for name, facts in entries.items():
        good = isinstance(facts, dict) and natural(facts.get("size"), 1 << 62)
        good = good and natural(facts.get("crc32"), 0xFFFFFFFF)
        sha = facts.get("sha256") if good else None
        need(isinstance(sha, str) and bool(re.fullmatch("[0-9a-f]{64}", sha)), f"entry {name!r}")

    variants = listed(manifest, "variants")
    need(bool(variants), "no variants")
    named(variants, "target", "variants")
    for row in variants:
        what = f"of variant {row['target']!r}"
        flags = listed(row, "features")
        need(all(isinstance(flag, str) for flag in flags), f"the features {what}")
        for key in ("library", "params"):
            value = row.get(key)
            given = isinstance(value, str) and value in entries
            need(given or (key == "params" and value is None), f"the {key} {what}")
        need(row["target"].startswith(GPU) == ("images" in row), f"whether there are images {what}")
        for piece in listed(row, "pieces") if "images" in row else []:
            good = isinstance(piece, list) and len(piece) == 2 and all(map(natural, piece))
            good = good and not piece[0] % ALIGN and not piece[1] % ALIGN
            good = good and row["params"] is not None
            need(good and piece[0] < entries[row["params"]]["size"], f"a piece of params {what}")
        kernels: set[str] = set()
        for image in listed(row, "images") if "images" in row else []:
            for key in ("cubin", "ptx"):
                value = image.get(key) if isinstance(image, dict) else None
                need(isinstance(value, str) and value in entries, f"the {key} of an image {what}")
            names = listed(image, "kernels")
            good = bool(names) and all(isinstance(n, str) and NAME.fullmatch(n) for n in names)
            need(good and len(set(names)) == len(names), f"the kernels of an image {what}")
            need(kernels.isdisjoint(names), f"two images with the same kernel {what}")
            kernels.update(names)
    runtime = manifest.get("runtime")
    need(isinstance(runtime, dict), "'runtime' is no object")
    need(isinstance(runtime.get("tvm_ffi"), str), "'runtime' names no tvm_ffi")
    made = runtime.get("cuda", "0.0")
    need(isinstance(made, str) and bool(VERSION.fullmatch(made)), "the version of CUDA")
    need(RUNTIME in entries, f"no entry {RUNTIME}")
