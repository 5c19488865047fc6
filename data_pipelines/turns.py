"""A conversation longer than a row, in pieces that are conversations themselves.

Every piece begins where a user's turn does, behind the system turns of the beginning, and holds as many exchanges (a
user's turn with all that follows it up to the next one) as fit. Only an exchange that alone is longer than a row is
cut, at the row's end.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from internjax.text.chat import Message, Rendered, render_samples
from internjax.text.tokenizer import Tokenizer


class Pieces(NamedTuple):
    """What a conversation became."""

    samples: list[Rendered]
    num_cut: int
    """Exchanges that alone are longer than a row."""
    num_lost: int
    """Those of them with nothing learned before the row's end: left out."""


def split_at_turns(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    window: int,
    learned: Sequence[bool] | None = None,
    date: datetime | None = None,
) -> Pieces:
    """Returns samples of at most `window` positions (an input and a target each), with what is learned in them.

    `learned` and `date` are those of `chat.render_samples`. Exchanges in which nothing is learned alone give no piece.
    """
    flags = [True] * len(messages) if learned is None else learned
    opening, exchanges = _exchanges(messages)

    def samples(several: Sequence[range]) -> list[Rendered]:
        indices = [*opening, *(index for exchange in several for index in exchange)]
        if not any(flags[index] and messages[index].role == "assistant" for index in indices):
            return []
        chosen = [flags[index] for index in indices]
        return render_samples([messages[index] for index in indices], tokenizer, learned=chosen, date=date)

    found, num_cut, num_lost, start = [], 0, 0, 0
    while start < len(exchanges):
        stop, fitting = start, []
        while stop < len(exchanges):
            tried = samples(exchanges[start : stop + 1])
            if any(len(sample.ids) > window + 1 for sample in tried):
                break
            stop, fitting = stop + 1, tried
        if stop == start:
            fitting = [Rendered(sample.ids[: window + 1], sample.mask[: window + 1]) for sample in tried]
            fitting = [sample for sample in fitting if any(sample.mask[1:])]
            num_cut, num_lost, stop = num_cut + 1, num_lost + (not fitting), start + 1
        found += fitting
        start = stop
    return Pieces(found, num_cut, num_lost)


def _exchanges(messages: Sequence[Message]) -> tuple[range, list[range]]:
    """Where the system turns of the beginning stand, and each exchange; later ones go with the user's turn behind."""
    roles = [message.role for message in messages]
    first = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    starts, last = [first], first
    for index in range(first + 1, len(roles)):
        if roles[index] == "system":
            continue
        if roles[index] == "user" and roles[last] != "user":
            starts.append(last + 1)
        last = index
    return range(first), [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(roles)])]
