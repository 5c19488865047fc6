"""Scores of the local model against full logits of one sequence at a time, without buckets or windows."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import model as eval_model
from eval.model import as_chat, as_text, bucket, local, until, windows
from internjax.decode import generate
from internjax.model import decoder, lora
from internjax.model.config import ModelConfig
from internjax.text import chat
from internjax.text.tokenizer import train_tokenizer
from tests.weights import random_params

TEXTS = ["def gcd(a, b):\n    return math.gcd(a, b)\n", "import os\nimport math\nfrom math import gcd, lcm\n"] * 8


@pytest.fixture(scope="module")
def model():
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        ffn_dim=48,
        max_position_embeddings=256,
        initializer_range=0.4,  # far from uniform, so that greedy choices are not ties
        dtype="float32",
    )
    params = random_params(config)
    return SimpleNamespace(config=config, params=params, tokenizer=tokenizer, lora=None)


full_logits = jax.jit(decoder.logits, static_argnames="config")


def logprobs(model, ids):
    """log p of ids[1:], and the most likely id at each place. Padding behind is not seen; one shape compiles once."""
    padded = np.array([[*ids, *[0] * (model.config.max_position_embeddings - len(ids))]])
    logits_TV = np.asarray(full_logits(model.params, padded, config=model.config), np.float64)[0, : len(ids) - 1]
    normalised = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return normalised[np.arange(len(ids) - 1), ids[1:]], logits_TV.argmax(-1)


PAIRS = [
    ("from", " math import gcd"),
    ("", "import os\n" * 4),
    ("def gcd(a, b):\n    return", " math.gcd(a, b)"),
    ("x " * 40, "y"),
    ("from math ", "import lcm"),
]


def test_scores_equal_full_logits(model):
    scores = local(model, batch_size=4).loglikelihood(PAIRS)
    for (context, continuation), score in zip(PAIRS, scores):
        ids = [model.tokenizer.bos_id, *model.tokenizer.encode(context + continuation)]
        num = score.num_tokens
        expected, _ = logprobs(model, ids)
        assert score.logprob == pytest.approx(expected[-num:].sum(), abs=1e-4)
        assert not score.is_cut
        # What is scored is the continuation; white space at the end of the context goes with it.
        assert model.tokenizer.decode(ids[-num:]).strip() == continuation.strip()


def test_a_score_does_not_depend_on_its_neighbours_or_order(model):
    functions = local(model, batch_size=4)
    alone = [functions.loglikelihood([pair])[0] for pair in PAIRS]
    assert functions.loglikelihood(PAIRS) == alone
    assert functions.loglikelihood(PAIRS[::-1]) == alone[::-1]


def test_greedy_means_every_token_is_the_most_likely(model):
    functions = local(model, batch_size=4)
    completion = functions.generate(["from math"], max_new_tokens=6)[0]
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("from math")]
    expected = []
    for _ in range(6):
        _, best = logprobs(model, [*ids, *expected, 0])
        expected.append(int(best[-1]))
        if expected[-1] == model.tokenizer.eos_id:
            break
    assert completion.text == model.tokenizer.decode(expected)
    assert completion.is_capped == (expected[-1] != model.tokenizer.eos_id)

    # The same ids as a continuation are greedy, and are not with any of them changed.
    def score(continuation):
        pair = eval_model.Ids(ids, continuation, ())
        return local(model, batch_size=4, encode=lambda *_: pair).loglikelihood([("", "")])[0].is_greedy

    assert score(expected)
    for place in range(len(expected)):
        assert not score([*expected[:place], (expected[place] + 1) % 300, *expected[place + 1 :]])


def test_completions_stop_at_strings_and_say_when_they_were_capped(model):
    functions = local(model, batch_size=4)
    prompts = ["import", "from math import", "def gcd("]
    free = functions.generate(prompts, max_new_tokens=6)
    completion = next(completion for completion in free if completion.is_capped and len(completion.text) > 3)
    index, stop = free.index(completion), completion.text[2:4]
    stopped = functions.generate(prompts, max_new_tokens=6, stop=(stop, "no such text"))[index]
    assert stopped.text == completion.text[: completion.text.index(stop)]
    assert not stopped.is_capped


def test_a_token_that_holds_the_stop_string_ends_its_row(model, monkeypatch):
    seen = []

    def spy(params, prompts_BT, lengths_B, *, stop_ids, **settings):
        seen.append(set(stop_ids))
        drawn_BN = np.full((len(prompts_BT), 6), min(seen[0]))
        return generate.Generation(drawn_BN, np.ones(len(prompts_BT), int), drawn_BN, np.full(len(prompts_BT), 1))

    monkeypatch.setattr(eval_model, "decode", spy)
    local(model).generate(["import"], max_new_tokens=6, stop=("\n",))
    newline = {i for i in range(model.tokenizer.vocab_size) if "\n" in model.tokenizer.decode([i])}
    assert newline and seen == [newline | {model.tokenizer.eos_id}]


def test_long_documents_are_scored_in_rolling_windows(model):
    text = "import os, math\n" * 12
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    length = 16
    assert len(ids) > 3 * length
    score = local(model, batch_size=4, max_length=length).loglikelihood([("", text)])[0]
    expected = logprobs(model, ids[: length + 1])[0].sum()
    end = length + 1
    while end < len(ids):  # each further window adds half a window of targets
        last, end = end, min(len(ids), end + length // 2)
        expected += logprobs(model, ids[end - length - 1 : end])[0][-(end - last) :].sum()
    assert score.logprob == pytest.approx(expected, abs=1e-3)
    assert (score.num_tokens, score.is_cut) == (len(ids) - 1, False)


def test_a_context_that_does_not_fit_loses_its_beginning_and_says_so(model):
    functions = local(model, batch_size=4, max_length=32)
    context = "def f(x): return x\n" * 10
    score = functions.loglikelihood([(context, "import os")])[0]
    ids = model.tokenizer.encode(context + "import os")
    assert score.is_cut
    assert score.logprob == pytest.approx(logprobs(model, ids[-33:])[0][-score.num_tokens :].sum(), abs=1e-4)
    assert functions.generate([context, "a"], max_new_tokens=6)[0].is_cut
    assert not functions.generate(["a"], max_new_tokens=6)[0].is_cut


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(2, 24))
def test_windows_score_every_id_once(num_context, num_continuation, length):
    ids = list(range(num_context + num_continuation))
    rows = windows(ids[:num_context], ids[num_context:], length)
    scored = [i for row in rows for i in row.ids[-row.num_scored :]]
    assert scored == ids[num_context:]
    for row in rows:
        assert row.ids == ids[row.ids[0] : row.ids[-1] + 1]  # nothing left out in between
        assert 1 <= row.num_scored < len(row.ids) <= length + 1


def test_a_bucket_is_a_power_of_two_within_the_limit():
    assert [bucket(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]
    assert bucket(5, 16) == 16
    assert [bucket(n, 256, shortest=50) for n in (1, 64, 65)] == [64, 64, 128]


def test_longer_buckets_ask_for_one_program_and_score_the_same(model):
    few, many = local(model, batch_size=3, shortest=128), local(model, batch_size=4)
    pairs = [("from", " math import gcd"), ("def f(x): return x\n" * 4, "import os")]
    want = [score.logprob for score in many.loglikelihood(pairs)]
    before = eval_model._score._cache_size()
    assert [score.logprob for score in few.loglikelihood(pairs)] == pytest.approx(want, abs=1e-4)
    assert eval_model._score._cache_size() == before + 1
    with pytest.raises(ValueError, match="shortest=0"):
        local(model, shortest=0)


def test_tasks_that_stop_elsewhere_share_a_program(model):
    functions = local(model, batch_size=4)
    functions.generate(["import"], max_new_tokens=3, stop=("\n",))
    before = generate._generate._cache_size()
    functions.generate(["import"], max_new_tokens=3, stop=("(", " "))
    assert generate._generate._cache_size() == before


def test_few_programs_are_compiled(model):
    functions = local(model, batch_size=4)
    functions.loglikelihood(PAIRS)
    before = eval_model._score._cache_size()
    functions.loglikelihood([("from", f" math import gcd{n}") for n in range(9)])
    assert eval_model._score._cache_size() == before


def test_a_token_across_the_join_belongs_to_the_continuation(model):
    text = "import"
    whole = model.tokenizer.encode(text)
    assert len(whole) == 1, "the tokenizer is expected to know this word"
    ids = as_text("imp", "ort", model.tokenizer)
    assert (ids.context, ids.continuation) == ([model.tokenizer.bos_id], whole)


def test_chat_models_are_asked_in_their_template(model):
    ids = as_chat("What is 2 + 2?", " 4", model.tokenizer)
    prompt = chat.render([chat.Message("user", "What is 2 + 2?")], model.tokenizer, add_generation_prompt=True).ids
    assert (ids.context, ids.continuation) == (list(prompt), model.tokenizer.encode("4"))
    assert model.tokenizer.special["<|im_end|>"] in ids.stop


def test_adapters_count(model):
    config = lora.LoraConfig(rank=2)
    weights = lora.init_lora(config, model.params, jax.random.key(1))
    weights = jax.tree.map(lambda leaf: leaf + 0.3, weights)
    adapters = lora.Lora(weights, scale=1.0, dropout=0.0)
    adapted = local(SimpleNamespace(**(vars(model) | {"lora": adapters})), batch_size=4).loglikelihood(PAIRS[:1])[0]
    merged_params = lora.merge(model.params, adapters)
    merged = local(SimpleNamespace(**(vars(model) | {"params": merged_params})), batch_size=4).loglikelihood(PAIRS[:1])[
        0
    ]
    assert adapted.logprob == pytest.approx(merged.logprob, abs=1e-3)
    assert adapted.logprob != pytest.approx(local(model, batch_size=4).loglikelihood(PAIRS[:1])[0].logprob, abs=1e-2)


def test_refusals_say_what_is_wanted(model):
    with pytest.raises(ValueError, match="empty continuation"):
        local(model).loglikelihood([("a", "")])
    with pytest.raises(ValueError, match="less than max_length=16"):
        local(model, max_length=16).generate(["a"], max_new_tokens=16)
    with pytest.raises(ValueError, match="no tokenizer"):
        local(SimpleNamespace(**(vars(model) | {"tokenizer": None})))
    broken = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    with pytest.raises(ValueError, match="not finite"):
        local(SimpleNamespace(**(vars(model) | {"params": broken})), batch_size=4).generate(["a"], max_new_tokens=6)


def test_until_cuts_at_the_first_of_all_stops():
    assert until("abc\ndef", ("d", "\n")) == "abc"
    assert until("abc", ()) == until("abc", ("x",)) == "abc"


def test_dynamic_frequencies_do_not_depend_on_the_bucket(model):
    from internjax.model.config import DynamicNTK

    config = dataclasses.replace(model.config, rope_scaling=DynamicNTK(2.0), max_position_embeddings=32)
    scaled = local(SimpleNamespace(**(vars(model) | {"config": config})), batch_size=4, max_length=128)
    short, plain = scaled.loglikelihood(PAIRS[:1])[0], local(model, batch_size=4).loglikelihood(PAIRS[:1])[0]
    assert abs(short.logprob - plain.logprob) > 1e-3  # the declared length rules, also for a short row
