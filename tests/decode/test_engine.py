"""The engine: its tokens are those of `generate`, whoever else is served; pages come back; nothing compiles twice."""

import dataclasses
import functools
import logging
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.decode import device
from internjax.decode.device import AdapterRoom, Newcomer, Part
from internjax.decode.engine import Engine
from internjax.decode.generate import generate
from internjax.decode.prefix_tree import Moves
from internjax.decode.programs import Weights, decode_block, empty_state
from internjax.decode.replay import replay
from internjax.decode.request import Event, Handle, Request, RequestError, Result
from internjax.decode.rounds import Rounds
from internjax.decode.sample import Allowed, Limits, SamplingParams, stack
from internjax.decode.score import logprobs
from internjax.decode.speculate import DraftModel, PromptLookup, look_up
from internjax.model import decoder, rope
from internjax.model.config import DynamicNTK
from internjax.model.lora import LoraConfig, apply_config, init_lora
from tests.decode import numpy_sampling
from tests.decode.small import CONFIG, PARAMS, OnlySteps

# The longest context is 16 tokens: what is longer has frequencies of its own.
SCALED = dataclasses.replace(CONFIG, max_position_embeddings=16, rope_scaling=DynamicNTK(2.0))
_LOGPROBS = jax.jit(logprobs, static_argnames="config")
_SCORES = jax.jit(lambda tokens_BT: decoder.logits(PARAMS, tokens_BT, config=CONFIG))
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.1, seed=7)
EVERYTHING = dataclasses.replace(
    DRAWN,
    min_p=0.01,
    typical_p=0.95,
    presence_penalty=0.6,
    frequency_penalty=-0.2,
    logit_bias=((3, 2.0), (11, -100.0)),
    bad_words=(*((token,) for token in range(20, 30)), (40, 41), (5, 6, 7)),
    min_new_tokens=4,
)


def build(params=PARAMS, config=CONFIG, **settings) -> Engine:
    settings = {"max_context": 64, "num_slots": 3, "page_size": 4, "prefill_chunk": 16} | settings
    return Engine(params, config, **settings)


@pytest.fixture(scope="module")
def shared_engine():
    engine = build()
    engine.warmup()
    return engine


@pytest.fixture(scope="module")
def small_engine():
    """An engine with 14 pages of 4 tokens, and chunks of two sizes."""
    return build(num_pages=14, prefill_chunk=32)


@pytest.fixture
def engine(shared_engine):
    """The warm engine, at rest before and after: every slot free, every page back."""
    yield shared_engine
    drive(shared_engine)
    stats = shared_engine.stats()
    assert (stats.num_active, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages)


def drive(engine, rounds=10_000):
    for _ in range(rounds):
        if not engine.tick():
            return
    raise AssertionError("the engine never came to rest")


def prompt(length, seed=0):
    return tuple(np.random.default_rng((seed, length)).integers(0, 64, length).tolist())


def answer(engine, *requests):
    handles = [engine.submit(request) for request in requests]
    drive(engine)
    return [handle.result() for handle in handles]


def generated(request, *, params=PARAMS, config=CONFIG, **inputs):
    """Returns (ids, logprobs) of the request by `generate`, alone, on a dense cache; one shape for all requests."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(request.tokens)] = request.tokens
    total = len(request.tokens) + request.max_new_tokens
    out = generate(
        params,
        padded,
        np.array([len(request.tokens)], np.int32),
        config=config,
        sampling=stack([request.sampling]),
        max_new_tokens=60,
        stop_ids=np.array(request.stop_ids + (-1,) * (2 - len(request.stop_ids)), np.int32),
        inv_freq_BF=rope.inv_freq(config, length=total)[None],
        **inputs,
    )
    length = min(int(out.lengths_B[0]), request.max_new_tokens)
    return tuple(out.tokens_BN[0, :length].tolist()), np.asarray(out.logprobs_BN[0, :length])


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, EVERYTHING], ids=["greedy", "drawn", "everything"])
def test_tokens_are_those_of_generate(engine, sampling):
    """Prompts of one token, within a chunk, exactly a chunk, and of several; more requests than slots."""
    stop_ids = tuple(range(0, 64, 8))[: 2 * (sampling is EVERYTHING)]
    requests = [Request(prompt(n), 12, sampling, stop_ids, logprobs=0) for n in (1, 5, 16, 17, 18, 33, 50)]
    for request, result in zip(requests, answer(engine, *requests)):
        ids, values = generated(request)
        assert result.ids == ids and result.error is None
        assert result.finish == ("stop" if ids[-1] in stop_ids else "length")
        np.testing.assert_allclose(result.logprobs, values, atol=2e-5)


def test_greedy_answers_follow_the_reference_and_log_probabilities_are_the_policys(engine):
    """Each token from NumPy on the full forward's logits; the log-probabilities know neither penalties nor bans."""
    free = answer(engine, *[Request(prompt(n), 14, GREEDY) for n in (9, 30, 1)])
    tried = {
        "presence_penalty": 2.0,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.4,
        "logit_bias": tuple((token, 0.1 * token) for token in range(8)),
        # What the model says by itself: words of one, two and three ids, one of them begun by the prompt's last id.
        "bad_words": (free[0].ids[:2], free[0].ids[3:6], (free[1].ids[2],), (prompt(30)[-1], free[1].ids[0])),
        "min_new_tokens": 6,
    }
    rows = [dataclasses.replace(GREEDY, **tried), dataclasses.replace(GREEDY, **tried)]
    rows += [dataclasses.replace(GREEDY, min_new_tokens=6)]
    stops = [(), (), free[2].ids[2:4]]
    requests = [
        Request(prompt(n), 14, row, ids, logprobs=3, prompt_logprobs=2 if n > 1 else 0)
        for n, row, ids in zip((9, 30, 1), rows, stops)
    ]
    for request, result, before in zip(requests, answer(engine, *requests), free):
        assert result.ids != before.ids, "the settings changed nothing"
        tokens = request.tokens + result.ids
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        logits_TV = np.asarray(_SCORES(padded))[0]
        logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        start = len(request.tokens)
        for place in range(start, len(tokens)):
            written = {"prompt": request.tokens, "answer": list(tokens[start:place]), "stop_ids": request.stop_ids}
            wanted_V = numpy_sampling.adjusted(logits_TV[place - 1], request.sampling, **written)
            assert tokens[place] == wanted_V.argmax(), place - start
        found = result.prompt.logprobs[1:] + result.logprobs
        np.testing.assert_allclose(found, [logprobs_TV[i - 1, tokens[i]] for i in range(1, len(tokens))], atol=2e-5)
        assert result.prompt.logprobs[0] is None and result.prompt.top[0] == ()
        for place, ranked in enumerate((*result.prompt.top[1:], *result.top_logprobs), 1):
            best = np.argsort(-logprobs_TV[place - 1])[: len(ranked)]
            assert [token for token, _ in ranked] == best.tolist()
            np.testing.assert_allclose([value for _, value in ranked], logprobs_TV[place - 1, best], atol=2e-5)
            drawn = dict(ranked).get(tokens[place])
            assert drawn in (None, found[place - 1]), "the same token has two log-probabilities"
        assert {len(ranked) for ranked in result.top_logprobs} == {3}
        assert {len(ranked) for ranked in result.prompt.top[1:]} <= {2}


def test_a_row_admitted_in_the_midst_of_its_answer_knows_what_the_answer_is(engine):
    """Five tokens, of which the last three are the answer's and are counted for the penalties."""
    row = Newcomer(1, [9, 8, 8, 9, 8], 2, 40, [], engine._inv_freq_F, EVERYTHING, True)
    engine._device.admit([row])  # the host knows nothing of it: it will draw nothing
    state = engine._device._state
    wanted_V = np.bincount([8, 9, 8], minlength=64)
    np.testing.assert_array_equal(state.counts_BV[1], wanted_V)
    np.testing.assert_array_equal(state.seen_BV[1], wanted_V > 0)
    assert state.prompt_lengths_B[1] == 2 and state.lengths_B[1] == 5 and bool(state.top.asked_B[1])


def test_prompt_logprobs_come_once_before_the_first_token(engine):
    request = Request(prompt(40), 6, DRAWN, prompt_logprobs=0)
    handle = engine.submit(request)
    drive(engine)
    events = list(handle.events())
    assert [event.prompt is not None for event in events] == [True] + [False] * (len(events) - 1)
    assert events[0].ids == () and events[0].logprobs is None and len(events[0].prompt.logprobs) == 40
    scored = _LOGPROBS(PARAMS, jnp.array([request.tokens]), config=CONFIG, temperature=DRAWN.temperature)
    np.testing.assert_allclose(events[0].prompt.logprobs[1:], scored[0, 1:], atol=2e-5)


def test_logprobs_are_those_of_the_trainers_forward(engine):
    request = Request(prompt(20), 10, dataclasses.replace(DRAWN, temperature=0.5), logprobs=0)
    (result,) = answer(engine, request)
    scored = _LOGPROBS(PARAMS, jnp.array([request.tokens + result.ids]), config=CONFIG, temperature=0.5)
    np.testing.assert_allclose(result.logprobs, scored[0, 20:], atol=2e-5)


def test_a_request_gets_the_same_bits_alone_and_beside_others_in_any_slot(engine):
    request = Request(prompt(21), 14, DRAWN, logprobs=0)
    (alone,) = answer(engine, request)
    others = [Request(prompt(n, seed=1), m, GREEDY) for n, m in ((3, 30), (40, 4), (9, 9), (2, 20))]
    for place in range(5):
        results = answer(engine, *others[:place], request, *others[place:])
        assert results[place] == alone


def test_exact_mode_gives_the_same_bits_after_any_history():
    """Neighbours, slots, order, aborts, what is cached and what was evicted: nothing changes a bit of anybody's answer.

    48 pages hold everything; 20 force rows to wait and pages to leave, for the host and for good.
    """
    stem = prompt(40, seed=3)
    requests = [
        Request((*stem[:n], *prompt(m, seed=n)), 9, dataclasses.replace(DRAWN, seed=n), logprobs=0)
        for n, m in ((40, 1), (40, 9), (33, 7), (17, 2), (5, 30), (0, 3))
    ]
    rng = random.Random(4)
    first: dict[Request, Result] = {}
    for pages, host in ((48, 0), (20, 10)):
        engine = build(mode="exact", num_pages=pages, num_host_pages=host, prefill_chunk=32)
        first.update(zip(requests, answer(engine, requests[0])) if not first else ())
        for _ in range(6):
            order = rng.sample(requests, k=6) + rng.choices(requests, k=3)
            handles = []
            for request in order:
                handles.append((request, engine.submit(request)))
                noise = engine.submit(Request((*stem[: rng.randint(1, 40)], 1), rng.randint(1, 20), GREEDY))
                for _ in range(rng.randint(0, 3)):
                    engine.tick()
                if rng.random() < 0.5:
                    noise.abort()
            drive(engine)
            for request, handle in handles:
                assert handle.num_shared % 32 == 0, "chunks are cut as nobody else would cut them"
                result = handle.result()
                assert result == first.setdefault(request, result)
        stats = engine.stats()
        assert stats.num_shared_tokens > 0 and stats.num_preempted == 0 and stats.num_free_pages == pages
    assert stats.num_saved_pages > 0
    for request in requests:
        assert first[request].ids == generated(request)[0]
    # Replayed, in other company and with what was cached since: the same log-probabilities.
    compiled = engine.stats().num_compiled
    handles = [replay(engine, request, first[request].ids) for request in reversed(requests)]
    others = [tuple(reversed(first[request].ids)) for request in requests[:2]]
    handles += [replay(engine, request, ids) for request, ids in zip(requests, others)]
    drive(engine)
    *again, back, also_back = [handle.result() for handle in handles]
    assert again == [first[request]._replace(finish="length") for request in reversed(requests)]
    assert engine.stats().num_compiled == compiled
    for request, ids, result in zip(requests, others, (back, also_back)):
        assert result.ids == ids != first[request].ids
        scored = _LOGPROBS(PARAMS, jnp.array([request.tokens + ids]), config=CONFIG, temperature=DRAWN.temperature)
        np.testing.assert_allclose(result.logprobs, scored[0, len(request.tokens) :], atol=2e-5)
    with pytest.raises(ValueError, match="at least one; given no token"):
        replay(engine, requests[0], ())
    with pytest.raises(ValueError, match=r"tokens in 0..63, at least one; given \[64\]"):
        replay(engine, requests[0], (64,))
    with pytest.raises(ValueError, match="exact mode wants no context_buckets and a prefill_chunk of whole pages of 4"):
        build(mode="exact", prefill_chunk=18)


@pytest.mark.parametrize(("length", "num_shared"), [(32, 16), (33, 32)])
def test_exact_mode_shares_what_was_read_and_nothing_that_the_step_was_fed(length, num_shared):
    """The last token of a prompt is fed to the step, which computes in other pieces than a chunk that is read."""
    engine, stem = build(mode="exact"), prompt(40, seed=3)
    answer(engine, Request(stem[:length], 6, GREEDY))
    handle = engine.submit(Request((*stem, 1), 2, GREEDY))
    drive(engine)
    assert handle.num_shared == num_shared


def test_exact_mode_leaves_no_page_of_a_chunk_that_is_not_full():
    """19 tokens are read as 32 and 13 as 16, which may round otherwise than where 32 of the same beginning are read."""
    engine, stem = build(mode="exact", prefill_chunk=32), prompt(40, seed=3)
    answer(engine, *(Request(stem[:length], 6, GREEDY) for length in (14, 20, 40)))
    assert engine.stats().num_cached_pages == 8
    answer(engine, Request((*stem, 1), 2, GREEDY))
    assert engine.stats().num_cached_pages == 8


@pytest.mark.slow
@pytest.mark.parametrize(("speculation", "cache_dtype"), [("lookup", "int8"), ("draft", "int4")])
def test_exact_mode_gives_the_same_bits_as_a_person_has_it(speculation, cache_dtype):
    """With XLA's own flags, in bfloat16, with adapters, guides, drafts and a cache of few bits."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.decode.exact_company", speculation, cache_dtype],
        cwd=Path(__file__).resolve().parent.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0] == "66"


def test_only_programs_of_exact_mode_that_compute_are_compiled_with_options_of_their_own(monkeypatch):
    jit, given = jax.jit, []

    def noted(function, **settings):
        given.append((function.func.__name__, settings.get("compiler_options")))
        return jit(function, **settings)

    for mode, options in (("fast", None), ("exact", {"xla_allow_excess_precision": False})):
        device._programs.cache_clear()
        given.clear()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "jit", noted)
            build(mode=mode)
        computing = [name for name, each in given if each is not None]
        assert computing == ([] if mode == "fast" else ["read_chunk", "score_chunk", "decode_block"])
        assert all(each == options for name, each in given if name in computing)
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    assert dict(device.exact_options(gpu)) == {"xla_allow_excess_precision": False, "xla_gpu_deterministic_ops": True}


def recorded(monkeypatch, device, name):
    """Returns the list that the first arguments of the device's calls go into."""
    seen, call = [], getattr(device, name)
    monkeypatch.setattr(device, name, lambda *a, **k: seen.append(a) or call(*a, **k))
    return seen


def test_few_answers_are_drawn_in_a_small_block_and_many_prompts_read_at_once(monkeypatch):
    """Of 16 slots one, four or all, with rows that come and go between them. Nothing compiles late."""
    engine = build(num_slots=16, num_pages=256, prefill_chunk=32)
    engine.warmup()
    num_compiled = engine.stats().num_compiled
    blocks, reads, admitted = (recorded(monkeypatch, engine._device, name) for name in ("_block", "_read", "_admit"))
    requests = [Request(prompt(4 + 3 * n, seed=n), 3 + n, DRAWN, logprobs=0) for n in range(12)]
    for some in (requests[:1], requests[1:4], requests):
        for request, result in zip(some, answer(engine, *some)):
            ids, values = generated(request)
            assert result.ids == ids and result.error is None
            np.testing.assert_allclose(result.logprobs, values, atol=2e-5)
    assert {count for count, *_ in blocks} == {1, 4, 16} and engine.stats().num_compiled == num_compiled
    assert [(count, size, len(parts)) for count, size, parts in reads[:2]] == [(1, 16, 1), (4, 16, 3)]
    assert {(count, size) for count, size, _ in reads} == {(1, 16), (4, 16), (4, 32)}
    assert [(count, len(rows)) for count, rows in admitted[:2]] == [(1, 1), (4, 3)]


def test_while_answers_are_drawn_prompts_take_turns_to_be_read(monkeypatch):
    engine = build(num_slots=6)
    monkeypatch.setattr(engine._rounds, "_most_read", 20)
    reads = recorded(monkeypatch, engine._device, "read")
    requests = [Request(prompt(17, seed=n), 40, GREEDY) for n in range(6)]
    handles = [engine.submit(request) for request in requests[:2]]
    engine.tick()
    handles += [engine.submit(request) for request in requests[2:]]
    drive(engine)
    parts = [len(parts) for (parts,) in reads if parts]
    assert parts == [2, 2, 2], "one of 16 tokens leaves 4, which may begin another"
    assert [handle.result().ids for handle in handles] == [generated(request)[0] for request in requests]


def test_exact_mode_reads_every_prompt_by_itself(monkeypatch):
    engine = build(mode="exact", num_slots=4)
    reads = recorded(monkeypatch, engine._device, "_read")
    answer(engine, *(Request(prompt(9, seed=n), 2, GREEDY) for n in range(4)))
    assert [count for count, *_ in reads] == [1] * 4


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_prompt_that_cannot_be_read_ends_alone(monkeypatch, mode):
    """Its neighbours are read once more without it, and answered as ever: up to rounding, or bit by bit."""
    engine = build(num_slots=4, mode=mode)
    good = [Request(tuple(token % 60 for token in prompt(9, seed=n)), 5, DRAWN, logprobs=0) for n in range(3)]
    before = answer(engine, *good)
    engine._rounds.seats.tree.clear()
    chunk = engine._device._chunk

    def failing(count, size, parts):
        if any(60 in part.tokens for part in parts):
            raise RuntimeError("planted")
        return chunk(count, size, parts)

    monkeypatch.setattr(engine._device, "_chunk", failing)
    *results, failed = answer(engine, *good, Request((60,) * 9, 5, GREEDY))
    assert failed == Result((), None, "error", "RuntimeError: planted")
    assert [result.ids for result in results] == [generated(request)[0] for request in good]
    if mode == "exact":
        assert results == before
    else:
        np.testing.assert_allclose([r.logprobs for r in results], [r.logprobs for r in before], atol=2e-5)


def test_stop_ids_end_a_request_and_are_kept(engine):
    (free,) = answer(engine, Request(prompt(6), 20, GREEDY))
    stop = free.ids[7]
    end = free.ids.index(stop) + 1
    stopped, other = answer(engine, Request(prompt(6), 20, GREEDY, (63, stop)), Request(prompt(6), 20, GREEDY))
    assert stopped.ids == free.ids[:end] and stopped.finish == "stop"
    assert other.ids == free.ids and other.finish == "length"


def test_events_arrive_in_pieces_and_end_once(engine):
    handle = engine.submit(Request(prompt(6), 10, GREEDY, logprobs=0))
    drive(engine)
    events = list(handle.events())
    # The first token does not wait for those behind it.
    assert [len(event.ids) for event in events] == [1, 4, 4, 1]
    assert [event.finish for event in events] == [None, None, None, "length"]
    assert all(len(event.logprobs) == len(event.ids) for event in events)
    assert list(handle.events()) == []
    with pytest.raises(RuntimeError, match="read already"):
        handle.result()


def test_a_first_token_hastens_a_round_only_where_most_wait_for_theirs(engine):
    """One turn for a newcomer would cost each of the others three."""
    two = [engine.submit(Request(prompt(5, seed=n), 30, GREEDY)) for n in range(2)]
    for _ in range(3):
        engine.tick()
    third = engine.submit(Request(prompt(6, seed=9), 9, GREEDY))
    drive(engine)
    assert [len(next(handle.events()).ids) for handle in (*two, third)] == [1, 1, 4]


def test_logprobs_are_reported_only_on_request(engine):
    (result,) = answer(engine, Request(prompt(6), 5, GREEDY))
    assert result.logprobs is None and len(result.ids) == 5


def test_rows_that_outgrow_the_pages_wait_and_draw_the_same_tokens(small_engine):
    """14 pages of 4: three rows of up to 10 pages begin together; the youngest leave, and continue where they were."""
    engine = small_engine
    requests = [Request(prompt(10, seed=s), 30, dataclasses.replace(DRAWN, seed=s), logprobs=0) for s in range(4)]
    handles = [engine.submit(request) for request in requests]
    done = []
    while len(done) < 4:
        engine.tick()
        done += [i for i, handle in enumerate(handles) if i not in done and handle.finished]
    assert done == [0, 1, 2, 3] and engine.stats().num_preempted >= 1
    for request, handle in zip(requests, handles):
        result, (ids, values) = handle.result(), generated(request)
        assert result.ids == ids
        np.testing.assert_allclose(result.logprobs, values, atol=2e-5)
    assert engine.stats().num_free_pages == 14


def test_a_large_request_is_not_overtaken_for_ever(small_engine):
    """The second fills the cache; the small ones behind it wait until it has its turn."""
    engine = small_engine
    requests = [Request(prompt(n, seed=n), 4, GREEDY) for n in (10, 50, 3, 3)]
    handles = [engine.submit(request) for request in requests]
    began = []
    while len(began) < 4:
        engine.tick()
        began += [i for i, handle in enumerate(handles) if i not in began and not handle._events.empty()]
    assert began == [0, 1, 2, 3]
    drive(engine)
    for request, handle in zip(requests, handles):
        assert handle.result().ids == generated(request)[0]


def test_what_requests_begin_with_is_read_once(engine):
    """Whole pages are shared, the rest of a page is copied; at the same time, and later."""
    stem = prompt(22, seed=5)
    requests = [Request((*stem, *prompt(n, seed=n)), 6, DRAWN, logprobs=0) for n in (9, 3, 1)]
    before = engine.stats()
    together = [engine.submit(request) for request in requests]
    drive(engine)
    assert [handle.num_shared for handle in together] == [0, 22, 22]  # read by the first while the others waited
    later = [engine.submit(request) for request in requests]
    drive(engine)
    assert [handle.num_shared for handle in later] == [30, 24, 22]  # all but the last token, which the step feeds
    after = engine.stats()
    assert after.num_prompt_tokens - before.num_prompt_tokens == 2 * sum(len(request.tokens) for request in requests)
    assert after.num_shared_tokens - before.num_shared_tokens == 44 + 76
    for request, first, second in zip(requests, together, later):
        result, again, (ids, values) = first.result(), second.result(), generated(request)
        assert result.ids == again.ids == ids
        np.testing.assert_allclose(result.logprobs, values, atol=2e-5)
        np.testing.assert_allclose(again.logprobs, values, atol=2e-5)


def test_a_session_sends_only_new_turns_and_answers_as_if_all_were_read(engine):
    session = engine.open_session(60)
    history = ()
    for turn, (length, count) in enumerate(((7, 6), (5, 9), (3, 11))):
        request = Request(prompt(length, seed=turn), count, DRAWN, logprobs=0)
        handle = engine.submit(request, session=session)
        with pytest.raises(RuntimeError, match="is not done"):
            engine.submit(request, session=session)
        drive(engine)
        result = handle.result()
        whole = dataclasses.replace(request, tokens=history + request.tokens)
        ids, values = generated(whole)
        assert result.ids == ids
        np.testing.assert_allclose(result.logprobs, values, atol=2e-5)
        # Of the history only the last token drawn is not in the cache: nothing was fed after it.
        assert handle.num_shared == max(len(history) - 1, 0)
        history += request.tokens + ids
        assert session.tokens == history and not session.busy
    with pytest.raises(
        ValueError, match="41 tokens of the session, 10 of the turn and 10 new ones make 61; the session"
    ):
        engine.submit(Request(prompt(10), 10), session=session)
    other = session.fork()
    assert engine.lengthen(session, 64) is False
    answers = [engine.submit(Request(prompt(10), 10, GREEDY), session=session)]
    answers.append(engine.submit(Request(prompt(4), 5, GREEDY), session=other))
    drive(engine)
    assert answers[0].result().ids == generated(Request(history + prompt(10), 10, GREEDY))[0]
    assert answers[1].result().ids == generated(Request(history + prompt(4), 5, GREEDY))[0]
    assert other.tokens[:41] == history and len(other.tokens) == 50


def test_a_turn_goes_on_in_the_last_page_of_its_session_and_forks_copy_it(engine, monkeypatch):
    tree, copied = engine._rounds.seats.tree, []
    copy = tree._moves.copy
    monkeypatch.setattr(
        tree, "_moves", tree._moves._replace(copy=lambda *which: copied.append(which[2]) or copy(*which))
    )
    session = engine.open_session()

    def turn(session, seed):
        before = session.tokens
        handle = engine.submit(Request(prompt(3, seed=seed), 3, GREEDY), session=session)
        drive(engine)
        assert handle.num_shared >= len(before) - 1  # more where the other fork went on with the same token
        assert handle.result().ids == generated(Request(before + prompt(3, seed=seed), 3, GREEDY))[0]

    turn(session, 30)
    copied.clear()
    for seed in (31, 32):
        assert (len(session.tokens) - 1) % 4  # the page that follows is not full
        turn(session, seed)
    assert not copied
    other = session.fork()
    turn(session, 34)
    turn(other, 38)
    assert len(copied) == 2
    turn(session, 36)
    turn(other, 39)
    assert len(copied) == 2


def test_an_aborted_turn_counts_as_far_as_it_came_and_a_failed_one_does_not(engine, monkeypatch):
    session = engine.open_session()
    handle = engine.submit(Request(prompt(5), 40, GREEDY), session=session)
    for _ in range(4):
        engine.tick()
    handle.abort()
    drive(engine)
    ids = handle.result().ids
    assert 0 < len(ids) < 40 and session.tokens == prompt(5) + ids
    monkeypatch.setattr(Rounds, "_place", lambda *_: 1 / 0)
    failed = engine.submit(Request(prompt(3), 4, GREEDY), session=session)
    drive(engine)
    assert failed.result().finish == "error" and session.tokens == prompt(5) + ids and not session.busy


@pytest.fixture(scope="module")
def hosting():
    """An engine with 12 pages, and 6 more on the host."""
    return build(num_pages=12, num_host_pages=6, num_slots=2, max_context=48)


def test_pages_wait_in_the_hosts_memory(hosting):
    """A conversation comes back after another filled the cache, with the same answers."""
    engine, session = hosting, hosting.open_session(32)
    first = engine.submit(Request(prompt(9), 6, GREEDY), session=session)
    drive(engine)
    answer(engine, Request(prompt(20, seed=1), 27, GREEDY))
    assert engine.stats().num_saved_pages == 4
    second = engine.submit(Request(prompt(3), 8, GREEDY, logprobs=0), session=session)
    drive(engine)
    history = prompt(9) + first.result().ids
    assert second.num_shared == len(history) - 1
    ids, values = generated(Request(history + prompt(3), 8, GREEDY))
    result = second.result()
    assert result.ids == ids
    np.testing.assert_allclose(result.logprobs, values, atol=2e-5)


@pytest.mark.parametrize("move", Moves._fields)
def test_pages_that_cannot_be_moved_end_one_request_and_come_back(hosting, monkeypatch, move):
    """Where a turn begins (pages come from the host, the last one is copied or taken over), or where a row grows."""
    engine, tree = hosting, hosting._rounds.seats.tree
    beside, turn = Request(prompt(13, seed=6), 12, DRAWN, logprobs=0), Request(prompt(3, seed=7), 6, GREEDY, logprobs=0)

    def run(fails):
        tree.clear()
        session = engine.open_session()
        engine.submit(Request(prompt(9, seed=5), 6, GREEDY), session=session)
        drive(engine)
        if move == "load":
            tree.free(tree.allocate(12))
        elif move == "copy":
            session.fork()
        elif move == "save":  # a page that is nobody's until the last one is needed
            answer(engine, Request(prompt(3), 2, GREEDY))
        first = engine.submit(beside)
        engine.tick()
        second, calls = engine.submit(turn, session=session), []

        def failing(*what):
            if what[0] and not calls:
                calls.append(what)
                raise MemoryError("planted")
            return getattr(engine._device.moves, move)(*what)

        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(tree, "_moves", tree._moves._replace(**{move: failing}))
            engine.tick()
            assert move == "save" or (len(calls) == fails and not first.finished)
            drive(engine)
        stats = engine.stats()
        assert len(calls) == fails and stats.num_free_pages == 12 and not stats.num_preempted
        return [first.result(), second.result()], session

    wanted, session = run(fails=False)
    found, other = run(fails=True)
    failed = [result.finish == "error" for result in found]
    assert failed.count(True) == 1 and found[failed.index(True)].error == "MemoryError: planted"
    assert found[failed.index(False)] == wanted[failed.index(False)]
    if failed[1]:  # it can be asked again, and whatever it still shares holds what it says
        again = engine.submit(turn, session=other)
        drive(engine)
        assert again.result().ids == wanted[1].ids and other.tokens == session.tokens
    assert answer(engine, beside)[0].ids == wanted[0].ids


def test_what_can_never_fit_is_refused_at_once(small_engine):
    engine = small_engine
    for request, message in (
        (Request((), 4), "prompt is empty"),
        (Request((1, 2), 0), "max_new_tokens must be at least 1, given 0"),
        (Request(prompt(50), 15), r"50 tokens and 15 new ones make 65; this engine serves up to 64\. Shorten"),
        (Request(prompt(56), 2), r"58 tokens need 15 pages of 4; the whole cache has 14\. Shorten"),
        (Request((1, 64), 4), r"token ids must be in 0\.\.63.*given \[64\]"),
        (Request((1, -1), 4), r"given \[-1\]"),
        (Request((1,), 4, stop_ids=(99,)), r"given \[99\]"),
        (Request((1,), 4, stop_ids=tuple(range(9))), "9 stop ids given; this engine takes up to 8"),
        (Request((1,), 4, logprobs=21), r"logprobs must be 0 .* to 20 .*; given 21"),
        (Request((1,), 4, prompt_logprobs=True), r"prompt_logprobs must be .*; given True"),
        (Request((1,), 4, SamplingParams(min_new_tokens=5)), "must not pass max_new_tokens; given 5 and 4"),
        (Request((1,), 4, SamplingParams(logit_bias=((64, 1.0),))), r"given \[64\] \(logit_bias\)"),
        (Request((1,), 4, SamplingParams(bad_words=((2, 70),))), r"given \[70\] \(bad_words\)"),
        (Request((1,), 4, SamplingParams(bad_words=((1,) * 17,))), "a bad word of 17 tokens given; .* up to 16"),
        (Request((1,), 4, SamplingParams(bad_words=((1,),) * 65)), "65 bad words given; this engine takes up to 64"),
        (Request((1,), 4, SamplingParams(bad_words=tuple((i,) for i in range(64)))), "leave no token"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(request)
    assert engine.stats().num_waiting == 0
    engine.submit(Request(prompt(56), 1, GREEDY))  # the last token needs no place: exactly 14 pages
    drive(engine)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_slots": 0},
        {"page_size": 0},
        {"context_buckets": (65,)},
        {"prefill_chunk": 0},
        {"num_pages": 0},
        {"num_pages": -3},
        {"limits": Limits(bad_words=-1)},
    ],
)
def test_silly_settings_are_refused(settings):
    with pytest.raises(ValueError, match="engine sizes must be positive"):
        build(**settings)
    with pytest.raises(ValueError, match="scalar head"):
        build(config=dataclasses.replace(CONFIG, head="scalar"))


def test_abort_while_waiting_reading_and_drawing(engine):
    long, again = Request(prompt(50, seed=8), 12, GREEDY), Request(prompt(50, seed=9), 12, GREEDY)
    reading, drawing, stays = (engine.submit(r) for r in (again, Request(prompt(2), 60, GREEDY), long))
    waiting = engine.submit(long)
    for _ in range(3):
        engine.tick()
    assert engine.stats().num_active == 3 and engine.stats().num_waiting == 1
    for handle in (reading, drawing, waiting):
        handle.abort()
    drive(engine)
    assert reading.result() == Result((), None, "aborted", None) == waiting.result()
    aborted = drawing.result()
    assert aborted.finish == "aborted" and 0 < len(aborted.ids) < 60
    assert stays.result().ids == generated(long)[0]
    stays.abort()  # done already
    assert answer(engine, long)[0].ids == generated(long)[0]


def test_a_failure_on_the_host_ends_one_request_only(engine, monkeypatch):
    good = [Request(prompt(n), 12, DRAWN, logprobs=2, prompt_logprobs=n % 2) for n in (9, 20)]
    before = answer(engine, *good)
    engine._rounds.seats.tree.clear()
    place = Rounds._place

    def failing(self, index, row):
        place(self, index, row)
        if row.handle.request.max_new_tokens == 13:
            raise RuntimeError("planted")

    monkeypatch.setattr(Rounds, "_place", failing)
    first, failed, second = answer(engine, good[0], Request(prompt(9), 13, GREEDY), good[1])
    assert failed == Result((), None, "error", "RuntimeError: planted")
    assert [first, second] == before and first.ids == generated(good[0])[0]


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_broken_logits_end_one_request_and_poison_no_page(mode):
    """Token 63 embeds to NaN. Its row's pages are used again at once by the next request in the queue."""
    params = PARAMS | {"embed": {"embedding": PARAMS["embed"]["embedding"].at[63].set(jnp.nan)}}
    engine = build(params, num_pages=14, mode=mode)
    clean = [Request(tuple(token % 63 for token in prompt(n)), 8, GREEDY, logprobs=0) for n in (18, 19, 17)]
    wanted = [generated(request) for request in clean]
    assert all(63 not in ids for ids, _ in wanted), "the model drew the broken token by itself"
    before = answer(engine, *clean)
    engine._rounds.seats.tree.clear()
    poison = Request((63,) * 18, 8, GREEDY)
    requests = [clean[0], poison, clean[1], poison, clean[2]]
    handles = [engine.submit(request) for request in requests]
    engine.tick()
    handles.append(engine.submit(poison))
    handles[-1].abort()  # aborted with NaN in its pages, before any logits were judged
    drive(engine)
    results = [handle.result() for handle in handles[:5]]
    for result, (ids, values) in zip(results[::2], wanted):
        assert result.ids == ids
        np.testing.assert_allclose(result.logprobs, values, atol=2e-5)
    # In fast mode a row may have to leave for want of pages, and is read in other pieces then.
    assert mode == "fast" or results[::2] == before
    for result in results[1::2]:
        assert result == Result((), None, "error", "the model's logits are not finite (NaN or infinite)")
    assert engine.stats().num_free_pages == 14


def test_an_aborted_prompt_leaves_no_nan_behind():
    params = PARAMS | {"embed": {"embedding": PARAMS["embed"]["embedding"].at[63].set(jnp.nan)}}
    engine = build(params, num_pages=14)
    handle = engine.submit(Request((63,) * 40, 8, GREEDY))  # 12 of the 14 pages
    for _ in range(2):  # two chunks: more pages than the next prompt writes over
        engine.tick()
    handle.abort()
    request = Request(tuple(token % 63 for token in prompt(18)), 8, GREEDY)
    assert answer(engine, request)[0].ids == generated(request)[0]


def test_a_lost_device_state_ends_what_was_served_and_not_what_waits(engine, monkeypatch):
    programs = engine._device._programs
    calls = []

    def failing(params, state, *rest):
        calls.append(1)
        if len(calls) == 2:
            jax.tree.map(lambda leaf: leaf.delete(), state)  # donated to a program that failed
            raise RuntimeError("planted device error")
        return programs.decode_block(params, state, *rest)

    failing._cache_size = lambda: 0
    monkeypatch.setattr(engine._device, "_programs", programs._replace(decode_block=failing))
    request = Request(prompt(5), 12, GREEDY)
    results = answer(engine, *[request] * 5)
    assert [result.finish for result in results] == ["error"] * 3 + ["length"] * 2
    assert all("planted device error" in result.error for result in results[:3])
    assert all(result.ids == generated(request)[0] for result in results[3:])


class CompileCounter(logging.Handler):
    """Counts real compilations, from JAX's own log."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.names = []

    def emit(self, record):
        if "Compiling" in record.getMessage():
            self.names.append(record.getMessage())

    def __enter__(self):
        self._log_compiles = jax.log_compiles(True)
        self._log_compiles.__enter__()
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *error):
        logging.getLogger("jax").removeHandler(self)
        self._log_compiles.__exit__(*error)


@pytest.fixture(scope="module")
def bucketed():
    """An engine with contexts of 16, 40 and 64 tokens and scaled frequencies; with what warming it up reported."""
    device._programs.cache_clear()  # of an earlier engine of this kind
    engine = build(config=SCALED, num_slots=2, prefill_chunk=32, context_buckets=(16, 40), tokens_per_dispatch=3)
    reported = []
    with CompileCounter() as compiled:
        engine.warmup(reported.append)
    return engine, reported, compiled.names


def test_nothing_compiles_after_warm_up(bucketed):
    engine, reported, names = bucketed
    assert names, "the counter sees nothing"
    # Chunks of two sizes; a block for each of three contexts; a scored chunk; admission (twice), clearing, copying.
    assert len({program.name for program in reported}) == len(reported) == 2 + 3 + 1 + 1
    assert [program[2:] for program in reported] == [(i, 7) for i in range(1, 8)]
    warm = engine.stats().num_compiled
    assert warm == 1 + 2 + 3 + 1 + 4  # the first is the empty state
    rng = random.Random(0)
    with CompileCounter() as compiled:
        handles = []
        for i in range(30):
            length = rng.randint(1, 50)
            sampling = SamplingParams(rng.choice([0.0, 0.7]), rng.choice([0, 5]), rng.choice([1.0, 0.9]), seed=i)
            if i % 5 == 4:
                sampling = dataclasses.replace(EVERYTHING, seed=i, min_new_tokens=1)
            asked = {"logprobs": (None, 0, 3)[i % 3], "prompt_logprobs": (None, None, None, 4)[i % 4]}
            request = Request(prompt(length), rng.randint(1, 64 - length), sampling, (3,) * (i % 3), **asked)
            handles.append(engine.submit(request))
            for _ in range(rng.randint(0, 3)):
                engine.tick()
            if i % 7 == 3:
                rng.choice(handles).abort()
        drive(engine)
        replay(engine, Request(prompt(5), 3, GREEDY), (1, 2, 3))  # with a guide
        drive(engine)
    assert compiled.names == [] and engine.stats().num_compiled == warm and engine.stats().num_compiled_late == 0
    assert {handle.result().finish for handle in handles} == {"length", "stop", "aborted"}


def test_another_engine_of_the_kind_compiles_nothing(bucketed):
    kind = {
        "config": SCALED,
        "num_slots": 2,
        "prefill_chunk": 32,
        "context_buckets": (16, 40),
        "tokens_per_dispatch": 3,
    }
    request = Request(prompt(20), 6, GREEDY)
    (wanted,) = answer(bucketed[0], request)
    with CompileCounter() as compiled:
        other = build(**kind)
        other.warmup()
    assert compiled.names == [] and other.stats().num_compiled == 0
    assert answer(other, request)[0].ids == wanted.ids
    mirrored = build(PARAMS | {"embed": {"embedding": PARAMS["embed"]["embedding"][::-1]}}, **kind)
    assert answer(mirrored, request)[0].ids != wanted.ids and mirrored.stats().num_compiled == 0
    assert build(**kind | {"num_slots": 3})._device._programs is not other._device._programs


@pytest.mark.parametrize("buckets", [(), (20,)], ids=["one width", "two widths"])
def test_a_turn_is_read_in_the_smallest_chunk_that_holds_it(buckets, monkeypatch):
    """Wherever it starts: a turn of a session costs what a first turn does."""
    device = build(prefill_chunk=64, context_buckets=buckets)._device
    assert device.chunks == [16, 32, 64]
    reads = []
    monkeypatch.setattr(device, "_read", lambda count, size, parts: reads.append((count, size)))
    for start, count in ((6, 10), (30, 10), (30, 20), (0, 40)):
        device.read([Part([1] * count, np.zeros(16, np.int32), start, inv_freq_F=None)])
    assert reads == [(1, 16), (1, 16), (1, 32), (1, 64)]


def test_context_buckets_change_no_token(bucketed):
    engine, *_ = bucketed
    requests = [Request(prompt(n), m, DRAWN) for n, m in ((3, 5), (10, 30), (25, 4), (40, 20))]
    for request, result in zip(requests, answer(engine, *requests)):
        assert result.ids == generated(request, config=SCALED)[0]


def test_dynamic_ntk_is_fixed_by_each_requests_own_length(bucketed):
    engine, *_ = bucketed
    requests = [Request(prompt(n), m, GREEDY) for n, m in ((4, 8), (20, 10), (20, 40))]
    results = answer(engine, *requests)
    for request, result in zip(requests, results):
        assert result.ids == generated(request, config=SCALED)[0]
    assert results[1].ids != results[2].ids[:10], "the declared length changed nothing"
    # Read in chunks far beyond the 16 tokens of training, drawn and replayed: one full forward of these frequencies.
    request = Request(prompt(50), 10, GREEDY, logprobs=0)
    (result,) = answer(engine, request)
    again = replay(engine, request, result.ids[:4])
    drive(engine)
    tokens = jnp.array([request.tokens + result.ids])
    scored, unscaled = (
        _LOGPROBS(PARAMS, tokens, config=SCALED, inv_freq_BF=rope.inv_freq(SCALED, length=length)[None])[0, 50:]
        for length in (60, 16)
    )
    np.testing.assert_allclose(result.logprobs, scored, atol=2e-5)
    np.testing.assert_allclose(again.result().logprobs, scored[:4], atol=2e-5)
    assert np.abs(scored - unscaled).max() > 1e-3, "the frequencies changed nothing"


def test_cache_dtypes_and_adapters_reach_the_model():
    lora_config = LoraConfig(rank=4, targets=("query", "value", "down"))
    make = jax.jit(functools.partial(init_lora, lora_config))
    zero = jax.device_get(make(PARAMS, jax.random.key(1)))
    lora = apply_config(jax.tree.map(lambda x: x + np.float32(0.1), zero), lora_config)
    engine = build(cache_dtype="int8", lora=lora)
    request = Request(prompt(20), 16, GREEDY, logprobs=0)
    (result,) = answer(engine, request)
    ids, values = generated(request, cache_dtype="int8", lora=lora)
    assert result.ids == ids
    np.testing.assert_allclose(result.logprobs, values, atol=1e-3)
    scored = _LOGPROBS(PARAMS, jnp.array([request.tokens + ids]), config=CONFIG, lora=lora)[0, 20:]
    assert np.abs(values - scored).max() > 1e-4, "the cache dtype changed nothing"
    without = generated(request, cache_dtype="int8", lora=apply_config(zero, lora_config))
    assert ids != without[0], "the adapter changed nothing"


def test_requests_choose_adapters_that_come_and_go(monkeypatch):
    """None, a small one, a DoRA one of another rank: in one batch, each with what was cached under it."""

    def made(config, seed, size):
        zero = init_lora(config, PARAMS, jax.random.key(seed))
        return apply_config(jax.tree.map(lambda x: x + jnp.float32(size), zero), config)

    small = made(LoraConfig(rank=2, targets=("query", "down")), 1, 0.1)
    turned = made(LoraConfig(rank=4, alpha=8.0, targets=("value", "gate"), kind="dora"), 2, 0.05)
    engine = build(adapter_room=AdapterRoom(2, rank=4), num_slots=4, num_pages=60)
    engine.warmup()
    warm, reads = engine.stats().num_compiled, recorded(monkeypatch, engine._device, "_read")
    with CompileCounter() as compiled:
        engine.load_adapter("small", small)
        engine.load_adapter("turned", turned)
    assert compiled.names == []
    assert engine.adapters == ("small", "turned")
    loras = {None: None, "small": small, "turned": turned}
    wanted = {}
    for name, lora in loras.items():
        wanted[name] = generated(Request(prompt(20), 10, GREEDY), lora=lora)[0]
    assert len(set(wanted.values())) == 3, "the adapters change nothing"
    for _ in range(2):  # the second time all prompts are in the cache, each under its adapter
        names = [None, "turned", "small", "turned", None]
        results = answer(engine, *[Request(prompt(20), 10, GREEDY, adapter=name) for name in names])
        assert [result.ids for result in results] == [wanted[name] for name in names]
    assert engine.stats().num_compiled == warm
    assert [part.adapter for part in reads[0][2]] == [-1, 1, 0], "their prompts were not read at once"

    with pytest.raises(ValueError, match="'other' is not loaded; there are: small, turned"):
        engine.submit(Request((1,), 1, adapter="other"))
    with pytest.raises(ValueError, match="all 2 places are taken: small, turned; unload one"):
        engine.load_adapter("third", small)
    with pytest.raises(ValueError, match="'small' is loaded already"):
        engine.load_adapter("small", small)
    handle = engine.submit(Request(prompt(20), 10, GREEDY, adapter="small"))
    with pytest.raises(RuntimeError, match="1 requests use adapter 'small'"):
        engine.unload_adapter("small")
    seat, refused = engine._rounds.seats.seat, []

    def unload():
        with pytest.raises(RuntimeError, match="1 requests use adapter 'small'"):
            engine.unload_adapter("small")
        refused.append("small")

    def seat_slowly(row):
        threads.append(threading.Thread(target=unload))
        threads[-1].start()
        threads[-1].join(0.1)  # it is in use on its way from the queue to a slot too
        return seat(row)

    threads = []
    monkeypatch.setattr(engine._rounds.seats, "seat", seat_slowly)
    drive(engine)
    threads[0].join()
    assert handle.num_shared == 19 and refused == ["small"]
    engine.unload_adapter("small")
    big = made(LoraConfig(rank=8, targets=("query", "head")), 3, 0.1)
    with pytest.raises(ValueError, match="has rank 8, and head; there is room for rank 4 on layers.attention.query"):
        engine.load_adapter("small", big)
    # Another one of that name: nothing that the first left in the cache is used.
    engine.load_adapter("small", turned)
    again = engine.submit(Request(prompt(20), 10, GREEDY, adapter="small"))
    drive(engine)
    assert again.result().ids == wanted["turned"] and again.num_shared == 0
    with pytest.raises(ValueError, match="no room for adapters"):
        build().load_adapter("small", small)
    with pytest.raises(ValueError, match="not both"):
        build(lora=small, adapter_room=AdapterRoom(1))


def test_a_model_cut_over_devices_answers_the_same():
    """Two devices share the heads: prompts, prefixes, pages on the host and back."""
    try:
        mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=1, tensor=2), devices=jax.devices()[:2])
        params = jax.device_put(PARAMS, sharding.shardings(decoder.logical_axes(CONFIG), PARAMS, mesh))
        engine = build(params, num_pages=14, num_host_pages=12)
        engine.warmup()
        warm = engine.stats().num_compiled
        requests = [Request(prompt(n, seed=s), 6, DRAWN, logprobs=0) for n, s in ((30, 1), (12, 2), (33, 3), (30, 1))]
        results = [answer(engine, request)[0] for request in requests]
        stats = engine.stats()
        assert stats.num_shared_tokens >= 29 and stats.num_saved_pages > 0 and stats.num_compiled == warm
        assert engine._device._state.cache.k_LPSKH.sharding.spec[3] == "tensor"
        with pytest.raises(ValueError, match=r"over the mesh axis tensor alone; given \{'data': 2\}"):
            other = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=1), devices=jax.devices()[:2])
            build(jax.device_put(PARAMS, sharding.shardings(decoder.logical_axes(CONFIG), PARAMS, other)))
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])
    for request, result in zip(requests, results):
        ids, values = generated(request)
        assert result.ids == ids
        np.testing.assert_allclose(result.logprobs, values, atol=2e-5)


class FailsToFollow(OnlySteps):
    def take(self, token):
        raise RuntimeError(f"planted at {len(self.taken)}")


class FailsToSay(OnlySteps):
    def mask(self):
        if len(self.taken) == 3:
            raise RuntimeError("planted at 3")
        return super().mask()


class SaysTooMuch(OnlySteps):
    def mask(self):
        return np.zeros(3, np.uint32)


@pytest.mark.parametrize(
    ("guide", "num_tokens", "error"),
    [
        (FailsToFollow, 1, "RuntimeError: planted at 1"),
        (FailsToSay, 2, "RuntimeError: planted at 3"),
        (SaysTooMuch, 0, r"ValueError: a guide's mask must be 2 words of uint32, given uint32\(3,\)"),
    ],
)
def test_a_guide_that_fails_ends_its_request_alone(engine, guide, num_tokens, error):
    free = Request(prompt(9), 20, DRAWN, logprobs=0)
    before = answer(engine, free)
    engine._rounds.seats.tree.clear()
    other, failed = answer(engine, free, Request(prompt(5), 15, GREEDY, guide=guide))
    assert [other] == before and other.ids == generated(free)[0] and other.finish == "length"
    assert failed.finish == "error" and len(failed.ids) == num_tokens and re.fullmatch(error, failed.error)


def test_a_session_is_free_again_after_a_turn_that_was_refused(engine):
    """Whatever it was refused for, the tokens that it has stay and the next turn is taken."""

    def no_guide():
        raise RuntimeError("planted")

    session = engine.open_session()
    for wrong, error in (
        (Request(prompt(5), 15, guide=no_guide), RuntimeError),
        (Request((), 3), ValueError),
        (Request(prompt(5), 3, adapter="nobody"), ValueError),
    ):
        with pytest.raises(error):
            engine.submit(wrong, session=session)
        assert not session.busy and session.tokens == ()
    handle = engine.submit(Request(prompt(5), 3, GREEDY), session=session)
    drive(engine)
    assert session.tokens == (*prompt(5), *handle.result().ids)
    for length in (-1, 9):
        with pytest.raises(ValueError, match="has 8 tokens and cannot go back to its first"):
            session.rewind(length)
    with pytest.raises(ValueError, match="may become 64 tokens long already, given 63"):
        engine.lengthen(session, session.max_length - 1)


@pytest.mark.parametrize("both", [{"bad_words": ((3,),)}, {"min_new_tokens": 2}])
def test_a_guide_and_what_may_forbid_all_that_it_allows_are_refused_together(engine, both):
    with pytest.raises(RequestError, match=f"{next(iter(both))} and a guide may leave no token"):
        engine.submit(Request(prompt(3), 9, dataclasses.replace(GREEDY, **both), guide=OnlySteps))


def speculating(kind) -> Engine:
    """Drafts are looked up in the row, or drawn by the model with its last layer taken out, which is often right."""
    if kind == "lookup":
        settings = {"speculation": PromptLookup(3)}
    else:
        first = PARAMS | {"layers": jax.tree.map(lambda leaf: leaf[:1], PARAMS["layers"])}
        settings = {"speculation": DraftModel(dataclasses.replace(CONFIG, num_layers=1), 3), "draft_params": first}
    return build(num_slots=4, num_pages=28, num_host_pages=4, **settings)


@pytest.mark.parametrize("kind", ["plain", "lookup", "draft"])
def test_a_guide_has_the_say_over_its_row_alone(engine, kind):
    """Guided and free rows in one batch: by a NumPy reference of the masks; the free ones as if alone."""
    if kind != "plain":
        engine = speculating(kind)
    free = [Request(prompt(9), 20, DRAWN, logprobs=0), Request(REPEATING, 20, GREEDY)]
    guided = [Request(prompt(5), 15, GREEDY, (63,), guide=OnlySteps), Request(prompt(3), 9, DRAWN, guide=OnlySteps)]
    first, a, b, second = answer(engine, free[0], *guided, free[1])
    assert first.ids == generated(free[0])[0] and second.ids == generated(free[1])[0]
    assert a.error is b.error is None and min(len(a.ids), len(b.ids)) > 4
    for request, result in zip(guided, (a, b)):
        follower = OnlySteps()
        for place, token in enumerate(result.ids):
            words = follower.mask()
            assert words[token // 32] >> np.uint32(token % 32) & 1
            if request.sampling == GREEDY:
                scores = np.asarray(_SCORES(np.pad([*request.tokens, *result.ids[:place]], (0, 59 - place))[None]))
                allowed = [t for t in range(64) if words[t // 32] >> np.uint32(t % 32) & 1]
                logits = scores[0, len(request.tokens) + place - 1]
                assert token == max(allowed, key=lambda t: logits[t])
            follower.taken.append(token)


REPEATING = tuple([5, 9, 41, 17, 30, 2] * 5)


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_speculation_changes_no_answer(kind, shared_engine, monkeypatch):
    """Looked up in the row, or drawn by a model: greedy and drawn answers, penalties, stops, reports and prefixes.

    Of many seeds every answer is the same, token by token: more than any test of how answers are distributed could say.
    """
    engine, plain = speculating(kind), shared_engine
    engine.warmup()
    warm, reads = engine.stats().num_compiled, recorded(monkeypatch, engine._device, "_read")
    sampling = dataclasses.replace(DRAWN, presence_penalty=0.5, min_new_tokens=2, seed=3)
    requests = [
        *[Request(prompt(12, seed=n), 8, GREEDY) for n in range(3)],
        Request(REPEATING, 20, GREEDY, logprobs=2),
        Request(REPEATING, 25, dataclasses.replace(GREEDY, frequency_penalty=-0.4), logprobs=1),
        Request(prompt(9), 30, sampling, (7, 11), logprobs=3, prompt_logprobs=1),
        Request(prompt(1), 12, DRAWN),
        Request(prompt(33), 3, GREEDY),
    ]
    for _ in range(2):
        for request, result, wanted in zip(requests, answer(engine, *requests), answer(plain, *requests)):
            assert (result.ids, result.finish) == (wanted.ids, wanted.finish)
            for name in ("logprobs", "prompt"):
                assert (getattr(result, name) is None) == (getattr(wanted, name) is None)
            if request.prompt_logprobs:
                np.testing.assert_allclose(result.prompt.logprobs[1:], wanted.prompt.logprobs[1:], atol=2e-5)
            if request.logprobs:
                np.testing.assert_allclose(result.logprobs, wanted.logprobs, atol=2e-5)
                ranked = [[token for token, _ in place] for place in result.top_logprobs]
                assert ranked == [[token for token, _ in place] for place in wanted.top_logprobs]
    stats = engine.stats()
    assert stats.num_compiled == warm and stats.num_free_pages == 28
    assert max(len(parts) for _, _, parts in reads) >= 3, "no prompts were read at once"
    assert stats.num_turns < 0.9 * stats.num_drawn_tokens, "no draft came true"
    seeds = [
        Request(prompt(7, seed=seed % 5) if seed % 2 else REPEATING, 9, SamplingParams(0.3 + seed % 7 / 7, seed=seed))
        for seed in range(120)
    ]
    results = answer(engine, *seeds)
    assert [result.ids for result in results] == [result.ids for result in answer(plain, *seeds)]
    after = engine.stats()
    num_turns, num_drawn = after.num_turns - stats.num_turns, after.num_drawn_tokens - stats.num_drawn_tokens
    assert num_drawn == 9 * 120 > num_turns and len({result.ids for result in results}) > 110
    assert plain.stats().num_turns == plain.stats().num_drawn_tokens
    drive(plain)


def test_what_is_looked_up():
    """The last place with the longest match, up to the end of the row; -1 behind it and where nothing matches."""
    rows = [
        ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], [8, 1, 2, 3]),
        ([5, 3, 7, 6, 3, 2, 7, 6], [3, 2, 7, 6]),
        ([4, 6, 4], [6, 4, -1, -1]),
        ([1, 2, 3, 4], [-1] * 4),
        ([7], [-1] * 4),
    ]
    for lookup in (PromptLookup(4), PromptLookup(4, shortest_match=2)):
        tokens = np.full((len(rows), 12), 3, np.int32)  # what stands behind a row matches nothing
        lengths = np.array([len(row) for row, _ in rows])
        for tokens_S, (row, _) in zip(tokens, rows):
            tokens_S[: len(row)] = row
        drafts = look_up(jnp.asarray(tokens), jnp.asarray(lengths), lookup=lookup)
        wanted = [row for _, row in rows]
        if lookup.shortest_match == 2:
            wanted[2] = [-1] * 4
        assert drafts.tolist() == wanted


def test_drafts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least one draft and 1 <= shortest_match <= longest_match; given 4, 3, 2"):
        PromptLookup(longest_match=2, shortest_match=3)
    with pytest.raises(ValueError, match="given together"):
        build(speculation=DraftModel(CONFIG))
    other = dataclasses.replace(CONFIG, vocab_size=65)
    with pytest.raises(ValueError, match="has 65 tokens and the model 64"):
        build(speculation=DraftModel(other), draft_params={})


ENDS = ("stop", "length", "aborted", "error")


def ended(engine):
    return [getattr(engine.stats(), f"num_{name}") for name in ("stopped", "cut", "aborted", "failed")]


class Traffic:
    """Requests of every kind to one engine, at random: prompts that begin alike, turns of sessions and of forks."""

    def __init__(self, engine, seed):
        self.engine, self.rng = engine, random.Random(seed)
        stem = prompt(24, seed=90)
        # Few, and beginnings of one another: pages are shared, wait on the host, and come back.
        self.prompts = [(*stem[:n], *prompt(m, seed=n)) for n in (0, 3, 9, 16, 24) for m in (1, 2, 7, 13)]
        self.sessions = [engine.open_session() for _ in range(5)]
        self.handles: list[Handle] = []
        self.turns: dict[Handle, tuple[int, ...]] = {}
        """What the session of a turn held before it."""

    def request(self) -> Request:
        rng = self.rng
        sampling = rng.choice([GREEDY, *[dataclasses.replace(DRAWN, seed=n) for n in range(3)]])
        return Request(
            rng.choice(self.prompts),
            rng.randint(1, 8),
            sampling,
            stop_ids=rng.choice([(), tuple(range(0, 64, 8))]),
            logprobs=rng.choice([None, 0, 2]),
            prompt_logprobs=rng.choice([None] * 9 + [1]),
            adapter=rng.choice([None, None, *self.engine.adapters]),
            guide=rng.choice([None] * 6 + [OnlySteps, FailsToSay]),
        )

    def send(self) -> None:
        rng, request = self.rng, self.request()
        kind = rng.random()
        if kind < 0.2:
            self.turn(rng.randrange(len(self.sessions)), request)
            return
        # Several answers to one question differ by their seeds.
        for n in range(rng.choice([1, 1, 1, 3])):
            sampling = request.sampling if n == 0 else dataclasses.replace(DRAWN, seed=n)
            self.handles.append(self.engine.submit(dataclasses.replace(request, sampling=sampling)))

    def turn(self, index: int, request: Request) -> None:
        session = self.sessions[index]
        if session.busy:
            return
        request = dataclasses.replace(request, tokens=request.tokens[:6])
        if len(session.tokens) + len(request.tokens) + request.max_new_tokens > session.max_length:
            session.rewind(self.rng.randrange(len(session.tokens)))
            return
        if self.rng.random() < 0.2:
            self.sessions[(index + 1) % len(self.sessions)] = session.fork()
        handle = self.engine.submit(request, session=session)
        self.handles.append(handle)
        self.turns[handle] = session.tokens


@pytest.fixture(scope="module")
def two_adapters():
    config = LoraConfig(rank=2, targets=("query", "down"))
    zero = jax.device_get(jax.jit(functools.partial(init_lora, config))(PARAMS, jax.random.key(1)))

    def moved(size):
        return apply_config(jax.tree.map(lambda x: x + np.float32(size), zero), config)

    return moved(0.1), moved(-0.1)


def test_pages_come_back_after_any_traffic(two_adapters):
    """2,000 requests of all sorts at once, a quarter of them aborted at some moment, and fewer pages than they want.

    Whoever asks the same gets the same, whatever was shared, moved, taken away or drafted meanwhile; a turn of a
    session is answered as one request with all of its history.
    """
    engine = build(
        num_slots=8,
        num_pages=28,
        num_host_pages=12,
        adapter_room=AdapterRoom(2, rank=2, targets=("query", "down")),
        speculation=PromptLookup(2),
    )
    engine.warmup()
    for name, lora in zip(("one", "two"), two_adapters):
        engine.load_adapter(name, lora)
    warm, traffic = engine.stats().num_compiled, Traffic(engine, seed=2)
    rng, handles = traffic.rng, traffic.handles
    while len(handles) < 2000:
        traffic.send()
        for _ in range(rng.randint(0, 2) + engine.stats().num_waiting // 8):
            engine.tick()
        if rng.random() < 0.5:
            rng.choice(handles[-8:]).abort()
    drive(engine)
    events = [list(handle.events()) for handle in handles]
    finishes = [each[-1].finish for each in events]
    assert min(finishes.count(name) for name in ENDS) > 50
    assert {each[-1].error for each in events} == {None, "RuntimeError: planted at 3"}
    assert ended(engine) == [finishes.count(name) for name in ENDS]
    stats = engine.stats()
    assert stats.num_compiled == warm and stats.num_preempted > 0 and stats.num_shared_tokens > 0
    assert stats.num_turns < stats.num_drawn_tokens, "no draft came true"
    pieces = [[len(event.ids) for event in each if event.ids] for each in events]
    assert stats.num_drawn_tokens == sum(map(sum, pieces))
    timings = {name: sum(spread.counts) for name, spread in engine.timings()._asdict().items()}
    assert timings == {
        "in_queue": timings["in_queue"],
        "first_token": len([each for each in pieces if each]),
        "each_token": sum(sum(each[1:]) for each in pieces),
        "whole": sum(ended(engine)[:2]),
    }

    seats = engine._rounds.seats
    tree, allocator = seats.tree, seats.tree._allocator
    assert stats.num_free_pages == 28 and stats.num_saved_pages > 0 and not any(seats.rows)
    assert [allocator.num_owners(page) for page in range(28)] == [page in tree._of_page for page in range(28)]
    assert (seats.page_table_BM == 28).all()
    assert not any(session.busy for session in traffic.sessions) and engine.num_users("one") == 0

    longest: dict[Request, tuple[int, ...]] = {}
    for handle, each in zip(handles, events):
        ids = tuple(token for event in each for token in event.ids)
        tokens = traffic.turns.get(handle, ()) + handle.request.tokens
        like = {"tokens": tokens, "max_new_tokens": 8, "logprobs": None, "prompt_logprobs": None}
        asked = dataclasses.replace(handle.request, **like)
        before = longest.setdefault(asked, ids)
        assert before[: len(ids)] == ids[: len(before)]
        longest[asked] = max(before, ids, key=len)
    # Only conversations are so long.
    turns = [each for each in longest if len(each.tokens) > 37 and each.guide is None and each.adapter is None]
    for asked in turns[:20]:
        assert generated(asked)[0][: len(longest[asked])] == longest[asked]


def test_waits_are_counted_and_silence_is_told(engine, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    before = engine.timings()
    assert engine.silent_seconds() == 0.0
    handle = engine.submit(Request(prompt(6, seed=3), 5, GREEDY))
    now[0] = 103.0
    assert engine.silent_seconds() == 3.0
    while engine.tick():  # reads and dispatches a block of 4, dispatches the next, and reads them
        assert engine.silent_seconds() == 0.0
        now[0] += 1.0
    assert engine.silent_seconds() == 0.0 and len(handle.result().ids) == 5
    after = engine.timings()
    new = {name: getattr(after, name).total - getattr(before, name).total for name in after._fields}
    assert new == {"in_queue": 3.0, "first_token": 4.0, "each_token": 1.0, "whole": 5.0}
    spread = before.first_token
    grown = [i for i, count in enumerate(spread.counts) if after.first_token.counts[i] > count]
    assert [spread.bounds[i - 1 : i + 1] for i in grown] == [(2.5, 5.0)]


def test_what_its_reader_has_enough_of_has_stopped(engine):
    before = ended(engine)
    enough, left = (engine.submit(Request(prompt(3), 50, GREEDY)) for _ in range(2))
    engine.tick()
    enough.is_enough = True
    for handle in (enough, left):
        handle.abort()
    drive(engine)
    assert [after - count for after, count in zip(ended(engine), before)] == [1, 0, 1, 0]


def test_a_thread_that_ends_is_a_fault(shared_engine, monkeypatch):
    monkeypatch.setattr(shared_engine._rounds, "run", lambda: None)
    monkeypatch.setattr(shared_engine, "_thread", None)
    assert shared_engine.fault is None
    shared_engine.start()
    shared_engine._thread.join()
    assert shared_engine.fault == "the engine's thread has ended"
    with pytest.raises(RuntimeError, match="thread has ended"):
        shared_engine.submit(Request(prompt(3), 1, GREEDY))


def test_threads_submit_to_a_running_engine():
    requests = [Request(prompt(5 + i), 6 + i, dataclasses.replace(DRAWN, seed=i)) for i in range(8)]
    results = {}
    with build() as engine:

        def client(i):
            results[i] = engine.submit(requests[i]).result()

        threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        with pytest.raises(RuntimeError, match="runs already"):
            engine.start()
    for i, request in enumerate(requests):
        assert results[i].ids == generated(request)[0]
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(requests[0])


def test_closing_ends_what_is_not_done():
    engine = build().start()
    handles = [engine.submit(Request(prompt(3), 60, GREEDY)) for _ in range(6)]
    first = next(handles[0].events())
    handles[1].abort()
    assert isinstance(first, Event) and first.ids
    engine.close()
    finishes = [handle.result().finish for handle in handles]
    assert finishes[-1] == "aborted" and set(finishes) <= {"aborted", "length"}
    assert engine.stats().num_free_pages == engine.num_pages
    engine.close()


def test_a_state_that_cannot_be_made_anew_stops_the_engine(monkeypatch):
    engine = build()
    handles = [engine.submit(Request(prompt(3), 5, GREEDY)) for _ in range(5)]

    def planted(*_):
        raise MemoryError("planted")

    planted._cache_size = lambda: 0
    programs = engine._device._programs._replace(decode_block=planted, empty_state=planted)
    monkeypatch.setattr(engine._device, "_programs", programs)
    engine.tick()
    assert {handle.result().finish for handle in handles} == {"error"}
    with pytest.raises(RuntimeError, match="could not be made anew: planted"):
        engine.submit(Request(prompt(3), 5, GREEDY))


def test_a_handle_wakes_the_engine_when_aborted():
    woken = []
    Handle(Request((1,), 1), lambda: woken.append(1)).abort()
    assert woken == [1]


def test_a_block_of_the_engine_keeps_the_cache_in_place():
    """As for `step`: temporaries of one layer's slots, not of all 8 layers."""
    config = dataclasses.replace(CONFIG, num_layers=8, num_heads=2, head_dim=32, vocab_size=128)
    B, S = 8, 2048
    one_layer = 2 * B * S * 2 * 32 * 4
    state = jax.eval_shape(
        lambda: empty_state(
            config=config,
            num_slots=B,
            max_context=S,
            num_pages=B * S // 16,
            page_size=16,
            cache_dtype="float32",
            limits=Limits(stop_ids=4),
        )
    )
    allowed = Allowed(jax.ShapeDtypeStruct((B, 4), jnp.uint32), jax.ShapeDtypeStruct((B,), bool))
    arguments = *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, S // 16), (B,))), allowed, None
    run = jax.jit(lambda p, s, *rest: decode_block(Weights(p), s, *rest, config=config, num_turns=4), donate_argnums=1)
    memory = run.lower(decoder.abstract_params(config), state, *arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 8 * one_layer
    assert memory.temp_size_in_bytes < 1.5 * one_layer + (2 << 20), memory.temp_size_in_bytes / one_layer
