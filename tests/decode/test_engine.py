"""The engine: its tokens are those of `generate`, whoever else is served; pages come back; nothing compiles twice."""

import dataclasses
import functools
import logging
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.decode.engine import Engine
from internjax.decode.generate import generate
from internjax.decode.programs import Admission, decode_block, empty_state
from internjax.decode.request import Event, Handle, Request, Result
from internjax.decode.sample import Limits, SamplingParams, stack
from internjax.decode.score import logprobs
from internjax.model import decoder, rope
from internjax.model.config import DynamicNTK, ModelConfig
from internjax.model.lora import LoraConfig, apply_config, init_lora
from tests.decode import numpy_sampling
from tests.weights import random_params

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_position_embeddings=64,
    rope_theta=10_000.0,
    initializer_range=0.2,
    dtype="float32",
)
PARAMS = random_params(CONFIG, seed=1)
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
    tokens_S = np.zeros(64, np.int32)
    tokens_S[:5] = [9, 8, 8, 9, 8]
    sizes = [np.array(size, np.int32) for size in (1, 5, 2, 40)]
    sampling_1 = stack([EVERYTHING], limits=engine.limits)
    row = Admission(sizes[0], tokens_S, *sizes[1:], np.full(8, -1, np.int32), engine._inv_freq_F, sampling_1, np.True_)
    engine._state = state = engine._admit(engine._state, row)  # the host knows nothing of it: it will draw nothing
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
    assert [len(event.ids) for event in events] == [4, 4, 2]
    assert [event.finish for event in events] == [None, None, "length"]
    assert all(len(event.logprobs) == len(event.ids) for event in events)
    assert list(handle.events()) == []
    with pytest.raises(RuntimeError, match="read already"):
        handle.result()


def test_logprobs_are_reported_only_on_request(engine):
    (result,) = answer(engine, Request(prompt(6), 5, GREEDY))
    assert result.logprobs is None and len(result.ids) == 5


def test_more_requests_than_pages_wait_in_order():
    """14 pages; the first and third request need 10 each, the second 3: one after another, none overtakes."""
    engine = build(num_pages=14)
    requests = [Request(prompt(10, seed=s), n, GREEDY) for s, n in ((0, 30), (1, 2), (2, 30), (3, 2))]
    handles = [engine.submit(request) for request in requests]
    order = []
    lows = []
    while engine.tick():
        order += [i for i, handle in enumerate(handles) if i not in order and not handle._events.empty()]
        lows.append(engine.stats().num_free_pages)
    assert min(lows) == 1 and order.index(1) < order.index(2) and order.index(2) <= order.index(3)
    for request, handle in zip(requests, handles):
        assert handle.result().ids == generated(request)[0]
    assert engine.stats().num_free_pages == 14


def test_what_can_never_fit_is_refused_at_once():
    engine = build(num_pages=14)
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
        {"limits": Limits(bad_words=-1)},
    ],
)
def test_silly_settings_are_refused(settings):
    with pytest.raises(ValueError, match="engine sizes must be positive"):
        build(**settings)
    with pytest.raises(ValueError, match="scalar head"):
        build(config=dataclasses.replace(CONFIG, head="scalar"))


def test_abort_while_waiting_reading_and_drawing(engine):
    long = Request(prompt(50), 12, GREEDY)
    reading, drawing, stays = (engine.submit(r) for r in (long, Request(prompt(2), 60, GREEDY), long))
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
    place = Engine._place

    def failing(self, index, slot):
        place(self, index, slot)
        if slot.handle.request.max_new_tokens == 13:
            raise RuntimeError("planted")

    monkeypatch.setattr(Engine, "_place", failing)
    good, bad = Request(prompt(9), 12, DRAWN, logprobs=0), Request(prompt(9), 13, GREEDY)
    first, failed, second = answer(engine, good, bad, good)
    assert failed == Result((), None, "error", "RuntimeError: planted")
    assert first == second and first.ids == generated(good)[0]


def test_broken_logits_end_one_request_and_poison_no_page():
    """Token 63 embeds to NaN. Its row's pages are used again at once by the next request in the queue."""
    params = PARAMS | {"embed": {"embedding": PARAMS["embed"]["embedding"].at[63].set(jnp.nan)}}
    engine = build(params, num_pages=14)
    clean = [Request(tuple(token % 63 for token in prompt(n)), 8, GREEDY, logprobs=0) for n in (18, 19, 17)]
    wanted = [generated(request) for request in clean]
    assert all(63 not in ids for ids, _ in wanted), "the model drew the broken token by itself"
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
    program = engine._decode_block
    calls = []

    def failing(params, state, *rest):
        calls.append(1)
        if len(calls) == 2:
            jax.tree.map(lambda leaf: leaf.delete(), state)  # donated to a program that failed
            raise RuntimeError("planted device error")
        return program(params, state, *rest)

    monkeypatch.setattr(engine, "_decode_block", failing)
    monkeypatch.setattr(failing, "_cache_size", lambda: 0, raising=False)
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
    engine = build(config=SCALED, num_slots=2, prefill_chunk=32, context_buckets=(16, 40), tokens_per_dispatch=3)
    reported = []
    with CompileCounter() as compiled:
        engine.warmup(lambda name, seconds: reported.append(name))
    return engine, reported, compiled.names


def test_nothing_compiles_after_warm_up(bucketed):
    engine, reported, names = bucketed
    assert names, "the counter sees nothing"
    # A small chunk; a full chunk and a block for each of three contexts; a scored chunk; admission with clearing.
    assert len(reported) == len(set(reported)) == 1 + 3 + 3 + 1 + 1
    warm = engine.stats().num_compiled
    assert warm == 1 + 3 + 3 + 1 + 2
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
    assert compiled.names == [] and engine.stats().num_compiled == warm
    assert {handle.result().finish for handle in handles} == {"length", "stop", "aborted"}


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


def test_pages_come_back_after_any_traffic(engine):
    rng = random.Random(1)
    handles = []
    for i in range(150):
        length = rng.randint(1, 40)
        request = Request(prompt(length), rng.randint(1, 24), dataclasses.replace(DRAWN, seed=i), (rng.randrange(64),))
        handles.append(engine.submit(request))
        for _ in range(rng.randint(0, 2)):
            engine.tick()
        if rng.random() < 0.3:
            rng.choice(handles).abort()
    drive(engine)
    finishes = [handle.result().finish for handle in handles]
    assert set(finishes) == {"length", "stop", "aborted"} and len(finishes) == 150
    assert sorted(engine._allocator.allocate(engine.num_pages)) == list(range(engine.num_pages))
    engine._allocator.free(range(engine.num_pages))
    assert (engine._page_table_BM == engine.num_pages).all()


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

    monkeypatch.setattr(engine, "_decode_block", planted)
    monkeypatch.setattr(engine, "_empty_state", planted)
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
    arguments = (jax.ShapeDtypeStruct((B, S // 16), jnp.int32), jax.ShapeDtypeStruct((B,), bool), None)
    run = jax.jit(lambda p, s, *rest: decode_block(p, s, *rest, config=config, num_tokens=4), donate_argnums=1)
    memory = run.lower(decoder.abstract_params(config), state, *arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 8 * one_layer
    assert memory.temp_size_in_bytes < 1.5 * one_layer + (2 << 20), memory.temp_size_in_bytes / one_layer
