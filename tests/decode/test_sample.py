"""Sampling against a NumPy reference written from the definitions, and against the laws it promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internjax.decode.sample import (
    Limits,
    Sampling,
    SamplingParams,
    Written,
    first_true,
    greedy,
    make_sampling,
    of_rows,
    penalise,
    stack,
)
from internjax.decode.sample import adjust as eager_adjust
from internjax.decode.sample import draw as eager_draw
from internjax.decode.sample import sample as eager_sample
from internjax.decode.sample import truncate as eager_truncate
from tests.decode import numpy_sampling

# Compiled once per shape; called as they are, each call would compile its branches anew.
adjust, draw, truncate = map(jax.jit, (eager_adjust, eager_draw, eager_truncate))
sample = jax.jit(eager_sample, static_argnames="num_top")


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
            "typical_p": float(rng.choice([1.0, 0.2, 0.7])),
        }
        for _ in logits_BV
    ]
    kept_BV = np.isfinite(truncate(jnp.asarray(logits_BV), stack([SamplingParams(**row) for row in rows])))
    for logits_V, kept_V, row in zip(logits_BV, kept_BV, rows):
        assert set(np.flatnonzero(kept_V)) == numpy_sampling.kept(logits_V, SamplingParams(**row)), row


@pytest.mark.parametrize(("typical_p", "kept"), [(0.2, [1]), (0.3, [0, 1]), (0.74, [0, 1]), (0.8, [0, 1, 2, 3])])
def test_typical_by_hand(typical_p, kept):
    """Entropy 1.75 bits; the tokens carry 1, 2, 3 and 3: the order is 1 (0.25 away), 0 (0.75), 2 and 3 (1.25)."""
    logits_BV = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
    found_BV = truncate(logits_BV, stack([SamplingParams(typical_p=typical_p)]))
    assert np.flatnonzero(np.isfinite(found_BV[0])).tolist() == kept


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


LIMITS = Limits(stop_ids=2, logit_bias=3, bad_words=4, bad_word_length=3)
EVERYTHING = SamplingParams(
    temperature=0.8,
    top_k=30,
    top_p=0.95,
    min_p=0.01,
    typical_p=0.9,
    repetition_penalty=1.3,
    presence_penalty=0.5,
    frequency_penalty=-0.25,
    logit_bias=((3, 5.0), (7, -100.0)),
    bad_words=((1,), (4, 5, 6), (5, 2)),
    min_new_tokens=3,
    seed=9,
)


def written(rows, *, vocab, length=8):
    """Returns what stands in rows given as (prompt, answer)."""
    tokens_BS = np.full((len(rows), length), 9, np.int32)  # what stands behind a row's end must not matter
    seen_BV, counts_BV = np.zeros((len(rows), vocab), bool), np.zeros((len(rows), vocab), np.int32)
    for row, (prompt, answer) in enumerate(rows):
        tokens_BS[row, : len(prompt) + len(answer)] = [*prompt, *answer]
        seen_BV[row, [*prompt, *answer]] = True
        np.add.at(counts_BV[row], list(answer), 1)
    prompts_B = np.array([len(prompt) for prompt, _ in rows], np.int32)
    return Written(seen_BV, counts_BV, tokens_BS, prompts_B, np.full((len(rows), 2), [0, -1], np.int32))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_penalties_biases_and_bans_equal_the_reference(data):
    """Rows of any settings in one batch; few tokens, so that words begin, repeat and cross from prompt to answer."""
    token = st.integers(0, 9)
    words = st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)
    bias = st.dictionaries(token, st.floats(-100, 100, width=32), max_size=3).map(lambda d: tuple(d.items()))
    penalty, factor = st.floats(-2, 2, width=32), st.floats(0.5, 2, width=32)
    params = st.builds(
        lambda *a: SamplingParams(**dict(zip(FIELDS, a))), factor, penalty, penalty, bias, words, st.integers(0, 4)
    )
    texts = st.tuples(st.lists(token, min_size=1, max_size=3), st.lists(token, max_size=4))
    rows, texts = data.draw(st.tuples(*[params] * 3)), data.draw(st.tuples(*[texts] * 3))
    logits_BV = random_logits(data.draw(st.integers(0, 99)), 3, 10)
    lengths_B = np.array([len(prompt) + len(answer) for prompt, answer in texts], np.int32)
    found_BV = adjust(logits_BV, stack(rows, limits=LIMITS), written(texts, vocab=10), positions_B=lengths_B)
    for logits_V, found_V, row, (prompt, answer) in zip(logits_BV, found_BV, rows, texts):
        wanted_V = numpy_sampling.adjusted(logits_V, row, prompt=prompt, answer=answer, stop_ids=[0])
        np.testing.assert_allclose(found_V, wanted_V, rtol=1e-4, atol=1e-4)


FIELDS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "min_new_tokens")


def test_penalties_of_openai_by_hand():
    """mu[j] - c[j] * frequency - [c[j] > 0] * presence, of the answer alone."""
    logits_BV = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    row = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    texts = [([3], [1, 2, 1])]
    found_BV = adjust(logits_BV, stack([row]), written(texts, vocab=4), positions_B=np.array([4]))
    np.testing.assert_allclose(found_BV, [[1.0, 2.0 - 0.5 - 0.5, 3.0 - 0.5 - 0.25, 4.0]])


def test_the_most_likely_tokens_are_the_policys_with_the_bits_of_the_token_drawn():
    """Before penalties and truncation, at the row's temperature; nothing for rows when none asks."""
    logits_BV = random_logits(8, 2, 50)
    sampling = make_sampling(2, temperature=[0.5, 0.0], top_k=3, repetition_penalty=4.0, seed=[1, 2])
    inputs = (logits_BV, sampling, Written(np.ones((2, 50), bool)))
    drawn = sample(*inputs, positions_B=np.arange(2), num_top=5, top_B=np.array([True, False]))
    for row, temperature in enumerate((0.5, 1.0)):
        logprobs_V = np.asarray(jax.nn.log_softmax(logits_BV[row] / temperature))
        assert drawn.top_ids_BK[row].tolist() == np.argsort(-logprobs_V)[:5].tolist()
        np.testing.assert_allclose(drawn.top_logprobs_BK[row], np.sort(logprobs_V)[::-1][:5], atol=1e-5)
        place = drawn.top_ids_BK[row].tolist().index(int(drawn.ids_B[row]))
        assert drawn.top_logprobs_BK[row, place] == drawn.logprobs_B[row]
    nobody = sample(*inputs, positions_B=np.arange(2), num_top=5, top_B=np.zeros(2, bool))
    assert not np.asarray(nobody.top_logprobs_BK).any() and nobody.ids_B.tolist() == drawn.ids_B.tolist()
    assert sample(*inputs, positions_B=np.arange(2)).top_ids_BK is None


def test_temperature_zero_is_the_most_likely_token_and_the_first_of_equals():
    logits_BV = random_logits(1, 12, 200)
    logits_BV[3, [7, 150]] = 50.0
    sampling = make_sampling(12, temperature=0.0, top_k=5, top_p=0.5, seed=3)
    drawn = sample(logits_BV, sampling, Written(np.zeros((12, 200), bool)), positions_B=np.arange(12))
    np.testing.assert_array_equal(drawn.ids_B, logits_BV.argmax(axis=-1))
    assert drawn.ids_B[3] == 7
    np.testing.assert_array_equal(drawn.processed_logprobs_B, 0.0)


def test_greedy_rows_and_drawn_rows_share_a_batch():
    logits_BV = random_logits(2, 12, 200)
    mixed = make_sampling(12, temperature=np.arange(12) % 2, seed=np.arange(12))
    seen_BV = np.zeros((12, 200), bool)
    ids_PB = [sample(logits_BV, mixed, Written(seen_BV), positions_B=np.full(12, p)).ids_B for p in range(20)]
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
        drawn = sample(logits_BV, sampling, Written(seen_BV), positions_B=np.array([position]))
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
        drawn = sample(logits_BV[order], sampling, Written(seen_BV[order]), positions_B=positions_B[order])
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
    drawn = sample(logits_BV, sampling, Written(np.zeros((12, 200), bool)), positions_B=np.zeros(12, int))
    assert ((drawn.ids_B >= 0) & (drawn.ids_B < 200)).all()
    assert np.isnan(drawn.logprobs_B).all()


def test_small_pieces():
    mask = jnp.array([[False, True, True], [False, False, False]])
    np.testing.assert_array_equal(first_true(mask), [1, 3])
    np.testing.assert_array_equal(greedy(jnp.array([[1.0, 4.0, 4.0], [-1.0, -3.0, -2.0]])), [1, 0])


def test_sampling_survives_jit_and_scalars_broadcast():
    sampling = make_sampling(3, temperature=0.7, top_k=[1, 2, 3], seed=[4, 5, 6], presence_penalty=1)
    np.testing.assert_allclose(sampling.temperature, np.float32([0.7] * 3))
    dtypes = [value.dtype.name for value in sampling if value is not None]
    assert dtypes == ["float32", "int32", "float32", "float32", "float32", "uint32", "float32"]
    traced = jax.jit(
        lambda t: make_sampling(
            3, temperature=t, top_k=jnp.array([1, 2, 3]), seed=jnp.array([4, 5, 6]), presence_penalty=1
        )
    )
    jax.tree.map(np.testing.assert_array_equal, Sampling(*traced(jnp.float32(0.7))), sampling)


def test_rows_that_are_done_ask_for_nothing():
    masked = of_rows(stack([EVERYTHING, EVERYTHING], limits=LIMITS), jnp.array([True, False]))
    nothing = stack([SamplingParams(temperature=0.0)], limits=LIMITS)
    for name, wanted, values in zip(Sampling._fields, nothing, masked):
        np.testing.assert_array_equal(values[1], wanted[0], err_msg=name)
        assert name == "seed" or (np.asarray(values[0]) != np.asarray(values[1])).any(), name


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
        ("typical_p", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("min_new_tokens", -1),
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", ((-1, 1.0),)),
        ("bad_words", ((),)),
        ("bad_words", ((1, 2.5),)),
    ],
)
def test_lists_that_mean_nothing_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*given"):
        SamplingParams(**{field: value})


def test_stack_keeps_every_field():
    stacked = stack([SamplingParams(), EVERYTHING], limits=LIMITS)
    found = {name: values[1].tolist() for name, values in stacked._asdict().items()}
    lists = {"bias_ids_BJ": [3, 7, -1], "bias_BJ": [5.0, -100.0, 0.0]}
    lists["bad_words_BNL"] = [[-1, -1, 1], [4, 5, 6], [-1, 5, 2], [-1, -1, -1]]
    wanted = {name: value for name, value in dataclasses.asdict(EVERYTHING).items() if name in Sampling._fields}
    assert {name: value for name, value in found.items() if name in lists} == lists
    np.testing.assert_allclose([found[name] for name in wanted], list(wanted.values()), rtol=1e-6)
    assert set(wanted) | set(lists) == set(Sampling._fields)
    few = stack([SamplingParams(), SamplingParams(min_new_tokens=2)])
    assert [name for name, values in few._asdict().items() if values is None] == [
        name for name in Sampling._fields[6:] if name != "min_new_tokens"
    ]
