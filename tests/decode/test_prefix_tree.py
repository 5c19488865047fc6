"""The prefix tree against a plain model: every page is a list of slots, and a slot is the whole text up to it."""

import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from internjax.decode.pages import PageAllocator
from internjax.decode.prefix_tree import Moves, PrefixTree

NUM_PAGES, S = 9, 3
NUM_GOOD = st.sampled_from([None, None, None, 0, 1, 2])
# Beginnings of the same few texts, so that pages come back from the host and are taken over, and any other.
KNOWN = st.builds(lambda text, length: text[:length], st.sampled_from([[0] * 14, [0, 1] * 7]), st.integers(1, 14))
TEXTS = KNOWN | st.lists(st.integers(0, 1), min_size=1, max_size=14)


class Planted(Exception):
    pass


class Arrays:
    """What the device would hold: for every page its slots, each None or (key, tokens up to and with this one)."""

    def __init__(self):
        self.slots = {page: [None] * S for page in range(NUM_PAGES)}
        self.num_copies = self.num_loads = 0
        self.num_good: int | None = None
        """How many more moves succeed before one raises, in the midst of its work; None: all do."""

    def fail(self):
        if self.num_good is not None:
            self.num_good -= 1
            if self.num_good < 0:
                raise Planted

    def renew(self, pages):
        for page in pages:
            self.slots[page] = [None] * S
        if pages:
            self.fail()

    def copy(self, source, target, count):
        self.slots[target] = self.slots[source][:count] + [None] * (S - count)
        self.fail()
        self.num_copies += 1

    def save(self, pages):
        self.fail()
        return [list(self.slots[page]) for page in pages]

    def load(self, saved, pages):
        assert len(saved) == len(pages)
        for contents, page in list(zip(saved, pages))[::-1]:
            self.slots[page] = list(contents)
            if page == pages[len(pages) // 2]:
                self.fail()
        self.num_loads += len(pages)

    def hand_over(self, page):
        self.fail()
        return page % 4 > 0

    @property
    def moves(self):
        return Moves(self.renew, self.copy, self.save, self.load, self.hand_over)


class Row:
    def __init__(self, key, tokens, pages):
        self.key, self.tokens, self.pages = key, list(tokens), pages
        self.num_read = len(tokens)
        """Tokens that it began with."""


class Sharing(RuleBasedStateMachine):
    """Rows begin with some text, grow, and end with or without leaving their pages in the tree.

    On a grid, as in exact mode, what a slot holds depends on how many tokens were read together, too: of a whole step
    of the grid, or of what was left of the text that a row began with.
    """

    num_saved = 0
    grid = None

    def __init__(self):
        super().__init__()
        self.arrays = Arrays()
        self.allocator = PageAllocator(NUM_PAGES)
        self.tree = PrefixTree(self.allocator, S, self.arrays.moves, num_saved=self.num_saved, grid=self.grid)
        self.rows: list[Row] = []

    def slot(self, row, index):
        """What the row's own reading and writing leaves in a slot."""
        together = 0
        if self.grid is not None and index < row.num_read:
            together = min(self.grid, row.num_read - index // self.grid * self.grid)
        return (row.key, tuple(row.tokens[: index + 1]), together)

    def write(self, row, start):
        for index in range(start, len(row.tokens)):
            page = row.pages[index // S]
            assert self.allocator.num_owners(page) == 1, "a shared page is written"
            self.arrays.slots[page][index % S] = self.slot(row, index)

    def kept(self, row):
        """The tokens that a row leaves: on a grid, only what it began with."""
        return row.tokens if self.grid is None else row.tokens[: row.num_read]

    def attempt(self, num_good, work, *arguments, **options):
        """Returns what the work returns, or Planted where it came to a move that fails: no page is lost by it."""
        before, self.arrays.num_good = self.tree.num_available, num_good
        try:
            return work(*arguments, **options)
        except Planted:
            assert self.tree.num_available == before, "a page is lost"
            return Planted
        finally:
            self.arrays.num_good = None

    @rule(key=st.sampled_from("ab"), tokens=TEXTS, goes_on=st.booleans(), num_good=NUM_GOOD)
    def begin(self, key, tokens, goes_on, num_good):
        before = self.tree.num_available
        shared = self.tree.num_shared(key, tokens)
        num_pages = -(-len(tokens) // S)
        needed = self.tree.num_needed(key, tokens, num_pages)
        assert num_pages - shared // S <= needed <= num_pages + 1
        taken = self.attempt(num_good, self.tree.take, key, tokens, num_pages, goes_on=goes_on)
        if taken is Planted:
            return
        if taken is None:
            assert self.tree.num_available == before < needed
            return
        assert before >= needed
        assert len(taken.pages) == len(set(taken.pages)) == num_pages
        assert taken.num_tokens % (self.grid or 1) == 0, "rows are cut where nobody else would cut them"
        # A page is not copied where the copy would need the page itself.
        assert taken.num_tokens == shared or (before == needed and taken.num_tokens == shared // S * S)
        row = Row(key, tokens, taken.pages)
        for index in range(taken.num_tokens):
            found = self.arrays.slots[row.pages[index // S]][index % S]
            assert found == self.slot(row, index), "a page holds other tokens than the tree says"
        self.write(row, taken.num_tokens)
        self.rows.append(row)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=5), num_good=NUM_GOOD)
    def grow(self, data, more, num_good):
        row = data.draw(st.sampled_from(self.rows))
        needed = -(-(len(row.tokens) + len(more)) // S) - len(row.pages)
        available = self.tree.num_available
        pages = self.attempt(num_good, self.tree.allocate, needed)
        if pages is Planted:
            return
        assert (pages is None) == (needed > available)
        # A row never writes into a page that it left in the tree unless the tree holds whole pages of it only.
        if pages is not None:
            row.pages += pages
            start = len(row.tokens)
            row.tokens += more
            self.write(row, start)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def insert_whole_pages(self, data):
        row = data.draw(st.sampled_from(self.rows))
        tokens = self.kept(row)
        row.pages = self.tree.insert(row.key, tokens[: len(tokens) // S * S], row.pages)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), how=st.sampled_from(["kept", "dropped", "forgotten"]))
    def end(self, data, how):
        row = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        if how == "kept":
            row.pages = self.tree.insert(row.key, self.kept(row), row.pages)
        elif how == "forgotten":
            self.tree.forget([page for page in row.pages if self.allocator.num_owners(page) == 2])
        self.tree.free(row.pages)
        if how == "kept":
            tokens = self.kept(row)
            assert self.tree.num_shared(row.key, tokens) == len(tokens) - len(tokens) % (self.grid or 1)

    @rule()
    def clear(self):
        self.tree.clear()
        assert self.tree.num_idle == self.tree.num_saved == 0 and not self.tree._roots

    @invariant()
    def no_page_is_lost_or_shared_wrongly(self):
        used = {page for row in self.rows for page in row.pages}
        assert self.tree.num_available == NUM_PAGES - len(used)
        assert self.tree.num_saved <= self.num_saved
        for page in range(NUM_PAGES):
            in_tree = page in self.tree._of_page
            assert self.allocator.num_owners(page) == sum(page in row.pages for row in self.rows) + in_tree
        for row in self.rows:
            for index in range(len(row.tokens)):
                assert self.arrays.slots[row.pages[index // S]][index % S] == self.slot(row, index)

    @invariant()
    def every_page_in_the_tree_holds_what_it_says(self):
        below = [(key, (), root) for key, root in self.tree._roots.items()]
        for key, before, node in below:
            for tokens, child in node.children.items():
                text = before + tokens
                held = child.saved if child.page is None else self.arrays.slots[child.page]
                together = self.grid or 0
                assert held[: len(tokens)] == [(key, text[: len(before) + i + 1], together) for i in range(len(tokens))]
                below.append((key, text, child))

    @invariant()
    def a_page_goes_before_those_above_it(self):
        idle = list(self.tree._idle)
        for node in self.tree._of_page.values():
            above = node.parent
            if above.page is not None and above in self.tree._idle:
                assert node in self.tree._idle and idle.index(node) < idle.index(above)

    @invariant()
    def what_the_host_keeps_has_nothing_below_it_on_the_device(self):
        for node in self.tree._saved:
            assert node.page is None and all(child.page is None for child in node.children.values())


class SharingWithHost(Sharing):
    num_saved = 4


class SharingOnAGrid(SharingWithHost):
    """As in exact mode: rows share two pages at a time."""

    grid = 2 * S


for machine in (Sharing, SharingWithHost, SharingOnAGrid):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestSharing, TestSharingWithHost = Sharing.TestCase, SharingWithHost.TestCase
TestSharingOnAGrid = SharingOnAGrid.TestCase


@pytest.fixture
def arrays():
    return Arrays()


def leave(tree, arrays, tokens, key="a"):
    """A row that holds `tokens` and leaves them in the tree."""
    pages, start = tree.take(key, tokens, -(-len(tokens) // S))
    for index in range(start, len(tokens)):
        arrays.slots[pages[index // S]][index % S] = (key, tuple(tokens[: index + 1]))
    tree.free(tree.insert(key, tokens, pages))


def test_what_was_used_longest_ago_goes_first_and_the_beginning_last(arrays):
    tree = PrefixTree(PageAllocator(NUM_PAGES), S, arrays.moves)
    old, new = [1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2]
    leave(tree, arrays, old)
    leave(tree, arrays, new)
    tree.free(tree.allocate(NUM_PAGES - 3))  # one of four pages must go
    assert (tree.num_shared("a", old), tree.num_shared("a", new)) == (3, 5)
    tree.free(tree.take("a", old, 2).pages)  # used: now the other one is older
    tree.free(tree.allocate(NUM_PAGES - 1))
    assert (tree.num_shared("a", old), tree.num_shared("a", new)) == (3, 0)


@pytest.mark.parametrize(("grid", "num_tokens", "num_loads", "num_copies"), [(None, 7, 3, 1), (2 * S, 6, 2, 0)])
def test_the_hosts_memory_gives_back_what_was_evicted(arrays, grid, num_tokens, num_loads, num_copies):
    tree = PrefixTree(PageAllocator(NUM_PAGES), S, arrays.moves, num_saved=3, grid=grid)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    leave(tree, arrays, tokens)
    tree.free(tree.allocate(NUM_PAGES))
    assert (tree.num_idle, tree.num_saved) == (0, num_loads)
    taken = tree.take("a", [*tokens, 8], 3)
    assert (taken.num_tokens, arrays.num_loads, arrays.num_copies) == (num_tokens, num_loads, num_copies)
    assert [slot[1][-1] for page in taken.pages for slot in arrays.slots[page] if slot] == tokens[:num_tokens]
    tree.free(taken.pages)


@pytest.mark.parametrize(
    ("move", "on_host", "goes_on"),
    [
        ("renew", False, True),  # after a page was handed over
        ("hand_over", False, True),
        ("copy", False, False),
        ("renew", True, False),
        ("load", True, False),
        ("copy", True, False),
        ("save", False, False),
    ],
)
def test_a_move_that_fails_leaves_every_page_where_it_can_be_had(arrays, move, on_host, goes_on):
    """Nothing that was not loaded is shared: who asks next gets what the tree still has, and reads the rest."""
    allocator = PageAllocator(NUM_PAGES)
    tree, text = PrefixTree(allocator, S, arrays.moves, num_saved=3), [1, 2, 3, 4, 5, 6, 7]
    leave(tree, arrays, text)
    if on_host:
        tree.free(tree.allocate(NUM_PAGES))
    calls = []

    def failing(*what):
        calls.append(what)
        raise Planted

    tree._moves = arrays.moves._replace(**{move: failing})
    with pytest.raises(Planted):
        tree.allocate(NUM_PAGES) if move == "save" else tree.take("a", [*text, 8], 4, goes_on=goes_on)
    tree._moves = arrays.moves
    assert len(calls) == 1 and tree.num_available == NUM_PAGES
    assert [allocator.num_owners(page) for page in range(NUM_PAGES)].count(1) == tree.num_idle
    pages, num_tokens = tree.take("a", [*text, 8], 4)
    held = [slot for page in pages for slot in arrays.slots[page]]
    assert held[:num_tokens] == [("a", tuple(text[: i + 1])) for i in range(num_tokens)]
    tree.free(pages)
    tree.clear()
    assert allocator.num_free == NUM_PAGES


def test_a_longer_row_takes_the_place_of_the_page_that_was_not_full(arrays):
    tree = PrefixTree(PageAllocator(NUM_PAGES), S, arrays.moves)
    leave(tree, arrays, [1, 2, 3, 4])
    leave(tree, arrays, [1, 2, 3, 4, 5])
    assert tree.num_idle == 2
    leave(tree, arrays, [1, 2, 3, 4])  # adds nothing
    assert tree.num_idle == 2 and tree.num_shared("b", [1, 2, 3]) == 0


def test_rows_that_grew_alike_share_one_page_in_the_end(arrays):
    allocator = PageAllocator(NUM_PAGES)
    tree = PrefixTree(allocator, S, arrays.moves)
    first, second = (tree.take("a", [1, 2, 3, 4], 2).pages for _ in range(2))
    assert not set(first) & set(second)
    first = tree.insert("a", [1, 2, 3], first)
    second = tree.insert("a", [1, 2, 3], second)
    assert second[0] == first[0] and allocator.num_owners(first[0]) == 3 and tree.num_available == NUM_PAGES - 3
    tree.free(first)
    assert tree.num_idle == 0  # the second still uses it
    tree.free(second)
    assert tree.num_idle == 1 and tree.num_available == NUM_PAGES


def test_a_row_of_more_pages_than_python_recurses_into_is_forgotten_whole():
    num_pages = 2 * sys.getrecursionlimit()
    tree = PrefixTree(PageAllocator(num_pages), 1, Moves(lambda pages: None, *[None] * 4))
    tokens = list(range(num_pages))
    pages = tree.take("a", tokens, num_pages).pages
    assert tree.insert("a", tokens, pages) == pages and tree.num_shared("a", tokens) == num_pages
    tree.forget(pages)
    assert tree.num_shared("a", tokens) == 0 and tree.num_available == 0  # the row still owns them
    tree.free(pages)
    assert tree.num_available == num_pages and tree.num_idle == 0


def test_who_goes_on_takes_the_last_page_over_and_copies_nothing(arrays):
    tree = PrefixTree(PageAllocator(NUM_PAGES), S, arrays.moves)
    pages = tree.take("a", [1, 2, 3, 4], 2).pages
    arrays.slots[pages[1]][0] = "of token 4"
    tree.free(tree.insert("a", [1, 2, 3, 4], pages))
    assert arrays.hand_over(pages[1])
    taken = tree.take("a", [1, 2, 3, 4, 5], 2, goes_on=True)
    assert taken == (pages, 4) and arrays.num_copies == 0 and arrays.slots[pages[1]][0] == "of token 4"
    # Nobody else has it meanwhile; when its row leaves it, others do.
    assert tree.num_shared("a", [1, 2, 3, 4]) == 3
    tree.free(tree.insert("a", [1, 2, 3, 4, 5], taken.pages))
    assert tree.num_shared("a", [1, 2, 3, 4, 5]) == 5
    # What others go on with, and a page that the tokens leave in the midst, are copied.
    assert tree.take("a", [1, 2, 3, 4, 5, 6], 2).pages[1] != pages[1] and arrays.num_copies == 1
    assert tree.take("a", [1, 2, 3, 4, 6], 2, goes_on=True).pages[1] != pages[1] and arrays.num_copies == 2
