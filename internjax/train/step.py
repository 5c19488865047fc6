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
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internjax import sharding
from internjax.sharding import OptimizerState
from internjax.train import loss_scale
from internjax.train.losses import Loss, LossOutput
from internjax.train.moments import beside
from internjax.train.optimizer import global_norm

STEP_METRICS = ("loss", "grad_norm", "learning_rate", "weight", "finite", "broken_layer", "loss_scale", "num_overflows")
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
    optimizer_state: OptimizerState = "as_parameters",
) -> TrainState:
    """Returns the state at step 0. It takes `trainable` over: the first step donates (deletes) those arrays.

    On a mesh, `axes` and `frozen_axes` are trees of logical axis names (`decoder.logical_axes`) that say where each
    leaf goes; without them, leaves that already live on the mesh stay there and all others are replicated. The
    optimizer's moments are created on the shardings of the leaves that they belong to, or cut over the replicas as well
    (`MeshConfig.optimizer_state`); the step then keeps gradients and update on the same shards.
    """
    frozen = _place(frozen, frozen_axes, mesh)
    taken = {id(leaf) for leaf in jax.tree.leaves(frozen)}
    # A leaf that is frozen and trained at once (a policy that starts from its reference) must not be donated.
    trainable = jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in taken else leaf, _place(trainable, axes, mesh))
    if mesh is None:
        opt_state = jax.jit(optimizer.init)(trainable)
    else:
        places = _optimizer_places(optimizer, trainable, mesh, optimizer_state)
        opt_state = jax.jit(optimizer.init, out_shardings=places)(trainable)
    scalars = (jnp.zeros((), jnp.int32), jax.random.key(seed), jnp.zeros((), jnp.int32))
    step, rng, data_position = _place(scalars, None, mesh)
    return TrainState(step, trainable, frozen, opt_state, rng, data_position)


def abstract_state(
    trainable: Any,
    optimizer: optax.GradientTransformation,
    *,
    frozen: Any = None,
    mesh: Mesh | None = None,
    axes: Any = None,
    frozen_axes: Any = None,
    optimizer_state: OptimizerState = "as_parameters",
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state that `init_state` makes; allocates nothing.

    `trainable` and `frozen` are trees of `jax.ShapeDtypeStruct` (`decoder.abstract_params`). `Step.lower` takes the
    result, so that a step is compiled for devices that are not there.
    """

    def abstract(tree, places):
        if mesh is None:
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)

    def placed(tree, axes):
        if mesh is None or axes is not None:
            return abstract(tree, None if mesh is None else sharding.shardings(axes, tree, mesh))
        return abstract(tree, jax.tree.map(lambda _: sharding.replicated(mesh), tree))

    trainable, frozen = placed(trainable, axes), placed(frozen, frozen_axes)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    places = None if mesh is None else _optimizer_places(optimizer, trainable, mesh, optimizer_state)
    scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.key, 0))
    (step, rng) = placed(scalars, None)
    return TrainState(step, trainable, frozen, abstract(opt_state, places), rng, step)


def _optimizer_places(optimizer, trainable: Any, mesh: Mesh, optimizer_state: OptimizerState) -> Any:
    """Returns where the optimizer's state lives: along with its parameters, as far as a leaf has their dimensions."""

    def place(leaf, param):
        if leaf.ndim != param.ndim:
            return sharding.replicated(mesh)
        cut = optimizer_state == "over_data"
        return beside(leaf, sharding.over_data(param.sharding, param.shape) if cut else param.sharding)

    return optax.tree_utils.tree_map_params(
        optimizer,
        place,
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )


def _gradient_places(optimizer, state: TrainState) -> Any:
    """Returns where each gradient lives: with the moments of its leaf, or with the leaf where it has none."""
    leaves, structure = jax.tree.flatten(state.trainable)
    places = [leaf.sharding for leaf in leaves]

    def note(moment, index):
        if moment.shape == leaves[index].shape:
            places[index] = moment.sharding
        return moment

    optax.tree_utils.tree_map_params(optimizer, note, state.opt_state, structure.unflatten(range(len(leaves))))
    return structure.unflatten(places)


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Returns the batch on the device, or as global arrays whose rows are split over the mesh's data and fsdp axes.

    The leading dimension of every leaf is rows, the second of a `[B, T]` leaf is time (split over `sequence`). Each
    process gives the rows of `sharding.process_rows` alone, in that order; in a job of one process these are all. A
    leaf that is a global array already is moved. Raises ValueError when the mesh does not divide rows or time.
    """
    if mesh is None:
        return jax.device_put(batch)
    return jax.tree.map(lambda leaf: _put_leaf(leaf, mesh), batch)


def _put_leaf(leaf: Any, mesh: Mesh) -> jax.Array:
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if leaf.ndim == 0:
        return jax.device_put(leaf, sharding.replicated(mesh))
    rows, time = sharding.batch_sharding(mesh).spec
    num_shards = sharding.axis_size(mesh, time)
    if leaf.ndim == 2 and leaf.shape[1] % num_shards:
        raise ValueError(
            f"an array {leaf.shape} of the batch has {leaf.shape[1]} time steps, which sequence {num_shards} of the "
            f"mesh does not divide. Pad rows to a multiple of {num_shards}, or choose a mesh with sequence=1."
        )
    placed = NamedSharding(mesh, PartitionSpec(rows, time) if leaf.ndim == 2 else PartitionSpec(rows))
    if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        sharding.check_rows(mesh, leaf.shape[0])
        return jax.device_put(leaf, placed)

    num_shards = sharding.axis_size(mesh, rows)
    num_held = len(sharding.process_rows(mesh, num_shards))
    if leaf.shape[0] % num_held:
        raise ValueError(
            f"process {jax.process_index()} gives {leaf.shape[0]} rows for its {num_held} of the mesh's {num_shards} "
            f"row shards. Give the rows of sharding.process_rows, of a batch that is a multiple of {num_shards} rows."
        )
    num_rows = leaf.shape[0] // num_held * num_shards
    place_of = {row: place for place, row in enumerate(sharding.process_rows(mesh, num_rows))}
    leaf = np.asarray(leaf)

    def part(index):
        start, stop, _ = index[0].indices(num_rows)
        return leaf[(slice(place_of[start], place_of[start] + stop - start), *index[1:])]

    return jax.make_array_from_callback((num_rows, *leaf.shape[1:]), placed, part)


class Step:
    """step(state, batch) -> (state, metrics). The given state is donated, except its frozen part.

    metrics are device scalars: loss, grad_norm, learning_rate (where the optimizer reports one), weight, finite, and
    the loss's own. `finite` False means that the loss or a gradient was not finite and that the update was left out:
    trainable and opt_state are as before, while step and data_position have moved on. `num_traces` counts how often
    the step was traced: 1 in a healthy run. broken_layer, where the loss knows (`LossOutput.broken_L`), is the first
    layer whose output is not finite somewhere, counted from 0; -1 where there is none.

    An optimizer with a loss scale (train.loss_scale) adds loss_scale, the one this step used, and num_overflows, the
    run's steps that were left out because a scaled gradient overflowed. Such a step is `finite`: only its grad_norm is
    not, and all that changed is the scale.
    """

    def __init__(self, loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int, mesh: Mesh | None):
        self.mesh = mesh
        self.num_traces = 0
        self._loss = loss
        self._optimizer = optimizer
        self._accumulate = accumulate
        self._compiled = None
        self._gradient_places = None

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        donated = dataclasses.replace(state, frozen=None)
        if self._compiled is None:
            _check_parts(batch, self._accumulate, self.mesh)
            self._compiled = self._jit(donated)
        with self._meshed():
            new, metrics = self._compiled(donated, state.frozen, batch)
        return dataclasses.replace(new, frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """Returns the lowered step of `abstract_state` and a batch of `jax.ShapeDtypeStruct`, for `.compile()`."""
        donated = dataclasses.replace(state, frozen=None)
        with self._meshed():
            return self._jit(donated).lower(donated, state.frozen, batch)

    def _meshed(self):
        return contextlib.nullcontext() if self.mesh is None else sharding.use(self.mesh)

    def _jit(self, donated: TrainState):
        if self.mesh is None:
            return jax.jit(self._update, donate_argnums=0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(donated):
            if not isinstance(leaf.sharding, NamedSharding) or leaf.sharding.mesh != self.mesh:
                raise ValueError(
                    f"the step runs on a mesh of {self.mesh.size} devices, but {jax.tree_util.keystr(path)} of the "
                    "state is not on it. Give init_state the same mesh."
                )
        self._gradient_places = _gradient_places(self._optimizer, donated)
        # The state comes out where it went in; left open, the compiler might choose otherwise and compile twice.
        return jax.jit(
            self._update, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, donated), None)
        )

    def _update(self, state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        self.num_traces += 1
        rng = jax.random.fold_in(state.rng, state.step)
        sums, grads = _summed_gradients(
            self._loss,
            state.trainable,
            frozen,
            batch,
            rng,
            num_parts=self._accumulate,
            place=self._place,
            scale=loss_scale.scale_of(state.opt_state),
        )
        grads = jax.tree.map(lambda g: g / sums.weight, grads)
        loss, grad_norm = sums.total / sums.weight, global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        overflow = loss_scale.overflowed(state.opt_state, loss, grad_norm)

        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.trainable)
        # On the gradients' shards still: where those are smaller than the parameters', the result is gathered once.
        trainable = self._place(optax.apply_updates(state.trainable, updates))
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        opt_state = loss_scale.adjusted(opt_state, updated=finite, overflow=overflow)
        metrics = {"loss": loss, "grad_norm": grad_norm, "weight": sums.weight, "finite": finite | overflow}
        metrics |= loss_scale.metrics(state.opt_state, opt_state)
        rate = optax.tree_utils.tree_get(opt_state, "learning_rate")
        metrics |= {} if rate is None else {"learning_rate": rate}
        metrics |= {name: value / sums.weight for name, value in sums.metrics.items()}
        if sums.broken_L is not None:
            metrics["broken_layer"] = jnp.where(jnp.any(sums.broken_L > 0), jnp.argmax(sums.broken_L > 0), -1)
        new = TrainState(state.step + 1, trainable, None, opt_state, state.rng, state.data_position + 1)
        return new, metrics

    def _place(self, tree: Any) -> Any:
        """Returns a tree shaped as the trainable one with its leaves on the gradients' shards."""
        if self._gradient_places is None:
            return tree
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self._gradient_places)


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
        if isinstance(placed, NamedSharding) and placed.mesh == mesh:
            return leaf
        everywhere = sharding.replicated(mesh)
        if jax.process_count() > 1 and jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            # JAX refuses to put typed keys on devices of other processes; a compiled identity does it.
            return jax.jit(lambda key: key, out_shardings=everywhere)(leaf)
        return jax.device_put(leaf, everywhere)

    return jax.tree.map(put, tree)


def _summed_gradients(
    loss: Loss, trainable, frozen, batch, rng, *, num_parts: int, place: Callable[[Any], Any], scale: jax.Array | None
) -> tuple[LossOutput, Any]:
    """Returns the summed LossOutput of the batch and the float32 gradient of its total, part after part.

    `place` puts gradients where they live: each part's are added up over devices into shards at once. With `scale` it
    is scale x the part's mean loss that is differentiated: a sum over tokens would overflow float16 at any scale.
    """

    # Its trace is kept: with several parts it is asked for the shapes first, which traced the model a second time.
    @functools.partial(jax.jit, inline=True)
    def part_gradients(trainable, frozen, part, key, scale):
        def total(trainable):
            out = loss(trainable, frozen, part, key)
            taken = sorted(set(out.metrics) & set(STEP_METRICS))
            if taken:
                raise ValueError(f"the loss names its metrics {taken}, which the step reports itself; rename them")
            out = LossOutput(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tuple(out)))
            factor = (
                None if scale is None else jax.lax.stop_gradient(scale / jnp.where(out.weight > 0, out.weight, 1.0))
            )
            return out.total if factor is None else out.total * factor, (out, factor)

        grads, (out, factor) = jax.grad(total, has_aux=True)(trainable)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), place(grads))
        return out, grads if factor is None else jax.tree.map(lambda g: g / factor, grads)

    if num_parts == 1:
        return part_gradients(trainable, frozen, batch, jax.random.fold_in(rng, 0), scale)

    parts = jax.tree.map(lambda leaf: _split_rows(leaf, num_parts), batch)

    def body(sums, xs):
        part, index = xs
        found = part_gradients(trainable, frozen, part, jax.random.fold_in(rng, index), scale)
        return jax.tree.map(jnp.add, sums, found), None

    shapes = jax.eval_shape(part_gradients, trainable, frozen, jax.tree.map(lambda leaf: leaf[0], parts), rng, scale)
    out, grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    zeros = (out, place(grads))
    return jax.lax.scan(body, zeros, (parts, jnp.arange(num_parts)))[0]


def _check_parts(batch: Any, num_parts: int, mesh: Mesh | None) -> None:
    """Raises ValueError when a micro-batch is no whole number of rows on every row shard."""
    num_shards = 1 if mesh is None else sharding.axis_size(mesh, sharding.batch_sharding(mesh).spec[0])
    for num_rows in {leaf.shape[0] for leaf in jax.tree.leaves(batch) if num_parts > 1}:
        if num_rows % (num_parts * num_shards):
            raise ValueError(
                f"a batch of {num_rows} rows cannot be cut into {num_parts} equal micro-batches of rows that "
                f"{num_shards} shards of the mesh divide. Choose a batch size that is a multiple of accumulate x "
                f"shards = {num_parts * num_shards}."
            )


def _split_rows(leaf: jax.Array, num_parts: int) -> jax.Array:
    """Returns `[num_parts, B / num_parts, ...]`: part i has the rows i, i + num_parts, ..., so shards stay in place."""
    num_rows = leaf.shape[0]
    parts = leaf.reshape(num_rows // num_parts, num_parts, *leaf.shape[1:]).swapaxes(0, 1)
    names = (None, "batch", "sequence") if parts.ndim == 3 else (None, "batch") + (None,) * (parts.ndim - 2)
    return sharding.constrain(parts, names)
