"""How far a quantised model is from the one it was made of: on given text, and along its own long answers.

B batch, T time, C chunk of T, V vocabulary, N rows of text.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internjax.decode.generate import generate
from internjax.decode.sample import make_sampling
from internjax.model import decoder
from internjax.model.config import ModelConfig

CHUNK = 128
"""Positions whose logits are held at once, of both models."""


class Quality(NamedTuple):
    """Both models on the same tokens; the divergence is KL(model || quantised) of their next-token distributions."""

    num_tokens: int
    perplexity_before: float
    perplexity_after: float
    kl_mean: float
    """Nats per token."""
    kl_p99: float
    """99 of 100 tokens have less."""
    top1_agreement: float
    """Share of positions at which both find the same token most likely."""

    @property
    def perplexity_increase(self) -> float:
        """In percent."""
        return 100.0 * (self.perplexity_after / self.perplexity_before - 1.0)


class Answers(NamedTuple):
    """Greedy answers of both models to the same prompts."""

    quality: Quality
    """Along the quantised model's answers."""
    first_differences: list[int | None]
    """Tokens of each pair of answers before they part; None where they are equal to the end."""
    lengths: list[int]
    """Tokens of the quantised model's answers."""
    before: list[list[int]]
    after: list[list[int]]


class _PerToken(NamedTuple):
    """Of the tokens 1 .. T - 1 of each row, `[B, T - 1]`."""

    kl: jax.Array
    before: jax.Array
    """log p of the token."""
    after: jax.Array
    agree: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def _compare(params: dict, quantized: dict, tokens_BT: jax.Array, *, config: ModelConfig) -> _PerToken:
    both = params, quantized
    hidden = [decoder.forward(each, tokens_BT, config=config).hidden_BTD[:, :-1] for each in both]
    targets_BT = tokens_BT[:, 1:]
    B, T = targets_BT.shape
    C = min(CHUNK, T)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -T % C)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, -1, C, *x.shape[2:]).swapaxes(0, 1)

    def chunk(inputs):
        *hidden, targets_BC = inputs
        logits = [decoder.unembed(each, h, config=config) for each, h in zip(both, hidden, strict=True)]
        logp, logq = (jax.nn.log_softmax(each) for each in logits)
        of = lambda each: jnp.take_along_axis(each, targets_BC[..., None], axis=-1)[..., 0]  # noqa: E731
        kl_BC = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)
        return _PerToken(kl_BC, of(logp), of(logq), logits[0].argmax(axis=-1) == logits[1].argmax(axis=-1))

    found = jax.lax.map(chunk, (*map(cut, hidden), cut(targets_BT)))
    return _PerToken(*(x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in found))


def compare(
    params: dict,
    quantized: dict,
    batches: Sequence[np.ndarray],
    *,
    config: ModelConfig,
    counted: Sequence[np.ndarray] | None = None,
) -> Quality:
    """Returns the quality over batches of token ids `[B, T]`, of which each token but a row's first is scored.

    counted: which tokens count, `[B, T]` of booleans; by default all.
    """
    parts = []
    for index, tokens_BT in enumerate(batches):
        found = jax.device_get(_compare(params, quantized, jnp.asarray(tokens_BT), config=config))
        mask = np.ones(found.kl.shape, bool) if counted is None else counted[index][:, 1:]
        parts.append([np.asarray(x, np.float64)[mask] for x in found])
    kl, before, after, agree = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Quality(
        num_tokens=len(kl),
        perplexity_before=float(np.exp(-before.mean())),
        perplexity_after=float(np.exp(-after.mean())),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(agree.mean()),
    )


def answers(
    params: dict,
    quantized: dict,
    prompts: Sequence[Sequence[int]],
    *,
    config: ModelConfig,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> Answers:
    """Returns greedy answers of both models, where they part, and the quality along those of the quantised one."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    prompts_BT = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for row, prompt in zip(prompts_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    how = {"config": config, "max_new_tokens": max_new_tokens, "stop_ids": tuple(stop_ids)}
    greedy = make_sampling(len(prompts), temperature=0.0)
    found = []
    for each in (params, quantized):
        said = jax.device_get(generate(each, prompts_BT, lengths_B, sampling=greedy, **how))
        found.append([ids[:num].tolist() for ids, num in zip(said.tokens_BN, said.lengths_B, strict=True)])
    before, after = found
    tokens_BT = np.zeros((len(prompts), prompts_BT.shape[1] + max_new_tokens), np.int32)
    counted_BT = np.zeros(tokens_BT.shape, bool)
    for row, counts, prompt, answer in zip(tokens_BT, counted_BT, prompts, after, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
        counts[len(prompt) : len(prompt) + len(answer)] = True
    return Answers(
        compare(params, quantized, [tokens_BT], config=config, counted=[counted_BT]),
        [_first_difference(*pair) for pair in zip(before, after, strict=True)],
        [len(answer) for answer in after],
        before,
        after,
    )


def _first_difference(first: list[int], second: list[int]) -> int | None:
    """Returns how many tokens two answers share from the start; None where they are equal."""
    if first == second:
        return None
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)
