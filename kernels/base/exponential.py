"""``exp``, ``expm1``, ``log`` and ``sigmoid`` of one float32 by arithmetic alone, which LLVM vectorises.

Numba calls the C library for ``math.exp`` unless Intel's short vector library is installed, one call
an item: a softmax would spend its time there. oneDNN writes its own polynomials for the same reason.

Source: S. Moshier, Cephes, ``expf.c`` and ``logf.c`` (1992), whose polynomials these are.
"""

import numpy as np

from kernels.base.jit import kernel

_ONE = np.float32(1)
_HALF = np.float32(0.5)
_ZERO = np.float32(0)

# Below, exp is under the smallest normal float32 and taken to be 0; above, it stays at 2.4e38.
_LOWEST = np.float32(-87.33654)
_HIGHEST = np.float32(88.37)
_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts: the first has 9 bits, so that its product with a small integer is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
# Adding 1.5 * 2^23 rounds to a whole number, and leaves it in the low bits.
_ROUNDER = np.float32(12582912.0)
_EXP5 = np.float32(1.9875691500e-4)
_EXP4 = np.float32(1.3981999507e-3)
_EXP3 = np.float32(8.3334519073e-3)
_EXP2 = np.float32(4.1665795894e-2)
_EXP1 = np.float32(1.6666665459e-1)
_EXP0 = np.float32(5.0000001201e-1)
_MANTISSA_BITS = np.int32(23)
_EXPONENT_OF_ONE = np.int32(127 << 23)


@kernel
def _factors(x: np.float32) -> tuple[np.float32, np.float32]:
    """``2**n`` and ``e**r - 1``, where ``x = n ln 2 + r`` with whole ``n`` and ``|r| <= ln(2) / 2``.

    The first is made from its bits and the second is a polynomial.
    """
    inside = _LOWEST if x < _LOWEST else x
    inside = _HIGHEST if inside > _HIGHEST else inside
    shifted = np.float32(inside * _LOG2_E + _ROUNDER)
    n = shifted - _ROUNDER
    r = inside - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = _EXP5 * r + _EXP4
    p = p * r + _EXP3
    p = p * r + _EXP2
    p = p * r + _EXP1
    p = p * r + _EXP0
    bits = np.int32((shifted.view(np.int32) << _MANTISSA_BITS) + _EXPONENT_OF_ONE)
    return bits.view(np.float32), p * (r * r) + r


@kernel
def exp(x: np.float32) -> np.float32:
    """``e ** x = 2**n * e**r``, within 1e-7 of it, relative.

    Below -87.33654 the result is 0 and above 88.37 it is 2.4e38, never infinite; NaN gives NaN.
    """
    power, rest = _factors(x)
    return _ZERO if x < _LOWEST else (rest + _ONE) * power


@kernel
def expm1(x: np.float32) -> np.float32:
    """``e ** x - 1``, within 3e-7 of it, relative, also where ``e ** x`` rounds to 1; never infinite."""
    power, rest = _factors(x)
    return rest * power + (power - _ONE)


# Bits of sqrt(1/2): what is above is one octave up.
_BITS_OF_ROOT_HALF = np.int32(0x3F3504F3)
# fmt: off
_LOG_POLYNOMIAL = tuple(map(np.float32, (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)))
# fmt: on


@kernel
def log(x: np.float32) -> np.float32:
    """Natural logarithm of a normal, finite number above 0, within 1e-7 of it.

    ``x = 2**n * (1 + f)`` with ``sqrt(1/2) <= 1 + f < sqrt(2)``; then ``log x = n ln 2 + log(1 + f)``,
    ``n`` from the bits of ``x`` and the second term a polynomial. The error is below 1e-7 times the
    larger of 1 and the result; NaN gives NaN.
    """
    bits = np.int32(np.float32(x).view(np.int32) - _BITS_OF_ROOT_HALF)
    n = np.int32(bits >> _MANTISSA_BITS)
    mantissa = np.int32(np.float32(x).view(np.int32) - np.int32(n << _MANTISSA_BITS))
    f = mantissa.view(np.float32) - _ONE
    p = _LOG_POLYNOMIAL[0]
    p = p * f + _LOG_POLYNOMIAL[1]
    p = p * f + _LOG_POLYNOMIAL[2]
    p = p * f + _LOG_POLYNOMIAL[3]
    p = p * f + _LOG_POLYNOMIAL[4]
    p = p * f + _LOG_POLYNOMIAL[5]
    p = p * f + _LOG_POLYNOMIAL[6]
    p = p * f + _LOG_POLYNOMIAL[7]
    p = p * f + _LOG_POLYNOMIAL[8]
    whole = np.float32(n)
    p = p * f * (f * f) + whole * _LN2_LOW
    logarithm = (p - _HALF * (f * f) + f) + whole * _LN2_HIGH
    # The bits of NaN make a number; x - x is 0, or NaN again.
    return logarithm + (x - x)


@kernel
def log1p(x: np.float32) -> np.float32:
    """``log(1 + x)`` for ``0 <= x``, within 3e-7 of it, relative, also where ``1 + x`` rounds to 1."""
    above_one = _ONE + x
    # What the sum lost, to first order.
    return log(above_one) + (x - (above_one - _ONE)) / above_one


@kernel
def sigmoid(x: np.float32) -> np.float32:
    """``1 / (1 + e ** -x)``, within 3e-7 of it, relative; NaN gives NaN.

    Below -87.33654 the result is 0: `exp` is never infinite, so ``1 / (1 + exp(-x))`` would be 4e-39.
    """
    power = exp(-abs(x))
    return (_ONE if x >= _ZERO else power) / (_ONE + power)
