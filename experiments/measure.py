"""What is measured on the models of the tiny chain: bits per byte beside baselines, replies, executed calls, gold.

T time, B batch.
"""

import concurrent.futures
import lzma
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from eval import ngram
from eval.metrics import Interval, wilson
from eval.tasks.library import Problem
from experiments import library
from internjax import sandbox
from internjax.decode.generate import STOP, generate
from internjax.decode.sample import make_sampling
from internjax.hf.open import Model
from internjax.text import chat
from internjax.text.chat import Message

PROMPT_BUCKET = 64
"""Prompts are padded to a multiple of it: one program, and not one for every length."""


class Reply(NamedTuple):
    """What a model said: its ids without the stop token, the turn they spell, and whether it stopped by itself."""

    ids: tuple[int, ...]
    message: Message
    ended: bool


def replies(
    model: Model,
    chats: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Reply]:
    """Returns the model's next turn in each conversation; the draw of a conversation depends on (seed, its index)."""
    assert model.tokenizer is not None
    prompts = [chat.render(turns, model.tokenizer, add_generation_prompt=True).ids for turns in chats]
    stops = chat.stop_ids(model.tokenizer)
    found: list[Reply] = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        padded = rows + [rows[0]] * (batch_size - len(rows))  # one shape, one program
        width = -(-max(map(len, padded)) // PROMPT_BUCKET) * PROMPT_BUCKET
        tokens = np.zeros((batch_size, width), np.int32)
        for row, ids in zip(tokens, padded, strict=True):
            row[: len(ids)] = ids
        out = generate(
            model.params,
            jnp.asarray(tokens),
            jnp.asarray([len(ids) for ids in padded], jnp.int32),
            config=model.config,
            sampling=make_sampling(
                batch_size, temperature=temperature, top_p=top_p, seed=[seed + start + i for i in range(batch_size)]
            ),
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            lora=model.lora,
        )
        new, lengths, finish = map(np.asarray, (out.tokens_BN, out.lengths_B, out.finish_B))
        for i in range(len(rows)):
            ended = finish[i] == STOP
            ids = tuple(int(t) for t in new[i, : lengths[i] - ended])
            found.append(Reply(ids, chat.parse(ids, model.tokenizer), bool(ended)))
    return found


class InterpreterScore(NamedTuple):
    """Of held-out problems: how many ended in a call that ran, and how many in the right answer."""

    executed: Interval
    right: Interval
    count: int
    samples: list[dict[str, str]]


def interpreter_score(model: Model, problems: Sequence[Problem], *, max_new_tokens: int = 48) -> InterpreterScore:
    """Returns how the model does at the interpreter protocol: question, call, tool output, answer."""
    chats = [library.interpreter_prompt(problem) for problem in problems]
    first = replies(model, chats, max_new_tokens=max_new_tokens)
    called = [
        reply.ended and reply.message.call is not None and reply.message.call.name == "interpreter" for reply in first
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = list(
            pool.map(lambda pair: sandbox.run(pair[0].message.call.content) if pair[1] else None, zip(first, called))
        )
    ran = [outcome is not None and outcome.status == "ok" for outcome in outcomes]
    going_on = [i for i, good in enumerate(ran) if good]
    second = dict(
        zip(
            going_on,
            replies(
                model,
                [
                    [
                        *chats[i],
                        first[i].message,
                        Message("environment", outcomes[i].stdout.strip(), name="interpreter"),
                    ]
                    for i in going_on
                ],
                max_new_tokens=max_new_tokens,
            )
            if going_on
            else [],
            strict=True,
        )
    )
    finals = [second[i].message.content if i in second else first[i].message.content for i in range(len(problems))]
    right = [good and library.answers(text, p) for good, text, p in zip(ran, finals, problems, strict=True)]
    samples = [
        {
            "question": problems[i].call,
            "call": first[i].message.call.content if called[i] else first[i].message.content,
            "output": outcomes[i].stdout.strip() if ran[i] else "",
            "answer": finals[i] if ran[i] else "",
            "wanted": problems[i].value,
        }
        for i in range(min(8, len(problems)))
    ]
    return InterpreterScore(wilson(sum(ran), len(ran)), wilson(sum(right), len(right)), len(problems), samples)


class Baselines(NamedTuple):
    """Bits per byte of the same held-out bytes by other means."""

    unigram: float
    bigram: float
    zlib: float
    xz: float


def baselines(
    seen: Sequence[np.ndarray], held_out: Sequence[np.ndarray], texts: Sequence[str], *, vocab_size: int
) -> Baselines:
    """Returns n-gram models fitted on `seen` (exactly the tokens that the model was trained on), and compressors.

    Each held-out document is BOS, its tokens, EOS; its own tokens are predicted, as those of a `TextTask` are.
    """
    num_bytes = sum(len(text.encode()) for text in texts)
    model = ngram.fit(seen, vocab_size=vocab_size)
    previous = np.concatenate([row[:-2] for row in held_out])
    following = np.concatenate([row[1:-1] for row in held_out])
    joined = "".join(texts).encode()
    return Baselines(
        ngram.bits_per_byte(ngram.unigram_logprobs(model, following), num_bytes),
        ngram.bits_per_byte(ngram.bigram_logprobs(model, previous, following), num_bytes),
        8 * len(zlib.compress(joined, 9)) / num_bytes,
        8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / num_bytes,
    )
