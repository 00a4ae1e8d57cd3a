"""LLVM vector code for compiled kernels: what compilers do not find by themselves in a loop nest.

Functions whose name begins with ``emit`` add instructions to an LLVM builder, on vectors of ``WIDTH``
float32 numbers. Kernels are compiled by ``compiled``. All compiled functions of a subject are in one file,
because Numba compiles again only when the file of the function itself changes, or this one.
"""

# Numba infers the types of compiled functions; annotations would only repeat the docstrings.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils


def _vector_width() -> int:
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


WIDTH = _vector_width()
"""float32 numbers in a vector register of this machine."""
VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)
_VERSION = sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Numba's ``njit``, with the options of all our kernels: cached on disk, without the GIL."""

    def compile_it(function: Any) -> Any:
        function.__qualname__ += (
            f"-{_VERSION}-{WIDTH}"  # names the cached file, which must not outlive this one
        )
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


def emit_fma(builder, a, b, c, flags=("contract",)):
    """a b + c."""
    return builder.fadd(builder.fmul(a, b, flags=flags), c, flags=flags)


def emit_products(builder, begin, a, a_at, a_row, a_k, b, b_at, b_k, n, flags=("contract",)):
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
                total = emit_fma(builder, one, columns[v], builder.load(sums[r, v]), flags)
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
