"""Sampling against a NumPy reference written from the definitions, and against the laws it promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internjax.decode.sample import (
    Sampling,
    SamplingParams,
    first_true,
    greedy,
    make_sampling,
    penalise,
    stack,
)
from internjax.decode.sample import draw as eager_draw
from internjax.decode.sample import sample as eager_sample
from internjax.decode.sample import truncate as eager_truncate

# Compiled once per shape; called as they are, each call would compile its branches anew.
draw, sample, truncate = map(jax.jit, (eager_draw, eager_sample, eager_truncate))


def reference_kept(logits_V, *, top_k=0, top_p=1.0, min_p=0.0):
    """Returns the set of tokens that can be drawn, by sorting; logits without ties."""
    kept = list(np.argsort(-logits_V))
    if top_k:
        kept = kept[:top_k]
    probabilities = np.exp(logits_V[kept] - logits_V.max())
    probabilities /= probabilities.sum()
    reached = np.searchsorted(np.cumsum(probabilities), top_p) + 1
    kept = kept[: min(reached, len(kept))]
    return {token for token in kept if np.exp(logits_V[token] - logits_V.max()) >= min_p}


def random_logits(seed, batch, vocab):
    return np.random.default_rng(seed).normal(0, 3, (batch, vocab)).astype(np.float32)


@pytest.mark.parametrize("vocab", [5, 128, 1000])
def test_truncation_equals_sorting(vocab):
    rng = np.random.default_rng(vocab)
    logits_BV = random_logits(0, 24, vocab)
    rows = [
        {
            "top_k": int(rng.choice([0, 1, 3, vocab // 2, vocab, 2 * vocab])),
            "top_p": float(rng.choice([1.0, 0.3, 0.9, 0.999])),
            "min_p": float(rng.choice([0.0, 0.05, 0.5])),
        }
        for _ in logits_BV
    ]
    kept_BV = np.isfinite(truncate(jnp.asarray(logits_BV), stack([SamplingParams(**row) for row in rows])))
    for logits_V, kept_V, row in zip(logits_BV, kept_BV, rows):
        assert set(np.flatnonzero(kept_V)) == reference_kept(logits_V, **row), row


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 40), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_truncation_is_a_set_of_the_most_likely_that_is_large_enough(seed, top_k, top_p, min_p):
    # Few distinct values, so that ties are everywhere: a kept set never splits tokens of one value.
    logits_V = np.random.default_rng(seed).integers(-3, 4, 40).astype(np.float32)
    row = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    kept_V = np.isfinite(truncate(jnp.asarray(logits_V)[None], stack([row])))[0]
    lowest = logits_V[kept_V].min()
    assert kept_V[logits_V == logits_V.max()].all()
    assert (kept_V == (logits_V >= lowest)).all()
    assert np.exp(lowest - logits_V.max()) >= min_p * (1 - 1e-6)
    if top_k and min_p == 0 and top_p == 1:
        assert (logits_V >= lowest).sum() >= min(top_k, 40) > (logits_V > lowest).sum()
    if not top_k and min_p == 0:
        mass_V = np.exp(logits_V.astype(np.float64))
        share = mass_V[logits_V > lowest].sum() / mass_V.sum()
        assert mass_V[kept_V].sum() / mass_V.sum() >= top_p - 1e-6 and share <= top_p + 1e-6


def test_repetition_penalty_by_hand():
    logits_BV = jnp.array([[2.0, -2.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    seen_BV = jnp.array([[True, True, False, False], [True, True, False, False]])
    np.testing.assert_allclose(
        penalise(logits_BV, seen_BV, jnp.array([2.0, 1.0])), [[1.0, -4.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]]
    )


def test_temperature_zero_is_the_most_likely_token_and_the_first_of_equals():
    logits_BV = random_logits(1, 12, 200)
    logits_BV[3, [7, 150]] = 50.0
    sampling = make_sampling(12, temperature=0.0, top_k=5, top_p=0.5, seed=3)
    drawn = sample(logits_BV, sampling, positions_B=np.arange(12), seen_BV=np.zeros((12, 200), bool))
    np.testing.assert_array_equal(drawn.ids_B, logits_BV.argmax(axis=-1))
    assert drawn.ids_B[3] == 7
    np.testing.assert_array_equal(drawn.processed_logprobs_B, 0.0)


def test_greedy_rows_and_drawn_rows_share_a_batch():
    logits_BV = random_logits(2, 12, 200)
    mixed = make_sampling(12, temperature=np.arange(12) % 2, seed=np.arange(12))
    seen_BV = np.zeros((12, 200), bool)
    ids_PB = [sample(logits_BV, mixed, positions_B=np.full(12, p), seen_BV=seen_BV).ids_B for p in range(20)]
    ids_BP = np.asarray(ids_PB).T
    for row, (logits_V, ids_P) in enumerate(zip(logits_BV, ids_BP)):
        assert len(set(ids_P.tolist())) > 1 if row % 2 else set(ids_P.tolist()) == {int(logits_V.argmax())}


def test_logprobs_raw_and_processed_by_hand():
    """A penalty halves the logit of token 0, top-k 2 leaves tokens 0 and 1; the raw log-prob knows neither."""
    logits_BV = jnp.log(jnp.array([[16.0, 2.0, 1.0, 0.5]]))
    sampling = make_sampling(1, temperature=0.5, top_k=2, repetition_penalty=2.0, seed=[1])
    seen_BV = jnp.array([[True, False, False, False]])
    found = {}
    for position in range(64):
        drawn = sample(logits_BV, sampling, positions_B=np.array([position]), seen_BV=seen_BV)
        found[int(drawn.ids_B[0])] = (float(drawn.logprobs_B[0]), float(drawn.processed_logprobs_B[0]))
    raw = np.array([256.0, 4.0, 1.0, 0.25]) / 261.25
    processed = np.array([16.0, 4.0]) / 20
    assert set(found) == {0, 1}
    for token in (0, 1):
        np.testing.assert_allclose(found[token], [np.log(raw[token]), np.log(processed[token])], rtol=1e-5)


@pytest.mark.parametrize("vocab", [3, 300])
def test_draws_follow_the_distribution(vocab):
    """Chi-square of 40,000 draws against softmax(logits): beyond 5 standard deviations only by a bug."""
    logits_V = random_logits(4, 1, vocab)[0] / 2
    logits_V[1] = -np.inf
    n = 40_000
    logits_BV = np.broadcast_to(logits_V, (n, vocab))
    ids_B = np.asarray(draw(logits_BV, seed_B=np.full(n, 5, np.uint32), positions_B=np.arange(n)))
    counts = np.bincount(ids_B, minlength=vocab)
    expected = n * np.exp(logits_V.astype(np.float64)) / np.exp(logits_V.astype(np.float64)).sum()
    assert counts[1] == 0
    often = expected > 5
    chi = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = often.sum() - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom)
    # Draws at neighbouring positions are independent: equal neighbours as often as chance makes them.
    share = (expected / n) ** 2
    assert abs((ids_B[1:] == ids_B[:-1]).mean() - share.sum()) < 5 * np.sqrt(share.sum() / n)


def test_draws_follow_the_seed_and_not_the_row():
    """Each row's token is that of the same row alone, wherever it stands in the batch and whatever stands beside it."""
    logits_BV = random_logits(5, 12, 200)
    rows = [SamplingParams(temperature=0.5 + b / 8, top_k=b, top_p=0.95, seed=b % 3) for b in range(12)]
    positions_B = np.arange(12) * 3
    seen_BV = np.random.default_rng(0).random((12, 200)) < 0.1

    def ids(order):
        order = np.array(order)
        sampling = stack([rows[b] for b in order])
        drawn = sample(logits_BV[order], sampling, positions_B=positions_B[order], seen_BV=seen_BV[order])
        return np.asarray(drawn.ids_B)

    together = ids(range(12))
    order = np.random.default_rng(1).permutation(12)
    np.testing.assert_array_equal(ids(order), together[order])
    np.testing.assert_array_equal([ids([b])[0] for b in range(12)], together)


def test_seed_and_position_both_matter():
    logits_BV, zeros_B, count_B = np.zeros((64, 1000), np.float32), np.zeros(64, np.uint32), np.arange(64)
    by_position = draw(logits_BV, seed_B=zeros_B, positions_B=count_B)
    by_seed = draw(logits_BV, seed_B=count_B.astype(np.uint32), positions_B=0 * count_B)
    assert len(set(by_position.tolist())) > 50 and len(set(by_seed.tolist())) > 50


def test_one_seed_gives_every_row_its_own_whatever_the_batch():
    few, many = make_sampling(4, seed=11).seed, make_sampling(32, seed=11).seed
    np.testing.assert_array_equal(few, many[:4])
    assert len(set(many.tolist())) == 32
    assert not set(many.tolist()) & set(make_sampling(32, seed=12).seed.tolist())


def test_broken_logits_give_valid_ids_and_a_logprob_that_says_so():
    logits_BV = np.full((12, 200), np.nan, np.float32)
    kinds = np.arange(12) % 3
    sampling = make_sampling(12, temperature=np.minimum(kinds, 1), top_p=np.where(kinds == 2, 0.5, 1.0))
    drawn = sample(logits_BV, sampling, positions_B=np.zeros(12, int), seen_BV=np.zeros((12, 200), bool))
    assert ((drawn.ids_B >= 0) & (drawn.ids_B < 200)).all()
    assert np.isnan(drawn.logprobs_B).all()


def test_small_pieces():
    mask = jnp.array([[False, True, True], [False, False, False]])
    np.testing.assert_array_equal(first_true(mask), [1, 3])
    np.testing.assert_array_equal(greedy(jnp.array([[1.0, 4.0, 4.0], [-1.0, -3.0, -2.0]])), [1, 0])


def test_sampling_survives_jit_and_scalars_broadcast():
    sampling = make_sampling(3, temperature=0.7, top_k=[1, 2, 3], seed=[4, 5, 6])
    np.testing.assert_allclose(sampling.temperature, np.float32([0.7] * 3))
    assert [value.dtype.name for value in sampling] == ["float32", "int32", "float32", "float32", "float32", "uint32"]
    traced = jax.jit(lambda t: make_sampling(3, temperature=t, top_k=jnp.array([1, 2, 3]), seed=jnp.array([4, 5, 6])))
    jax.tree.map(np.testing.assert_array_equal, Sampling(*traced(jnp.float32(0.7))), sampling)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-9),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", True),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*given"):
        SamplingParams(**{field: value})
    with pytest.raises(ValueError, match=f"{field} must be .*given"):
        make_sampling(2, **{field: value if field == "seed" else [getattr(SamplingParams(), field), value]})


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ValueError, match="top_p must be one value or 3"):
        make_sampling(3, top_p=[0.5, 0.6])


def test_stack_keeps_every_field():
    row = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5, seed=2**32 - 1)
    stacked = stack([SamplingParams(), row])
    assert {name: getattr(stacked, name)[1].item() for name in Sampling._fields} == dataclasses.asdict(row)
