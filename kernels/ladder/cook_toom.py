"""The matrices of Winograd's minimal filtering, made from one list of points.

F(m, r) computes m neighbouring outputs of a correlation with r taps in n = m + r - 1 multiplications
instead of m * r. It takes inputs and taps as polynomials, evaluates both at n points, multiplies them point
by point, and interpolates the product. In matrices,

    y = A^T ((G g) * (B^T d))        d: n inputs, g: r taps, y: m outputs

    A^T[i, j] = a_j^i        G[j, k] = a_j^k / prod over l != j of (a_j - a_l)
    B^T[j]    = coefficients of prod over l != j of (x - a_l)

The last point is infinity: the last column of A^T and the last row of G pick the leading coefficient, and
the last row of B^T is the product over all finite points. All arithmetic here is exact, in fractions. In 3-D
each axis is transformed in turn.

The choice of points decides the rounding errors. Points a and -a share their sums. Points that are close
together make nearly equal rows, and large or small points make powers of very different size: both lose
digits. Pairs a, 1/a avoid both (Barabasz et al.): with 2/3 and 3/2, the error of F(4, 4, 4) is an eighth of
the error with the usual 1 and 2.

The gradient of the weights is the same form read in another direction: from y = A^T ((G g) * (B^T d)),

    diff_g = G^T ((A diff_y) * (B^T d))

Source: Winograd, "Arithmetic complexity of computations" (1980), section V; Lavin and Gray, "Fast
algorithms for convolutional neural networks" (2016), section 4; Blahut, "Fast algorithms for signal
processing" (2010), chapter 5; Barabasz, Anderson, Soodhalter and Gregg, "Error analysis and improving the
accuracy of Winograd convolution for deep neural networks" (2020).
"""

import functools
from fractions import Fraction

from kernels.base.jit import compile_time

Matrix = tuple[tuple[Fraction, ...], ...]

#: Finite points of F(m, 3): 0 and pairs a, -a.
POINTS = {
    m: (Fraction(0), *(sign * Fraction(a) for a in pairs for sign in (1, -1)))
    for m, pairs in {2: ("1",), 4: ("2/3", "3/2")}.items()
}

#: What a transform does; the number of each is part of a compiled kernel's identity.
INPUT, OUTPUT, WEIGHTS, DIFF_DST, DIFF_WEIGHTS = range(5)


@functools.cache
def matrix(kind: int, m: int) -> Matrix:
    """Return the matrix of one transform of F(m, 3) along one axis; m = 1 is an axis without a kernel.

    Parameters
    ----------
    kind : {INPUT, OUTPUT, WEIGHTS, DIFF_DST, DIFF_WEIGHTS}
        B^T, A^T, G, A or G^T.
    m : {1, 2, 4}
        Outputs at a time. For 1 the kernel has one tap along this axis, and the matrix is the number 1.

    Returns
    -------
    tuple of rows, each a tuple of fractions
    """
    if m == 1:
        return ((Fraction(1),),)
    points = POINTS[m]
    n = m + 2
    output = tuple((*(a**i for a in points), Fraction(i == m - 1)) for i in range(m))
    weights = []
    for j, a in enumerate(points):
        scale = _product([a - b for k, b in enumerate(points) if k != j])
        weights.append(tuple(a**k / scale for k in range(3)))
    weights.append((Fraction(0), Fraction(0), Fraction(1)))
    inputs = [_coefficients([b for k, b in enumerate(points) if k != j], n) for j in range(m + 1)]
    inputs.append(_coefficients(list(points), n))
    return {
        INPUT: tuple(inputs),
        OUTPUT: output,
        WEIGHTS: tuple(weights),
        DIFF_DST: transpose(output),
        DIFF_WEIGHTS: transpose(tuple(weights)),
    }[kind]


@compile_time
@functools.cache
def sizes(kind: int, m: int) -> tuple[int, int]:
    """Return how many numbers a transform along one axis takes, and how many it makes."""
    rows = matrix(kind, m)
    return len(rows[0]), len(rows)


def transpose(rows: Matrix) -> Matrix:
    """Exchange the rows and columns of a matrix."""
    return tuple(zip(*rows, strict=True))


def _product(factors: list[Fraction]) -> Fraction:
    product = Fraction(1)
    for factor in factors:
        product *= factor
    return product


def _coefficients(roots: list[Fraction], length: int) -> tuple[Fraction, ...]:
    """Coefficients, lowest first, of the polynomial with these roots; zeros up to ``length``."""
    polynomial = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *polynomial]
        for i, coefficient in enumerate(polynomial):
            shifted[i] -= root * coefficient
        polynomial = shifted
    return tuple(polynomial) + (Fraction(0),) * (length - len(polynomial))
