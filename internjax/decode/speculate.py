"""Speculation: tokens that may come next are fed together, and of what follows each as many are kept as come true.

A draft is kept if the token drawn in its place, by its seed and position as always, is the same one. So speculation
changes no answer, at any temperature, beyond the rounding of logits that are computed several at a time; how good the
drafts are decides the speed alone. (Leviathan et al., arXiv:2211.17192, accept with probability min(1, p / q) instead;
for drafts without a distribution of their own, p = the chance that the token is drawn, which is what happens here.)

B rows, S length of the buffer, k drafts, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from internjax.decode.generate import DecodeState, advance, next_logits
from internjax.decode.sample import Allowed, Written, of_rows, sample
from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts are what followed the last tokens where they stood before in the row (prompt lookup decoding)."""

    num_drafts: int = 4
    """Tokens that are tried at once."""
    longest_match: int = 3
    """Last tokens that are looked for; where they are not found, fewer, down to `shortest_match`."""
    shortest_match: int = 1

    def __post_init__(self):
        if self.num_drafts < 1 or not 1 <= self.shortest_match <= self.longest_match:
            raise ValueError(
                "prompt lookup wants at least one draft and 1 <= shortest_match <= longest_match; "
                f"given {self.num_drafts}, {self.shortest_match}, {self.longest_match}"
            )


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Drafts are drawn by a smaller model of the same vocabulary, under the seeds and settings of the rows."""

    config: ModelConfig
    num_drafts: int = 4

    def __post_init__(self):
        if self.num_drafts < 1 or self.config.head != "lm":
            raise ValueError(
                f"a draft model wants num_drafts >= 1 and an lm head; given {self.num_drafts}, {self.config.head}"
            )


Speculation = PromptLookup | DraftModel


def look_up(tokens_BS: jax.Array, lengths_B: jax.Array, *, lookup: PromptLookup) -> jax.Array:
    """Returns `[B, k]` the tokens after the last earlier place that ends as the row does; -1 where there is none."""
    B, S = tokens_BS.shape
    index_S, rows_B1 = jnp.arange(S), jnp.arange(B)[:, None]
    matches_BS = index_S < lengths_B[:, None] - 1  # the place ends before the row does
    found_B = jnp.full(B, -1)
    for size in range(1, lookup.longest_match + 1):
        last_B1 = tokens_BS[rows_B1, lengths_B[:, None] - size]
        shifted_BS = jnp.pad(tokens_BS, ((0, 0), (size - 1, 0)))[:, :S]
        matches_BS &= (shifted_BS == last_B1) & (index_S >= size - 1) & (lengths_B[:, None] >= size)
        if size >= lookup.shortest_match:
            place_B = jnp.where(matches_BS, index_S, -1).max(axis=1)
            found_B = jnp.where(place_B >= 0, place_B, found_B)  # a longer match is the better one
    at_Bk = found_B[:, None] + 1 + jnp.arange(lookup.num_drafts)
    drafts_Bk = jnp.take_along_axis(tokens_BS, jnp.minimum(at_Bk, S - 1), axis=1)
    return jnp.where((found_B[:, None] >= 0) & (at_Bk < lengths_B[:, None]), drafts_Bk, -1)


def draw_drafts(params: dict, state: DecodeState, *, draft: DraftModel) -> tuple[jax.Array, DecodeState]:
    """Returns `[B, k]` the tokens that the draft model draws, and the state with them in its cache.

    It draws with the numbers that the model itself will draw with, so two distributions that are alike mostly agree.
    """
    rows_B = jnp.arange(state.tokens_BS.shape[0])

    def one_more(carry, offset):
        cache, token_B = carry
        positions_B = state.lengths_B - 1 + offset
        hidden_BTD, cache, _ = decoder.forward(
            params,
            token_B[:, None],
            config=draft.config,
            positions_BT=positions_B[:, None],
            segments_BT=state.active_B.astype(jnp.int32)[:, None],
            cache=cache,
        )
        logits_BV = decoder.unembed(params, hidden_BTD, config=draft.config)[:, 0]
        written = Written(state.seen_BV, state.counts_BV, state.tokens_BS, state.prompt_lengths_B, state.stop_ids_BI)
        drawn = sample(logits_BV, of_rows(state.sampling, state.active_B), written, positions_B=positions_B + 1)
        return (cache, drawn.ids_B), drawn.ids_B

    # Once more than there are drafts: all of them may be kept, and then the last one has to be in the cache.
    start = state.draft_cache, state.tokens_BS[rows_B, state.lengths_B - 1]
    (cache, _), drafts_kB = lax.scan(one_more, start, jnp.arange(draft.num_drafts + 1))
    return drafts_kB[:-1].T, dataclasses.replace(state, draft_cache=cache)


def verify(
    params: dict,
    state: DecodeState,
    drafts_Bk: jax.Array,
    noted: Any,
    *,
    note: Callable[[DecodeState, DecodeState, Any], Any],
    on_B: jax.Array,
    allowed: Allowed,
    config: ModelConfig,
    lora: Lora | None = None,
) -> tuple[DecodeState, Any]:
    """Returns the state with one token more in every row of `on`, and one more for every draft that came true.

    A guide knows what may come next and not what after that, so its row takes one token. note(before, after, noted)
    sees every token taken and returns what is noted from then on.
    """
    logits_BTV, cache = next_logits(params, state, drafts_Bk, config=config, lora=lora)
    state = dataclasses.replace(state, cache=cache)
    rows_B = jnp.arange(drafts_Bk.shape[0])
    # The last place has no draft to come true: nothing follows it.
    wanted_TB = jnp.pad(drafts_Bk, ((0, 0), (0, 1)), constant_values=-1).T

    def one_more(carry, inputs):
        state, on_B, noted = carry
        logits_BV, wanted_B = inputs
        after = advance(state, logits_BV, on_B=on_B, allowed=allowed)
        came_true_B = after.tokens_BS[rows_B, after.lengths_B - 1] == wanted_B
        return (after, on_B & after.active_B & came_true_B & ~allowed.guided_B, note(state, after, noted)), None

    # Without the caches, which do not change: the loop would carry them.
    caches = {name: getattr(state, name) for name in ("cache", "draft_cache")}
    bare = dataclasses.replace(state, **dict.fromkeys(caches))
    (after, _, noted), _ = lax.scan(
        one_more, (bare, on_B & state.active_B, noted), (logits_BTV.swapaxes(0, 1), wanted_TB)
    )
    return dataclasses.replace(after, **caches), noted
