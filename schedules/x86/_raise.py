"""Errors raised in compiled code whose message has values in it.

An assertion's message is a constant. Here the text is put together on the stack when the error
is met, so that it can name the offending value and its place. One loop over a template does it:
code for every part of a message would take longer to compile than the kernel.
"""

from __future__ import annotations

from typing import Any

from tvm.ir import StringImm

from ._ir import T, i64, local, tirx

_SIZE = 512  # bytes of a message
_DIGITS = 20  # of a number, with its sign


def raise_error(template: str, *values: Any, text: tuple[Any, Any] | None = None) -> None:
    """Emits code that leaves the function with a ValueError.

    In the template, ``%`` stands for the next of the int64 values, ``$`` for the text: a pointer
    and a number of bytes.
    """
    count = len(template.encode())
    most = count + _DIGITS * len(values)
    assert most < _SIZE and template.count("%") == len(values)
    source, message = local(count, "uint8"), local(_SIZE, "uint8")
    numbers, used, end = local(max(1, len(values)), "int64"), local(1, "int64"), local(1, "int64")
    _copy(source, i64(0), StringImm(template), i64(count))
    for k, value in enumerate(values):
        T.buffer_store(numbers, value, [k])
    T.buffer_store(used, i64(0), [0])
    T.buffer_store(end, i64(0), [0])
    with T.serial(i64(0), i64(count)) as i:
        this = T.Bind(tirx.Cast("int32", source[i]))
        with T.If(tirx.EQ(this, ord("%"))):
            with T.Then():
                _number(message, end, T.Bind(numbers[used[0]]))
                T.buffer_store(used, used[0] + 1, [0])
            with T.Else():
                if text is None:
                    _character(message, end, this)
                else:
                    with T.If(tirx.EQ(this, ord("$"))):
                        with T.Then():
                            length = T.Bind(tirx.min(text[1], i64(_SIZE - 1 - most)))
                            _copy(message, end[0], text[0], length)
                            T.buffer_store(end, end[0] + length, [0])
                        with T.Else():
                            _character(message, end, this)
    T.buffer_store(message, tirx.const(0, "uint8"), [end[0]])
    kind, pointer = StringImm("ValueError"), T.address_of(message[0])
    T.evaluate(tirx.call_extern("void", "TVMFFIErrorSetRaisedFromCStr", kind, pointer))
    T.evaluate(tirx.call_intrin("int32", "tirx.tvm_throw_last_error"))


def _copy(buffer: Any, at: Any, source: Any, length: Any) -> None:
    T.evaluate(tirx.call_extern("handle", "memcpy", T.address_of(buffer[at]), source, length))


def _character(message: Any, end: Any, value: Any) -> None:
    T.buffer_store(message, tirx.Cast("uint8", value), [end[0]])
    T.buffer_store(end, end[0] + 1, [0])


def _number(message: Any, end: Any, value: Any) -> None:
    """Appends the value in decimal: the digits from the last on, then copied."""
    with T.If(value < 0), T.Then():
        _character(message, end, tirx.const(ord("-"), "int32"))
    digits, rest, used = local(_DIGITS, "uint8"), local(1, "uint64"), local(1, "int64")
    ten = tirx.const(10, "uint64")
    # as unsigned, because the least int64 has no negative
    T.buffer_store(rest, tirx.Cast("uint64", tirx.Select(value < 0, 0 - value, value)), [0])
    T.buffer_store(used, i64(0), [0])
    with T.serial(i64(0), i64(_DIGITS)) as i:
        with T.If(tirx.Or(rest[0] > tirx.const(0, "uint64"), tirx.EQ(i, i64(0)))), T.Then():
            T.buffer_store(used, used[0] + 1, [0])
        digit = tirx.Cast("uint8", tirx.truncmod(rest[0], ten))
        T.buffer_store(digits, digit + tirx.const(ord("0"), "uint8"), [_DIGITS - 1 - i])
        T.buffer_store(rest, tirx.truncdiv(rest[0], ten), [0])
    _copy(message, end[0], T.address_of(digits[_DIGITS - used[0]]), used[0])
    T.buffer_store(end, end[0] + used[0], [0])
