"""Low-rank adapters: the `lora` collection beside the parameters, and what a linear layer does with it.

    start = initialise(config, params, jax.random.key(0))        # start.params: the base, PiSSA's residual
    lora = apply_config(start.weights, config)

LoRA (arXiv:2106.09685), rank-stabilised scaling (rsLoRA, arXiv:2312.03732), weight-decomposed adapters (DoRA,
arXiv:2402.09353), principal components as first factors (PiSSA, arXiv:2404.02948).
L layers, I input features, O output features, r rank, N adapters side by side, B batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from internjax.model.quantize import QuantArray, column_squares, dequantize, matmul

ATTENTION_TARGETS = ("query", "key", "value", "output")
FFN_TARGETS = ("gate", "up", "down")

Scaling = Literal["lora", "rslora"]
Kind = Literal["lora", "dora"]
Initialisation = Literal["zero", "pissa"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels get an adapter, of which kind and size: y = x W + s (x A) B."""

    rank: int = 16
    """Columns of A and rows of B."""
    alpha: float = 32.0
    """The product A B is scaled by s: alpha / rank, or alpha / sqrt(rank)."""
    targets: tuple[str, ...] = ATTENTION_TARGETS + FFN_TARGETS
    """Matrices that get an adapter: query, key, value, output, gate, up, down, head."""
    dropout: float = 0.0
    """Probability with which an adapter's input is zeroed during training."""
    scaling: Scaling = "lora"
    """s = alpha / rank; rslora: alpha / sqrt(rank), under which larger ranks learn as fast as small ones."""
    kind: Kind = "lora"
    """dora: the length of every column of W + s A B is a parameter of its own, and A B turns its direction alone."""
    initialisation: Initialisation = "zero"
    """zero: A random, B zero. pissa: A and B hold the largest singular values of W, the base keeps what is left."""

    def __post_init__(self):
        unknown = sorted(set(self.targets) - set(ATTENTION_TARGETS + FFN_TARGETS + ("head",)))
        if unknown or not self.targets:
            known = ", ".join(ATTENTION_TARGETS + FFN_TARGETS + ("head",))
            raise ValueError(f"adapter targets must be among {known}, given {self.targets}")
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"rank must be >= 1 and dropout in [0, 1), given rank={self.rank} dropout={self.dropout}")
        for name, known in (("scaling", Scaling), ("kind", Kind), ("initialisation", Initialisation)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; given {getattr(self, name)!r}")
        if self.initialisation == "pissa" and self.alpha <= 0:
            raise ValueError(f"PiSSA divides by the adapter's scale, which must be positive; given alpha={self.alpha}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank if self.scaling == "lora" else self.rank**0.5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters ready to apply: the collection mirrors the parameter tree, with a node in place of each kernel.

    A node has a `[L, I, r]` and b `[L, r, O]`; a DoRA node also magnitude `[L, O]`, or gain `[L, O]` (`with_gains`).
    Nodes of several adapters side by side have N after L, and say which row takes which (`select`).
    """

    weights: dict
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


NODE_LEAVES = ("a", "b", "gain", "scale", "ids")
"""What a linear layer reads of a node."""


def apply_config(weights: dict, config: LoraConfig) -> Lora:
    """Returns the collection with the scale and dropout of its config."""
    return Lora(weights, config.scale, config.dropout)


def target_path(target: str) -> tuple[str, ...]:
    """Returns where the kernel of `target` stands in the parameter tree."""
    if target == "head":
        return ("head",)
    return ("layers", "attention" if target in ATTENTION_TARGETS else "ffn", target)


def _find(tree: Mapping[str, Any], path: Sequence[str]):
    for name in path:
        tree = tree[name]
    return tree


def num_adapted(lora: Lora) -> int:
    """Returns how many kernels have an adapter; those of all layers, which are stacked, count as one."""
    return sum(1 for _ in nodes(lora.weights))


def put_node(tree: dict, path: Sequence[str], node: dict) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = node


def nodes(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yields the path and the node of every adapted kernel of a collection."""
    if "a" in tree:
        yield path, tree
        return
    for name, child in tree.items():
        yield from nodes(child, (*path, name))


# --- how training starts ---------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Where training starts: the base to freeze, and the collection on top of it. Together they are the given model."""

    params: dict
    weights: dict


def initialise(config: LoraConfig, params: dict, rng: jax.Array, *, dtype: str = "float32") -> Start:
    """Returns a fresh collection for `params` and the base that it stands on, which together compute as `params` do.

    The base is `params` itself, but with PiSSA, where it is W - s A B, in new arrays for the adapted kernels alone.
    """
    weights = init_lora(config, params, rng, dtype=dtype)
    return Start(residual(config, params, weights), weights)


def init_lora(config: LoraConfig, params: dict, rng: jax.Array, *, dtype: str = "float32") -> dict:
    """Returns a fresh collection for `params` (arrays, QuantArrays or their shapes).

    a is uniform in +-1/sqrt(I) (the initialisation of the PEFT library) and b zero: the adapted model is the base.
    With PiSSA the adapted model is the base only on `residual`. DoRA's magnitudes are the lengths of the columns of W.
    """
    weights: dict = {}
    for index, target in enumerate(config.targets):
        path = target_path(target)
        if path[0] not in params:
            raise ValueError(f"the model has no {'.'.join(path)} to adapt (its head is tied); drop it from the targets")
        kernel = _find(params, path)["kernel"]
        *lead, in_features, out_features = kernel.shape
        key = jax.random.fold_in(rng, index)
        if config.initialisation == "pissa":
            node = _principal_factors(kernel, key, config, name=".".join(path))
        else:
            bound = in_features**-0.5
            a = jax.random.uniform(key, (*lead, in_features, config.rank), jnp.dtype(dtype), -bound, bound)
            node = {"a": a, "b": jnp.zeros((*lead, config.rank, out_features))}
        if config.kind == "dora":
            node["magnitude"] = _per_layer(_column_lengths, kernel)
        put_node(weights, path, {name: leaf.astype(jnp.dtype(dtype)) for name, leaf in node.items()})
    return weights


def residual(config: LoraConfig, params: dict, weights: dict) -> dict:
    """Returns the base on which fresh `weights` change nothing: W - s A B with PiSSA, else `params` themselves."""
    if config.initialisation != "pissa":
        return params

    def node(kernel, node, path):
        return _per_layer(_left, kernel, node["a"], node["b"], settings=(config.scale,))

    return _with_kernels(params, weights, node)


def _left(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return (kernel.astype(jnp.float32) - scale * product).astype(kernel.dtype)


def _per_layer(function: Callable, kernel, *leaves, settings: tuple = ()):
    """Returns function(kernel, *leaves, *settings) of one layer after the other: the temporaries of one are alive at a
    time. A function of the module makes one program for all kernels of a shape.

    Of shapes instead of arrays it returns zeros of the right shape: there are no values to compute with.
    """
    if isinstance(jax.tree.leaves(kernel)[0], jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(functools.partial(_mapped, function, settings), kernel, *leaves)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return _mapped(function, settings, kernel, *leaves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mapped(function: Callable, settings: tuple, kernel, *leaves):
    if len(kernel.shape) == 3:
        return jax.lax.map(lambda layer: function(*layer, *settings), (kernel, *leaves))
    return function(kernel, *leaves, *settings)


def _column_lengths(kernel) -> jax.Array:
    return jnp.sqrt(column_squares(kernel))


PISSA_ITERATIONS = 8
"""Turns of subspace iteration; each multiplies errors by (s_k / s_r)^4, k being twice the rank and 8 more."""


def _principal_factors(kernel, key: jax.Array, config: LoraConfig, *, name: str) -> dict:
    """Returns a = U sqrt(S / s) and b = sqrt(S / s) V^T of the `rank` largest singular values of a kernel.

    By randomised subspace iteration (Halko et al., arXiv:0909.4061), exact where the kernel has few columns or rows.
    """
    if isinstance(kernel, QuantArray):
        raise ValueError(
            f"PiSSA takes singular values of {name} in full precision, and it is quantised ({kernel.scheme}); "
            "initialise on the model before it is quantised, and quantise the base that comes back"
        )
    if config.rank > min(kernel.shape[-2:]):
        raise ValueError(
            f"PiSSA with rank {config.rank} wants as many singular values, and {name} {kernel.shape[-2:]} has "
            f"{min(kernel.shape[-2:])}; lower the rank or drop the target"
        )

    keys = jnp.broadcast_to(key, (*kernel.shape[:-2], *key.shape))
    with jax.default_matmul_precision("highest"):
        a, b = _per_layer(_factors, kernel, keys, settings=(config.rank, config.scale))
    return {"a": a, "b": b}


def _factors(kernel_IO: jax.Array, key: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    w_IO = kernel_IO.astype(jnp.float32)
    width = min(2 * rank + 8, *w_IO.shape)
    start = jax.random.normal(key, (w_IO.shape[1], width), jnp.float32)

    def turn(_, q):
        return jnp.linalg.qr(w_IO @ jnp.linalg.qr(w_IO.T @ q)[0])[0]

    q = jax.lax.fori_loop(0, PISSA_ITERATIONS, turn, jnp.linalg.qr(w_IO @ start)[0])
    u, singular, vt = jnp.linalg.svd(q.T @ w_IO, full_matrices=False)
    root = jnp.sqrt(singular[:rank] / scale)
    return (q @ u)[:, :rank] * root, root[:, None] * vt[:rank]


class Plain(NamedTuple):
    """An adapter of the original base: its config and its collection."""

    config: LoraConfig
    weights: dict


def of_original_base(config: LoraConfig, weights: dict, initial: dict) -> Plain:
    """Returns PiSSA's adapter as one of the model that it started from, of twice the rank; `initial` is its start.

    A B on the residual W - s A0 B0 is [A, A0] [B; -B0] on W (the convention of the PEFT library). alpha is changed so
    that the scale stays.
    """
    if config.initialisation != "pissa":
        raise ValueError(f"only PiSSA changes the base; given initialisation={config.initialisation!r}: save it as is")

    def node(now, start):
        a = jnp.concatenate([now["a"], start["a"]], axis=-1)
        return now | {"a": a, "b": jnp.concatenate([now["b"], -start["b"]], axis=-2)}

    doubled: dict = {}
    for path, now in nodes(weights):
        put_node(doubled, path, node(now, _find(initial, path)))
    alpha = config.alpha * (2.0 if config.scaling == "lora" else 2.0**0.5)
    return Plain(dataclasses.replace(config, rank=2 * config.rank, alpha=alpha, initialisation="zero"), doubled)


# --- what a linear layer adds ----------------------------------------------------------------------------------------


def adapted(y: jax.Array, x: jax.Array, node: dict, *, scale: float) -> jax.Array:
    """Returns y = x W with the node's adapter on it: y + s (x A) B, times the gain of every column with DoRA.

    x is the adapter's input (after dropout).
    """
    if "ids" in node:
        return _adapted_by_row(y, x, node)
    y += scale * matmul(matmul(x, node["a"]), node["b"])
    if "gain" not in node:
        return y
    # In float32: what DoRA learns first are changes of a gain near 1, which bfloat16 would round away.
    return (y.astype(jnp.float32) * node["gain"].astype(jnp.float32)).astype(y.dtype)


def with_gains(lora: Lora, params: dict) -> Lora:
    """Returns adapters with DoRA's magnitudes turned into what the columns of W + s A B are multiplied by.

    The gain is m / |W + s A B|, whose denominator is held constant in the backward pass (arXiv:2402.09353, section
    4.3). The decoder calls this before its layers: within them, every matrix of a layer would be dequantised for it at
    once, in the forward pass and again where activations are recomputed. For frozen adapters call it once.
    """
    weights: dict = {}
    for path, node in nodes(lora.weights):
        if "magnitude" in node:
            kernel, a, b = jax.lax.stop_gradient((_find(params, path)["kernel"], node["a"], node["b"]))
            norms = _per_layer(_column_norms, kernel, a, b, settings=(lora.scale,))
            node = {"a": node["a"], "b": node["b"], "gain": node["magnitude"].astype(jnp.float32) / norms}
        put_node(weights, path, node)
    return dataclasses.replace(lora, weights=weights)


def _column_norms(kernel, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns |W + s A B| of every column `[O]`, float32, without making that matrix.

    |w + s A b|^2 = |w|^2 + 2 s (A^T w) b + s^2 b (A^T A) b, with A^T W as one more product with the kernel.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        along = jnp.sum(matmul(a.T, kernel) * b, axis=0)
        own = jnp.sum(b * ((a.T @ a) @ b), axis=0)
    squares = column_squares(kernel) + 2 * scale * along + scale**2 * own
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


# --- several side by side --------------------------------------------------------------------------------------------


def stack(adapters: Sequence[Lora], params: dict) -> dict:
    """Returns the collection of N frozen adapters of one base side by side, for `select`.

    Ranks and targets may differ: a smaller rank is filled with zeros, a target that an adapter lacks adds nothing.
    Nodes have a `[L, N, I, r]`, b `[L, N, r, O]`, scale `[L, N]` and, where one of them is DoRA's, gain `[L, N, O]`.
    """
    if not adapters:
        raise ValueError("no adapters are given to put side by side; give at least one")
    found = [dict(nodes(with_gains(lora, params).weights)) for lora in adapters]
    stacked: dict = {}
    for path in dict.fromkeys(path for each in found for path in each):
        *lead, _, out_features = _find(params, path)["kernel"].shape
        here = [each.get(path) for each in found]
        like = next(node for node in here if node is not None)
        rank = max(node["a"].shape[-1] for node in here if node is not None)
        a = [_padded(jnp.zeros_like(like["a"]) if node is None else node["a"], rank, axis=-1) for node in here]
        b = [_padded(jnp.zeros_like(like["b"]) if node is None else node["b"], rank, axis=-2) for node in here]
        axis = len(lead)
        scales = jnp.array([0.0 if node is None else lora.scale for node, lora in zip(here, adapters, strict=True)])
        node = {
            "a": jnp.stack(a, axis),
            "b": jnp.stack(b, axis),
            "scale": jnp.broadcast_to(scales.astype(jnp.float32), (*lead, len(adapters))),
        }
        if any(each is not None and "gain" in each for each in here):
            ones = jnp.ones((*lead, out_features), jnp.float32)
            node["gain"] = jnp.stack([ones if each is None else each.get("gain", ones) for each in here], axis)
        put_node(stacked, path, node)
    return stacked


def _padded(leaf: jax.Array, rank: int, *, axis: int) -> jax.Array:
    widths = [(0, 0)] * leaf.ndim
    widths[axis] = (0, rank - leaf.shape[axis])
    return jnp.pad(leaf, widths)


def select(stacked: dict, ids_B: jax.Array) -> Lora:
    """Returns adapters under which row b of a batch is computed with adapter `ids_B[b]` of a stack, -1 for none.

    The ids may be traced: one compiled program serves every mixture. Raises ValueError for ids that are known and
    beyond the stack; a traced one selects none.
    """
    ids_B = jnp.asarray(ids_B, jnp.int32)
    num_adapters = next(node["scale"].shape[-1] for _, node in nodes(stacked))
    if not isinstance(ids_B, jax.core.Tracer) and ((ids_B < -1) | (ids_B >= num_adapters)).any():
        raise ValueError(f"adapter ids lie in 0..{num_adapters - 1}, -1 for none; given {ids_B.tolist()}")
    weights: dict = {}
    for path, node in nodes(stacked):
        lead = node["a"].shape[:-3]
        put_node(weights, path, node | {"ids": jnp.broadcast_to(ids_B, (*lead, *ids_B.shape))})
    return Lora(weights, 1.0)


def _adapted_by_row(y: jax.Array, x: jax.Array, node: dict) -> jax.Array:
    """Returns y `[B, T, O]` with the adapter of every row on it.

    All N adapters are multiplied and those of other rows masked in between: for the few that are held at once this is
    two products, where gathering would copy factors for every row.
    """
    ids_B, a, b = node["ids"], node["a"].astype(x.dtype), node["b"].astype(x.dtype)
    if ids_B.shape[0] != x.shape[0]:
        raise ValueError(f"{ids_B.shape[0]} adapter ids are given for a batch of {x.shape[0]} rows; give one per row")
    own_BN = ids_B[:, None] == jnp.arange(a.shape[0])
    any_B11 = own_BN.any(axis=1)[:, None, None]
    low_BTNr = jnp.where(own_BN[:, None, :, None], jnp.einsum("bti,nir->btnr", x, a), 0)
    delta_BTO = jnp.einsum("btnr,nro->bto", low_BTNr, b)
    scale_B11 = node["scale"][ids_B][:, None, None]
    sum_BTO = y + scale_B11.astype(y.dtype) * delta_BTO
    if "gain" in node:
        sum_BTO = (sum_BTO.astype(jnp.float32) * node["gain"][ids_B][:, None]).astype(y.dtype)
    return jnp.where(any_B11, sum_BTO, y)


# --- placing and merging ---------------------------------------------------------------------------------------------


def logical_axes(weights: dict, params_axes: dict) -> dict:
    """Returns the logical axes of a collection: a follows its kernel's input axis, b and magnitude the output axis.

    In a stack of several adapters their own axis is on every device.
    """

    def node(tree, axes):
        if "a" not in tree:
            return {name: node(child, axes[name]) for name, child in tree.items()}
        kernel = axes["kernel"]
        *lead, inputs, outputs = kernel.values if isinstance(kernel, QuantArray) else kernel
        several = (None,) if "scale" in tree else ()
        last = {"a": (inputs, "rank"), "b": ("rank", outputs), "magnitude": (outputs,), "gain": (outputs,)}
        own = {name: (*lead, *several, *last.get(name, ())) for name in tree}
        return own | ({"ids": (*lead, None)} if "ids" in tree else {})

    return node(weights, params_axes)


def merge(params: dict, lora: Lora) -> dict:
    """Returns parameters with the adapters in every adapted W, each in its own dtype: W + s A B, times DoRA's gains.

    Raises ValueError for an adapter whose shape or place does not fit. A quantised W is restored first: the merged
    kernel is an array of the dtype that was quantised. PiSSA's adapter is merged into the residual that it stands on.
    """

    def merged(kernel, node, path):
        if "ids" in node or "scale" in node:
            raise ValueError("several adapters side by side cannot be merged into one model; merge one of them")
        if (node["a"].shape[-2], node["b"].shape[-1]) != kernel.shape[-2:]:
            raise ValueError(
                f"adapter of {'.'.join(path)} maps {node['a'].shape[-2]} to {node['b'].shape[-1]} features, the base "
                f"kernel maps {kernel.shape[-2]} to {kernel.shape[-1]}: it was trained on another base"
            )
        return _merged(kernel, node, lora.scale)

    return _with_kernels(params, lora.weights, merged)


@functools.partial(jax.jit, static_argnames="scale")
def _merged(kernel, node: dict, scale: float) -> jax.Array:
    kernel = dequantize(kernel) if isinstance(kernel, QuantArray) else kernel
    whole = kernel.astype(jnp.float32) + scale * (node["a"].astype(jnp.float32) @ node["b"].astype(jnp.float32))
    if "magnitude" in node:
        norms = jnp.sqrt(jnp.maximum(column_squares(whole), jnp.finfo(jnp.float32).tiny))
        whole = whole * (node["magnitude"].astype(jnp.float32) / norms)[..., None, :]
    elif "gain" in node:
        whole = whole * node["gain"].astype(jnp.float32)[..., None, :]
    return whole.astype(kernel.dtype)


def _with_kernels(params: dict, weights: dict, function: Callable) -> dict:
    """Returns the parameters with function(kernel, node, path) in place of every adapted kernel."""

    def node(tree, adapters, path):
        if "a" in adapters:
            return tree | {"kernel": function(tree["kernel"], adapters, path)}
        unknown = sorted(set(adapters) - set(tree))
        if unknown:
            raise ValueError(f"the adapter has {unknown} under {'.'.join(path) or 'the root'}, the base does not")
        return tree | {name: node(tree[name], child, (*path, name)) for name, child in adapters.items()}

    return node(params, weights, ())
