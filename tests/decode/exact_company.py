"""Exact mode as a person has it, with XLA's own settings: bits of tokens and log-probabilities, alone and in company.

    python -m tests.decode.exact_company SPECULATION CACHE_DTYPE

In bfloat16, with prompts of several chunks of 64 tokens, adapters, guides, reports of prompts, pages on the host and
drafts. Prints how many answers were compared.
"""

import dataclasses
import functools
import random
import sys

import jax
import numpy as np

from internjax.decode.device import AdapterRoom
from internjax.decode.engine import Engine
from internjax.decode.request import Request
from internjax.decode.sample import SamplingParams
from internjax.decode.speculate import DraftModel, PromptLookup
from internjax.model.lora import LoraConfig, apply_config, init_lora
from tests.decode.small import CONFIG, OnlySteps
from tests.weights import random_params

# Wide enough that sums in another order round to other bfloat16: in fast mode some answers differ.
WIDE = dataclasses.replace(
    CONFIG,
    d_model=256,
    num_layers=4,
    num_heads=8,
    head_dim=32,
    ffn_dim=512,
    dtype="bfloat16",
    max_position_embeddings=512,
)
PARAMS = random_params(dataclasses.replace(WIDE, initializer_range=0.1), seed=1)
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.1, seed=7)


def speculation_of(name: str) -> dict:
    if name == "lookup":
        return {"speculation": PromptLookup(3)}
    first = PARAMS | {"layers": jax.tree.map(lambda leaf: leaf[:1], PARAMS["layers"])}
    return {"speculation": DraftModel(dataclasses.replace(WIDE, num_layers=1), 3), "draft_params": first}


def adapter():
    config = LoraConfig(rank=2, targets=("query", "down"))
    zero = jax.device_get(jax.jit(functools.partial(init_lora, config))(PARAMS, jax.random.key(1)))
    return apply_config(jax.tree.map(lambda x: x + np.float32(0.1), zero), config)


def drive(engine: Engine) -> None:
    while engine.tick():
        pass


def main() -> None:
    speculation, cache_dtype = sys.argv[1:]
    engine = Engine(
        PARAMS,
        WIDE,
        max_context=256,
        num_slots=5,
        num_pages=36,
        num_host_pages=16,
        cache_dtype=cache_dtype,
        prefill_chunk=64,
        adapter_room=AdapterRoom(1, rank=2, targets=("query", "down")),
        mode="exact",
        **speculation_of(speculation),
    )
    engine.warmup()
    engine.load_adapter("one", adapter())
    rng, numbers = random.Random(3), np.random.default_rng(3)
    stem = tuple(numbers.integers(0, 64, 150).tolist())
    prompts = [(*stem[:n], *numbers.integers(0, 64, m).tolist()) for n, m in ((150, 5), (140, 30), (70, 9), (0, 2))]
    prompts.append(tuple([5, 9, 41, 17, 30, 2] * 15))
    subjects = [
        dataclasses.replace(Request(prompt, 24, sampling, logprobs=3), **extra)
        for prompt in prompts
        for sampling in (GREEDY, DRAWN)
        for extra in ({}, {"adapter": "one"})
    ]
    subjects += [Request(prompts[1], 9, DRAWN, logprobs=0, guide=OnlySteps)]
    subjects += [Request(prompts[2], 9, DRAWN, logprobs=0, prompt_logprobs=2)]
    alone = {}
    for subject in subjects:
        engine._rounds.seats.tree.clear()
        handle = engine.submit(subject)
        drive(engine)
        alone[subject] = handle.result()
    assert {result.finish for result in alone.values()} == {"length"}
    assert len({result.ids for result in alone.values()}) > len(subjects) // 2
    compared = shared = 0
    for _ in range(3):
        handles = []
        for subject in rng.sample(subjects, len(subjects)):
            handles.append((subject, engine.submit(subject)))
            guide = rng.choice([None, OnlySteps])
            sampling = rng.choice([GREEDY, DRAWN, dataclasses.replace(DRAWN, temperature=0.4, frequency_penalty=0.5)])
            noise = Request(
                rng.choice(prompts)[: rng.randint(1, 150)],
                rng.randint(1, 30),
                sampling,
                guide=guide,
                adapter=rng.choice([None, "one"]),
                logprobs=rng.choice([None, 5]),
            )
            noise = engine.submit(noise)
            for _ in range(rng.randint(0, 3)):
                engine.tick()
            if rng.random() < 0.4:
                noise.abort()
        drive(engine)
        for subject, handle in handles:
            assert handle.result() == alone[subject], (subject, alone[subject])
            compared, shared = compared + 1, shared + handle.num_shared
    stats = engine.stats()
    assert shared > 0 and stats.num_saved_pages > 0 and stats.num_free_pages == 36 and stats.num_compiled_late == 0
    assert stats.num_turns < 0.95 * stats.num_drawn_tokens, "no draft came true"
    print(compared, stats)


if __name__ == "__main__":
    main()
