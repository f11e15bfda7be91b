"""Reductions of which several threads each compute a part."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .gpu_ir import barrier, i64, parts, product, registers, shared, when
from .gpu_values import Scalar
from .lanes import Hook, rebuild, same
from .loops import Loops
from .stages import Nest


class Partial:
    """The accumulators of one thread; `terms` are what updates add to them, if parts are joined."""

    def __init__(
        self, loops: Loops, nest: Nest, env: dict[Any, Any], terms: list[Any] | None
    ) -> None:
        self.memory, self.nest, self.env, self.terms = loops.memory, nest, env, terms
        self.acc = [registers(1, str(a.ty.dtype.dtype)) for a in nest.acc]

    def hook(self) -> Hook:
        """Loads of the accumulators."""

        def found(load: Any, _: Any) -> Any:
            for own, acc in zip(self.nest.acc, self.acc, strict=True):
                if load.source.same_as(own):
                    return acc[0]
            return None

        return found

    def begin(self, at: Scalar) -> None:
        for value, acc in zip(self.nest.inits, self.acc, strict=True):
            T.buffer_store(acc, at(value), [0])

    def step(self, at: Scalar) -> None:
        self.keep([at(u) for u in self.nest.updates], at)

    def keep(self, values: list[Any], at: Scalar) -> None:
        if len(values) > 1:
            values = [at.bind(v) for v in values]
        for value, acc in zip(values, self.acc, strict=True):
            T.buffer_store(acc, value, [0])

    def run(self, y: Any, share: int) -> None:
        """Part `y` of `share`: every `share`-th step."""
        self.begin(Scalar(self.memory, self.env))
        over = self.nest.over
        with ExitStack() as loops:
            point = dict(self.env)
            if share == 1:
                for it in over:
                    var = loops.enter_context(T.serial(i64(0), tirx.Cast("int64", it.extent)))
                    point[it.var] = Loops.as_type(it.var, var)
            else:
                total = product(it.extent for it in over)
                i = loops.enter_context(T.serial(i64(0), parts(total, share)))
                at = T.Bind(i * share + tirx.Cast("int64", y))
                loops.enter_context(when(at < total))
                rest: Any = at
                for it in reversed(over[1:]):
                    extent = tirx.Cast("int64", it.extent)
                    point[it.var] = Loops.as_type(it.var, T.Bind(tirx.FloorMod(rest, extent)))
                    rest = T.Bind(tirx.FloorDiv(rest, extent))
                point[over[0].var] = Loops.as_type(over[0].var, rest)
            self.step(Scalar(self.memory, point, self.hook()))

    def join(self, t: Any, y: Any, share: int, threads: int, along: bool) -> None:
        """Brings the parts of every result together, in those threads that have part 0.

        Thread `t` has part `y`; the parts of a result are neighbours if `along`, else
        `threads / share` apart. All threads of the block must come here.
        """
        if share == 1:
            return
        stores = [shared(threads, str(a.ty.dtype.dtype)) for a in self.nest.acc]
        apart = 1 if along else threads // share
        for store, acc in zip(stores, self.acc, strict=True):
            T.buffer_store(store, acc[0], [t])
        barrier()
        gap = share // 2
        while gap:
            with when(y < gap):
                other = [store[t + gap * apart] for store in stores]
                at = Scalar(self.memory, self.env, self.hook())
                self.combine(at, [at.bind(v) for v in other])
                for store, acc in zip(stores, self.acc, strict=True):
                    T.buffer_store(store, acc[0], [t])
            barrier()
            gap //= 2

    def combine(self, at: Scalar, others: list[Any]) -> None:
        """The reduction's own step, applied to two parts."""
        assert self.terms is not None
        terms = self.terms
        names = [tirx.Var(f"part{i}", str(v.ty)) for i, v in enumerate(others)]

        def change(node: Any) -> Any:
            return next((v for v, t in zip(names, terms, strict=True) if same(node, t)), None)

        env = {**self.env, **dict(zip(names, others, strict=True))}
        inner = Scalar(self.memory, env, self.hook())
        self.keep([inner(rebuild(u, change)) for u in self.nest.updates], at)
