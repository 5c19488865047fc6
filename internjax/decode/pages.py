"""Who owns which page of the cache: reference counts on the host. The cache arrays themselves never allocate."""

import collections
from collections.abc import Iterable


class PageAllocator:
    """Pages 0 .. num_pages - 1, each free or held by one or more owners."""

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"a cache needs at least one page, given {num_pages}")
        self._counts = [0] * num_pages
        # A stack: the page freed last is used next, while it is warm.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_pages(self) -> int:
        return len(self._counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_owners(self, page: int) -> int:
        """Returns how many owners hold `page`; 0 if it is free."""
        return self._counts[page]

    def allocate(self, count: int) -> list[int] | None:
        """Returns `count` pages with one owner each, or None, taking nothing, when fewer are free."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages")
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds an owner to every page of `pages`; raises ValueError, changing nothing, if one of them is free."""
        pages = list(pages)
        self._check_held(pages, owners=1)
        for page in pages:
            self._counts[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Takes an owner from every page of `pages`; a page without owners is free again.

        Raises ValueError, changing nothing, if a page would be given back more often than it is held.
        """
        pages = list(pages)
        for page, count in collections.Counter(pages).items():
            self._check_held([page], owners=count)
        for page in pages:
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self._free.append(page)

    def _check_held(self, pages: list[int], *, owners: int) -> None:
        for page in pages:
            if not 0 <= page < len(self._counts) or self._counts[page] < owners:
                held = self._counts[page] if 0 <= page < len(self._counts) else "no such page"
                raise ValueError(
                    f"page {page} is not held by {owners} owner(s): {held}, of pages 0..{self.num_pages - 1}"
                )
