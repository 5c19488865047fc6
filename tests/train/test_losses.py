"""The next-token loss on the real decoder: the formula, packing, adapters, what a LoRA state trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.model.lora import LoraConfig, init_lora
from internjax.sharding import MeshConfig
from internjax.train.batch import Batch
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import init_state, make_step
from tests.weights import random_params

CONFIG = ModelConfig(
    vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24, dtype="float32"
)
KEY = jax.random.key(0)


@functools.cache
def initial_params():
    return jax.device_get(random_params(CONFIG, seed=1))


def params():
    return jax.tree.map(jnp.asarray, initial_params())


@functools.partial(jax.jit, static_argnames="chunk_size")
def loss_of(params, batch, *, chunk_size=512):
    return next_token(CONFIG, chunk_size=chunk_size)(params, None, batch, KEY)


def with_entries(params, path, where, value):
    """The parameters with one leaf changed, in NumPy."""
    *above, name = path.split(".")
    tree = jax.tree.map(np.array, params)
    functools.reduce(dict.__getitem__, above, tree)[name][where] = value
    return tree


def unpacked(documents: list[np.ndarray], seq_len: int) -> Batch:
    """One document per row."""
    return packed([[document] for document in documents], seq_len)


def packed(rows: list[list[np.ndarray]], seq_len: int) -> Batch:
    fields = {name: np.zeros((len(rows), seq_len), np.int32) for name in Batch._fields}
    fields["loss_mask"] = fields["loss_mask"].astype(np.float32)
    for index, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, start=1):
            place = (index, slice(start, start + len(document) - 1))
            fields["tokens"][place] = document[:-1]
            fields["targets"][place] = document[1:]
            fields["loss_mask"][place] = 1.0
            fields["positions"][place] = np.arange(len(document) - 1)
            fields["segments"][place] = segment
            start += len(document) - 1
    return Batch(**fields)


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CONFIG.vocab_size, size=length).astype(np.int32) for length in lengths]


def test_the_loss_is_minus_the_log_probability_of_the_targets():
    batch = unpacked(documents([9, 5]), seq_len=8)
    out = loss_of(params(), batch)
    logits = np.asarray(
        decoder.logits(params(), batch.tokens, config=CONFIG, positions_BT=batch.positions, segments_BT=batch.segments),
        np.float64,
    )
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logprobs, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.total, -(chosen * batch.loss_mask).sum(), rtol=1e-5)
    assert float(out.weight) == 8 + 4


def test_packed_loss_is_unpacked_loss():
    docs = documents([12, 7, 5, 9, 14, 3])
    loss = jax.jit(jax.value_and_grad(lambda p, batch: next_token(CONFIG)(p, None, batch, KEY).total))
    alone, alone_grads = loss(params(), unpacked(docs, 24))
    together, together_grads = loss(params(), packed([[docs[0], docs[1], docs[2]], [docs[3], docs[4], docs[5]]], 24))
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), together_grads, alone_grads)


def test_weights_of_the_mask_scale_the_terms():
    batch = unpacked(documents([9]), seq_len=8)
    mask = np.array([[0, 0, 0, 1, 0.5, 0, 0, 2]], np.float32)
    masks = [(np.arange(8) == t)[None].astype(np.float32) for t in (3, 4, 7)]
    parts = [float(loss_of(params(), batch._replace(loss_mask=mask)).total) for mask in masks]
    out = loss_of(params(), batch._replace(loss_mask=mask))
    np.testing.assert_allclose(out.total, parts[0] + 0.5 * parts[1] + 2 * parts[2], rtol=1e-5)
    assert float(out.weight) == 3.5


def test_chunks_of_the_vocabulary_loss_change_nothing():
    batch = packed([documents([9])], 8)
    whole, cut = loss_of(params(), batch).total, loss_of(params(), batch, chunk_size=3).total
    np.testing.assert_allclose(cut, whole, rtol=1e-6)


def adapters_of(lora_config):
    return jax.jit(functools.partial(init_lora, lora_config))(params(), jax.random.key(2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lora_starts_as_the_base_and_trains_adapters_alone(accumulate):
    lora_config = LoraConfig(rank=2, alpha=4.0, dropout=0.1 if accumulate == 2 else 0.0)
    base = params()
    adapters = adapters_of(lora_config)
    batch = unpacked(documents([20, 18, 17, 20]), seq_len=19)
    optimizer = make_optimizer(AdamW(peak_lr=0.02), Constant(), num_steps=20)
    state = init_state(adapters, optimizer, frozen=base)
    step = make_step(next_token(CONFIG, lora_config=lora_config), optimizer, accumulate=accumulate)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    plain = loss_of(base, batch)
    np.testing.assert_allclose(losses[0], plain.total / plain.weight, rtol=1e-6)  # identity at step 0
    assert losses[-1] < losses[0] - 0.05
    jax.tree.map(np.testing.assert_array_equal, state.frozen, params())
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert sizes == {leaf.shape for leaf in jax.tree.leaves(state.trainable)}
    # A number that is not finite is traced to the layer in which it arises.
    assert metrics["broken_layer"] == -1
    broken = jax.tree.map(jnp.asarray, with_entries(base, "layers.ffn.down.kernel", (1, 3, 5), np.nan))
    _, metrics = step(dataclasses.replace(state, frozen=broken), batch)
    assert not metrics["finite"] and metrics["broken_layer"] == 1 and step.num_traces == 1


@pytest.mark.parametrize(("dropout", "first"), [(0.0, [0, 1, 6, 7]), (0.1, [0, 1, 2, 3])])
def test_the_ring_gets_every_row_in_the_order_in_which_devices_have_equal_work(monkeypatch, dropout, first):
    """Not where dropout is drawn by a token's place: the draws have to be those of every other mesh."""
    seen = []

    def forward(params, tokens_BT, *, positions_BT, segments_BT, **_):
        seen.extend(map(np.asarray, (tokens_BT, positions_BT, segments_BT)))
        raise StopIteration

    monkeypatch.setattr(decoder, "forward", forward)
    lora_config = LoraConfig(rank=2, dropout=dropout)
    adapters = adapters_of(lora_config)
    loss = next_token(dataclasses.replace(CONFIG, attention="ring"), lora_config=lora_config)
    batch = unpacked(documents([9]), seq_len=8)
    with sharding.use(sharding.make_mesh(MeshConfig(fsdp=1, sequence=2), jax.devices()[:2])):
        with pytest.raises(StopIteration):
            loss(adapters, params(), jax.tree.map(jnp.asarray, batch), KEY)
    sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    tokens, positions, segments = seen
    assert positions[0, :4].tolist() == first and sorted(positions[0]) == list(range(8)) and (segments == 1).all()
    np.testing.assert_array_equal(tokens[0], batch.tokens[0][positions[0]])


def test_a_model_without_vocabulary_logits_is_refused():
    with pytest.raises(ValueError, match="head='lm'"):
        next_token(dataclasses.replace(CONFIG, head="scalar"))


def test_a_masked_impossible_target_does_not_poison_the_sum():
    # The head gives the target of the masked place a probability of exactly 0.
    tree = with_entries(params(), "head.kernel", (slice(None), 5), np.inf)
    batch = unpacked(documents([4]), seq_len=8)
    batch = batch._replace(loss_mask=np.zeros((1, 8), np.float32))
    assert float(loss_of(tree, batch).total) == 0.0
