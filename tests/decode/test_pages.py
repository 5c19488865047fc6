"""The page allocator against a plain model: a list of owners per page."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from internjax.decode.pages import PageAllocator

NUM_PAGES = 12


class Allocation(RuleBasedStateMachine):
    """Owners take, share and give back pages in any order."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.owners: list[list[int]] = []

    def held(self):
        return [page for owner in self.owners for page in owner]

    @rule(count=st.integers(0, NUM_PAGES + 1))
    def allocate(self, count):
        before = set(self.held())
        pages = self.allocator.allocate(count)
        if count > NUM_PAGES - len(before):
            assert pages is None
        else:
            assert len(pages) == len(set(pages)) == count and not set(pages) & before
            self.owners.append(pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def share(self, data):
        owner = data.draw(st.sampled_from(self.owners))
        prefix = owner[: data.draw(st.integers(0, len(owner)))]
        self.allocator.share(prefix)
        self.owners.append(list(prefix))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data):
        index = data.draw(st.integers(0, len(self.owners) - 1))
        self.allocator.free(self.owners.pop(index))

    @rule(page=st.integers(-2, NUM_PAGES + 2))
    def free_too_often(self, page):
        owners = self.held().count(page)
        with pytest.raises(ValueError, match=f"page {page} is not held by {owners + 1} owner"):
            self.allocator.free([page] * (owners + 1))

    @rule(page=st.integers(-2, NUM_PAGES + 2))
    def share_what_is_free(self, page):
        if page not in self.held():
            with pytest.raises(ValueError, match=f"page {page} is not held"):
                self.allocator.share([page])

    @invariant()
    def no_page_is_lost_or_held_wrongly(self):
        held = self.held()
        assert self.allocator.num_free == NUM_PAGES - len(set(held))
        assert [self.allocator.num_owners(page) for page in range(NUM_PAGES)] == [
            held.count(page) for page in range(NUM_PAGES)
        ]


Allocation.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAllocation = Allocation.TestCase


def test_a_failed_call_changes_nothing():
    allocator = PageAllocator(4)
    a, b = allocator.allocate(2), allocator.allocate(1)
    with pytest.raises(ValueError):
        allocator.share([*a, 3])
    with pytest.raises(ValueError):
        allocator.free([*a, *b, *b])
    assert [allocator.num_owners(page) for page in (*a, *b)] == [1, 1, 1] and allocator.num_free == 1


def test_silly_sizes_are_refused():
    with pytest.raises(ValueError, match="at least one page, given 0"):
        PageAllocator(0)
    with pytest.raises(ValueError, match="cannot allocate -1"):
        PageAllocator(2).allocate(-1)
