"""The decoder against hand computation and against itself in its other forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.model import decoder
from internjax.model.cache import dense_cache, paged_cache
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B, INTERNLM2_20B, ModelConfig, num_params

SMALL = ModelConfig(
    vocab_size=61, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, dtype="float32"
)


@pytest.fixture(scope="module")
def params():
    return decoder.init(dataclasses.replace(SMALL, initializer_range=0.2), jax.random.key(0))


def tokens(batch, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 3, SMALL.vocab_size)


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
    "change", [{"remat": "dots"}, {"remat": "full"}, {"unroll_layers": 3}, {"attention": "chunked"}]
)
def test_memory_and_loop_choices_change_neither_loss_nor_gradient(params, change):
    inputs = tokens(2, 17)

    def loss(params, config):
        hidden = decoder.forward(params, inputs, config=config).hidden_BTD
        return -decoder.target_logprobs(params, hidden, inputs, config=config, chunk_size=5).sum()

    want, want_grad = jax.value_and_grad(loss)(params, SMALL)
    got, got_grad = jax.value_and_grad(loss)(params, dataclasses.replace(SMALL, **change))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got_grad, want_grad)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 16, 64])
def test_chunked_logprobs_equal_the_softmax_of_all_logits(params, chunk_size):
    inputs, temperature = tokens(2, 16), jnp.array([1.0, 0.5])
    hidden = decoder.forward(params, inputs, config=SMALL).hidden_BTD
    logits = decoder.unembed(params, hidden, config=SMALL) / temperature[:, None, None]
    want = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(inputs)[..., None], -1)[..., 0]
    got = decoder.target_logprobs(params, hidden, inputs, config=SMALL, chunk_size=chunk_size, temperature=temperature)
    np.testing.assert_allclose(got, want, atol=2e-6)


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
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    positions = jnp.array([[*range(5), *range(8), 0, 0, 0]])
    segments = jnp.array([[1] * 5 + [2] * 8 + [0] * 3])
    got = decoder.logits(params, packed, config=SMALL, positions_BT=positions, segments_BT=segments)
    np.testing.assert_allclose(got[:, :5], decoder.logits(params, first, config=SMALL), atol=1e-5)
    np.testing.assert_allclose(got[:, 5:13], decoder.logits(params, second, config=SMALL), atol=1e-5)
    assert np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("int8", 0.15)])
def test_cached_decoding_equals_the_full_forward(params, layout, dtype, tolerance):
    B, T = 2, 12
    inputs = tokens(B, T)
    want = decoder.logits(params, inputs, config=SMALL)
    if layout == "dense":
        cache = dense_cache(SMALL, B, 16, dtype=dtype)
    else:
        cache = paged_cache(SMALL, 9, 4, batch=B, pages_per_row=4, dtype=dtype)
        # Rows own scattered pages, and one table entry stays unmapped.
        cache = dataclasses.replace(cache, page_table_BM=jnp.array([[7, 1, 4, 9], [0, 8, 3, 9]], jnp.int32))
    got = []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 11), (11, 12)]:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
        out = decoder.forward(params, inputs[:, start:stop], config=SMALL, positions_BT=positions, cache=cache)
        cache = out.cache
        got.append(decoder.unembed(params, out.hidden_BTD, config=SMALL))
    error = np.abs(np.concatenate(got, axis=1) - np.asarray(want)).max()
    assert error < tolerance
    assert dtype == "float32" or error > 1e-4, "an 8-bit cache that is exact is not being used"


def test_ragged_prefill_drops_padding_and_unmapped_writes(params):
    inputs, lengths = tokens(2, 6), jnp.array([3, 6])
    segments = (jnp.arange(6) < lengths[:, None]).astype(jnp.int32)
    cache = paged_cache(SMALL, 4, 4, batch=2, pages_per_row=2, dtype="float32")
    cache = dataclasses.replace(cache, page_table_BM=jnp.array([[2, 4], [1, 3]], jnp.int32))
    cache = decoder.forward(params, inputs, config=SMALL, segments_BT=segments, cache=cache).cache
    written = np.asarray(jnp.abs(cache.k_LPSKH).sum(axis=(0, 3, 4)) > 0)
    assert written.tolist() == [[False] * 4, [True] * 4, [True, True, True, False], [True, True, False, False]]


def test_the_layer_loop_carries_the_cache_instead_of_copying_it():
    config = dataclasses.replace(SMALL, num_layers=8)
    params = decoder.init(config, jax.random.key(0))
    B, S = 4, 1024

    def decode_step(params, cache, inputs, positions):
        return decoder.forward(params, inputs, config=config, positions_BT=positions, cache=cache)

    for dtype, bytes_read in (("float32", 4), ("int8", 4)):  # an 8-bit layer is read back in float32
        cache = dense_cache(config, B, S, dtype=dtype)
        one = jnp.zeros((B, 1), jnp.int32)
        memory = jax.jit(decode_step, donate_argnums=1).lower(params, cache, one, one).compile().memory_analysis()
        layer = 2 * B * S * config.num_kv_heads * config.head_dim * bytes_read
        assert memory.temp_size_in_bytes < 1.5 * layer + 200_000, dtype
        assert memory.alias_size_in_bytes >= cache.k_LPSKH.nbytes * 2


def test_normalised_head_uses_unit_rows(params):
    config = dataclasses.replace(SMALL, norm_head=True)
    inputs = tokens(1, 6)
    kernel = params["head"]["kernel"]
    baked = params | {"head": {"kernel": kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)}}
    want = decoder.logits(baked, inputs, config=SMALL)
    np.testing.assert_allclose(decoder.logits(params, inputs, config=config), want, atol=1e-5)
    hidden = decoder.forward(params, inputs, config=config).hidden_BTD
    got = decoder.target_logprobs(params, hidden, inputs, config=config, chunk_size=4)
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(want)), np.asarray(inputs)[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, chosen, atol=1e-5)


def test_scalar_head_scores_positions(params):
    config = dataclasses.replace(SMALL, head="scalar")
    params = params | {"head": {"kernel": jnp.ones((32, 1))}}
    hidden = decoder.forward(params, tokens(2, 5), config=config).hidden_BTD
    scores = decoder.unembed(params, hidden, config=config)
    np.testing.assert_allclose(scores[..., 0], hidden.sum(-1), rtol=1e-5)


def test_tied_embeddings_have_no_head(params):
    config = dataclasses.replace(SMALL, tie_embeddings=True)
    tied = {name: leaf for name, leaf in params.items() if name != "head"}
    assert jax.tree.structure(decoder.abstract_params(config)) == jax.tree.structure(tied)
    untied = tied | {"head": {"kernel": params["embed"]["embedding"].T}}
    inputs = tokens(1, 6)
    want = decoder.logits(untied, inputs, config=SMALL)
    np.testing.assert_allclose(decoder.logits(tied, inputs, config=config), want, atol=1e-5)


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"head_dim": 7}, {"unroll_layers": 4}, {"d_model": 0}])
def test_impossible_configs_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)
