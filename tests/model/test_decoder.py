"""The decoder against hand computation and against itself in its other forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from internjax.model import decoder
from internjax.model.cache import dense_cache, paged_cache
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B, INTERNLM2_20B, ModelConfig, num_params
from internjax.model.lora import LoraConfig, apply_config, init_lora, with_gains
from internjax.model.quantize import quantize_params
from tests.weights import random_params

SMALL = ModelConfig(
    vocab_size=61, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, dtype="float32"
)


@pytest.fixture(scope="module")
def params():
    return random_params(dataclasses.replace(SMALL, initializer_range=0.2))


def tokens(batch, length, seed=1):
    return np.random.default_rng(seed).integers(3, SMALL.vocab_size, (batch, length), np.int32)


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(params, inputs, *, config):
    def loss(params):
        hidden = decoder.forward(params, inputs, config=config).hidden_BTD
        return -decoder.target_logprobs(params, hidden, inputs, config=config, chunk_size=5).sum()

    return jax.value_and_grad(loss)(params)


@functools.partial(jax.jit, static_argnames=("config", "chunk_sizes"))
def logits_and_logprobs(params, inputs, temperature=1.0, *, config, chunk_sizes):
    """Returns all logits, and the inputs' log-probabilities in chunks of each size."""
    hidden = decoder.forward(params, inputs, config=config).hidden_BTD
    chunked = [
        decoder.target_logprobs(params, hidden, inputs, config=config, chunk_size=size, temperature=temperature)
        for size in chunk_sizes
    ]
    return decoder.unembed(params, hidden, config=config), chunked


@jax.jit
def cached_step(params, inputs, positions, cache, segments=None):
    out = decoder.forward(params, inputs, config=SMALL, positions_BT=positions, segments_BT=segments, cache=cache)
    return decoder.unembed(params, out.hidden_BTD, config=SMALL), out.cache


@pytest.mark.parametrize("config", [INTERNLM2_1_8B, INTERNLM2_7B, INTERNLM2_20B])
def test_published_sizes_have_the_published_number_of_parameters(config):
    published = {24: 1_889_110_016, 32: 7_737_708_544, 48: 19_861_149_696}[config.num_layers]
    leaves = jax.tree.leaves(decoder.abstract_params(config))
    assert sum(leaf.size for leaf in leaves) == num_params(config) == published


def test_every_parameter_has_logical_axes_of_its_rank():
    axes, shapes = decoder.logical_axes(SMALL), decoder.abstract_params(SMALL)
    jax.tree.map(lambda shape, names: np.testing.assert_equal(len(names), len(shape.shape)), shapes, axes)
    assert axes["layers"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads")
    assert axes["embed"]["embedding"] == ("vocab", "embed")


@pytest.mark.parametrize(
    "change", [{"remat": "dots"}, {"remat": "full"}, {"unroll_layers": 2}, {"attention": "chunked"}]
)
def test_memory_and_loop_choices_change_neither_loss_nor_gradient(params, change):
    inputs = tokens(2, 17)
    want, want_grad = loss_and_gradient(params, inputs, config=SMALL)
    got, got_grad = loss_and_gradient(params, inputs, config=dataclasses.replace(SMALL, **change))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got_grad, want_grad)


def test_chunked_logprobs_equal_the_softmax_of_all_logits(params):
    inputs, temperature, chunk_sizes = tokens(2, 16), np.array([1.0, 0.5], np.float32), (1, 4, 7, 16, 64)
    logits, chunked = logits_and_logprobs(params, inputs, temperature, config=SMALL, chunk_sizes=chunk_sizes)
    every = scipy.special.log_softmax(logits / temperature[:, None, None], axis=-1)
    want = np.take_along_axis(every, inputs[..., None], -1)[..., 0]
    for chunk_size, got in zip(chunk_sizes, chunked, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6, err_msg=str(chunk_size))


def test_a_chunked_loss_never_holds_all_logits():
    B, T, V = 2, 256, 4096
    config = dataclasses.replace(SMALL, vocab_size=V)
    shapes = decoder.abstract_params(config)
    hidden = jax.ShapeDtypeStruct((B, T, SMALL.d_model), jnp.float32)
    targets = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def temporaries(chunk_size):
        def loss(params, hidden, targets):
            return decoder.target_logprobs(params, hidden, targets, config=config, chunk_size=chunk_size).sum()

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return grad.lower(shapes, hidden, targets).compile().memory_analysis().temp_size_in_bytes

    all_logits = B * T * V * 4
    assert temporaries(16) < all_logits / 2
    assert temporaries(T) > all_logits


def test_packed_segments_are_the_separate_sequences(params):
    first, second = tokens(1, 5, seed=2), tokens(1, 8, seed=3)
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], axis=1)
    positions = np.array([[*range(5), *range(8), 0, 0, 0]])
    segments = np.array([[1] * 5 + [2] * 8 + [0] * 3])
    got = decoder.logits(params, packed, config=SMALL, positions_BT=positions, segments_BT=segments)
    np.testing.assert_allclose(got[:, :5], decoder.logits(params, first, config=SMALL), atol=1e-5)
    np.testing.assert_allclose(got[:, 5:13], decoder.logits(params, second, config=SMALL), atol=1e-5)
    assert np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"), [("dense", "float32", 2e-5), ("paged", "int8", 0.15), ("paged", "int4", 1.5)]
)
def test_cached_decoding_equals_the_full_forward(params, layout, dtype, tolerance):
    B, T = 2, 12
    inputs = tokens(B, T)
    want = decoder.logits(params, inputs, config=SMALL)
    if layout == "dense":
        cache = dense_cache(SMALL, B, 16, dtype=dtype)
    else:
        cache = paged_cache(SMALL, 9, 4, batch=B, pages_per_row=4, dtype=dtype)
        # Rows own scattered pages, and one table entry stays unmapped.
        cache = dataclasses.replace(cache, page_table_BM=np.array([[7, 1, 4, 9], [0, 8, 3, 9]], np.int32))
    got = []
    for start, stop in [(0, 4), (4, 5), (5, 6), (6, 10), (10, 11), (11, 12)]:
        positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (B, stop - start))
        logits, cache = cached_step(params, inputs[:, start:stop], positions, cache)
        got.append(logits)
    error = np.abs(np.concatenate(got, axis=1) - np.asarray(want)).max()
    assert error < tolerance
    assert dtype == "float32" or error > 1e-4, "an 8-bit cache that is exact is not being used"


def test_ragged_prefill_drops_padding_and_unmapped_writes(params):
    inputs, lengths = tokens(2, 6), np.array([3, 6])
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    segments = (positions < lengths[:, None]).astype(np.int32)
    cache = paged_cache(SMALL, 4, 4, batch=2, pages_per_row=2, dtype="float32")
    cache = dataclasses.replace(cache, page_table_BM=np.array([[2, 4], [1, 3]], np.int32))
    _, cache = cached_step(params, inputs, positions, cache, segments)
    written = np.abs(cache.k_LPSKH).sum(axis=(0, 3, 4)) > 0
    assert written.tolist() == [[False] * 4, [True] * 4, [True, True, True, False], [True, True, False, False]]


def test_the_layer_loop_carries_the_cache_instead_of_copying_it():
    config = dataclasses.replace(SMALL, num_layers=8)
    params = decoder.abstract_params(config)
    B, S = 4, 1024

    def decode_step(params, cache, inputs, positions):
        return decoder.forward(params, inputs, config=config, positions_BT=positions, cache=cache)

    for dtype, bytes_read in (("float32", 4), ("int8", 4)):  # an 8-bit layer is read back in float32
        cache = jax.eval_shape(lambda dtype=dtype: dense_cache(config, B, S, dtype=dtype))
        one = jax.ShapeDtypeStruct((B, 1), jnp.int32)
        memory = jax.jit(decode_step, donate_argnums=1).lower(params, cache, one, one).compile().memory_analysis()
        layer = 2 * B * S * config.num_kv_heads * config.head_dim * bytes_read
        assert memory.temp_size_in_bytes < 1.5 * layer + 200_000, dtype
        assert memory.alias_size_in_bytes >= cache.k_LPSKH.size * cache.k_LPSKH.dtype.itemsize * 2


def test_normalised_head_uses_unit_rows(params):
    config = dataclasses.replace(SMALL, norm_head=True)
    inputs = tokens(1, 6)
    kernel = np.asarray(params["head"]["kernel"])
    baked = params | {"head": {"kernel": kernel / np.linalg.norm(kernel, axis=0, keepdims=True)}}
    want = decoder.logits(baked, inputs, config=SMALL)
    got, (logprobs,) = logits_and_logprobs(params, inputs, config=config, chunk_sizes=(4,))
    np.testing.assert_allclose(got, want, atol=1e-5)
    chosen = np.take_along_axis(scipy.special.log_softmax(want, axis=-1), inputs[..., None], -1)[..., 0]
    np.testing.assert_allclose(logprobs, chosen, atol=1e-5)


def test_scalar_head_scores_positions(params):
    config = dataclasses.replace(SMALL, head="scalar")
    params = params | {"head": {"kernel": np.ones((32, 1), np.float32)}}

    @jax.jit
    def hidden_and_scores(inputs):
        hidden = decoder.forward(params, inputs, config=config).hidden_BTD
        return hidden, decoder.unembed(params, hidden, config=config)

    hidden, scores = hidden_and_scores(tokens(2, 5))
    np.testing.assert_allclose(scores[..., 0], hidden.sum(-1), rtol=1e-5)


def test_tied_embeddings_have_no_head(params):
    config = dataclasses.replace(SMALL, tie_embeddings=True)
    tied = {name: leaf for name, leaf in params.items() if name != "head"}
    assert jax.tree.structure(decoder.abstract_params(config)) == jax.tree.structure(tied)
    untied = tied | {"head": {"kernel": np.asarray(params["embed"]["embedding"]).T}}
    inputs = tokens(1, 6)
    want = decoder.logits(untied, inputs, config=SMALL)
    np.testing.assert_allclose(decoder.logits(tied, inputs, config=config), want, atol=1e-5)


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"head_dim": 7}, {"unroll_layers": 4}, {"d_model": 0}])
def test_impossible_configs_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("kind", ["plain", "dora", "one layer"])
def test_layers_that_stand_apart_compute_what_the_stack_does(kind, params):
    config, lora = SMALL, None
    if kind == "one layer":
        config = dataclasses.replace(SMALL, num_layers=1)
        params = params | {"layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
    elif kind == "dora":
        how = LoraConfig(rank=4, alpha=8.0, kind="dora")
        weights = jax.tree.map(lambda leaf: leaf + 0.1, init_lora(how, params, jax.random.key(1)))
        lora = with_gains(apply_config(weights, how), params)  # of the stack; a layer alone has no magnitudes

    @jax.jit
    def both(params, cache):
        whole = decoder.forward(params, inputs, config=config, lora=lora)
        cached = decoder.forward(params, inputs, config=config, lora=lora, cache=cache)
        logits = [decoder.unembed(params, each.hidden_BTD, config=config, lora=lora) for each in (whole, cached)]
        return logits, whole.finite_LBT, cached.cache

    inputs, apart = tokens(2, 7), decoder.with_layers_apart(params)
    assert len(apart["layers"]) == config.num_layers
    expected, found = (both(each, dense_cache(config, 2, 9, dtype="float32")) for each in (params, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, found)
    assert found[1].shape == (config.num_layers, 2, 7) and found[1].all()
    inner = np.abs(expected[0][0] - decoder.logits(params, inputs, config=config)).max()
    assert (inner > 0.01) == (kind == "dora"), "the adapter counts"


def test_layers_that_stand_apart_lie_where_the_stack_lies(params):
    up = params["layers"]["ffn"]["up"]["kernel"]
    for index, own in enumerate(decoder.with_layers_apart(params)["layers"]):
        kernel = own["ffn"]["up"]["kernel"]
        np.testing.assert_array_equal(kernel, up[index])
        assert kernel.unsafe_buffer_pointer() == up.unsafe_buffer_pointer() + index * kernel.nbytes, "nothing is copied"


def test_layers_stay_stacked_where_that_is_better(params):
    quantised = quantize_params(params, scheme="nf4", group=16)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    everywhere = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    apart = decoder.with_layers_apart(params)
    for given in (quantised, everywhere, apart):
        assert decoder.with_layers_apart(given) is given
    jax.eval_shape(lambda params: [decoder.with_layers_apart(params) is params or pytest.fail("traced")], params)
