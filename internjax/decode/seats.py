"""Who sits in which slot, and which pages it owns: the host's books of the engine.

B slots, M pages of a row, F frequencies.
"""

import dataclasses
import time
from collections.abc import Hashable
from typing import Literal

import jax
import numpy as np

from internjax.decode.adapters import Place
from internjax.decode.pages import PageAllocator
from internjax.decode.prefix_tree import Moves, PrefixTree, num_common
from internjax.decode.request import Guide, Handle, Session

Mode = Literal["fast", "exact"]
"""fast: a request draws the same tokens in any company, up to rounding of what was computed in other pieces or for
another number of rows. exact: bit by bit. Then only prompts are shared, in whole chunks as every request reads them;
all pages of a request are reserved before it begins, so none is ever read again; attention has one width, every
prompt is read by itself, every block is for all slots, and XLA compiles with `device.exact_options`."""


@dataclasses.dataclass(eq=False)
class Row:
    """A request as the host knows it: waiting, reading its prompt, or drawing."""

    handle: Handle
    session: Session | None
    order: int
    """Of arrival."""
    tokens: list[int]
    """What it begins with and what was delivered."""
    num_prompt: int
    total: int
    """The longest that it can become."""
    key: Hashable
    inv_freq_F: np.ndarray
    adapter: Place
    pages: list[int] = dataclasses.field(default_factory=list)
    num_read: int = 0
    """First tokens that are in the cache, while it reads."""
    num_judged: int = 0
    """First pages that led to tokens."""
    drawing: bool = False
    longest: int = 0
    """Upper bound of its length after all blocks dispatched so far."""
    num_in_flight: int = 0
    """Blocks of this turn that were dispatched and not read yet."""
    num_turns: int = 0
    """How often it got a slot."""
    scores: list[tuple[int, jax.Array]] = dataclasses.field(default_factory=list)
    """How many prompt tokens each chunk scored, and their scores; not delivered yet."""
    guide: Guide | None = None
    arrived: float = dataclasses.field(default_factory=lambda: time.monotonic())
    delivered: float | None = None
    """When its last tokens came."""
    scored: bool = False
    """Whether nobody waits for scores of the prompt (any more)."""

    @property
    def num_cached(self) -> int:
        """First tokens whose keys and values are in its pages for good. The last one drawn was not fed yet."""
        return len(self.tokens) - 1 if self.drawing else self.num_read

    @property
    def shares_prompt(self) -> bool:
        """Whether its prompt is read as every other's: not to be scored."""
        return self.handle.request.prompt_logprobs is None

    @property
    def sharable(self) -> list[int]:
        """First tokens that need not be read where pages hold them: not the last, which the step feeds, and none
        while the prompt's scores are wanted."""
        return self.tokens[:-1] if self.scored else []


class Seats:
    """Slots with the rows in them, and the tree that all their pages come from."""

    def __init__(
        self,
        moves: Moves,
        *,
        num_slots: int,
        num_pages: int,
        num_host_pages: int,
        page_size: int,
        pages_per_row: int,
        chunk: int,
        tokens_per_block: int,
        mode: Mode,
    ):
        """chunk: prompt tokens read at once. tokens_per_block: the most that a row without a guide grows by."""
        self.rows: list[Row | None] = [None] * num_slots
        self.page_table_BM = np.full((num_slots, pages_per_row), num_pages, np.int32)
        self._num_pages, self._page_size, self._tokens_per_block, self._mode = (
            num_pages,
            page_size,
            tokens_per_block,
            mode,
        )
        # Rows share a multiple of so many tokens.
        self._step = chunk if mode == "exact" else page_size
        grid = chunk if mode == "exact" else None
        self.tree = PrefixTree(PageAllocator(num_pages), page_size, moves, num_saved=num_host_pages, grid=grid)

    @property
    def taken(self) -> dict[int, Row]:
        """The rows in slots, by slot."""
        return {index: row for index, row in enumerate(self.rows) if row is not None}

    def num_pages_for(self, num_tokens: int) -> int:
        """Returns how many pages hold so many tokens."""
        return -(-num_tokens // self._page_size)

    def longest_next(self, row: Row) -> int:
        """Returns how long a row may be after one more block."""
        longest = row.longest if row.drawing else len(row.tokens)
        if row.guide is None:
            return min(longest + self._tokens_per_block, row.total)
        return min(len(row.tokens) + 1, row.total)

    def _at_first(self, row: Row) -> int:
        return self.num_pages_for(row.total - 1 if self._mode == "exact" else len(row.tokens))

    def _growth(self, row: Row) -> int:
        """Returns the pages that a row needs for its next block, beside those that it has or begins with."""
        return max(self.num_pages_for(self.longest_next(row) - 1) - (len(row.pages) or self._at_first(row)), 0)

    def is_read_elsewhere(self, row: Row) -> bool:
        """Returns whether another row is reading more of what this one begins with than the tree holds."""
        held = None
        for other in self.taken.values():
            if other.drawing or (self._mode == "exact" and not other.shares_prompt) or other.key != row.key:
                continue
            common = num_common(row.sharable, other.tokens[:-1])
            if common := common - common % self._step:
                held = self.tree.num_shared(row.key, row.sharable) if held is None else held
                if common > held:
                    return True
        return False

    def has_pages_for(self, row: Row) -> bool:
        """Returns whether a row can begin, and all rows get their next block: else one would soon have to stop."""
        others = self.taken.values()
        growth = sum(map(self._growth, (*others, row))) if others else 0
        return self.tree.num_needed(row.key, row.sharable, self._at_first(row)) + growth <= self.tree.num_available

    def seat(self, row: Row) -> int:
        """Puts a row into a free slot, without pages yet; returns which."""
        index = self.rows.index(None)
        self.rows[index] = row
        return index

    def give_pages(self, index: int) -> None:
        """Gives a row the pages that it begins with, those that are in the tree among them."""
        row = self.rows[index]
        goes_on = row.session is not None and not row.session.is_forked
        taken = self.tree.take(row.key, row.sharable, self._at_first(row), goes_on=goes_on)
        row.pages, row.num_read = taken.pages, taken.num_tokens
        row.num_turns += 1
        self.page_table_BM[index, : len(row.pages)] = row.pages

    def grow(self, index: int) -> bool:
        """Gives a row the pages of its next block; returns whether there were enough."""
        row = self.rows[index]
        pages = self.tree.allocate(self._growth(row))
        if pages is None:
            return False
        self.page_table_BM[index, len(row.pages) : len(row.pages) + len(pages)] = pages
        row.pages += pages
        return True

    def oldest_first(self) -> list[int]:
        """Returns the slots in the order in which their rows arrived."""
        return sorted(self.taken, key=lambda index: self.rows[index].order)

    def keep(self, index: int, *, whole_pages: bool) -> None:
        """Leaves what a row has read and drawn to later rows that begin with it."""
        row = self.rows[index]
        num_tokens = row.num_cached
        # What the step was fed, or read to be scored, or stands behind the last whole chunk, was computed in other
        # pieces; of the last the tree takes nothing.
        if self._mode == "exact":
            num_tokens = min(num_tokens, row.num_prompt - 1) if row.shares_prompt else 0
        if whole_pages:  # a block under way may still write into the last one
            num_tokens -= num_tokens % self._page_size
        row.pages = self.tree.insert(row.key, row.tokens[:num_tokens], row.pages)
        self.page_table_BM[index, : len(row.pages)] = row.pages

    def release(self, index: int) -> None:
        """Frees a slot and the pages of its row."""
        row = self.rows[index]
        self.tree.free(row.pages)
        row.pages = []
        self.rows[index] = None
        self.page_table_BM[index] = self._num_pages
