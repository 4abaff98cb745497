"""Normalisations in pieces, so that passes can move them; and activations after them, or a convolution.

    forward     moments of x > statistics: scale, shift > normalize: y = act(scale x + shift)
    backward    mask: dz = dy act'(scale x + shift), and sums of dz and dz (x - mean)
                > statistics_backward: a, b, d and the gradients of gamma and beta
                > gradient: dx = a dz + b x + d

Nothing is saved yet: it is the same arithmetic in smaller nodes. Batch, instance and group norm differ in the
two nodes of statistics alone: in which values share a mean. An activation after the normalisation becomes
part of ``normalize`` and ``mask`` (ELU and PReLU: ``normalize_activation`` and ``mask_activation``). An
activation after a convolution becomes a ``normalize`` of its own, with scale 1 and shift 0.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kernels.deferred import masking, statistics
from kernels.deferred.normalizing import normalize
from kernels.deferred.statistics import BATCH, Sharing
from kernels.deferred.tensors import NO_MASK
from tinyunet import functional
from tinyunet.compiler.ir import NDHWC, Graph, Node, Value
from tinyunet.compiler.operators.weightless import check_vectors
from tinyunet.compiler.record import Binder, Call, Kernel, Operator, Shape, Shapes, lanes, vectors, volume

_FUSED = {"implementation": "fused"}
# Of a normalisation, for its statistics. With "combine", sums are those of several processes.
_SETTINGS = ("momentum", "epsilon", "combine", "sharing")


def _normalised(a: Mapping[str, Any]) -> Shape:
    vectors = [name for name in a if name.endswith(("mean", "variance"))]
    check_vectors(a, a["src"].shape[-1], "scale", "shift", *vectors)
    return tuple(a["src"].shape)


def _statistics_shape(a: Mapping[str, Any]) -> Shape:
    """Shape of the mean or the variance that the gradient takes."""
    MB, *_, C = a["src"].shape
    return (MB if "sharing" in a else 1, C)


def _sums(name: str) -> Value:
    """Return a value of partial sums; its size is known when every kernel is (``Kernel.sums``)."""
    return Value(name, (0, 0, 0), np.dtype(np.float64))


def sharing_of(node: Node) -> Sharing:
    """Which values share the statistics of a node."""
    return node.attributes.get("sharing", BATCH)


def centres(node: Node) -> bool:
    """Whether each channel has a mean of its own, also if the node is of the gradient."""
    return sharing_of(node).channels == 1


# ---- in pieces -------------------------------------------------------------------------------


def is_volume(graph: Graph, node: Node) -> bool:
    """Whether a node reads a volume that could be blocked."""
    value = graph.values[node.inputs["src"]]
    return value.layout == NDHWC and value.dtype == np.float32


def _split_training(graph: Graph, node: Node, activation: Node | None, slope: float) -> Graph:
    name, src = node.name, node.inputs["src"]
    parameters = {"gamma": node.inputs["scale"], "beta": node.inputs["shift"]}
    parameters |= {role: v for role, v in node.inputs.items() if role.startswith("running")}
    outputs = {role: f"{name}:{role}" for role in ("scale", "shift", "mean", "rstd")}
    settings = {key: node.attributes[key] for key in _SETTINGS if key in node.attributes}
    moments = f"{name}:moments"
    nodes = [
        Node(moments, "moments", {"src": src}, {"moments": moments}),
        Node(
            f"{name}:statistics", "statistics", {"moments": moments} | parameters, outputs, settings | _FUSED
        ),
    ]
    values = [_sums(moments), *(vectors(v, graph.values[src]) for v in outputs.values())]
    return _with_normalize(graph, node, activation, slope, nodes, values)


def _split_inference(graph: Graph, node: Node, activation: Node | None, slope: float) -> Graph:
    if graph.backward_of(node):
        return graph
    name, src = node.name, graph.values[node.inputs["src"]]
    inputs = {"gamma": node.inputs["scale"], "beta": node.inputs["shift"]}
    inputs |= {role: node.inputs[role] for role in ("mean", "variance")}
    outputs = {role: f"{name}:{role}" for role in ("scale", "shift")}
    settings = {"epsilon": node.attributes["epsilon"]} | _FUSED
    phase = "prepare" if graph.are_fixed(inputs.values()) else node.phase
    made = Node(f"{name}:statistics", "fixed_statistics", inputs, outputs, settings, phase)
    values = [vectors(v, src) for v in outputs.values()]
    return _with_normalize(graph, node, activation, slope, [made], values)


def _with_normalize(
    graph: Graph,
    node: Node,
    activation: Node | None,
    slope: float,
    nodes: Iterable[Node],
    values: list[Value],
) -> Graph:
    """Replace a normalisation, and the activation after it, by statistics and a ``normalize``."""
    result = (activation or node).outputs["dst"]
    source = {"src": node.inputs["src"]} | {f"src.{r}": f"{node.name}:{r}" for r in ("scale", "shift")}
    normalize = Node(f"{node.name}:normalize", "normalize", source, {"dst": result}, {"src.slope": slope})
    changes: dict[str, list[Node]] = {node.name: [*nodes, normalize]}
    if activation:
        changes[activation.name] = []
    backward = graph.backward_of(node)
    if backward:
        undo = graph.backward_of(activation) if activation else None
        mask, tail, more = _batch_norm_backward(graph, node, backward, undo)
        mask = mask.with_attributes({"mask.slope": slope})
        changes |= {undo.name: [mask], backward.name: tail} if undo else {backward.name: [mask, *tail]}
        values = values + more
    return graph.rewrite(changes, values)


def _batch_norm_backward(
    graph: Graph, node: Node, backward: Node, undo: Node | None
) -> tuple[Node, list[Node], list[Value]]:
    name, src = node.name, node.inputs["src"]
    channels = graph.values[src].shape[-1]
    dy = (undo or backward).inputs["gradient"]
    dz = undo.outputs["diff_src"] if undo else f"{dy}*"
    forms = {role: f"d {name}:{role}" for role in "abd"}
    found = {r: backward.outputs.get(r, f"d({name}.{r})") for r in ("diff_scale", "diff_shift")}
    values = [_sums(f"d {name}:sums"), *(vectors(v, graph.values[src]) for v in forms.values())]
    values.append(replace(graph.values[dy], name=dz))
    values += [Value(v, (channels,), np.dtype(np.float32)) for v in found.values() if v not in graph.values]
    mask = _mask(name, dy, dz, src, {part: f"{name}:{part}" for part in ("scale", "shift", "mean")})
    inputs = {"sums": f"d {name}:sums", "gamma": node.inputs["scale"]}
    inputs |= {role: f"{name}:{role}" for role in ("mean", "rstd")}
    settings = {key: node.attributes[key] for key in _SETTINGS if key in node.attributes} | _FUSED
    settings["count"] = sharing_of(node).count(graph.values[src].shape)
    tail = [Node(f"d {name}.statistics", "statistics_backward", inputs, forms | found, settings, "backward")]
    if "diff_src" in backward.outputs:
        inputs = {"diff_dst": dz, "diff_dst.x": src} | {f"diff_dst.{role}": v for role, v in forms.items()}
        outputs = {"dst": backward.outputs["diff_src"]}
        tail.append(Node(f"d {name}.gradient", "gradient", inputs, outputs, phase="backward"))
    return mask, tail, values


def _mask(name: str, dy: str, dz: str, x: str, vectors: dict[str, str]) -> Node:
    inputs = {"gradient": dy, "mask.x": x} | {f"mask.{part}": value for part, value in vectors.items()}
    outputs = {"diff_src": dz, "sums": f"d {name}:sums"}
    return Node(f"d {name}.mask", "mask", inputs, outputs, {}, "backward", {"diff_src": "gradient"})


def split_activation(graph: Graph, node: Node, slope: float) -> Graph:
    """Return the graph with an activation as a ``normalize`` that changes nothing else, and a ``mask``."""
    src = node.inputs["src"]
    graph, ones, zeros = _with_constants(graph, graph.values[src])
    inputs = {"src": src, "src.scale": ones, "src.shift": zeros}
    normalize = Node(f"{node.name}:normalize", "normalize", inputs, dict(node.outputs), {"src.slope": slope})
    changes, values = {node.name: [normalize]}, list[Value]()
    backward = graph.backward_of(node)
    if backward:
        dy, dz = backward.inputs["gradient"], backward.outputs["diff_src"]
        mask = _mask(node.name, dy, dz, src, {"scale": ones, "shift": zeros, "mean": zeros})
        changes[backward.name] = [mask.with_attributes({"mask.slope": slope})]
        values.append(_sums(f"d {node.name}:sums"))
    return graph.rewrite(changes, values)


def _with_constants(graph: Graph, src: Value) -> tuple[Graph, str, str]:
    """Return the graph with a scale of ones and a shift of zeros, both constants, and their names."""
    values, data, (MB, *_, C) = dict(graph.values), dict(graph.data), src.shape
    names = f"ones:{MB}x{C}", f"zeros:{MB}x{C}"
    for name, number in zip(names, (1, 0), strict=True):
        values[name] = replace(vectors(name, src), kind="constant")
        array = np.zeros(values[name].shape, np.float32)
        array[:, :C] = number
        data.setdefault(name, array)
    return replace(graph, values=values, data=data), *names


# ---- calls -----------------------------------------------------------------------------------


def _out(b: Binder, *roles: str) -> list[Any]:
    return [b.arrays[b.node.outputs[role]] for role in roles]


def _moments(b: Binder) -> Call:
    x, moments = b.array("src"), b.array("moments")
    return lambda: statistics.gather_moments(x, moments)


def _normalize(b: Binder) -> Call:
    """Also of a gradient, which has the form of a source."""
    source, dst = b.gradient() if b.has("diff_dst") else b.source(), b.array("dst")
    return lambda: normalize(source, dst)


def _apply_mask(b: Binder) -> Call:
    diff, mask = b.array("diff_src"), b.mask() or NO_MASK
    return lambda: masking.apply_mask(diff, mask)


def _statistics(b: Binder) -> Call:
    moments, gamma, beta = b.array("moments"), b.array("gamma"), b.array("beta")
    epsilon, momentum = (float(b.node.attributes.get(name, 1)) for name in ("epsilon", "momentum"))
    running = [b.array(role) for role in ("running_mean", "running_variance") if b.has(role)]
    norm = statistics.Norm(gamma, beta, epsilon, sharing_of(b.node), momentum, *running)
    out = statistics.Normalisation(*_out(b, "scale", "shift", "mean", "rstd"))
    combine = b.node.attributes.get("combine")

    def run() -> None:
        found = statistics.combine_moments(moments, combine) if combine else moments
        statistics.finish_moments(found, norm, out)

    return run


def _fixed_statistics(b: Binder) -> Call:
    gamma, beta, mean, variance = (b.array(r) for r in ("gamma", "beta", "mean", "variance"))
    (scale, shift), epsilon, channels = _out(b, "scale", "shift"), b.node.attributes["epsilon"], gamma.size

    def run() -> None:
        scale[:], shift[:] = 0.0, 0.0
        scale[:, :channels] = gamma / np.sqrt(variance.astype(np.float64) + epsilon)
        shift[:, :channels] = beta - mean.astype(np.float64) * scale[:, :channels]

    return run


def _fold(b: Binder) -> Call:
    weights, bias = _out(b, "folded_weights", "folded_bias")
    old, old_bias = b.array("weights"), b.array("bias") if "bias" in b.node.inputs else np.zeros_like(bias)
    gamma, beta, mean, variance = (b.array(r) for r in ("gamma", "beta", "mean", "variance"))
    epsilon, shape = b.node.attributes["epsilon"], [1] * weights.ndim
    shape[b.node.attributes["axis"]] = bias.size

    def run() -> None:
        factor = gamma / np.sqrt(variance.astype(np.float64) + epsilon)
        weights[:] = old * factor.reshape(shape)
        bias[:] = (old_bias - mean.astype(np.float64)) * factor + beta

    return run


def _statistics_backward(b: Binder) -> Call:
    part, count, combine = b.array("sums"), b.node.attributes["count"], b.node.attributes.get("combine")
    sharing = sharing_of(b.node)
    gamma, mean, rstd = (b.array(r) for r in ("gamma", "mean", "rstd"))
    out = statistics.NormGradient(*_out(b, "a", "b", "d", "diff_scale", "diff_shift"))

    def run() -> None:
        statistics.finish_gradient(part, count, sharing, gamma, mean, rstd, out)
        if combine:
            # The source's gradient goes through everybody's statistics; gamma's and beta's stay
            # this process' own, which are summed with all other gradients.
            own = [diff.copy() for diff in (out.diff_gamma, out.diff_beta)]
            everyones, voxels = statistics.combine_sums(part, count, combine)
            statistics.finish_gradient(everyones, voxels, sharing, gamma, mean, rstd, out)
            out.diff_gamma[:], out.diff_beta[:] = own

    return run


def _bias_gradient(b: Binder) -> Call:
    """Of a bias: the sum of ``dz``; before a norm that of ``a dz + b x + d``, from the moments of ``x``."""
    sums, diff = b.array("sums")[0], b.array("diff_bias")
    moments = b.array("moments") if b.has("moments") else None
    a, slope, d = (b.array(role) if b.has(role) else np.ones((1, 1), np.float32) for role in "abd")

    def each_image(array: Any) -> Any:
        return array.reshape(len(a), -1, array.shape[-1]).sum(axis=1)

    def run() -> None:
        total = a * each_image(sums)
        if moments is not None:
            counts = moments[:, 0]
            total += slope * each_image(counts * moments[:, 1]) + d * each_image(counts)
        diff[:] = total.sum(axis=0)[: diff.size]

    return run


# ---- what kernels take -----------------------------------------------------------------------


def _whole(*roles: str) -> Any:
    """Shapes of a kernel whose roles are all blocked volumes of the same shape, but moments."""

    def sizes(b: Binder) -> Shapes:
        *size, C = b.value(roles[0]).shape
        shape = volume(tuple(size), C)
        return dict.fromkeys(roles, shape) | {"moments": (masking.partials(shape), 3, *lanes(C))}

    return sizes


def _moments_shape(node: Node, role: str, graph: Graph) -> Shape:
    value = graph.values[node.inputs["src"]]
    return (masking.partials(value.storage_shape), 3, *lanes(value.shape[-1]))


def _statistics_sizes(b: Binder) -> Shapes:
    (C,) = b.value("gamma").shape
    parameters = dict.fromkeys(("gamma", "beta", "running_mean", "running_variance"), (C,))
    shape = b.value("scale").shape
    filled = dict.fromkeys(("scale", "shift", "mean", "rstd"), (shape[0], *lanes(C)))
    return {**parameters, **filled, "moments": (b.array("moments").shape[0], 3, *lanes(C))}


def _statistics_backward_sizes(b: Binder) -> Shapes:
    (C,) = b.value("gamma").shape
    shape = b.value("mean").shape
    filled = dict.fromkeys(("mean", "rstd", "a", "b", "d"), (shape[0], *lanes(C)))
    parameters = dict.fromkeys(("gamma", "diff_scale", "diff_shift"), (C,))
    return {**filled, **parameters, "sums": (2, b.array("sums").shape[1], *lanes(C))}


def _bias_gradient_sizes(b: Binder) -> Shapes:
    (C,) = b.value("diff_bias").shape
    moments = {"moments": (b.array("moments").shape[0], 3, *lanes(C))} if b.has("moments") else {}
    coefficients = dict.fromkeys("abd", (b.value("a").shape[0], *lanes(C))) if moments else {}
    return {"diff_bias": (C,), "sums": (2, b.array("sums").shape[1], *lanes(C)), **moments, **coefficients}


# ---- records ---------------------------------------------------------------------------------

_norm = functools.partial(Operator, shape=_normalised, saves=("src", "scale", "mean", "variance"))
_norm_of_batch = functools.partial(
    _norm,
    workspaces={
        "mean": lambda a, _: (_statistics_shape(a), a["src"].dtype),
        "variance": lambda a, _: (_statistics_shape(a), np.float64),
    },
    work=(8, 12),
    split=_split_training,
    centres=centres,
)

OPERATORS = (
    _norm_of_batch(
        "batch_norm_training",
        functional.BatchNormTraining,
        kernels={
            "moments": Kernel(_moments, _whole("src"), sums=_moments_shape, has_eager=False),
            "statistics": Kernel(_statistics, _statistics_sizes),
            "normalize": Kernel(_normalize, _whole("src", "dst"), has_eager=False),
            "mask": Kernel(_apply_mask, _whole("diff_src", "gradient"), has_eager=False),
            "statistics_backward": Kernel(_statistics_backward, _statistics_backward_sizes),
            "gradient": Kernel(_normalize, _whole("dst", "diff_dst"), has_eager=False),
            "bias_gradient": Kernel(_bias_gradient, _bias_gradient_sizes),
        },
    ),
    # Its nodes are those above, with other values that share a mean.
    _norm_of_batch("group_norm", functional.GroupNorm),
    _norm(
        "batch_norm_inference",
        functional.BatchNormInference,
        work=(2, 1),
        split=_split_inference,
        kernels={"fixed_statistics": Kernel(_fixed_statistics), "fold": Kernel(_fold)},
    ),
)
