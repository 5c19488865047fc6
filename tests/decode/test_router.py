"""The router: answers are those of one engine, prompts go where their beginning is, and what fails is left out."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.decode.device import AdapterRoom
from internjax.decode.engine import Engine
from internjax.decode.request import Request
from internjax.decode.router import Router, _pages
from internjax.decode.sample import SamplingParams
from internjax.model import decoder
from internjax.model.lora import LoraConfig, apply_config, init_lora
from tests.decode.small import CONFIG, PARAMS

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.9, top_k=30, top_p=0.95, seed=7)
SIZES = {"max_context": 64, "num_slots": 2, "page_size": 4, "prefill_chunk": 16}


def engines_on(params, num_engines: int, **settings) -> list[Engine]:
    meshes = sharding.meshes_beside(sharding.mesh_of(params), num_engines)
    return [Engine(sharding.moved(params, mesh), CONFIG, **SIZES | settings) for mesh in meshes]


@pytest.fixture(scope="module")
def shared_engines():
    return engines_on(PARAMS, 2, adapter_room=AdapterRoom(1, rank=4))


@pytest.fixture
def engines(shared_engines):
    """Two engines on two devices, idle and with empty caches; a test drives them itself."""
    for engine in shared_engines:
        engine._rounds.seats.tree.clear()
    yield shared_engines
    drive(shared_engines)
    assert all(engine.stats().num_free_pages == engine.num_pages for engine in shared_engines)


def drive(engines) -> None:
    for _ in range(10_000):
        if not any([engine.tick() for engine in engines]):
            return
    raise AssertionError("the engines never came to rest")


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, length)).integers(0, 64, length).tolist())


def loads(engines) -> list[int]:
    return [engine.stats().num_waiting + engine.stats().num_active for engine in engines]


def answers(target, engines, requests) -> list:
    handles = [target.submit(request) for request in requests]
    drive(engines)
    return [handle.result() for handle in handles]


def test_answers_are_those_of_one_engine_whichever_serves(engines):
    router = Router(engines)
    requests = [Request(prompt(n, seed), 10, GREEDY if n % 2 else DRAWN) for n in (1, 12, 33, 50) for seed in range(3)]
    together = answers(router, engines, requests)
    served = [engine.stats().num_prompt_tokens for engine in engines]
    assert min(served) > 0, "one of them served nothing"
    for engine in engines:
        assert [result.ids for result in answers(engine, engines, requests)] == [result.ids for result in together]


def test_conversations_come_back_to_their_cache(engines):
    """Three of them behind one system turn, told turn by turn: all but what is new is cached; in turn it is not."""
    system, router = prompt(4, seed=9), Router(engines)

    def num_shared(targets) -> int:
        before = sum(engine.stats().num_shared_tokens for engine in engines)
        told = [system] * 3
        for turn in range(3):
            for talk in range(3):
                told[talk] += prompt(13, seed=10 * talk + turn)
                answers(next(targets), engines, [Request(told[talk], 1, GREEDY)])
        return sum(engine.stats().num_shared_tokens for engine in engines) - before

    assert num_shared(itertools.repeat(router)) >= 3 * (17 + 30) + 4
    for engine in engines:
        engine._rounds.seats.tree.clear()
    assert num_shared(itertools.cycle(engines)) < 3 * (17 + 30) / 2


def test_too_busy_a_replica_is_passed_over(engines):
    router, tokens = Router(engines), prompt(40)
    most = 1  # half of two slots
    handles = [router.submit(Request(tokens, 2, GREEDY))]
    first = loads(engines).index(1)
    handles += [router.submit(Request(tokens, 2, GREEDY)) for _ in range(most)]
    assert loads(engines)[first] == most + 1 and loads(engines)[1 - first] == 0
    handles.append(router.submit(Request(tokens, 2, GREEDY)))
    assert loads(engines)[1 - first] == 1, "it waits where the cache is"
    # Both have it from now on: the less busy one is taken.
    handles.append(router.submit(Request(tokens, 2, GREEDY)))
    assert loads(engines)[1 - first] == 2
    drive(engines)
    assert len({handle.result().ids for handle in handles}) == 1


def test_little_in_common_or_a_prompt_to_be_scored_goes_to_the_least_busy(engines):
    router, first, second = Router(engines), prompt(40, seed=1), prompt(40, seed=2)
    router.submit(Request(first, 1, GREEDY))
    router.submit(Request((*first[:12], *prompt(29)), 1, GREEDY))  # 12 of 41 tokens: 29 %
    assert loads(engines) == [1, 1]
    drive(engines)
    router.submit(Request(second, 1, GREEDY))
    drive(engines)
    router.submit(Request((*second[:12], *prompt(27)), 1, GREEDY))  # 12 of 39: 31 %; though it was sent more so far
    assert loads(engines) == [1, 0]
    router.submit(Request(second, 1, GREEDY, prompt_logprobs=0))
    assert loads(engines) == [1, 1]


def test_the_record_is_as_long_as_the_cache(engines):
    router, (room, *_) = Router(engines), [engine.num_pages for engine in engines]
    for seed in range(8):
        router.submit(Request(prompt(40, seed), 1, GREEDY)).abort()
        drive(engines)
    sent = [replica.sent for replica in router._replicas]
    assert [len(each._pages) for each in sent] == [room, room], "40 pages were sent to each"
    # Of the oldest, the end is forgotten before the beginning; the others are known in whole.
    held = [sum(each.num_held(_pages(None, prompt(40, seed), 4)) for each in sent) for seed in range(8)]
    assert held == [2, 2, 10, 10, 10, 10, 10, 10]


def test_a_replica_that_stopped_is_left_out(engines, monkeypatch):
    breaking = engines_on(PARAMS, 2, adapter_room=AdapterRoom(1, rank=4))[1]
    router = Router([breaking, engines[0]])

    def planted(*_):
        raise MemoryError("planted")

    planted._cache_size = lambda: 0
    programs = breaking._device._programs._replace(decode_block=planted, empty_state=planted)
    monkeypatch.setattr(breaking._device, "_programs", programs)
    requests = [Request(prompt(30, seed), 4, GREEDY) for seed in range(2)]
    handles = [router.submit(request) for request in requests]
    session = router.open_session()
    begun = router.submit(Request(prompt(20), 4, GREEDY), session=session)
    drive([breaking, engines[0]])
    finishes = [handle.result().finish for handle in handles]
    assert sorted(finishes) == ["error", "length"] and begun.result().finish == "error"
    assert router.fault is None and "could not be made anew: planted" in router.engines[0].fault
    # What it held, and a session that was with it, goes to the other.
    again = [router.submit(request) for request in requests]
    turn = router.submit(Request(prompt(20), 4, GREEDY), session=session)
    router.load_adapter("late", adapter(0.1))
    assert router.adapters == ("late",)
    drive(engines)
    assert {handle.result().finish for handle in (*again, turn)} == {"length"}
    router.unload_adapter("late")
    alone = Router([breaking])
    assert "all 1 engines have stopped" in alone.fault
    with pytest.raises(RuntimeError, match="all 1 engines have stopped: .* planted"):
        alone.submit(requests[0])


def test_an_engine_that_stops_while_it_is_chosen(engines, monkeypatch):
    stopping = engines_on(PARAMS, 1, adapter_room=AdapterRoom(1, rank=4))[0]
    router, submit = Router([stopping, engines[1]]), stopping.submit

    def late(request, *, session=None):
        stopping.close()
        return submit(request, session=session)

    monkeypatch.setattr(stopping, "submit", late)
    (result,) = answers(router, engines, [Request(prompt(5), 2, GREEDY)])
    assert result.finish == "length" and stopping.fault is not None


def test_a_session_stays_where_it_began_and_a_fork_follows(engines):
    router, one = Router(engines), engines[0]
    session, alone = router.open_session(60), one.open_session(60)
    texts = [prompt(20, seed) for seed in range(3)]
    wanted = []
    for text in texts[:2]:
        handle = one.submit(Request(text, 4, GREEDY), session=alone)
        drive(engines)
        wanted.append(handle.result().ids)
    for engine in engines:
        engine._rounds.seats.tree.clear()
    handle = router.submit(Request(texts[0], 4, GREEDY), session=session)
    home = loads(engines).index(1)
    with pytest.raises(RuntimeError, match="the last request of this session is not done"):
        router.submit(Request(texts[1], 4, GREEDY), session=session)
    drive(engines)
    assert handle.result().ids == wanted[0]
    # However busy it is.
    busy = [engines[home].submit(Request(prompt(3, seed), 8, GREEDY)) for seed in range(6)]
    handle = router.submit(Request(texts[1], 4, GREEDY), session=session)
    assert loads(engines)[1 - home] == 0
    drive(engines)
    assert handle.result().ids == wanted[1] and handle.num_shared == 23 and all(h.finished for h in busy)
    fork = session.fork()
    assert not router.lengthen(fork, 64) and fork.max_length == 64
    handle = router.submit(Request(texts[2][:12], 4, GREEDY), session=fork)
    assert loads(engines)[home] == 1
    drive(engines)
    assert handle.num_shared == 47 and len(handle.result().ids) == 4


def adapter(size: float):
    config = LoraConfig(rank=4, targets=("query", "down"))
    zero = init_lora(config, PARAMS, jax.random.key(1))
    return apply_config(jax.tree.map(lambda x: x + jnp.float32(size), zero), config)


def test_adapters_are_on_all_replicas_or_none(engines, monkeypatch):
    router = Router(engines)
    router.load_adapter("one", adapter(0.1))
    assert router.adapters == ("one",) and [engine.adapters for engine in engines] == [("one",)] * 2
    request = Request(prompt(20), 10, GREEDY, adapter="one")
    results = [answers(engine, engines, [request])[0] for engine in engines]
    plain = answers(engines[0], engines, [Request(prompt(20), 10, GREEDY)])[0]
    assert results[0].ids == results[1].ids != plain.ids
    stacks = [jax.tree.leaves(engine._device.adapters.stacked)[0] for engine in engines]
    assert [stack.devices() for stack in stacks] == [{device} for device in jax.devices()[:2]]
    handle = engines[1].submit(request)
    with pytest.raises(RuntimeError, match="1 requests use adapter 'one'"):
        router.unload_adapter("one")
    assert router.adapters == ("one",)
    with pytest.raises(ValueError, match="'one' is loaded already"):
        router.load_adapter("one", adapter(0.2))
    drive(engines)
    assert handle.result().ids == results[0].ids
    router.unload_adapter("one")
    assert [engine.adapters for engine in engines] == [(), ()]

    def full(name, lora):
        raise ValueError("planted")

    monkeypatch.setattr(engines[1], "load_adapter", full)
    with pytest.raises(ValueError, match="planted"):
        router.load_adapter("two", adapter(0.1))
    assert [engine.adapters for engine in engines] == [(), ()]


def test_threads_over_running_replicas_cut_over_devices():
    """Two replicas of two devices each, in threads of their own, under many submitters."""
    try:
        mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=1, tensor=2), devices=jax.devices()[:2])
        params = jax.device_put(PARAMS, sharding.shardings(decoder.logical_axes(CONFIG), PARAMS, mesh))
        engines = engines_on(params, 2)
        placed = [engine._device._state.cache.k_LPSKH.sharding for engine in engines]
        assert [placement.device_set for placement in placed] == [{*jax.devices()[:2]}, {*jax.devices()[2:4]}]
        requests = [Request(prompt(n, seed=3), 6, DRAWN) for n in (5, 20, 33, 20, 41, 5, 9, 33)]
        results = [None] * len(requests)

        def ask(index: int) -> None:
            results[index] = router.submit(requests[index]).result()

        with Router(engines) as router:
            warm = router.stats().num_compiled
            threads = [threading.Thread(target=ask, args=[index]) for index in range(len(requests))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            stats = router.stats()
        assert stats.num_compiled == warm and stats.num_slots == 4 and stats.num_drawn_tokens == 48
        assert all(engine.stats().num_drawn_tokens for engine in engines)
        assert router.fault is not None
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])
    engine = Engine(PARAMS, CONFIG, **SIZES)
    assert [result.ids for result in results] == [result.ids for result in answers(engine, [engine], requests)]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="give at least one"):
        Router([])
    engines = [engines_on(PARAMS, 1)[0], engines_on(PARAMS, 1, num_slots=3)[0]]
    with pytest.raises(ValueError, match="the engines differ in num_pages, num_slots"):
        Router(engines)
    mesh = sharding.mesh_of(PARAMS)
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"{count} replicas on 1 devices each .* enough for 1 to 8"):
            sharding.meshes_beside(mesh, count)
