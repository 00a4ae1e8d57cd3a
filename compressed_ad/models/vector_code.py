"""LLVM vector code for compiled kernels: what compilers do not find by themselves in a loop nest.

Functions whose name begins with ``emit`` add instructions to an LLVM builder, on vectors of ``WIDTH``
float32 numbers; so do those below ``emitted``, which kernels can call. Kernels are compiled by ``compiled``.
Numba compiles again only when the file of the function itself changes. So ``compiled`` is told which other
files make vector code for it, and knows of this one.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import functools
import inspect
import math
import platform
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic, register_jitable


def _has(instructions: str) -> bool:
    """Whether the processor that Numba compiles for has them; by default it is this one."""
    asked = config.CPU_FEATURES
    if asked is None:
        return bool(llvm.get_host_cpu_features().get(instructions))
    return f"+{instructions}" in asked.split(",")


WIDTH = 16 if _has("avx512f") else 8 if _has("avx2") else 4
"""float32 numbers in a vector register of this machine."""
FUSED = _has("fma") or not platform.machine().lower().startswith(("x86", "amd64", "i386", "i686"))
"""Whether a b + c can be rounded once, as every server has done since 2013; else it is rounded twice."""
VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)
ROWS = 8 if WIDTH == 16 else 4
COLUMNS = 2 * WIDTH
"""Products of models are computed in tiles of ``ROWS`` x ``COLUMNS``."""


def compiled(*files: str, **options: Any) -> Callable[[Any], Any]:
    """Numba's ``njit``, with the options of all our kernels: cached on disk, without the GIL.

    ``files``: those beside this one from which the functions have vector code.
    """
    content = b"".join(Path(file).read_bytes() for file in (__file__, *files))
    version = sha256(content).hexdigest()[:8]

    def compile_it(function: Any) -> Any:
        # Names the cached file, which must not outlive these.
        function.__qualname__ += f"-{version}-{WIDTH}{'' if FUSED else '-unfused'}"
        return njit(cache=True, nogil=True, error_model="numpy", **options)(function)

    return compile_it


def number(value: int) -> ir.Constant:
    """A whole number."""
    return ir.Constant(ir.IntType(64), value)


def constant(value: float) -> ir.Constant:
    """A vector of equal numbers."""
    # LLVM's text form of a float is a double that float32 holds exactly.
    return ir.Constant(VECTOR, [float(np.float32(value))] * WIDTH)


def integers(values: list[int]) -> ir.Constant:
    """A vector of int32."""
    return ir.Constant(INTEGERS, values)


def shuffled(builder, a, b, order):
    """The numbers ``order`` of the vectors a and b, one after the other."""
    return builder.shuffle_vector(a, b, integers(order))


def spread(builder, scalar, kind=VECTOR):
    """A vector of equal numbers."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, number(0))
    return shuffled(builder, one, one, [0] * WIDTH)


def emitted(gives: Any = types.void, **kinds: Any) -> Callable[[Any], Any]:
    """Decorator: a function for kernels, made of one that adds its instructions to the builder.

    Kernels hand over arrays, and numbers of the types in ``kinds``, by default int64; they get a ``gives``.
    After the builder, the decorated function takes numbers as they are, and for each array a function of an
    offset (in numbers) that points there.
    """

    def decorate(emit):
        names = list(inspect.signature(emit).parameters)[1:]

        @functools.wraps(emit)
        def typed(typingctx, *given):
            own = [
                kind if isinstance(kind, types.Array) else kinds.get(name, types.int64)
                for name, kind in zip(names, given, strict=True)
            ]

            def codegen(context, builder, signature, args):
                result = emit(builder, *(_handed(context, builder, *a) for a in zip(own, args, strict=True)))
                return context.get_dummy_value() if result is None else result

            return gives(*own), codegen

        return intrinsic(typed)

    return decorate


def _handed(context, builder, kind, value):
    if not isinstance(kind, types.Array):
        return value
    data = cgutils.create_struct_proxy(kind)(context, builder, value=value).data
    return lambda at: builder.gep(data, [at])


def load(builder, pointer, kind=VECTOR):
    """A vector from memory."""
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)


def store(builder, value, pointer):
    """A vector to memory."""
    builder.store(value, builder.bitcast(pointer, VECTOR.as_pointer()), align=4)


def emit_fma(builder, a, b, c):
    """a b + c, never left to the compiler: rounded once if ``FUSED``, else twice."""
    if not FUSED:
        return builder.fadd(builder.fmul(a, b), c)
    kind = a.type
    name = f"llvm.fma.v{kind.count}f32" if isinstance(kind, ir.VectorType) else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [a, b, c])


@emitted(types.float32, **dict.fromkeys("abc", types.float32))
def fma(builder, a, b, c):
    """``emit_fma`` of three float32 numbers, for loops that the compiler turns into vector code."""
    return emit_fma(builder, a, b, c)


def emit_products(builder, begin, a, a_at, a_row, a_k, b, b_at, b_k, n):
    """``begin`` + sum_k A[r, k] B[k, v], k < n, for each (row r, vector v) of the vectors ``begin``.

    ``a`` and ``b`` point; ``a_at`` and ``b_at`` are offsets, ``a_row``, ``a_k`` and ``b_k`` strides.
    """
    add, mul = builder.add, builder.mul
    # Stack slots in the source, registers after optimisation.
    sums = {place: cgutils.alloca_once_value(builder, value) for place, value in begin.items()}
    rows, vectors = ({place[axis]: None for place in begin} for axis in (0, 1))
    with cgutils.for_range(builder, n) as loop:
        row_b = add(b_at, mul(loop.index, b_k))
        columns = {v: load(builder, b(add(row_b, number(v * WIDTH)))) for v in vectors}
        column_a = add(a_at, mul(loop.index, a_k))
        for r in rows:
            one = spread(builder, builder.load(a(add(column_a, mul(a_row, number(r))))))
            for v in vectors:
                total = emit_fma(builder, one, columns[v], builder.load(sums[r, v]))
                builder.store(total, sums[r, v])
    return {place: builder.load(slot) for place, slot in sums.items()}


def emit_exp(builder, x):
    """e^x, relative error below 3e-7, for x up to 88; 1.6e-38 below -87, and NaN for NaN."""
    low = constant(-87.0)
    x = builder.select(builder.fcmp_unordered(">", x, low), x, low)
    shift = constant(12582912.0)  # 1.5 x 2^23: adding it rounds to a whole number
    n = builder.fsub(builder.fadd(builder.fmul(x, constant(1.4426950408889634)), shift), shift)
    r = emit_fma(builder, n, constant(-0.693359375), x)
    r = emit_fma(builder, n, constant(2.12194440e-4), r)
    y = constant(1 / 720)
    for c in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        y = emit_fma(builder, y, r, constant(c))
    bits = builder.shl(builder.fptosi(n, INTEGERS), integers([23] * WIDTH))
    bits = builder.add(bits, integers([0x3F800000] * WIDTH))
    return builder.fmul(y, builder.bitcast(bits, VECTOR))


def make_tile(vectors: int, add: bool, rows: int = ROWS) -> Any:
    """C[0:rows, 0:vectors WIDTH] = sum_k A[., k] B[k, .], k < n, or C += it; by offsets and strides."""

    @emitted()
    def tile(builder, c, c_at, c_row, a, a_at, a_row, a_k, b, b_at, b_k, n):
        plus, times = builder.add, builder.mul
        to = {
            (r, v): c(plus(c_at, plus(times(c_row, number(r)), number(v * WIDTH))))
            for r in range(rows)
            for v in range(vectors)
        }
        begin = {place: load(builder, at) if add else constant(0.0) for place, at in to.items()}
        sums = emit_products(builder, begin, a, a_at, a_row, a_k, b, b_at, b_k, n)
        for place, value in sums.items():
            store(builder, value, to[place])

    return tile


def make_gelu(backward: bool) -> Any:
    """y = gelu(x) on [0 : n], or y = gelu'(x) dy; n a multiple of WIDTH.

    gelu(x) = x s, s = 1 / (1 + e), e = exp(-u), u = 2 sqrt(2 / pi) (x + .044715 x^3): the form with tanh of
    Hendrycks & Gimpel 2016. Its derivative is s + x u' e s^2.
    """

    @emitted()
    def gelu(builder, x, dy, y, n):
        slope, cube, high = 2 * math.sqrt(2 / math.pi), 0.044715, constant(88.0)
        with cgutils.for_range(builder, builder.sdiv(n, number(WIDTH))) as loop:
            at = builder.mul(loop.index, number(WIDTH))
            value = load(builder, x(at))
            square = builder.fmul(value, value)
            inner = emit_fma(builder, square, constant(-slope * cube), constant(-slope))
            power = builder.fmul(value, inner)
            power = builder.select(builder.fcmp_unordered("<", power, high), power, high)
            e = emit_exp(builder, power)
            s = builder.fdiv(constant(1.0), builder.fadd(e, constant(1.0)))
            if backward:
                du = emit_fma(builder, square, constant(3 * slope * cube), constant(slope))
                rest = builder.fmul(builder.fmul(value, du), builder.fmul(builder.fmul(e, s), s))
                result = builder.fmul(load(builder, dy(at)), builder.fadd(s, rest))
            else:
                result = builder.fmul(value, s)
            store(builder, result, y(at))

    return gelu


@register_jitable
def padded(n, multiple):
    """The smallest multiple that is not less than ``n``."""
    return (n + multiple - 1) // multiple * multiple
