"""How fast a model answers: what `python -m serve.bench` measures, as functions for a notebook. Token ids only.

    with Engine(params, config, max_context=512, num_slots=8) as engine:
        target = engine_target(engine)
        cell = measure_cell(target, batch=8, prompt=128, completion=128, rounds=3)
        print(cell.throughput, cell.first_token.p50, cell.per_token.p95)

Every request has a thread of its own, which notes by time.perf_counter when its events arrive. Prompts are random ids
and no two are alike, so that none is shared with an earlier one unless that is what is measured. Nothing ends early:
requests have no stop ids. What is measured first is run once beforehand and not counted.

The time of a token is that since the event before its own, divided by the tokens that came in its event: an engine that
hands out four at once is not credited with three that took no time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internjax.decode.engine import Engine
from internjax.decode.generate import decoding_params
from internjax.decode.router import Router
from internjax.decode.sizing import page_bytes
from internjax.model.cache import CacheDType
from internjax.model.config import ModelConfig
from internjax.model.quantize import num_bytes
from serve.bench.targets import FIRST_ID, Target, Timing, ask_engine, engine_target

MEAN_PROMPT, MEAN_ANSWER = 161, 338
"""Mean lengths of ShareGPT's conversations in tokens, as the vLLM paper counts them (arXiv:2309.06180, figure 11)."""
_SPREAD_PROMPT, _SPREAD_ANSWER = 1.2, 0.9
"""Standard deviations of the logarithms of both lengths; ours: few are long, many are short."""
PREFIX_SUFFIX, TURN_ANSWER = 16, 16
"""Own tokens of a prompt behind a shared prefix; tokens of an answer in a session."""
_MIX_CONTEXT = 2048
"""Context that those lengths belong to; in a shorter one they shrink alike."""


class Latency(NamedTuple):
    """Seconds: mean, extremes and percentiles."""

    ave: float
    min: float
    max: float
    p50: float
    p75: float
    p95: float
    p99: float


class Ceiling(NamedTuple):
    """What the memory would allow: a step reads the weights and the keys and values of its rows, and nothing twice."""

    step_bytes: int
    throughput: float
    """Tokens per second at the bandwidth that was measured."""
    fraction: float | None
    """Of it that was reached while all rows drew; beyond 1 where the model lies in the processor's caches."""


class Cell(NamedTuple):
    """One point of the static grid."""

    batch: int
    prompt: int
    completion: int
    throughput: float
    """Output tokens per second from the first request to the last token, reading of prompts included: median."""
    throughputs: tuple[float, ...]
    """That of every round."""
    decode_throughput: float | None
    """The same while all rows drew, none reading its prompt any more: median; None where there was no such time."""
    first_token: Latency
    per_token: Latency | None
    """None where all tokens came at once."""
    memory_bytes: int | None
    ceiling: Ceiling | None


class Load(NamedTuple):
    """Many requests of different lengths, and how they were served."""

    num_requests: int
    rate: float | None
    """Arrivals per second, Poisson; None: all at once."""
    prompt_tokens: int
    output_tokens: int
    seconds: float
    requests_per_second: float
    output_throughput: float
    total_throughput: float
    """Prompt and output tokens per second."""
    first_token: Latency
    per_token: Latency | None


class PrefixHit(NamedTuple):
    """First-token seconds of a prompt that begins anew, and of one that begins like it. Medians."""

    prefix: int
    suffix: int
    cold: float
    warm: float
    ratio: float
    """warm / cold"""
    num_shared: int | None


class Turn(NamedTuple):
    """First-token seconds of a conversation's turn, after `history` tokens. Median."""

    turn: int
    history: int
    first_token: float
    ratio: float
    """To the first turn's; the goal is at most 1.2 however long the history is."""


# --- the runs --------------------------------------------------------------------------------------------------------


def require_fitting(target: Target, prompt: int, completion: int, *, what: str) -> None:
    """Raises ValueError where a prompt and its answer pass the context."""
    if target.max_context is not None and prompt + completion > target.max_context:
        raise ValueError(
            f"{what}: a prompt of {prompt} and an answer of {completion} tokens make {prompt + completion}; the "
            f"context holds {target.max_context}. Leave it out, or start with a larger --max-context"
        )


def ask_together(
    target: Target,
    asked: Sequence[tuple[Sequence[int], int]],
    *,
    starts: Sequence[float] | None = None,
    concurrency: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Returns the timings of (prompt, new tokens), asked all at once, or `concurrency` at a time.

    starts: seconds at which each is due. It counts from then on, even if it could not be sent at once.
    """
    begin = time.perf_counter()

    def one(index: int) -> Timing:
        prompt, num_new = asked[index]
        if starts is None:
            return target.ask(prompt, num_new)
        due = begin + starts[index]
        time.sleep(max(0.0, due - time.perf_counter()))
        return target.ask(prompt, num_new)._replace(start=due)

    with ThreadPoolExecutor(concurrency or len(asked)) as pool:
        futures = [pool.submit(one, index) for index in range(len(asked))]
        timings = []
        try:
            for future in futures:
                timings.append(future.result())
                on_done()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return timings


def random_prompts(rng: np.random.Generator, target: Target, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns a prompt of random ids for each of the lengths."""
    return [tuple(rng.integers(FIRST_ID, target.last_id + 1, length).tolist()) for length in lengths]


def measure_cell(
    target: Target,
    *,
    batch: int,
    prompt: int,
    completion: int,
    rounds: int = 3,
    seed: int = 0,
    bandwidth: float | None = None,
    step_bytes: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Cell:
    """Returns a point of the grid: `batch` requests at once, all of one size, `rounds` times after one that warms up.

    bandwidth, step_bytes: bytes per second of the device, and bytes that a step reads: with both, the ceiling.
    """
    require_fitting(target, prompt, completion, what=f"batch {batch}")
    rng = np.random.default_rng((seed, batch, prompt, completion))
    results = []
    for _ in range(rounds + 1):
        prompts = random_prompts(rng, target, [prompt] * batch)
        results.append(ask_together(target, [(each, completion) for each in prompts], on_done=on_done))
    measured = results[1:]
    throughputs = tuple(_output_throughput(timings) for timings in measured)
    drawing = [speed for timings in measured if (speed := _decode_throughput(timings)) is not None]
    decode = statistics.median(drawing) if drawing else None
    timings = [timing for each in measured for timing in each]
    ceiling = None
    if bandwidth is not None and step_bytes is not None:
        highest = batch * bandwidth / step_bytes
        ceiling = Ceiling(step_bytes, highest, None if decode is None else decode / highest)
    return Cell(
        batch,
        prompt,
        completion,
        throughput=statistics.median(throughputs),
        throughputs=throughputs,
        decode_throughput=decode,
        first_token=first_token_latency(timings),
        per_token=per_token_latency(timings),
        memory_bytes=target.memory(),
        ceiling=ceiling,
    )


def mix_lengths(num_requests: int, *, max_context: int, seed: int) -> list[tuple[int, int]]:
    """Returns (prompt, answer) lengths like those of ShareGPT's conversations: log-normal, scaled to the context.

    Their means are MEAN_PROMPT and MEAN_ANSWER times min(1, max_context / 2048), before what is too long is cut: a
    prompt to half of the context, an answer to what is left.
    """
    rng = np.random.default_rng((seed, num_requests))
    scale = min(1.0, max_context / _MIX_CONTEXT)

    def lengths(mean: float, spread: float) -> np.ndarray:
        # The mean of a log-normal is exp(mu + spread^2 / 2).
        drawn = rng.lognormal(math.log(mean * scale) - spread**2 / 2, spread, num_requests)
        return np.maximum(1, np.round(drawn).astype(int))

    prompts = np.minimum(lengths(MEAN_PROMPT, _SPREAD_PROMPT), max(1, max_context // 2))
    answers = np.minimum(lengths(MEAN_ANSWER, _SPREAD_ANSWER), max_context - prompts)
    return list(zip(prompts.tolist(), answers.tolist()))


def measure_load(
    target: Target,
    *,
    num_requests: int,
    rate: float | None = None,
    concurrency: int | None = None,
    max_context: int | None = None,
    seed: int = 0,
    on_done: Callable[[], None] = lambda: None,
) -> Load:
    """Returns how requests of mixed lengths are served that come all at once, or `rate` a second, Poisson.

    concurrency: so many at a time at most, where they come all at once. max_context: the one that lengths are scaled
    to, the target's by default.
    """
    context = max_context or target.max_context
    if context is None:
        raise ValueError("the target does not say how long its context is; give max_context")
    lengths = mix_lengths(num_requests, max_context=context, seed=seed)
    rng = np.random.default_rng((seed, num_requests, 1))
    asked = list(zip(random_prompts(rng, target, [prompt for prompt, _ in lengths]), [n for _, n in lengths]))
    ask_together(target, [((FIRST_ID,), 1)])
    starts = None if rate is None else np.cumsum(rng.exponential(1 / rate, num_requests)).tolist()
    # With a rate nobody waits for others to be done: that is what the engine's queue is measured by.
    limit = concurrency if rate is None else None
    timings = ask_together(target, asked, starts=starts, concurrency=limit, on_done=on_done)
    prompt_tokens, output_tokens = sum(each.num_prompt for each in timings), round(sum(t.num_new for t in timings))
    seconds = _end(timings) - min(timing.start for timing in timings)
    return Load(
        num_requests,
        rate,
        prompt_tokens,
        output_tokens,
        seconds=seconds,
        requests_per_second=num_requests / seconds,
        output_throughput=output_tokens / seconds,
        total_throughput=(prompt_tokens + output_tokens) / seconds,
        first_token=first_token_latency(timings),
        per_token=per_token_latency(timings),
    )


def measure_prefix(
    target: Target,
    *,
    prefix: int,
    suffix: int = PREFIX_SUFFIX,
    rounds: int = 5,
    seed: int = 0,
    on_done: Callable[[], None] = lambda: None,
) -> PrefixHit:
    """Returns the first-token seconds behind a prefix that nobody had before, and those behind the same once more.

    Both prompts end with `suffix` tokens of their own; answers are one token. Every round has a prefix of its own.
    """
    require_fitting(target, prefix + suffix, 1, what=f"prefix {prefix}")
    rng = np.random.default_rng((seed, prefix, suffix, 2))
    pairs = []
    for _ in range(rounds + 1):
        begin, first, second = random_prompts(rng, target, [prefix, suffix, suffix])
        pairs.append((target.ask(begin + first, 1), target.ask(begin + second, 1)))
        on_done()
    cold, warm = (statistics.median(pair[which].first_token for pair in pairs[1:]) for which in (0, 1))
    shared = [pair[1].num_shared for pair in pairs[1:]]
    return PrefixHit(prefix, suffix, cold, warm, warm / cold, None if None in shared else min(shared))


def measure_sessions(
    engine: Engine | Router,
    *,
    turns: int = 8,
    new_tokens: int = 32,
    answer: int = TURN_ANSWER,
    rounds: int = 3,
    seed: int = 0,
    on_done: Callable[[], None] = lambda: None,
) -> list[Turn]:
    """Returns the first-token seconds of every turn of a session, all with equally many new tokens."""
    target = engine_target(engine)
    total = turns * (new_tokens + answer)
    require_fitting(target, total - answer, answer, what=f"{turns} turns of {new_tokens} new tokens")
    rng = np.random.default_rng((seed, turns, new_tokens, 3))
    found: list[list[float]] = []
    for _ in range(rounds + 1):
        session = engine.open_session()
        said = random_prompts(rng, target, [new_tokens] * turns)
        found.append([ask_engine(engine, each, answer, session=session).first_token for each in said])
        on_done()
    seconds = [statistics.median(each[turn] for each in found[1:]) for turn in range(turns)]
    return [
        Turn(index + 1, index * (new_tokens + answer), value, value / seconds[0]) for index, value in enumerate(seconds)
    ]


# --- the ceiling -----------------------------------------------------------------------------------------------------


def copy_bandwidth(num_bytes: int, *, rounds: int = 10) -> float:
    """Returns the bytes per second that the first device reads and writes while it copies an array, median.

    Both count: a copy of n bytes moves 2 n.
    """
    source = jnp.zeros(num_bytes // 4, jnp.float32)
    # The sum is free beside the traffic, and keeps the compiler from handing on the buffer it was given.
    copy = jax.jit(lambda x: x + 1)
    copy(source).block_until_ready()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        copy(source).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds)


def weight_bytes(params: dict, config: ModelConfig) -> int:
    """Returns the bytes of weights that every step reads: all but the embedding table, of which it looks up rows."""
    read = jax.eval_shape(lambda params: decoding_params(params, config), params)
    if not config.tie_embeddings:
        read = {name: part for name, part in read.items() if name != "embed"}
    return sum(num_bytes(leaf) for leaf in jax.tree.leaves(read))


def step_bytes(weights: int, config: ModelConfig, *, batch: int, prompt: int, completion: int, kv: CacheDType) -> int:
    """Returns weights + batch x mean context x bytes of one token's keys and values: what a step must read."""
    return weights + round(batch * (prompt + completion / 2) * page_bytes(config, 1, kv))


# --- from timings to figures -----------------------------------------------------------------------------------------


def first_token_latency(timings: Sequence[Timing]) -> Latency:
    """Returns the seconds until the first tokens of each request."""
    seconds = np.array([timing.first_token for timing in timings])
    return _latency(seconds, np.ones_like(seconds))


def per_token_latency(timings: Sequence[Timing]) -> Latency | None:
    """Returns the seconds per token after the first event; every token counts once. None where there was none."""
    gaps = [
        ((timing.arrivals[i] - timing.arrivals[i - 1]) / timing.counts[i], timing.counts[i])
        for timing in timings
        for i in range(1, len(timing.arrivals))
    ]
    return _latency(*map(np.array, zip(*gaps))) if gaps else None


def _latency(seconds: np.ndarray, weights: np.ndarray) -> Latency:
    points = np.percentile(seconds, [50, 75, 95, 99], weights=weights, method="inverted_cdf")
    ave = float(np.average(seconds, weights=weights))
    return Latency(ave, float(seconds.min()), float(seconds.max()), *map(float, points))


def _end(timings: Sequence[Timing]) -> float:
    return max(timing.arrivals[-1] for timing in timings)


def _output_throughput(timings: Sequence[Timing]) -> float:
    return sum(t.num_new for t in timings) / (_end(timings) - min(t.start for t in timings))


def _decode_throughput(timings: Sequence[Timing]) -> float | None:
    """Returns tokens per second from when the last row drew its first tokens to when the first row was done."""
    begin, end = max(t.arrivals[0] for t in timings), min(t.arrivals[-1] for t in timings)
    if end <= begin:
        return None
    tokens = sum(n for t in timings for at, n in zip(t.arrivals, t.counts) if begin < at <= end)
    return tokens / (end - begin)
