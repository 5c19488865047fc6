"""The n-gram baselines against counting by hand."""

import numpy as np
import pytest

from eval.ngram import bigram_logprobs, bits_per_byte, fit, unigram_logprobs


def test_counts_and_interpolation_by_hand():
    # 0 1 0 1 | 0 2: six tokens, V = 4; after 0 came 1, 1, 2; after 1 came 0.
    model = fit([np.array([0, 1, 0, 1]), np.array([0, 2])], vocab_size=4)
    unigram = np.exp(unigram_logprobs(model, np.array([0, 1, 2, 3])))
    np.testing.assert_allclose(unigram, [4 / 10, 3 / 10, 2 / 10, 1 / 10])
    got = np.exp(bigram_logprobs(model, np.array([0, 0, 0, 1, 3]), np.array([1, 2, 3, 1, 2])))
    # t(0) = 2 kinds of followers, c(0) = 3; t(1) = 1, c(1) = 1; 3 was never followed.
    np.testing.assert_allclose(got, [(2 + 2 * 0.3) / 5, (1 + 2 * 0.2) / 5, (0 + 2 * 0.1) / 5, (0 + 1 * 0.3) / 2, 0.2])


def test_probabilities_sum_to_one_for_every_context():
    rng = np.random.default_rng(0)
    model = fit([rng.integers(0, 10, 50)], vocab_size=12)
    for previous in range(12):
        total = np.exp(bigram_logprobs(model, np.full(12, previous), np.arange(12))).sum()
        np.testing.assert_allclose(total, 1.0)


def test_bits_per_byte():
    assert bits_per_byte(np.log([0.5, 0.25]), 3) == pytest.approx(1.0)


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        fit([np.array([], np.int64)], vocab_size=4)
