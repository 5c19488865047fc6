"""The decoder: one definition for training, scoring, rollouts, decoding and serving, as pure functions of a tree.

    params = init(config, jax.random.key(0))
    logits_BTV = logits(params, tokens_BT, config=config)

B batch, T time, D embed, N query heads, K key/value heads, H head dim, F frequencies (H / 2), V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from internjax.kernels.attention import attention
from internjax.kernels.paged_attention import paged_attention
from internjax.model import alibi, rope
from internjax.model.cache import KVCache, write
from internjax.model.config import ModelConfig, in_shape
from internjax.model.linear import Linear
from internjax.model.lora import Lora, with_gains
from internjax.model.neftune import add_noise
from internjax.model.quantize import QuantArray, column_squares, full_scales
from internjax.sharding import axis_size, constrain, partition_spec, unconstrained


class Norm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps), in float32, cast back, times the scale."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", scale_init, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.config.norm_eps)
        return x32.astype(x.dtype) * scale.astype(x.dtype)


class Inputs(NamedTuple):
    """What every layer sees besides the residual stream."""

    positions_BT: jax.Array
    segments_BT: jax.Array
    rotation: rope.Rotation | None
    """None where positions are not rotary."""


class Attention(nn.Module):
    """Grouped-query self-attention; with a cache, keys and values are written first and read back."""

    config: ModelConfig
    linear: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x_BTD, cache: KVCache | None, layer, inputs: Inputs):
        config, B, T = self.config, *x_BTD.shape[:2]
        heads, kv_heads = config.num_heads, config.num_kv_heads

        biased = config.attention_bias != "none"

        def project(name, num_heads, axis):
            y = self.linear(num_heads * config.head_dim, axes=("embed", axis), use_bias=biased, name=name)(x_BTD)
            y = y.reshape(B, T, num_heads, config.head_dim)
            y = constrain(y, ("batch", "sequence", f"act_{axis}", None))
            if name == "value":
                return y
            if config.qk_norm:
                y = Norm(config, name=f"{name}_norm")(y)
            return y if inputs.rotation is None else rope.rotate(y, inputs.rotation)

        q_BTNH = project("query", heads, "heads")
        k_BTKH = project("key", kv_heads, "kv_heads")
        v_BTKH = project("value", kv_heads, "kv_heads")
        slopes_N = jnp.asarray(alibi.slopes(heads)) if config.positions == "alibi" else None
        if cache is None:
            out_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                q_positions_BT=inputs.positions_BT,
                k_positions_BS=inputs.positions_BT,
                q_segments_BT=inputs.segments_BT,
                k_segments_BS=inputs.segments_BT,
                window=config.window,
                alibi_slopes_N=slopes_N,
                backend=config.attention,
            )
        else:
            valid_BT = inputs.segments_BT != 0
            cache = write(cache, layer, k_BTKH, v_BTKH, positions_BT=inputs.positions_BT, valid_BT=valid_BT)
            out_BTNH = paged_attention(
                q_BTNH,
                cache.k_LPSKH,
                cache.v_LPSKH,
                layer=layer,
                page_table_BM=cache.page_table_BM,
                q_positions_BT=inputs.positions_BT,
                k_scales=cache.k_scales_LPSK,
                k_offsets=cache.k_offsets_LPSK,
                v_scales=cache.v_scales_LPSK,
                v_offsets=cache.v_offsets_LPSK,
                window=config.window,
                alibi_slopes_N=slopes_N,
                backend=config.paged_attention,
            )
        biased = config.attention_bias == "all"
        output = self.linear(config.d_model, axes=("heads", "embed"), use_bias=biased, name="output")
        return output(out_BTNH.reshape(B, T, -1)), cache


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig
    linear: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x_BTD):
        linear = functools.partial(self.linear, use_bias=self.config.ffn_bias)
        gate = linear(self.config.ffn_dim, axes=("embed", "ffn"), name="gate")(x_BTD)
        up = linear(self.config.ffn_dim, axes=("embed", "ffn"), name="up")(x_BTD)
        hidden = constrain(nn.silu(gate) * up, ("batch", "sequence", "act_ffn"))
        return linear(self.config.d_model, axes=("ffn", "embed"), name="down")(hidden)


class Block(nn.Module):
    """One layer: h + attention(norm(h)), then h + ffn(norm(h)). The cache rides along in the carry.

    Without one it says where its output is finite, `[B, T]`.
    """

    config: ModelConfig
    linear: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, carry, layer, inputs: Inputs):
        x_BTD, cache = carry
        normed = Norm(self.config, name="attention_norm")(x_BTD)
        mixed, cache = Attention(self.config, self.linear, name="attention")(normed, cache, layer, inputs)
        x_BTD = constrain(x_BTD + mixed, ("batch", "sequence", "act_embed"))
        normed = Norm(self.config, name="ffn_norm")(x_BTD)
        x_BTD += FeedForward(self.config, self.linear, name="ffn")(normed)
        x_BTD = constrain(x_BTD, ("batch", "sequence", "act_embed"))
        # Over the width alone: no device has to ask another in every layer.
        return (x_BTD, cache), jnp.isfinite(x_BTD).all(axis=-1) if cache is None else None


_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm, head. Use the functions below, not this class."""

    config: ModelConfig
    lora_scale: float = 0.0
    lora_dropout: float = 0.0
    embedding_noise: float = 0.0

    def setup(self):
        config = self.config
        linear = functools.partial(Linear, config=config, lora_scale=self.lora_scale, lora_dropout=self.lora_dropout)
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
            unroll=config.unroll_layers,
            # To check that nothing is broadcast out of the loop, flax traces a layer once more than needed. Parameters
            # are drawn with that trace: without it a seed would give others.
            check_constancy_invariants=self.is_initializing(),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, linear)
        self.embed = nn.Embed(
            config.vocab_size,
            config.d_model,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(config.initializer_range), ("vocab", "embed")
            ),
        )
        self.norm = Norm(config)
        if not config.tie_embeddings:
            features, axis = (config.vocab_size, "vocab") if config.head == "lm" else (1, "score")
            self.head = linear(features, axes=("embed", axis))

    def begin(self, tokens_BT, positions_BT, segments_BT, inv_freq_BF):
        x_BTD = _look_up(self.embed.embedding, tokens_BT, dtype=jnp.dtype(self.config.dtype))
        if self.embedding_noise:
            x_BTD = add_noise(x_BTD, segments_BT, self.make_rng("dropout"), alpha=self.embedding_noise)
        x_BTD = constrain(x_BTD, ("batch", "sequence", "act_embed"))
        rotation = None
        if self.config.positions == "rotary":
            rotation = rope.rotation(positions_BT, inv_freq_BF, magnitude=rope.magnitude(self.config))
        return x_BTD, Inputs(positions_BT, segments_BT, rotation)

    def hidden(self, tokens_BT, positions_BT, segments_BT, inv_freq_BF, cache):
        x_BTD, inputs = self.begin(tokens_BT, positions_BT, segments_BT, inv_freq_BF)
        (x_BTD, cache), finite_LBT = self.layers((x_BTD, cache), jnp.arange(self.config.num_layers), inputs)
        return self.norm(x_BTD), cache, finite_LBT

    def unembed(self, hidden_BTD):
        hidden_BTD = hidden_BTD.astype(jnp.dtype(self.config.dtype))
        if self.config.tie_embeddings:
            return self.embed.attend(hidden_BTD).astype(jnp.float32)
        return self.head(hidden_BTD).astype(jnp.float32)

    def __call__(self, tokens_BT, positions_BT, segments_BT, inv_freq_BF):
        return self.unembed(self.hidden(tokens_BT, positions_BT, segments_BT, inv_freq_BF, None)[0])


def _look_up(table_VD: jax.Array, tokens_BT: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Returns the rows of the tokens as `dtype`, NaN for a token beyond the table. Gradients add up in the table's.

    On a mesh the table is cut by vocabulary and by embedding. Each device looks up its columns for the tokens of all
    the row shards that share the columns out between them, and then they exchange rows for columns: of the table
    nothing moves. The compiler finds this way by itself only where time is not cut, and replicates activations
    elsewhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    vocab, embed, batch, time = (partition_spec((name,))[0] for name in ("vocab", "embed", "batch", "sequence"))
    sizes = zip((*table_VD.shape, *tokens_BT.shape), (vocab, embed, batch, time), strict=True)
    if mesh.empty or mesh.size == 1 or any(size % axis_size(mesh, axes) for size, axes in sizes):
        return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)

    def local(table_VD, tokens_BT):
        num_rows = table_VD.shape[0]
        own_BT = jax.lax.all_gather(tokens_BT, embed, tiled=True) - jax.lax.axis_index(vocab) * num_rows
        here_BT = (own_BT >= 0) & (own_BT < num_rows)
        found_BTD = jnp.where(here_BT[..., None], jnp.take(table_VD, own_BT, axis=0, mode="clip"), 0).astype(dtype)
        found_BTD = jax.lax.all_to_all(found_BTD, embed, split_axis=0, concat_axis=2, tiled=True)
        known_BT = tokens_BT < num_rows * axis_size(mesh, vocab)
        return jnp.where(known_BT[..., None], jax.lax.psum(found_BTD, vocab), jnp.nan)

    specs = PartitionSpec(vocab, embed), PartitionSpec(batch, time)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[1])(table_VD, tokens_BT)


def _init_boxed(config: ModelConfig, rng: jax.Array) -> dict:
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    inv_freq_BF = rope.inv_freq(config)[None]
    # One token under no mesh: not every back end takes that, and none has parameters. Nothing is differentiated.
    # Layers one by one: the same numbers, compiled sooner.
    config = dataclasses.replace(config, attention="xla", remat="none", unroll_layers=1)
    with unconstrained():
        return Decoder(config).init(rng, tokens_BT, tokens_BT, tokens_BT + 1, inv_freq_BF)["params"]


@functools.partial(jax.jit, static_argnames="config")
def init(config: ModelConfig, rng: jax.Array) -> dict:
    """Returns fresh parameters as a nested dict; layers are stacked on axis 0 of every leaf under `layers`.

    Normal with initializer_range; the projections back into the residual stream (attention output, ffn down) of layer
    i are divided by sqrt(2 (i + 1)) (InternEvo's initialisation, i from 0). Norm scales are 1, biases 0.
    """
    params = nn.unbox(_init_boxed(config, rng))
    depth = jnp.sqrt(2.0 * (jnp.arange(config.num_layers, dtype=jnp.float32) + 1))[:, None, None]
    for part, name in (("attention", "output"), ("ffn", "down")):
        kernel = params["layers"][part][name]["kernel"]
        params["layers"][part][name]["kernel"] = (kernel / depth).astype(kernel.dtype)
    return params


def abstract_params(config: ModelConfig) -> dict:
    """Returns the shapes and dtypes of the parameters; allocates nothing and touches no device."""
    boxed = _abstract_boxed(config)
    return jax.tree.map(lambda box: box.unbox(apply_constraint=False), boxed, is_leaf=_is_box)


def logical_axes(config: ModelConfig) -> dict:
    """Returns the logical axis names of every parameter, in the parameters' tree."""
    specs = nn.get_partition_spec(_abstract_boxed(config))
    return jax.tree.map(tuple, specs, is_leaf=lambda leaf: not isinstance(leaf, dict))


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _abstract_boxed(config: ModelConfig) -> dict:
    # How a model computes changes none of its parameters.
    return _traced_boxed(dataclasses.replace(in_shape(config), attention="xla", remat="none", dtype="float32"))


@functools.lru_cache(maxsize=64)
def _traced_boxed(config: ModelConfig) -> dict:
    # Asked for by every step, load and save; tracing the model takes a fifth of a second.
    return jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))


class Forward(NamedTuple):
    """The residual stream after the final norm, and the cache with this call's keys and values in it."""

    hidden_BTD: jax.Array
    cache: KVCache | None
    finite_LBT: jax.Array | None
    """Where the output of each layer is finite; None with a cache."""


def _variables(params: dict, lora: Lora | None) -> tuple[dict, dict]:
    if lora is None:
        return {"params": params}, {}
    lora = with_gains(lora, params)
    return {"params": params, "lora": lora.weights}, {"lora_scale": lora.scale, "lora_dropout": lora.dropout}


def forward(
    params: dict,
    tokens_BT: jax.Array,
    *,
    config: ModelConfig,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    inv_freq_BF: jax.Array | None = None,
    lora: Lora | None = None,
    cache: KVCache | None = None,
    dropout_rng: jax.Array | None = None,
    embedding_noise: float = 0.0,
) -> Forward:
    """Returns the final-normed hidden states `[B, T, D]`, the updated cache, and where each layer is finite.

    The layers of `params` are stacked, or stand apart (`with_layers_apart`). positions default to 0..T-1, segments to 1
    (0 is padding: never attended, never cached), inv_freq to the config's frequencies. Under a cache, row b's token at
    position p is stored in slot p of its pages and attends to slots 0..p.
    embedding_noise: alpha of NEFTune, drawn from dropout_rng.
    """
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    if inv_freq_BF is None:
        inv_freq_BF = rope.inv_freq(config)[None]
    variables, adapter = _variables(params, lora)
    if isinstance(params["layers"], tuple):
        assert dropout_rng is None, "layers that stand apart are for decoding, which drops nothing"
        inputs = tokens_BT, positions_BT, segments_BT, inv_freq_BF
        return _forward_apart(variables, inputs, cache, config=config, adapter=adapter)
    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    found = Decoder(config, embedding_noise=embedding_noise, **adapter).apply(
        variables, tokens_BT, positions_BT, segments_BT, inv_freq_BF, cache, method=Decoder.hidden, rngs=rngs
    )
    return Forward(*found)


def _forward_apart(
    variables: dict, inputs: Sequence[jax.Array], cache: KVCache | None, *, config: ModelConfig, adapter: dict
) -> Forward:
    """Returns what `forward` does, one layer after the other; variables: collections whose layers stand apart."""
    layers = variables["params"]["layers"]
    others = {"params": _without_layers(variables["params"])}
    decoder = Decoder(config, **adapter)
    x_BTD, inputs = decoder.apply(others, *inputs, method=Decoder.begin)
    block = Block(config, functools.partial(Linear, config=config, **adapter))
    factors, finite = variables.get("lora", {}).get("layers"), []
    for index, own in enumerate(layers):
        mine = {"params": own} | ({} if factors is None else {"lora": layer_of(factors, index)})
        (x_BTD, cache), is_finite_BT = block.apply(mine, (x_BTD, cache), jnp.int32(index), inputs)
        finite.append(is_finite_BT)
    hidden_BTD = decoder.apply(others, x_BTD, method=lambda decoder, x_BTD: decoder.norm(x_BTD))
    return Forward(hidden_BTD, cache, jnp.stack(finite) if cache is None else None)


def _without_layers(params: dict) -> dict:
    return {name: part for name, part in params.items() if name != "layers"}


def layer_of(layers: dict, index: int) -> dict:
    """Returns one layer of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[index], layers)


def with_layers_apart(params: dict) -> dict:
    """Returns the parameters with a tuple of layers in place of the stack where a CPU decodes faster so, for `forward`
    and `unembed`; else the parameters themselves. Not to be traced: parameters that are being traced stay.

    On a CPU XLA copies a layer's matrices out of the stack each time it multiplies by them, which for few rows takes as
    long as the product: those of a step of a model of 20 million parameters (69 MB) take one row 3.5 ms instead of 6.2.
    Programs grow with the layers. Arrays are looked at in place, not copied, where a layer begins at a multiple of 64
    bytes. On several devices the stack stays; so it does with a QuantArray, whose dense matrices XLA would make of all
    layers before a loop over tokens, and keep.
    """
    leaves = jax.tree.leaves(params["layers"], is_leaf=lambda leaf: isinstance(leaf, QuantArray))
    if isinstance(params["layers"], tuple) or not all(map(_is_on_one_cpu, leaves)):
        return params

    def own(leaf, index):
        return jax.device_put(np.asarray(leaf)[index], *leaf.devices())

    num_layers = leaves[0].shape[0]
    apart = [jax.tree.map(functools.partial(own, index=index), params["layers"]) for index in range(num_layers)]
    return params | {"layers": tuple(apart)}


def _is_on_one_cpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    return [device.platform for device in leaf.devices()] == ["cpu"]


def begin(params: dict, tokens_BT: jax.Array, *, config: ModelConfig) -> tuple[jax.Array, Inputs]:
    """Returns what goes into the first layer: the residual stream `[B, T, D]`, and what every layer sees besides.

    Rows are whole sequences that are declared to be T long.
    """
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    inv_freq_BF = rope.inv_freq(config, length=T)[None]
    inputs = (tokens_BT, positions_BT, jnp.ones((B, T), jnp.int32), inv_freq_BF)
    return Decoder(config).apply({"params": params}, *inputs, method=Decoder.begin)


def layer(params: dict, x_BTD: jax.Array, inputs: Inputs, *, config: ModelConfig) -> jax.Array:
    """Returns the residual stream after one layer, whose parameters are one layer of `params["layers"]`, unstacked.

    Linear layers are `internjax.model.linear.Linear` modules named query, key, value, output, gate, up and down, which
    flax's `intercept_methods` can look into.
    """
    block = Block(config, functools.partial(Linear, config=config))
    (x_BTD, _), _ = block.apply({"params": params}, (x_BTD, None), None, inputs)
    return x_BTD


def _with_normalised_head(params: dict, config: ModelConfig) -> dict:
    if not config.norm_head:
        return params
    kernel = params["head"]["kernel"]
    shrunk_O = jax.lax.rsqrt(column_squares(kernel) + 1e-12)
    if isinstance(kernel, QuantArray):
        # Dividing a column's scales divides the column, so the head stays in few bits.
        scales = full_scales(kernel) * shrunk_O
        kernel = dataclasses.replace(kernel, scales=scales, steps=None, offsets=None)
    else:
        kernel = kernel.astype(jnp.float32) * shrunk_O
    return params | {"head": {"kernel": kernel}}


def unembed(params: dict, hidden_BTD: jax.Array, *, config: ModelConfig, lora: Lora | None = None) -> jax.Array:
    """Returns float32 logits `[B, T, V]` of final-normed hidden states, or scores `[B, T, 1]` with a scalar head."""
    variables, adapter = _variables(_with_normalised_head(params, config), lora)
    variables |= {"params": _without_layers(variables["params"])}
    return Decoder(config, **adapter).apply(variables, hidden_BTD, method=Decoder.unembed)


@functools.partial(jax.jit, static_argnames=("config", "embedding_noise"))
def logits(params: dict, tokens_BT: jax.Array, *, config: ModelConfig, **inputs: Any) -> jax.Array:
    """Returns float32 logits `[B, T, V]`, as one program; `inputs` are those of `forward`."""
    hidden_BTD = forward(params, tokens_BT, config=config, **inputs).hidden_BTD
    return unembed(params, hidden_BTD, config=config, lora=inputs.get("lora"))


def target_logprobs(
    params: dict,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    config: ModelConfig,
    lora: Lora | None = None,
    chunk_size: int = 512,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """Returns log p(target) `[B, T]`, float32, of logits / temperature (a number, or one per row `[B]`).

    The vocabulary is never materialised for more than `chunk_size` time steps, forward or backward.
    """
    params, config = _with_normalised_head(params, config), dataclasses.replace(config, norm_head=False)
    name = "embed" if config.tie_embeddings else "head"

    def local(head, hidden_BTD, targets_BT, temperature_B):
        def chunk(hidden_BCD, targets_BC):
            logits_BCV = unembed(params | {name: head}, hidden_BCD, config=config, lora=lora)
            logits_BCV = constrain(logits_BCV / temperature_B[:, None, None], (None, None, "act_vocab"))
            chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
            return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

        return _in_chunks(jax.checkpoint(chunk), hidden_BTD, targets_BT, chunk_size=chunk_size)

    temperature_B = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), hidden_BTD.shape[:1])
    return _per_shard(local, params[name], hidden_BTD, targets_BT, temperature_B)


def _in_chunks(function: Callable, hidden_BTD, targets_BT, *, chunk_size: int) -> jax.Array:
    """Returns function(hidden, targets) `[B, T]`, called on `chunk_size` time steps at once."""
    B, T = targets_BT.shape
    if T <= chunk_size:
        return function(hidden_BTD, targets_BT)
    padding = -T % chunk_size

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, chunk_size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda xs: function(*xs), (split(hidden_BTD), split(targets_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1)[:, :T]


def _per_shard(function: Callable, head: dict, hidden_BTD, targets_BT, temperature_B) -> jax.Array:
    """Returns function(head, hidden, targets, temperature) `[B, T]`, called by every shard of rows and time for itself.

    The shards become leading axes, and the head gets them too: one copy per shard, as each device holds anyway while it
    multiplies by it. So a loop over chunks gathers the head once before it and adds its gradient up over devices once
    after it, instead of in every turn, and it runs over each shard's own time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, time = partition_spec(("batch", "sequence"))
    R, S = (1, 1) if mesh.empty else (axis_size(mesh, rows), axis_size(mesh, time))
    B, T = targets_BT.shape
    if R * S == 1 or B % R or T % S:
        return function(head, hidden_BTD, targets_BT, temperature_B)

    def cut(x_BT):
        x = jnp.moveaxis(x_BT.reshape(R, B // R, S, T // S, *x_BT.shape[2:]), 2, 1)
        return constrain(x, ("batch", "sequence") + (None,) * (x.ndim - 2))

    def copied(path, leaf):
        axes = ("act_vocab", None) if path[0].key == "embedding" else (None, "act_vocab")
        return constrain(jnp.broadcast_to(leaf, (R, S, *leaf.shape)), ("batch", "sequence", *axes))

    function = jax.vmap(function, in_axes=(0, 0, 0, None), spmd_axis_name=time)
    function = jax.vmap(function, spmd_axis_name=rows)
    head = jax.tree_util.tree_map_with_path(copied, head)
    out = function(head, cut(hidden_BTD), cut(targets_BT), temperature_B.reshape(R, B // R))
    return constrain(jnp.moveaxis(out, 1, 2).reshape(B, T), ("batch", "sequence"))
