"""Live, with torch: the logits processors of stock transformers do the same to the same logits."""

import jax
import numpy as np
import pytest

from internjax.decode.sample import SamplingParams, Written, adjust, stack, truncate

pytestmark = pytest.mark.parity

B, V = 4, 50
PROMPT, ANSWER = [7, 3, 11, 3], [9, 4, 9]
STOPS = [0, 1]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def processed(torch, processors, logits_BV):
    ids = torch.tensor([PROMPT + ANSWER] * B)
    scores = torch.from_numpy(logits_BV.copy())
    for processor in processors:
        scores = processor(ids, scores)
    return scores.numpy()


def ours(logits_BV, *, function=adjust, **settings):
    sampling = stack([SamplingParams(**settings)] * B)
    if function is truncate:
        return np.asarray(jax.jit(truncate)(logits_BV, sampling))
    seen_BV, counts_BV = np.zeros((B, V), bool), np.zeros((B, V), np.int32)
    seen_BV[:, PROMPT + ANSWER] = True
    np.add.at(counts_BV, (slice(None), ANSWER), 1)
    tokens_BS = np.array([PROMPT + ANSWER + [5]] * B, np.int32)
    written = Written(seen_BV, counts_BV, tokens_BS, np.full(B, len(PROMPT)), np.array([STOPS] * B))
    return np.asarray(jax.jit(adjust)(logits_BV, sampling, written, positions_B=np.full(B, len(PROMPT + ANSWER))))


@pytest.mark.parametrize(
    "case", ["repetition", "bad words", "least length", "bias", "top-k", "top-p", "min-p", "typical", "all four"]
)
def test_stock_processors_do_the_same(torch, case):
    from transformers.generation import logits_process as stock

    logits_BV = np.random.default_rng(1).normal(0, 3, (B, V)).astype(np.float32)
    warpers = {
        "top-k": ({"top_k": 7}, [stock.TopKLogitsWarper(7)]),
        "top-p": ({"top_p": 0.8}, [stock.TopPLogitsWarper(0.8)]),
        "min-p": ({"min_p": 0.1}, [stock.MinPLogitsWarper(0.1)]),
        "typical": ({"typical_p": 0.6}, [stock.TypicalLogitsWarper(0.6)]),
    }
    warpers["all four"] = (
        {"top_k": 30, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.8},
        [
            stock.TopKLogitsWarper(30),
            stock.TopPLogitsWarper(0.97),
            stock.MinPLogitsWarper(0.01),
            stock.TypicalLogitsWarper(0.8),
        ],
    )
    words = [[8], [4, 9, 12], [9, 13], [5, 14]]
    others = {
        "repetition": ({"repetition_penalty": 1.7}, [stock.RepetitionPenaltyLogitsProcessor(1.7)]),
        "bad words": ({"bad_words": tuple(map(tuple, words))}, [stock.NoBadWordsLogitsProcessor(words, STOPS)]),
        "least length": (
            {"min_new_tokens": 4},
            [stock.MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, STOPS)],
        ),
        "bias": (
            {"logit_bias": ((2, 3.5), (9, -100.0))},
            [stock.SequenceBiasLogitsProcessor([[[2], 3.5], [[9], -100.0]])],
        ),
    }
    settings, processors = (warpers | others)[case]
    found_BV = ours(logits_BV, function=truncate if case in warpers else adjust, **settings)
    wanted_BV = processed(torch, processors, logits_BV)
    np.testing.assert_allclose(found_BV, wanted_BV, rtol=1e-5, atol=1e-5)
    assert (wanted_BV != logits_BV).any(), "the processor changed nothing"
