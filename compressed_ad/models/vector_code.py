"""LLVM vector code for compiled kernels: what compilers do not find by themselves in a loop nest.

Functions whose name begins with ``emit`` add instructions to an LLVM builder, on vectors of ``WIDTH``
float32 numbers. Kernels are compiled by ``compiled``. All compiled functions of a subject are in one file,
because Numba compiles again only when the file of the function itself changes, or this one.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

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
from numba.extending import intrinsic


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
_VERSION = sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Numba's ``njit``, with the options of all our kernels: cached on disk, without the GIL."""

    def compile_it(function: Any) -> Any:
        # Names the cached file, which must not outlive this one.
        function.__qualname__ += f"-{_VERSION}-{WIDTH}{'' if FUSED else '-unfused'}"
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


def pointers(context, builder, signature, args):
    """For each array argument, a function of an offset (in numbers) that points there."""

    def pointer(kind, value):
        data = cgutils.create_struct_proxy(kind)(context, builder, value=value).data
        return lambda at: builder.gep(data, [at])

    arrays = zip(signature.args, args, strict=True)
    return [pointer(kind, value) for kind, value in arrays if isinstance(kind, types.Array)]


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


@intrinsic
def fma(typingctx, a, b, c):
    """``emit_fma`` of three float32 numbers, for loops that the compiler turns into vector code."""
    f32 = types.float32
    return f32(f32, f32, f32), lambda context, builder, signature, args: emit_fma(builder, *args)


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
