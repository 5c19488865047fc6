"""Several engines of one model behind one face: a request goes where its beginning is cached, unless that is too busy.

    with Router([Engine(...), Engine(...)]) as router:
        router.submit(Request(tokens=(1, 42, 7), max_new_tokens=32)).result()

The engines are alike (weights, sizes, loaded adapters) and know nothing of each other; whichever serves a request, it
draws the same tokens. The rule:

1. Replicas that have failed are left out, and so are those with over SLACK of their slots more requests than the least
   busy one has.
2. Of the others it is the one that was sent the longest beginning of the prompt, if that is over LEAST_HELD of it.
3. Else the least busy one; of equally busy ones the one that was sent the fewest requests so far.

It is what SGLang's gateway (0.3.1) and vllm-router (0.1.15) call cache_aware, but for where load begins to count:
there, once the busiest worker has 64 requests and 1.5 times more than the idlest, all go to the idlest.
"""

import collections
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from internjax.decode.device import Compiled
from internjax.decode.engine import Engine, Stats
from internjax.decode.request import Handle, Request, Session
from internjax.model.lora import Lora

LEAST_HELD = 0.3
"""Part of a prompt, the default `cache-threshold` of SGLang's and vLLM's routers: not every prompt that begins with the
same system turn as others is to go where those are."""
SLACK = 0.5
"""Part of an engine's slots. While slots are free one row more costs a step little, and a prompt read anew costs whole
steps; once rows wait for slots, each waits for a whole answer."""


class _Sent:
    """The beginnings that one replica was sent lately, in whole pages: about what its tree holds, or soon will.

    As many pages as it has room for, those used longest ago forgotten first, as there. A page is known by a hash of its
    tokens and of all before them: a collision could cost the cache, never a token.
    """

    def __init__(self, num_pages: int):
        self._num_pages = num_pages
        self._pages: collections.OrderedDict[int, None] = collections.OrderedDict()

    def num_held(self, pages: Sequence[int]) -> int:
        """Returns how many of the first pages are known."""
        return next((index for index, page in enumerate(pages) if page not in self._pages), len(pages))

    def add(self, pages: Sequence[int]) -> None:
        """Notes what is sent now."""
        for page in reversed(pages):  # so that an end is forgotten before its beginning
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > self._num_pages:
            self._pages.popitem(last=False)


@dataclasses.dataclass(eq=False)
class _Replica:
    engine: Engine
    sent: _Sent
    num_routed: int = 0

    @property
    def load(self) -> int:
        """Requests that are not done."""
        stats = self.engine.stats()
        return stats.num_active + stats.num_waiting


class Router:
    """What an engine is to those who submit, over several. Safe to use from several threads."""

    def __init__(self, engines: Sequence[Engine]):
        """`engines` serve the same weights with the same sizes; the router owns them from here on."""
        if not engines:
            raise ValueError("a router needs engines to choose from; give at least one")
        first, *others = engines
        for other in others:
            differing = [name for name in ("config", *_SIZES) if getattr(other, name) != getattr(first, name)]
            if differing:
                raise ValueError(f"the engines differ in {', '.join(differing)}; give engines of one model and size")
        self.engines = tuple(engines)
        self.config, self.limits, self.max_context = first.config, first.limits, first.max_context
        self.page_size, self.num_pages, self.num_host_pages = first.page_size, first.num_pages, first.num_host_pages
        """Of each engine: a request has its pages in one of them."""
        self.num_slots = sum(engine.num_slots for engine in engines)
        """Of all together."""
        self._replicas = [_Replica(engine, _Sent(engine.num_pages + engine.num_host_pages)) for engine in engines]
        self._sessions: weakref.WeakKeyDictionary[Session, _Replica] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    # Requests.

    def submit(self, request: Request, *, session: Session | None = None) -> Handle:
        """Returns the handle of a request that one of the engines serves; see `Engine.submit`.

        A session stays with the engine of its first request while that serves; one that is forked from it goes where
        its beginning is. Raises RuntimeError where all engines have failed.
        """
        tokens = request.tokens if session is None else (*session.tokens, *request.tokens)
        pages = _pages(request.adapter, tokens, self.page_size)
        with self._lock:
            while True:
                replica = self._sessions.get(session) if session is not None else None
                if replica is None or replica.engine.fault is not None:
                    # A prompt that is scored is read in whole, wherever it is.
                    replica = self._choose(pages if request.prompt_logprobs is None else (), len(tokens))
                try:
                    handle = replica.engine.submit(request, session=session)
                except RuntimeError:
                    if replica.engine.fault is None:
                        raise  # it is the request's own fault
                    continue  # the engine failed in between, and is left out from here on
                replica.sent.add(pages)
                replica.num_routed += 1
                if session is not None:
                    self._sessions[session] = replica
                return handle

    def _choose(self, pages: Sequence[int], num_tokens: int) -> _Replica:
        """Returns where a request goes, by the rule above."""
        loads = {replica: replica.load for replica in self._replicas if replica.engine.fault is None}
        if not loads:
            raise RuntimeError(self.fault)

        def idlest(replica: _Replica) -> tuple[int, int]:
            return loads[replica], replica.num_routed

        least_busy = min(loads, key=idlest)
        most = loads[least_busy] + SLACK * least_busy.engine.num_slots
        held = {replica: replica.sent.num_held(pages) for replica, load in loads.items() if load <= most}
        longest = max(held.values())
        if longest * self.page_size <= LEAST_HELD * num_tokens:
            return least_busy
        return min((replica for replica, count in held.items() if count == longest), key=idlest)

    def open_session(self, max_length: int | None = None) -> Session:
        """Returns an empty conversation; see `Engine.open_session`."""
        return self.engines[0].open_session(max_length)

    def lengthen(self, session: Session, max_length: int) -> bool:
        """Lets a session become longer; see `Engine.lengthen`."""
        return self.engines[0].lengthen(session, max_length)

    # Adapters: every engine that serves has all of them.

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        first, *others = [engine.adapters for engine in self._serving() or self.engines]
        return tuple(name for name in first if all(name in names for names in others))

    def load_adapter(self, name: str, lora: Lora) -> None:
        """Makes an adapter available on every engine, or on none; raises ValueError where there is no room for it."""
        lora = jax.device_get(lora)  # the engines are on different devices
        with self._lock:
            loaded: list[Engine] = []
            try:
                for engine in self._serving():
                    engine.load_adapter(name, lora)
                    loaded.append(engine)
            except BaseException:
                for engine in loaded:
                    engine.unload_adapter(name)
                raise

    def unload_adapter(self, name: str) -> None:
        """Frees the places of an adapter; raises RuntimeError, with nothing changed, while requests use it."""
        with self._lock:
            # Where it is used first: that engine refuses before any other gave it up. Nothing is submitted meanwhile.
            for engine in sorted(self._serving(), key=lambda engine: -engine.num_users(name)):
                engine.unload_adapter(name)

    # State.

    @property
    def fault(self) -> str | None:
        """Why requests are taken by none of the engines, or None if one takes them."""
        faults = [engine.fault for engine in self.engines]
        if None in faults:
            return None
        return f"all {len(faults)} engines have stopped: {'; '.join(dict.fromkeys(faults))}"

    def _serving(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.fault is None]

    def silent_seconds(self) -> float:
        """Returns the longest of all engines; see `Engine.silent_seconds`."""
        return max(engine.silent_seconds() for engine in self.engines)

    def stats(self) -> Stats:
        """Returns the sums over all engines; those of one: `engines[i].stats()`."""
        return Stats(*map(sum, zip(*(engine.stats() for engine in self.engines), strict=True)))

    # Lifetime.

    def warmup(self, on_program: Callable[[Compiled], None] | None = None) -> None:
        """Compiles every program of every engine; see `Engine.warmup`."""
        done = itertools.count(1)

        def tell(program: Compiled) -> None:
            on_program(program._replace(number=next(done), count=program.count * len(self.engines)))

        # One first: where compiled programs are kept on disk, the others find them if their devices are GPUs, whose
        # numbers are no part of a program's key (jax/_src/cache_key.py).
        for engines in self.engines[:1], self.engines[1:]:
            with ThreadPoolExecutor(max(1, len(engines))) as pool:
                list(pool.map(lambda engine: engine.warmup(on_program and tell), engines))

    def start(self) -> "Router":
        """Compiles what is not compiled yet, then serves in one thread for each engine; returns the router."""
        for engine in self.engines:
            engine.start()
        return self

    def close(self) -> None:
        """Stops all engines; every request that is not done ends as aborted."""
        for engine in self.engines:
            engine.close()

    def __enter__(self) -> "Router":
        return self.start()

    def __exit__(self, *_) -> None:
        self.close()


_SIZES = ("limits", "max_context", "page_size", "num_pages", "num_host_pages", "num_slots")


def _pages(key: Hashable, tokens: Sequence[int], page_size: int) -> list[int]:
    """Returns a hash of every whole page of tokens, which is one of all that stands before it too."""
    pages = (tuple(tokens[end - page_size : end]) for end in range(page_size, len(tokens) + 1, page_size))
    chained = itertools.accumulate(pages, lambda before, page: hash((before, page)), initial=hash(key))
    return list(chained)[1:]
