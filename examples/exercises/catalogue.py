"""All exercises, each with its checker; start with :data:`EXERCISES`."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from examples.exercises.frame import Case, Exercise, Race, bound_of, call, function_of, judge, seconds
from kernels.ladder import naive
from kernels.workbench import verdict
from kernels.workbench.verdict import Failure

_NAIVE = naive.forward  # taken now: the guard replaces it while the student's file runs


def _random(*shape: int) -> Any:
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


# ---- tape --------------------------------------------------------------------------------------------------


def _check_tape(module: ModuleType) -> None:
    add, mul, relu, backward, Value = (
        function_of(module, name) for name in ("add", "mul", "relu", "backward", "Value")
    )

    def gradients(expression: Callable[..., Any]) -> Callable[..., Any]:
        def run(*numbers: float) -> list[float]:
            values = [Value(number) for number in numbers]
            backward(expression(*values))
            return [value.grad for value in values]

        return run

    a, b, c = np.random.default_rng().uniform(1, 2, 3).tolist()
    overwritten = "gradients are overwritten where they must be added"
    early = "a value passes its gradient on before all of it has arrived: visit in reverse order"
    trials: list[tuple[str, Callable[..., Any], tuple[float, ...], list[float], dict[str, Any]]] = [
        ("a sum", add, (a, b), [1, 1], {"the derivative of a sum is that of a product": [b, a]}),
        ("a product", mul, (a, b), [b, a], {"each factor gets its own value": [a, b]}),
        ("a negative number", relu, (-a,), [0], {"relu passes the gradient of numbers below 0": [1]}),
        ("a positive number", relu, (a,), [1], {}),
        ("x * x", lambda x: mul(x, x), (a,), [2 * a], {overwritten: [a]}),
        ("a chain", lambda x, y: mul(add(x, y), mul(x, y)), (a, b), [b * (2 * a + b), a * (2 * b + a)], {}),
    ]

    def diamond(x: Any) -> Any:  # y reaches the result by a short way and by a long one
        y = mul(x, x)
        return add(y, mul(mul(y, y), y))

    trials.append(("a diamond", diamond, (c,), [2 * c + 6 * c**5], {early: [2 * c]}))
    for label, expression, numbers, answer, mistakes in trials:
        judge(gradients(expression), [Case(label, numbers, answer, 1e-9, mistakes)])
    with_twice = Value(a)
    result = mul(with_twice, with_twice)
    backward(result)
    backward(result)
    judge(
        lambda: [with_twice.grad],
        [Case("backward twice", (), [2 * a], 1e-9, {"old gradients stay": [4 * a]})],
    )


def _race_tape(module: ModuleType) -> Race:
    def deep() -> None:
        value = module.Value(1.0)
        for _ in range(200):
            value = module.mul(module.add(value, value), module.Value(0.5))
        module.backward(value)

    return Race("values of a chain of 600 a millisecond", 0.6 / seconds(deep), 100)


# ---- im2col ------------------------------------------------------------------------------------------------


def _columns(src: Any, K: int, flip: bool = False, shift: int = 0) -> Any:
    before = K // 2
    padded = np.pad(src, [(before + 1, before + 1)] * 3 + [(0, 0)])
    D, H, W, C = src.shape
    order = range(K - 1, -1, -1) if flip else range(K)
    at = [(kd + 1 + shift, kh + 1 + shift, kw + 1 + shift) for kd in order for kh in order for kw in order]
    parts = [padded[d : d + D, h : h + H, w : w + W] for d, h, w in at]
    return np.stack(parts, axis=3).reshape(D * H * W, K**3 * C)


def _im2col_cases() -> Iterator[Case]:
    for label, src, K in (
        ("one voxel", _random(1, 1, 1, 2), 1),
        ("equal elements", np.ones((3, 3, 3, 2), np.float32), 3),
        ("a volume of 3 x 4 x 5, 2 channels, K = 3", _random(3, 4, 5, 2), 3),
        ("the same shape again", _random(3, 4, 5, 2), 3),
        ("K = 5", _random(3, 4, 5, 1), 5),
        ("K = 1", _random(2, 3, 2, 3), 1),
    ):
        mistakes = {
            "the kernel is reversed": _columns(src, K, flip=True),
            "the halo begins one voxel too late": _columns(src, K, shift=1),
            "the halo begins one voxel too early": _columns(src, K, shift=-1),
            "channels come before the places of the kernel": _columns(src, K)
            .reshape(-1, K**3, src.shape[3])
            .transpose(0, 2, 1)
            .reshape(-1, K**3 * src.shape[3]),
        }
        yield Case(label, (src, K), _columns(src, K), 0.0, mistakes)


def _race_im2col(module: ModuleType) -> Race:
    src, weights = _random(1, 8, 12, 12, 8), _random(8, 8, 3, 3, 3)
    matrix = weights.transpose(2, 3, 4, 1, 0).reshape(-1, 8)
    mine = seconds(lambda: module.im2col(src[0], 3) @ matrix)
    return Race("faster than seven loops", seconds(lambda: _NAIVE(src, weights)) / mine, 2)


# ---- blocking ----------------------------------------------------------------------------------------------


def _blocked(src: Any) -> Any:
    D, H, W, C = src.shape
    padded = np.zeros((D, H, W, -(-C // 16) * 16), src.dtype)
    padded[..., :C] = src
    return np.ascontiguousarray(padded.reshape(D, H, W, -1, 16).transpose(3, 0, 1, 2, 4))


def _check_blocking(module: ModuleType) -> None:
    to_blocked, from_blocked = (function_of(module, name) for name in ("to_blocked", "from_blocked"))
    shapes = ((2, 3, 4, 16), (1, 1, 1, 32), (2, 3, 4, 16), (2, 3, 2, 5), (1, 2, 3, 33))
    sources = [_random(*shape) for shape in shapes]
    there, back = [], []
    for src in sources:
        answer = _blocked(src)
        interleaved = np.zeros_like(answer)
        blocks, C = len(answer), src.shape[3]
        for c in range(C):
            interleaved[c % blocks, ..., c // blocks] = src[..., c]
        mistakes = {"neighbouring channels must lie in one block": interleaved}
        label = f"{C} channels" if C % 16 else f"{C} channels, a multiple of 16"
        there.append(Case(label, (src,), answer, 0.0, mistakes))
        back.append(Case(f"back, {label}", (answer, C), src, 0.0))
    judge(to_blocked, there)
    judge(from_blocked, back)


def _race_blocking(module: ModuleType) -> Race:
    src = _random(32, 32, 32, 48)
    return Race("of the speed of a copy", seconds(src.copy) / seconds(lambda: module.to_blocked(src)), 0.1)


# ---- register tile -----------------------------------------------------------------------------------------


def _check_tile(module: ModuleType) -> None:
    verdict.check(function_of(module, "forward"), "forward", examples=15)


def _race_tile(module: ModuleType) -> Race:
    src, weights = _random(1, 8, 16, 16, 16), _random(16, 16, 3, 3, 3)
    times = [seconds(lambda f=f: f(src, weights)) for f in (_NAIVE, module.forward)]  # type: ignore[misc]
    return Race("faster than seven loops", times[0] / times[1], 3)


# ---- winograd ----------------------------------------------------------------------------------------------


class _Number:
    """A number that counts products of data and taps."""

    products = 0

    def __init__(self, value: float, made_of: frozenset[str]) -> None:
        self.value, self.made_of = value, made_of

    def _with(self, other: Any, value: float) -> "_Number":
        return _Number(value, self.made_of | (other.made_of if isinstance(other, _Number) else frozenset()))

    def __mul__(self, other: Any) -> "_Number":
        if isinstance(other, _Number):
            _Number.products += 1
        return self._with(other, self.value * _value(other))

    def __add__(self, other: Any) -> "_Number":
        return self._with(other, self.value + _value(other))

    def __sub__(self, other: Any) -> "_Number":
        return self._with(other, self.value - _value(other))

    def __rsub__(self, other: Any) -> "_Number":
        return self._with(other, _value(other) - self.value)

    def __truediv__(self, other: Any) -> "_Number":
        return self * (1 / _value(other))

    def __neg__(self) -> "_Number":
        return self * -1.0

    __rmul__, __radd__ = __mul__, __add__


def _value(number: Any) -> float:
    return float(number.value if isinstance(number, _Number) else number)


def _numbers(values: Any, kind: str) -> list[_Number]:
    return [_Number(float(value), frozenset({kind})) for value in values]


def _counted(function: Callable[..., Any], outputs: int, most: int) -> Callable[..., Any]:
    def run(src: Any, taps: Any) -> Any:
        _Number.products = 0
        found = function(_numbers(src, "src"), _numbers(taps, "taps"))
        if _Number.products > most:
            raise Failure(f"{_Number.products} products of data and taps; expected {most} at most")
        if found is None:
            return None
        return [_value(number) for number in found]

    return run


def _check_winograd(module: ModuleType) -> None:
    for name, outputs, most in (("f23", 2, 4), ("f43", 4, 6)):
        cases = []
        equal = ("all elements equal", np.ones(outputs + 2), np.ones(3))
        fresh = [(f"{name}, random numbers", _random(outputs + 2), _random(3)) for _ in range(3)]
        for label, src, taps in (equal, *fresh):
            src, taps = src.astype(np.float64), taps.astype(np.float64)
            mistakes = {"the taps are reversed": np.convolve(src, taps, "valid")}
            answer = np.correlate(src, taps, "valid")
            cases.append(Case(label, (src, taps), answer, bound_of(src, taps, terms=3) * 1e-3, mistakes))
        judge(_counted(function_of(module, name), outputs, most), cases)


def _race_winograd(module: ModuleType) -> Race:
    _Number.products = 0
    module.f43(_numbers(_random(6), "src"), _numbers(_random(3), "taps"))
    return Race("fewer products than the definition in F(4, 3)", 12 / max(_Number.products, 1), 2)


# ---- bytes of a block --------------------------------------------------------------------------------------


def _check_traffic(module: ModuleType) -> None:
    cases = []
    for voxels, IC, OC in ((4096, 16, 16), (4096, 16, 32), (1000, 4, 5), (27, 17, 3)):
        ic, oc = -(-IC // 16) * 16, -(-OC // 16) * 16
        src, dst, weights, vectors = 4 * voxels * ic, 4 * voxels * oc, 108 * IC * OC, 8 * oc
        answer = [src + weights + 5 * dst + vectors, src + weights + dst + vectors]
        plain = [4 * voxels * (IC + 5 * OC) + weights + 8 * OC, 4 * voxels * (IC + OC) + weights + 8 * OC]
        in_place = [answer[0] - dst, answer[1]]
        mistakes = {
            "channels are not rounded up to 16": plain,
            "a result that is written must be read again by the next pass": in_place,
            "numbers of float32 take 4 bytes": [number / 4 for number in answer],
            "weights are not counted": [number - weights for number in answer],
            "scale and shift are not counted": [number - vectors for number in answer],
        }
        label = f"{IC} and {OC} channels" + (", multiples of 16" if IC % 16 == OC % 16 == 0 else "")
        cases.append(Case(label, (voxels, IC, OC), answer, 0.0, mistakes))
    judge(function_of(module, "bytes_moved"), cases)


def _race_traffic(module: ModuleType) -> Race:
    """Compare with what the compiler saves when it fuses such a block."""
    from tinyunet.compiler.compiled import Inference
    from tinyunet.compiler.ir import Options
    from tinyunet.compiler.passes import NAMES
    from tinyunet.compiler.show import figures
    from tinyunet.nn import BatchNorm, Conv3d, ReLU, Sequential

    block = Sequential(Conv3d(16, 16), BatchNorm(16), ReLU())
    stages = Inference(block, Options(NAMES, "fast", True)).stages((1, 32, 32, 32, 16))
    apart, fused = module.bytes_moved(32**3, 16, 16)
    measured = figures(stages[0]).moved / min(figures(stage).moved for stage in stages)
    # The compiler also reorders at the beginning and at the end of the net.
    return Race("as much saved as you predict, by the compiler", measured / (apart / fused), 0.4)


# ---- backward of batch norm --------------------------------------------------------------------------------


def _norm_gradients(diff: Any, src: Any, scale: Any, epsilon: float) -> tuple[Any, Any, Any, dict[str, Any]]:
    diff, src, scale = (np.asarray(a, np.float64) for a in (diff, src, scale))
    rstd = 1 / np.sqrt(src.var(0) + epsilon)
    x = (src - src.mean(0)) * rstd
    of_mean, of_variance = diff.mean(0), x * (diff * x).mean(0)
    mistakes = {
        "mean and variance pass no gradient": scale * rstd * diff,
        "the mean passes no gradient": scale * rstd * (diff - of_variance),
        "the variance passes no gradient": scale * rstd * (diff - of_mean),
        "the scale is missing": rstd * (diff - of_mean - of_variance),
    }
    return scale * rstd * (diff - of_mean - of_variance), (diff * x).sum(0), diff.sum(0), mistakes


def _check_norm(module: ModuleType) -> None:
    function = function_of(module, "backward")
    parts = ("diff_src", "diff_scale", "diff_shift")
    cases: list[list[Case]] = [[], [], []]
    for N, C in ((8, 16), (8, 16), (5, 3), (1, 2), (64, 1)):
        arguments = _random(N, C), 2 * _random(N, C) + 3, _random(C), 1e-2
        *answers, mistakes = _norm_gradients(*arguments)
        for part, answer in enumerate(answers):
            label = f"{parts[part]}, {N} rows of {C} channels"
            bound = 1e-4 * (1 + float(np.abs(answer).max()))
            unscaled = {"the unscaled src is taken, not x": (arguments[0] * arguments[1]).sum(0)}
            known = mistakes if part == 0 else unscaled if part == 1 else {}
            cases[part].append(Case(label, arguments, answer, bound, known))
    for part in (2, 1, 0):

        def run(*arguments: Any, part: int = part) -> Any:
            found = function(*arguments)
            if found is None:
                return None
            if not isinstance(found, tuple | list) or len(found) != 3:
                raise Failure(f"returns {type(found).__name__}; expected diff_src, diff_scale and diff_shift")
            return found[part]

        judge(run, cases[part])


def _race_norm(module: ModuleType) -> Race:
    arguments = _random(20000, 16), _random(20000, 16), _random(16), 1e-3
    mine = seconds(lambda: module.backward(*arguments))
    return Race(
        "of the speed of the checker, in float64", seconds(lambda: _norm_gradients(*arguments)) / mine, 1
    )


# ---- ring --------------------------------------------------------------------------------------------------


class _Wire:
    """Messages between ranks, counted."""

    def __init__(self, ranks: int) -> None:
        self.sent = np.zeros(ranks)

    def send(self, source: int, target: int, chunk: Any) -> Any:
        ranks = len(self.sent)
        if target != (source + 1) % ranks:
            raise Failure(
                f"rank {source} sends to rank {target}; expected its neighbour {(source + 1) % ranks}"
            )
        self.sent[source] += np.size(chunk)
        return np.array(chunk)


def _check_ring(module: ModuleType) -> None:
    function = function_of(module, "ring")
    cases = []
    for ranks, size in ((2, 16), (3, 12), (3, 12), (4, 7), (5, 3), (1, 4)):
        arrays = [np.random.default_rng().standard_normal(size) for _ in range(ranks)]
        answer = np.tile(np.sum(arrays, axis=0), (ranks, 1))
        mistakes = {"each rank keeps its own array": np.stack(arrays)} if ranks > 1 else {}
        cases.append(Case(f"{ranks} ranks, {size} numbers each", (arrays,), answer, 1e-9, mistakes))

    def run(arrays: Any) -> Any:
        wire, size = _Wire(len(arrays)), len(arrays[0])
        before = [array.copy() for array in arrays]
        found = function(arrays, wire.send)
        most = 2 * (len(arrays) - 1) * -(-size // len(arrays))
        if found is not None and len(arrays) > 1 and not wire.sent.any():
            raise Failure("nothing was sent: a number reaches another rank by send alone")
        if wire.sent.max(initial=0) > most:
            sent = f"a rank sends {wire.sent.max():.0f} numbers of {size}"
            raise Failure(f"{sent}; expected {most} at most, 2 (N - 1) / N")
        if any(not np.array_equal(a, b) for a, b in zip(arrays, before, strict=True)):
            raise Failure("the arrays that were given are changed; expected new ones")
        return found

    judge(run, cases)
    tree = function_of(module, "tree_wins")
    random = np.random.default_rng()
    drawn = [(int(random.integers(2, 2000)), float(10 ** random.uniform(0, 9)), 1e-6) for _ in range(40)]
    for ranks, nbytes, latency in ((1024, 4.0, 1e-6), (4, 1e8, 1e-6), (1024, 1e9, 1e-6), *drawn):
        by_tree = 2 * int(np.ceil(np.log2(ranks))) * (latency + nbytes * 1e-10)
        by_ring = 2 * (ranks - 1) * (latency + nbytes / ranks * 1e-10)
        if abs(by_tree - by_ring) < 1e-3 * by_ring:
            continue  # so near that the order of the sums decides
        answer = by_tree < by_ring
        label = f"tree_wins for {ranks} ranks and {nbytes:g} bytes"
        found = call(tree, Case(label, (ranks, nbytes, latency, 1e-10), answer, 0.0))
        if bool(found) is not answer:
            raise Failure(f"{label}: {found}; expected {answer}")


def _race_ring(module: ModuleType) -> Race:
    wire = _Wire(8)
    module.ring([np.ones(800) for _ in range(8)], wire.send)
    return Race("of the least that a rank must send", 2 * 7 / 8 * 800 / float(wire.sent.max()), 1)


_LIST = (
    Exercise(
        "tape", "A tape in thirty lines", "tinyunet/tape.py, its docstring",
        ("A value may be used twice: its gradient is a sum.",
         "A value may pass its gradient on only when all of it has arrived: visit children before parents.",
         "A depth-first walk that appends a value after its parents gives the order; then go backwards."),
        _check_tape, _race_tape,
    ),
    Exercise(
        "im2col", "Convolution as one product of matrices", "kernels/ladder/im2col.py, its docstring",
        ("Pad the volume by K // 2 zeros on each side first.",
         "For each place of the kernel, all voxels at once are one slice of the padded volume.",
         "Write into an array (D, H, W, K, K, K, C), and reshape it at the end."),
        lambda module: judge(function_of(module, "im2col"), [*_im2col_cases()]), _race_im2col,
    ),
    Exercise(
        "blocking", "Channels in blocks of 16", "docs/glossary.md: blocked tensor; kernels/base/layout.py",
        ("How many blocks are there? Round up.", "Zeros first, then copy a block at a time.",
         "The last block may be narrower than 16."),
        _check_blocking, _race_blocking,
    ),
    Exercise(
        "tile", "The register tile", "kernels/ladder/direct.py, its docstring; docs/fast-convolution.md",
        ("Put the output channel last in the weights: 16 of them are one vector.",
         "Keep the 16 sums of a voxel in a local array while you go through the kernel and the channels in.",
         "Pad the input once, so that the inner loops have no test."),
        _check_tile, _race_tile,
    ),
    Exercise(
        "winograd", "Winograd by hand: F(2, 3), then F(4, 3)", "kernels/ladder/minimal_filtering.py",
        ("F(2, 3): the products are (d0 - d2) g0, (d1 + d2)(g0 + g1 + g2) / 2, ...",
         "Polynomials of degree 3 are known from their values at 0, 1, -1 and at infinity.",
         "F(4, 3) adds the points 2 and -2; docs/fast-convolution.md has the matrices."),
        _check_winograd, _race_winograd,
    ),
    Exercise(
        "traffic", "Predict the bytes of a block", "docs/compiled-graph.md",
        ("Three passes: which tensors does each read, which does it write?",
         "Between the passes the result of the convolution goes to memory and comes back twice."),
        _check_traffic, _race_traffic,
    ),
    Exercise(
        "norm_backward", "Backward of batch norm", "kernels/ops/norms.py, its docstring",
        ("Write x = (src - mean) rstd first; diff_scale and diff_shift are sums over rows.",
         "The mean passes -mean(diff_dst), the variance -x mean(diff_dst x)."),
        _check_norm, _race_norm,
    ),
    Exercise(
        "ring", "A ring allreduce, and where a tree wins", "docs/data-parallel.md",
        ("Cut each array into N chunks. In step s rank r sends chunk r - s.",
         "All ranks send at once: collect what is sent before you add anything.",
         "After N - 1 steps rank r has the complete chunk r + 1: send it round once more."),
        _check_ring, _race_ring,
    ),
)  # fmt: skip
#: By name, in the order in which to solve them.
EXERCISES = {exercise.name: exercise for exercise in _LIST}
