"""Embedding tables in fewer bits: the error, the format, and rows that cannot be quantized."""

from __future__ import annotations

import numpy as np
import pytest

from dccompile import reference, tables
from dccompile.errors import ModelError
from dccompile.workload import EmbeddingBag, EmbeddingTables

FORMS = [(bits, scale) for bits in (8, 4) for scale in ("f32", "f16")]
STORAGE = {8: "u8", 4: "u4"}


def _rows(rows, dim, seed=0, scale=0.1):
    return (np.random.default_rng(seed).standard_normal((rows, dim)) * scale).astype(np.float32)


def _relative(table, values):
    return np.sqrt(np.square(values - table, dtype=np.float64).sum() / np.square(table).sum())


@pytest.mark.parametrize(("bits", "scale"), FORMS)
@pytest.mark.parametrize("dim", (1, 2, 7, 16, 64, 129))
def test_error_is_what_is_reported(bits, scale, dim):
    table = _rows(300, dim)
    codes, error = tables.quantize_rows(table, bits, scale)
    work = EmbeddingBag((300,), dim, STORAGE[bits], scale)
    assert codes.shape == (300, work.row_bytes) and codes.dtype == np.uint8
    values = tables.dequantize_rows(codes, bits, dim, scale)
    assert error.relative == pytest.approx(_relative(table, values), rel=1e-3, abs=1e-7)
    gap = np.abs(values - table)
    assert error.largest == pytest.approx(gap.max(), rel=1e-3, abs=1e-7)
    assert gap[error.row].max() == pytest.approx(gap.max(), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(("bits", "scale"), FORMS)
def test_better_than_the_whole_range(bits, scale):
    """No row is worse than with its least and greatest value as the range; int4 gains 8 %."""
    table = _rows(500, 64)
    codes, error = tables.quantize_rows(table, bits, scale)
    low, high = table.min(axis=1, keepdims=True), table.max(axis=1, keepdims=True)
    levels = 2**bits - 1
    step = (high - low) / levels
    plain = np.rint((table - low) / step) * step + low
    values = tables.dequantize_rows(codes, bits, 64, scale)
    squares = [np.square(v - table).sum(axis=1) for v in (values, plain)]
    assert (squares[0] <= squares[1] * (1.001 if scale == "f32" else 1.2)).all()
    assert error.relative_plain == pytest.approx(_relative(table, plain), rel=2e-3)
    assert error.relative < error.relative_plain * (0.92 if bits == 4 else 0.98)


def test_outlier_is_clipped():
    """One of 64 values twice as large as the next: 15 steps are better spent on the others."""
    table = np.tile(np.linspace(-1, 1, 64, dtype=np.float32), (3, 1))
    table[:, 20] = 1.4
    codes, _ = tables.quantize_rows(table, 4)
    assert tables.dequantize_rows(codes, 4, 64).max() < 1.35


@pytest.mark.parametrize(("bits", "scale"), FORMS)
def test_exact_rows(bits, scale):
    """Rows that codes can hold come back unchanged: zeros, constants, a grid of 2**-k steps."""
    grid = np.arange(2**bits, dtype=np.float32) / 8 - 1
    table = np.stack([np.zeros_like(grid), np.full_like(grid, 0.75), grid, -grid])
    codes, error = tables.quantize_rows(table, bits, scale)
    np.testing.assert_array_equal(tables.dequantize_rows(codes, bits, len(grid), scale), table)
    assert error.relative == error.largest == 0


@pytest.mark.parametrize(("bits", "scale"), FORMS)
def test_kernels_read_it(bits, scale):
    """The reference of the operator gives the same values for bags of one row."""
    table = _rows(20, 33)
    codes, _ = tables.quantize_rows(table, bits, scale)
    work = EmbeddingBag((20,), 33, STORAGE[bits], scale, bags=20, pooling=1)
    index = np.arange(20).reshape(20, 1, 1)
    bags = reference.embedding_bag(work, EmbeddingTables([codes]), index)[:, 0]
    values = tables.dequantize_rows(codes, bits, 33, scale)
    np.testing.assert_allclose(bags, values, rtol=0, atol=2e-7)  # a fused multiply-add less


@pytest.mark.parametrize("bits", (8, 4))
def test_parts_are_the_whole(bits, tmp_path):
    """Any cut of a table gives the same bytes, the errors add up, a mapped file may be filled."""
    table = _rows(3000, 50)
    codes, error = tables.quantize_rows(table, bits)
    mapped = np.memmap(tmp_path / "rows", np.uint8, "w+", shape=codes.shape)
    parts = tables.RowError()
    for first, last in ((0, 1), (1, 1400), (1400, 3000)):
        out = mapped[first:last]
        got, part = tables.quantize_rows(table[first:last], bits, out=out, first=first)
        assert got is out
        parts += part
    np.testing.assert_array_equal(mapped, codes)
    assert parts.relative == pytest.approx(error.relative, rel=1e-9)
    assert (parts.largest, parts.row) == (error.largest, error.row)


@pytest.mark.parametrize(("bits", "scale"), FORMS)
def test_extreme_rows(bits, scale):
    """Ranges from subnormal to nearly all of f32."""
    rows = _rows(4, 40, scale=1.0) * np.array([[1e-39], [1e-30], [1e4], [1.0]], np.float32)
    if scale == "f32":
        rows[3] *= 5e37
    codes, _ = tables.quantize_rows(rows, bits, scale)
    values = tables.dequantize_rows(codes, bits, 40, scale)
    assert np.isfinite(values).all()
    steps = np.ptp(rows.astype(np.float64), axis=1, keepdims=True) / (2**bits - 1)
    # clipping may cost 4 steps of int4; f16 rounds the bias, and to multiples of 2**-24
    allowed = steps * (0.51 if bits == 8 else 4) + 1e-3 * np.abs(rows).max(axis=1, keepdims=True)
    assert (np.abs(values.astype(np.float64) - rows) <= allowed + 1e-7 * (scale == "f16")).all()


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_row_with_no_number(value):
    table = _rows(5000, 16)
    table[4321, 7] = value
    for make in (lambda t: tables.quantize_rows(t, 8, name="emb.3"), tables.half_rows):
        with pytest.raises(ModelError, match=rf"row 4321: it holds {value} in column 7") as error:
            make(table)
        assert error.value.problems[0].code == "DC3161"
    with pytest.raises(ModelError, match=r"emb\.3, row 14321: "):
        tables.quantize_rows(table, 4, name="emb.3", first=10000)


def test_row_beyond_half():
    table = _rows(10, 16)
    table[3, 1] = 2e6
    with pytest.raises(ModelError, match="row 3: its range does not fit a scale of f16"):
        tables.quantize_rows(table, 4, "f16")
    with pytest.raises(ModelError, match="row 3: it holds a value beyond 65504"):
        tables.half_rows(table)
    tables.quantize_rows(table, 4, "f32")


@pytest.mark.parametrize("shape", ((0, 16), (4, 0)))
def test_no_rows(shape):
    with pytest.raises(ModelError, match="a table of shape") as error:
        tables.quantize_rows(np.zeros(shape, np.float32), 8)
    assert error.value.problems[0].code == "DC3160"


def test_half_rows():
    table = _rows(100, 33)
    half, error = tables.half_rows(table)
    np.testing.assert_array_equal(half, table.astype(np.float16))
    assert error.relative == pytest.approx(_relative(table, half.astype(np.float32)), rel=1e-6)
