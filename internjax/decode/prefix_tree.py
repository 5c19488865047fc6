"""Which pages hold which tokens: a tree of pages that all requests share. The host's part; arrays are moved elsewhere.

A node is a page and the tokens whose keys and values it holds; its path from the root is what stands before them. There
is a root for every key: what else keys and values depend on (adapter, rotary frequencies). Pages of nodes that nobody
uses stay until pages are needed: then those used longest ago go first, to the host's memory if there is room.
"""

import bisect
import collections
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from internjax.decode.pages import PageAllocator


class Moves(NamedTuple):
    """What the tree asks of whoever holds the arrays; all of it happens in the order of the calls.

    Any of them may raise, where memory is short or a device fails. The tree then forgets what may not be where it says,
    nobody owns a page more than before, and the error goes on to who asked.
    """

    renew: Callable[[list[int]], None]
    """These pages get a new owner: whatever must not be seen of the last one goes."""
    copy: Callable[[int, int, int], None]
    """(source, target, count): the target page gets the first `count` slots of the source and nothing else."""
    save: Callable[[list[int]], list[Any]]
    """Returns the contents of pages, in the host's memory."""
    load: Callable[[list[Any], list[int]], None]
    """Pages get the contents that were saved."""
    hand_over: Callable[[int], bool]
    """A page gets a new owner with its contents; False, with nothing done, where they must not be seen as they are."""


class _Node:
    """Tokens after those of the parent: as many as a page holds, or fewer if it has no children."""

    __slots__ = ("parent", "tokens", "children", "ordered", "page", "saved")

    def __init__(self, parent: "_Node | None", tokens: tuple[int, ...]):
        self.parent, self.tokens = parent, tokens
        self.children: dict[tuple[int, ...], _Node] = {}
        # Sorted: of all children, one beside a sequence shares the longest beginning with it. None begins another.
        self.ordered: list[tuple[int, ...]] = []
        self.page: int | None = None
        self.saved: Any = None
        """Contents in the host's memory, while there is no page."""


class Taken(NamedTuple):
    """Pages of a row in the order of its tokens, and how many of its first tokens they hold already."""

    pages: list[int]
    num_tokens: int


class _Plan(NamedTuple):
    """Whole pages that a row can share, the page of which it can copy the first slots, and the pages that it costs."""

    path: list[_Node]
    tail: _Node | None
    num_tail: int
    num_needed: int


class PrefixTree:
    """Owns one reference of every page in it; whoever takes pages owns others, and gives them back with `free`."""

    def __init__(
        self, allocator: PageAllocator, page_size: int, moves: Moves, *, num_saved: int = 0, grid: int | None = None
    ):
        """num_saved: pages whose contents the host may keep. grid: rows leave and share a multiple of so many tokens,
        which must be a multiple of the page size: of such a step every page was computed alike. None: as many tokens as
        they have in common."""
        self._allocator, self._page_size, self._moves, self._num_saved = allocator, page_size, moves, num_saved
        self._grid = grid
        self._roots: dict[Hashable, _Node] = {}
        self._of_page: dict[int, _Node] = {}
        # Used longest ago first. Whoever uses a node uses those above it, so a child always stands before its parent.
        self._idle: collections.OrderedDict[_Node, None] = collections.OrderedDict()
        self._saved: collections.OrderedDict[_Node, None] = collections.OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones, and those of nodes that nobody uses."""
        return self._allocator.num_free + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages that hold tokens which nobody uses now."""
        return len(self._idle)

    @property
    def num_saved(self) -> int:
        """Pages whose contents are in the host's memory."""
        return len(self._saved)

    # Taking and giving back.

    def allocate(self, count: int) -> list[int] | None:
        """Returns `count` pages with one owner each, or None, changing nothing, when fewer can be had."""
        if count > self.num_available:
            return None
        self._evict(count - self._allocator.num_free)
        pages = self._allocator.allocate(count)
        try:
            self._moves.renew(pages)
        except BaseException:
            self._allocator.free(pages)
            raise
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Takes an owner from every page of a row, given in the order of its tokens."""
        self._allocator.free(pages)
        for page in reversed(pages):
            self._rest(page)

    def _rest(self, page: int) -> None:
        node = self._of_page.get(page)
        if node is not None and self._allocator.num_owners(page) == 1:
            self._idle[node] = None

    def _use(self, node: _Node) -> None:
        self._allocator.share([node.page])
        self._idle.pop(node, None)

    def num_shared(self, key: Hashable, tokens: Sequence[int]) -> int:
        """Returns how many of the first tokens the tree holds."""
        nodes, _, num_tail = self._match(key, tokens)
        return len(nodes) * self._page_size + num_tail

    def num_needed(self, key: Hashable, tokens: Sequence[int], num_pages: int) -> int:
        """Returns how many of the pages that are available now `take` would use, a copied one included."""
        return self._plan(key, tokens, num_pages).num_needed

    def _plan(self, key: Hashable, tokens: Sequence[int], num_pages: int) -> "_Plan":
        path, tail, num_tail = self._match(key, tokens)
        needed = num_pages - sum(node.page is not None and node not in self._idle for node in path)
        if tail in self._idle and needed + 1 > self.num_available:
            return _Plan(path, None, 0, needed)  # the page to copy is itself needed
        return _Plan(path, tail, num_tail, needed + (tail in self._idle))

    def take(self, key: Hashable, tokens: Sequence[int], num_pages: int, *, goes_on: bool = False) -> Taken | None:
        """Returns `num_pages` pages for a row that begins with `tokens`, the first of them shared as far as possible.

        Of a page that is not full, or that the tokens leave in the midst, the first slots are copied. A row that
        `goes_on` with what nobody else will takes such a page over instead, if that is all it holds and nobody uses it:
        the tree has it again when it is full, or the row ends. What the host keeps is loaded. None, with nothing
        changed, when there are not enough pages.
        """
        path, tail, num_tail, needed = self._plan(key, tokens, num_pages)
        if needed > self.num_available:
            return None
        own = []
        if goes_on and tail in self._idle and num_tail == len(tail.tokens) and self._moves.hand_over(tail.page):
            own = [tail.page]
            self._use(tail)
            self._remove(tail)
            tail = None
        nodes = [*path, tail] if tail is not None else path
        # First, so that what is used is not evicted to make room.
        saved = {node: node.saved for node in nodes if node.page is None}
        for node in nodes:
            if node.page is None:
                del self._saved[node]
            else:
                self._use(node)
        owned = [node.page for node in nodes if node.page is not None] + own
        try:
            fresh = self.allocate(num_pages - len(own) - sum(node.page is not None for node in path))
            owned += fresh
            pages = []
            for node in path:
                if node.page is None:
                    self._give(node, fresh.pop(0))
                pages.append(node.page)
            if tail is not None and tail.page is None:
                self._saved[tail] = None
                self._fit_saved(0)
            if saved:
                targets = [fresh[0] if node.page is None else node.page for node in saved]
                self._moves.load(list(saved.values()), targets)
            if tail is not None:
                self._moves.copy(fresh[0] if tail.page is None else tail.page, fresh[0], num_tail)
        except BaseException:
            if saved:  # the others follow the first; their pages may hold nothing yet
                self._remove(next(iter(saved)))
            self.free(owned)
            raise
        if tail is not None and tail.page is not None:
            self.free([tail.page])
        return Taken(pages + own + fresh, len(path) * self._page_size + num_tail)

    def _match(self, key: Hashable, tokens: Sequence[int]) -> tuple[list[_Node], _Node | None, int]:
        """Returns the nodes of whole pages with which `tokens` begin, then the one that holds most of what follows."""
        node, path, S = self._roots.get(key), [], self._page_size
        if node is None:
            return [], None, 0
        while (child := node.children.get(tuple(tokens[len(path) * S : (len(path) + 1) * S]))) is not None:
            if len(child.tokens) < S:
                break
            path.append(child)
            node = child
        if self._grid is not None:
            return path[: self._on_grid(len(path) * S) // S], None, 0
        rest = tuple(tokens[len(path) * S : (len(path) + 1) * S])
        at = bisect.bisect_left(node.ordered, rest)
        beside = [(num_common(rest, other), other) for other in node.ordered[max(at - 1, 0) : at + 1]]
        num_tail, best = max(beside, default=(0, None))
        return (path, node.children[best], num_tail) if num_tail else (path, None, 0)

    # Adding and removing.

    def insert(self, key: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Adds a row's pages, which hold the keys and values of `tokens`; returns the pages that the row owns now.

        Where the tree has pages of these tokens, the row owns those from now on and its own are freed: so who owns a
        node's page owns all those above it. To its last page, if that is not full, the row may add nothing more. On a
        grid, what stands behind its last whole step is left out.
        """
        pages, tokens = list(pages), tokens[: self._on_grid(len(tokens))]
        if not tokens:
            return pages
        node, S = self._roots.setdefault(key, _Node(None, ())), self._page_size
        for index in range(-(-len(tokens) // S)):
            part, page = tuple(tokens[index * S : (index + 1) * S]), pages[index]
            child = node.children.get(part)
            if child is None:
                at = bisect.bisect_left(node.ordered, part)
                if len(part) < S and at < len(node.ordered) and node.ordered[at][: len(part)] == part:
                    break  # a page that begins so is there
                before = node.ordered[at - 1] if at else None
                child = node.children[part] = _Node(node, part)
                node.ordered.insert(at, part)
                self._give(child, page)
                if before is not None and before == part[: len(before)]:
                    self._remove(node.children[before])  # the new page holds all that it held
            elif child.page is None:
                self._saved.pop(child)
                self._give(child, page)
            elif child.page != page:
                self._use(child)
                self._allocator.free([page])
                pages[index] = child.page
            node = child
        return pages

    def _on_grid(self, num_tokens: int) -> int:
        return num_tokens if self._grid is None else num_tokens - num_tokens % self._grid

    def _give(self, node: _Node, page: int) -> None:
        """A node without a page gets one that somebody else owns too."""
        self._allocator.share([page])
        node.page, node.saved = page, None
        self._of_page[page] = node

    def forget(self, pages: Iterable[int]) -> None:
        """Removes the nodes of these pages with all that follows them; rows keep the pages that they own."""
        for page in pages:
            if page in self._of_page:
                self._remove(self._of_page[page])

    def clear(self) -> None:
        """Removes everything."""
        for root in list(self._roots.values()):
            for child in list(root.children.values()):
                self._remove(child)

    def _remove(self, node: _Node) -> None:
        """Removes a node with all that follows it."""
        # In a list that grows, not by recursion: what follows may be thousands of pages, one below the other.
        below = [node]
        for each in below:
            below += each.children.values()
        for each in reversed(below):
            self._remove_last(each)

    def _remove_last(self, node: _Node) -> None:
        parent = node.parent
        del parent.children[node.tokens]
        parent.ordered.remove(node.tokens)
        self._idle.pop(node, None)
        self._saved.pop(node, None)
        if node.page is not None:
            self._let_go(node)
        if parent.parent is None and not parent.children:
            self._roots = {key: root for key, root in self._roots.items() if root is not parent}

    def _let_go(self, node: _Node) -> None:
        del self._of_page[node.page]
        self._allocator.free([node.page])
        node.page = None

    # Making room.

    def _evict(self, count: int) -> None:
        """Makes `count` pages free that nobody uses."""
        victims = [self._idle.popitem(last=False)[0] for _ in range(max(count, 0))]
        keep = victims[max(0, len(victims) - self._num_saved) :] if self._num_saved else []
        for node in victims[: len(victims) - len(keep)]:
            self._remove(node)
        self._fit_saved(len(keep))
        if keep:
            try:
                contents = self._moves.save([node.page for node in keep])
            except BaseException:
                # Forgotten, and not idle as before: whoever needs pages next would fail as well.
                for node in keep:
                    self._remove(node)
                raise
            for node, saved in zip(keep, contents, strict=True):
                self._let_go(node)
                node.saved = saved
                self._saved[node] = None

    def _fit_saved(self, coming: int) -> None:
        """Forgets contents that the host keeps until `coming` more fit."""
        while len(self._saved) + coming > self._num_saved:
            self._remove(next(iter(self._saved)))


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common beginning of two tuples, or of two lists."""
    # By halves: slices are compared many times faster than single tokens.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
