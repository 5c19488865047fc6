"""Preference pairs, and the conditions (system prompts of the reward model alone) under which they were judged.

B batch, T time, C conditions, M condition length.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internjax.rlhf.rows import Rows, concatenate, drop_first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """Rendered system prompts, one per preference: the text that tells the reward model what counts.

    Each begins with BOS. The policy, the critic and the reference never see them (arXiv:2403.17297, section 4.2.1).
    """

    tokens_CM: jax.Array
    lengths_C: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def index(self, name: str) -> int:
        """Returns the row of condition `name`; raises ValueError with the known names."""
        if name not in self.names:
            raise ValueError(f"unknown condition {name!r}; known: {', '.join(self.names)}")
        return self.names.index(name)


def make_conditions(prompts: Mapping[str, Sequence[int]], *, bos_id: int, pad_id: int = 0) -> Conditions:
    """Returns the conditions of `prompts`, name -> token ids that begin with BOS.

    The ids `[bos_id]` alone are the empty condition: a reward model with one preference.
    """
    if not prompts:
        raise ValueError("a reward model needs at least one condition; give {'default': [bos_id]} for a plain one")
    for name, ids in prompts.items():
        if not len(ids) or ids[0] != bos_id:
            raise ValueError(
                f"condition {name!r} must begin with BOS ({bos_id}), given {list(ids[:4])}...: it takes the place of "
                "the prompt's own BOS. Render it as a system turn at the start of a chat."
            )
    width = max(len(ids) for ids in prompts.values())
    tokens = [list(ids) + [pad_id] * (width - len(ids)) for ids in prompts.values()]
    lengths = [len(ids) for ids in prompts.values()]
    return Conditions(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), tuple(prompts))


def with_reward_token(rows: Rows, *, reward_token_id: int) -> Rows:
    """Returns the rows, one wider, with the reward token appended where the last id is another."""
    last_B = jnp.take_along_axis(rows.tokens_BT, jnp.maximum(rows.lengths_B - 1, 0)[:, None], axis=1)[:, 0]
    missing_B = (rows.lengths_B == 0) | (last_B != reward_token_id)
    token_B1 = jnp.full((rows.tokens_BT.shape[0], 1), reward_token_id, jnp.int32)
    return concatenate([rows, Rows(token_B1, missing_B.astype(jnp.int32))])


def with_condition(conditions: Conditions, condition_B: jax.Array, rows: Rows, *, reward_token_id: int) -> Rows:
    """Returns what the reward model reads: condition ++ row without its BOS ++ reward token, `[B, M + T + 1]`.

    A row is a prompt followed by its response. Turn boundaries are special tokens, so the joined ids are the ids of the
    joined text.
    """
    head = Rows(conditions.tokens_CM[condition_B], conditions.lengths_C[condition_B])
    starts_with_bos_B = (rows.lengths_B > 0) & (rows.tokens_BT[:, 0] == head.tokens_BT[:, 0])
    joined = concatenate([head, drop_first(rows, starts_with_bos_B)])
    return with_reward_token(joined, reward_token_id=reward_token_id)


class Pair(NamedTuple):
    """Two responses to one prompt, as token ids; `chosen` is the better one under `condition`."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    condition: str
    pattern: str = ""  # what the pair was made against, e.g. a pattern of reward hacking


class PreferenceBatch(NamedTuple):
    """Reward-model inputs of B pairs (condition in front, reward token last), right-padded."""

    chosen: jax.Array  # [B, T]
    chosen_lengths: jax.Array  # [B]
    rejected: jax.Array  # [B, T]
    rejected_lengths: jax.Array  # [B]
    weight: jax.Array  # [B] float32; 0 on pairs that only fill the batch


def preference_batch(
    pairs: Sequence[Pair], conditions: Conditions, *, length: int, batch_size: int | None = None, reward_token_id: int
) -> PreferenceBatch:
    """Returns the batch of `pairs`, rows `length` long, filled up to `batch_size` with pairs of weight 0.

    Raises ValueError for a pair that does not fit: cutting it would drop what the preference is about.
    """
    batch_size = len(pairs) if batch_size is None else batch_size
    if not 0 < len(pairs) <= batch_size:
        raise ValueError(f"a batch of {batch_size} takes 1..{batch_size} pairs, given {len(pairs)}")
    heads = [np.asarray(conditions.tokens_CM)[i, :n] for i, n in enumerate(np.asarray(conditions.lengths_C))]
    rows = np.zeros((2, batch_size, length), np.int32)
    lengths = np.ones((2, batch_size), np.int32)
    for b, pair in enumerate(pairs):
        head = heads[conditions.index(pair.condition)].tolist()
        prompt = list(pair.prompt)
        prompt = prompt[1:] if prompt[:1] == head[:1] else prompt
        for side, response in enumerate((pair.chosen, pair.rejected)):
            ids = head + prompt + list(response)
            ids += [] if ids[-1] == reward_token_id else [reward_token_id]
            if len(ids) > length:
                raise ValueError(
                    f"the {('chosen', 'rejected')[side]} side of pair {b} has {len(ids)} tokens with its condition and "
                    f"reward token, rows are {length} long. Filter it out or raise the length."
                )
            rows[side, b, : len(ids)], lengths[side, b] = ids, len(ids)
    weight = (np.arange(batch_size) < len(pairs)).astype(np.float32)
    return PreferenceBatch(rows[0], lengths[0], rows[1], lengths[1], weight)


def preference_batches(
    pairs: Sequence[Pair], conditions: Conditions, *, batch_size: int, length: int, reward_token_id: int, seed: int
) -> Callable[[int], Iterator[PreferenceBatch]]:
    """Returns position -> endless iterator of batches; batch i is a function of (seed, i) alone.

    Every epoch visits all pairs in a new order; its last batch is filled up with pairs of weight 0.
    """
    if not pairs:
        raise ValueError("no preference pairs were given; a reward model cannot be trained without any")
    per_epoch = -(-len(pairs) // batch_size)

    def batches(position: int) -> Iterator[PreferenceBatch]:
        while True:
            epoch, index = divmod(position, per_epoch)
            order = np.random.default_rng((seed, epoch)).permutation(len(pairs))
            chosen = [pairs[i] for i in order[index * batch_size : (index + 1) * batch_size]]
            yield preference_batch(
                chosen, conditions, length=length, batch_size=batch_size, reward_token_id=reward_token_id
            )
            position += 1

    return batches
