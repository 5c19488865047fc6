"""The training state, and the one step that moves it: gradients, accumulation, guard, update.

A loss of one's own is a function; everything else stays:

    def loss(trainable, frozen, batch, rng):
        error = batch["x"] @ trainable["kernel"] - batch["y"]
        return LossOutput(jnp.sum(error**2), jnp.asarray(error.size, jnp.float32), {})

    optimizer = make_optimizer(AdamW(peak_lr=1e-2), Constant(), num_steps=100)
    state = init_state({"kernel": kernel}, optimizer, seed=0)
    state, metrics = make_step(loss, optimizer)(state, batch)
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internjax import sharding
from internjax.train.losses import Loss, LossOutput
from internjax.train.optimizer import global_norm

STEP_METRICS = ("loss", "grad_norm", "learning_rate", "weight", "finite")
"""Names that the step itself reports; a loss may not use them for its own metrics."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is at one moment. Only `trainable` gets gradients, optimizer state and checkpoints.

    step: number of updates done, int32. trainable: the tree that is trained. frozen: arrays the loss may read, or None.
    opt_state: of `trainable`. rng: a key that never changes; a step uses fold_in(rng, step). data_position: index of
    the next batch of the data, int32.
    """

    step: jax.Array
    trainable: Any
    frozen: Any
    opt_state: Any
    rng: jax.Array
    data_position: jax.Array


def init_state(
    trainable: Any,
    optimizer: optax.GradientTransformation,
    *,
    frozen: Any = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    axes: Any = None,
    frozen_axes: Any = None,
) -> TrainState:
    """Returns the state at step 0. It takes `trainable` over: the first step donates (deletes) those arrays.

    On a mesh, `axes` and `frozen_axes` are trees of logical axis names (`decoder.logical_axes`) that say where each
    leaf goes; without them, leaves that already live on the mesh stay there and all others are replicated. The
    optimizer's moments are created on the shardings of the leaves that they belong to.
    """
    frozen = _place(frozen, frozen_axes, mesh)
    taken = {id(leaf) for leaf in jax.tree.leaves(frozen)}
    # A leaf that is frozen and trained at once (a policy that starts from its reference) must not be donated.
    trainable = jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in taken else leaf, _place(trainable, axes, mesh))
    if mesh is None:
        opt_state = jax.jit(optimizer.init)(trainable)
    else:
        opt_shardings = optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, leaf: leaf.sharding,
            jax.eval_shape(optimizer.init, trainable),
            trainable,
            transform_non_params=lambda _: sharding.replicated(mesh),
        )
        opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(trainable)
    scalars = (jnp.zeros((), jnp.int32), jax.random.key(seed), jnp.zeros((), jnp.int32))
    step, rng, data_position = _place(scalars, None, mesh)
    return TrainState(step, trainable, frozen, opt_state, rng, data_position)


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Returns the batch on the device, or with its rows split over the mesh's data and fsdp axes.

    The leading dimension of every leaf is rows, the second of a `[B, T]` leaf is time (split over `sequence`). Where a
    mesh spans several processes, each is given the whole batch and keeps its own rows.
    """
    if mesh is None:
        return jax.device_put(batch)
    rows, time = sharding.batch_sharding(mesh).spec

    def put(leaf):
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        names = (rows, time)[: leaf.ndim] if leaf.ndim <= 2 else (rows,)
        spec = PartitionSpec(
            *(name if size % _axis_size(mesh, name) == 0 else None for name, size in zip(names, leaf.shape))
        )
        placed = NamedSharding(mesh, spec)
        if jax.process_count() == 1:
            return jax.device_put(leaf, placed)
        return jax.make_array_from_callback(leaf.shape, placed, lambda index: leaf[index])

    return jax.tree.map(put, batch)


class Step:
    """step(state, batch) -> (state, metrics). The given state is donated, except its frozen part.

    metrics are device scalars: loss, grad_norm, learning_rate (where the optimizer reports one), weight, finite, and
    the loss's own. `finite` False means that the loss or a gradient was not finite and that the update was left out:
    trainable and opt_state are as before, while step and data_position have moved on. `num_traces` counts how often
    the step was traced: 1 in a healthy run.
    """

    def __init__(self, loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int, mesh: Mesh | None):
        self.mesh = mesh
        self.num_traces = 0
        self._loss = loss
        self._optimizer = optimizer
        self._accumulate = accumulate
        self._compiled = None

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        donated = dataclasses.replace(state, frozen=None)
        if self._compiled is None:
            self._compiled = self._jit(donated)
        with contextlib.nullcontext() if self.mesh is None else sharding.use(self.mesh):
            new, metrics = self._compiled(donated, state.frozen, batch)
        return dataclasses.replace(new, frozen=state.frozen), metrics

    def _jit(self, donated: TrainState):
        if self.mesh is None:
            return jax.jit(self._update, donate_argnums=0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(donated):
            if not isinstance(leaf.sharding, NamedSharding) or leaf.sharding.mesh != self.mesh:
                raise ValueError(
                    f"the step runs on a mesh of {self.mesh.size} devices, but {jax.tree_util.keystr(path)} of the "
                    "state is not on it. Give init_state the same mesh."
                )
        # The state comes out where it went in; left open, the compiler might choose otherwise and compile twice.
        return jax.jit(
            self._update, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, donated), None)
        )

    def _update(self, state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        self.num_traces += 1
        rng = jax.random.fold_in(state.rng, state.step)
        sums, grads = _summed_gradients(self._loss, state.trainable, frozen, batch, rng, num_parts=self._accumulate)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / sums.weight, grads)
        loss, grad_norm = sums.total / sums.weight, global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "weight": sums.weight, "finite": finite}
        rate = optax.tree_utils.tree_get(opt_state, "learning_rate")
        metrics |= {} if rate is None else {"learning_rate": rate}
        metrics |= {name: value / sums.weight for name, value in sums.metrics.items()}
        new = TrainState(state.step + 1, trainable, None, opt_state, state.rng, state.data_position + 1)
        return new, metrics


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int = 1, mesh: Mesh | None = None
) -> Step:
    """Returns the compiled training step of `loss`.

    `accumulate` cuts every batch into that many micro-batches whose gradients are added in float32 before the one
    update: the same result with the activations of one micro-batch. With a mesh the step runs under it, and the state
    must have been made on it.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is the number of micro-batches per update, at least 1; given {accumulate}")
    return Step(loss, optimizer, accumulate=accumulate, mesh=mesh)


def _place(tree: Any, axes: Any, mesh: Mesh | None) -> Any:
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf), tree)
    if axes is not None:
        return jax.device_put(tree, sharding.shardings(axes, tree, mesh))

    def put(leaf):
        placed = getattr(leaf, "sharding", None)
        stays = isinstance(placed, NamedSharding) and placed.mesh == mesh
        return leaf if stays else jax.device_put(leaf, sharding.replicated(mesh))

    return jax.tree.map(put, tree)


def _axis_size(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
    return int(np.prod([mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ())]))


def _summed_gradients(loss: Loss, trainable, frozen, batch, rng, *, num_parts: int) -> tuple[LossOutput, Any]:
    """Returns the summed LossOutput of the batch and the gradient of its total, part after part."""

    def part_gradients(part, key):
        def total(trainable):
            out = loss(trainable, frozen, part, key)
            taken = sorted(set(out.metrics) & set(STEP_METRICS))
            if taken:
                raise ValueError(f"the loss names its metrics {taken}, which the step reports itself; rename them")
            out = LossOutput(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tuple(out)))
            return out.total, out

        grads, out = jax.grad(total, has_aux=True)(trainable)
        return out, grads

    if num_parts == 1:
        return part_gradients(batch, jax.random.fold_in(rng, 0))

    parts = jax.tree.map(lambda leaf: _split_rows(leaf, num_parts), batch)

    def body(sums, xs):
        part, index = xs
        new = part_gradients(part, jax.random.fold_in(rng, index))
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, new), None

    shapes = jax.eval_shape(part_gradients, jax.tree.map(lambda leaf: leaf[0], parts), rng)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    return jax.lax.scan(body, zeros, (parts, jnp.arange(num_parts)))[0]


def _split_rows(leaf: jax.Array, num_parts: int) -> jax.Array:
    """Returns `[num_parts, B / num_parts, ...]`: part i has the rows i, i + num_parts, ..., so shards stay in place."""
    num_rows = leaf.shape[0]
    if num_rows % num_parts:
        raise ValueError(
            f"a batch of {num_rows} rows cannot be cut into {num_parts} equal micro-batches. "
            f"Choose a batch size that is a multiple of accumulate={num_parts}."
        )
    parts = leaf.reshape(num_rows // num_parts, num_parts, *leaf.shape[1:]).swapaxes(0, 1)
    names = (None, "batch", "sequence") if parts.ndim == 3 else (None, "batch") + (None,) * (parts.ndim - 2)
    return sharding.constrain(parts, names)
