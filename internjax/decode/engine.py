"""Continuous batching: requests come and go while one compiled step serves a fixed number of slots. Token ids only.

    with Engine(params, config, max_context=1024) as engine:
        handle = engine.submit(Request(tokens=(1, 42, 7), max_new_tokens=32))
        for event in handle.events():
            print(event.ids)

Here is what any thread may call; the rounds that serve are in `decode.rounds`. The host decides who sits in which slot
and which pages it owns; the device holds one DecodeState for all slots (`decode.device`). Pages are taken as a row
grows, and shared between rows that begin alike (`decode.prefix_tree`). When none is left, the youngest row gives up its
pages and waits to be continued: it draws the same tokens then, because a draw depends on its seed and position alone.

F frequencies.
"""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from internjax.decode.adapters import NO_ADAPTER, AdapterPlaces, Place
from internjax.decode.device import AdapterRoom, Compiled, Device
from internjax.decode.request import Handle, Request, Session, check_options
from internjax.decode.rounds import Rounds
from internjax.decode.sample import Limits
from internjax.decode.seats import Mode, Row, Seats
from internjax.decode.sizing import row_buckets_of
from internjax.decode.speculate import DraftModel, Speculation
from internjax.decode.timing import Timings
from internjax.model import rope
from internjax.model.cache import CacheDType
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora

_LEAST_READ = 512
"""Prompt tokens that may be read between two blocks, at least."""


class Stats(NamedTuple):
    """What the engine holds at this moment, and what it did so far."""

    num_slots: int
    num_active: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    """Pages that no row uses; some of them may hold tokens that a later request begins with."""
    num_cached_pages: int
    """Of those, pages that hold such tokens."""
    num_saved_pages: int
    """Pages whose contents wait in the host's memory."""
    num_compiled: int
    """Programs compiled so far; constant after warm-up."""
    num_compiled_late: int
    """Of those, programs compiled after warm-up: none, or shapes are not as fixed as they should be."""
    num_prompt_tokens: int
    """Prompt tokens of all requests that got a slot."""
    num_shared_tokens: int
    """Of those, tokens that did not have to be read."""
    num_preempted: int
    """How often a row gave up its pages."""
    num_drawn_tokens: int
    num_turns: int
    """How often the model was asked for them, counted for every row: fewer, where drafts came true."""
    num_stopped: int
    """Requests that ended by themselves, by a stop id or by what their reader was waiting for."""
    num_cut: int
    """Requests that ended at their greatest length."""
    num_aborted: int
    num_failed: int


class Engine:
    """Slots, pages, a queue and the compiled programs that serve them.

    `start` (or the context manager) runs it in a thread of its own; without it `tick` drives it. Requests are admitted
    in order of arrival, when a slot is free and there are pages for what they begin with and for the next block of all
    rows; one whose beginning another row is just reading lets others pass until that is read.
    """

    def __init__(
        self,
        params: dict,
        config: ModelConfig,
        *,
        max_context: int,
        num_slots: int = 8,
        page_size: int = 16,
        num_pages: int | None = None,
        num_host_pages: int = 0,
        cache_dtype: CacheDType | None = None,
        lora: Lora | None = None,
        adapter_room: AdapterRoom | None = None,
        tokens_per_dispatch: int = 4,
        max_pause: float | None = None,
        prefill_chunk: int = 64,
        context_buckets: tuple[int, ...] = (),
        limits: Limits = Limits(),
        speculation: Speculation | None = None,
        draft_params: dict | None = None,
        mode: Mode = "fast",
    ):
        """Prepares the device state; compiles nothing yet.

        max_context: longest prompt and answer together of a request. num_pages: pages of the cache, all slots full by
        default. num_host_pages: pages whose contents the host's memory may keep when the cache has no room for them.
        lora: one adapter for all requests. adapter_room: room for several that are loaded while the engine runs, of
        which each request may name one (`load_adapter`). prefill_chunk: prompt tokens read at once, of one request or
        of several that are short. context_buckets: shorter contexts, in tokens, for which drawing is compiled too;
        while all rows fit into one, a step reads no more of the cache than that. A row's results then agree with those
        of another width up to rounding only. limits: what one request may ask for. speculation: drafts that are tried
        together, looked up in the row or drawn by a model with `draft_params`. mode: see Mode; "exact" wants no
        context_buckets and a prefill_chunk of whole pages. tokens_per_dispatch: turns of the model at most in a
        program's run, whose tokens come together. max_pause: it has fewer where these would come later than so many
        seconds after those before; the tokens stay the same.
        """
        sizes = {"max_context": max_context, "num_slots": num_slots, "page_size": page_size}
        sizes |= {"tokens_per_dispatch": tokens_per_dispatch, "prefill_chunk": prefill_chunk}
        sizes |= {} if num_pages is None else {"num_pages": num_pages}
        wrong = [f"{name}={value}" for name, value in sizes.items() if value < 1]
        wrong += [f"{name}={value}" for name, value in {"num_host_pages": num_host_pages}.items() if value < 0]
        if wrong or min(limits) < 0 or any(not 1 <= bucket <= max_context for bucket in context_buckets):
            raise ValueError(
                f"engine sizes must be positive and context_buckets in 1..{max_context} (max_context); "
                f"given {', '.join(wrong)} {limits} context_buckets={context_buckets}"
            )
        if mode == "exact" and (context_buckets or prefill_chunk % page_size):
            raise ValueError(
                f"exact mode wants no context_buckets and a prefill_chunk of whole pages of {page_size} tokens; given "
                f"context_buckets={context_buckets} prefill_chunk={prefill_chunk}"
            )
        if max_pause is not None and not max_pause > 0:
            raise ValueError(f"max_pause is {max_pause}; give seconds over 0, or None for blocks of full length")
        if lora is not None and adapter_room is not None:
            raise ValueError("give one adapter for all requests (lora) or room for several (adapter_room), not both")
        if isinstance(speculation, DraftModel) != (draft_params is not None):
            raise ValueError("a DraftModel and its draft_params are given together")
        if isinstance(speculation, DraftModel) and speculation.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"the draft model has {speculation.config.vocab_size} tokens and the model {config.vocab_size}; take "
                "one with the same tokenizer"
            )
        if config.head != "lm":
            raise ValueError("a model with a scalar head scores and cannot generate; use one with head='lm'")
        self.config, self.max_context, self.num_slots, self.page_size = config, max_context, num_slots, page_size
        self.num_pages = num_slots * -(-max_context // page_size) if num_pages is None else num_pages
        self.num_host_pages, self.limits = num_host_pages, limits
        self._inv_freq_F = np.asarray(rope.inv_freq(config))
        self._device = Device(
            params,
            config,
            max_context=max_context,
            num_slots=num_slots,
            page_size=page_size,
            num_pages=self.num_pages,
            cache_dtype=cache_dtype or config.dtype,
            lora=lora,
            adapter_room=adapter_room,
            tokens_per_dispatch=tokens_per_dispatch,
            prefill_chunk=prefill_chunk,
            context_buckets=context_buckets,
            row_buckets=() if mode == "exact" else row_buckets_of(num_slots),  # another shape may give other bits
            reads_together=mode == "fast",
            exact=mode == "exact",
            limits=limits,
            saves_pages=num_host_pages > 0,
            speculation=speculation,
            draft_params=draft_params,
        )
        empty_seats = functools.partial(
            Seats,
            self._device.moves,
            num_slots=num_slots,
            num_pages=self.num_pages,
            num_host_pages=num_host_pages,
            page_size=page_size,
            pages_per_row=self._device.pages_per_row,
            chunk=self._device.chunks[-1],
            tokens_per_block=self._device.tokens_per_block,
            mode=mode,
        )
        most_read = max(4 * prefill_chunk, _LEAST_READ)
        self._rounds = Rounds(self._device, empty_seats, page_size=page_size, most_read=most_read, max_pause=max_pause)
        self._arrivals = itertools.count()
        self._thread: threading.Thread | None = None
        self._num_warm: int | None = None
        """Programs that warm-up compiled, once it is done."""

    def submit(self, request: Request, *, session: Session | None = None) -> Handle:
        """Returns the handle of a request that will be served; raises ValueError for one that never can be.

        With a session the request's tokens are those of the new turn only; the session grows by them and by the answer
        (not by one that ends with an error). Raises RuntimeError for a session whose last request is not done.
        """
        handle = Handle(request, self._rounds.notify)
        if session is None:
            self._enqueue(handle, None)
            return handle
        with self._rounds.wake:
            session.take(handle)
        try:
            self._enqueue(handle, session)
        except BaseException:
            session.end(None)
            raise
        return handle

    def _enqueue(self, handle: Handle, session: Session | None) -> None:
        request = handle.request
        tokens = [*(() if session is None else session.tokens), *request.tokens]
        self._check(request, tokens, session)
        total = len(tokens) + request.max_new_tokens
        inv_freq_F = self._frequencies(total) if session is None else session.inv_freq_F
        guide = None if request.guide is None else request.guide()
        with self._rounds.wake:
            if self.fault:
                raise RuntimeError(self.fault)
            adapter = self._find_adapter(request.adapter)
            row = Row(
                handle,
                session,
                next(self._arrivals),
                tokens,
                num_prompt=len(tokens),
                total=total,
                key=(adapter, inv_freq_F.tobytes()),
                inv_freq_F=inv_freq_F,
                adapter=adapter,
                scored=request.prompt_logprobs is None,
                guide=guide,
            )
            self._rounds.add(row)

    def open_session(self, max_length: int | None = None) -> Session:
        """Returns an empty conversation that can become `max_length` tokens long (default: the engine's max_context).

        The length fixes its rotary frequencies where they depend on it (dynamic NTK), so what it holds stays right.
        """
        max_length = self.max_context if max_length is None else max_length
        if not 1 <= max_length <= self.max_context:
            raise ValueError(
                f"a session of up to {max_length} tokens; this engine serves 1 to {self.max_context} (max_context)"
            )
        return Session(max_length, self._frequencies(max_length))

    def lengthen(self, session: Session, max_length: int) -> bool:
        """Lets a session become longer; returns whether its history will be read once more, with other frequencies.

        Raises ValueError for a length below the one it has, and RuntimeError while it is busy.
        """
        if max_length < session.max_length:
            raise ValueError(
                f"the session may become {session.max_length} tokens long already, given {max_length}; to make it "
                "shorter, rewind it or open another"
            )
        longer = self.open_session(max_length)
        return session.lengthen(longer.max_length, longer.inv_freq_F)

    def load_adapter(self, name: str, lora: Lora) -> None:
        """Makes an adapter available to requests by name; raises ValueError where there is no room for it."""
        places = self._room_for_adapters()
        prepared = places.prepare(name, lora)  # takes a while, and requests go on
        with self._rounds.wake:
            places.load(name, prepared)

    def unload_adapter(self, name: str) -> None:
        """Frees the place of an adapter; raises RuntimeError while requests use it."""
        with self._rounds.wake:
            if num_users := self.num_users(name):
                raise RuntimeError(f"{num_users} requests use adapter {name!r}; wait until they are done or abort them")
            self._device.adapters.unload(name)

    def num_users(self, adapter: str) -> int:
        """Returns how many requests that are not done use an adapter."""
        with self._rounds.wake:
            place = self._room_for_adapters().find(adapter)
            return sum(row.adapter == place for row in self._rounds.rows)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return () if self._device.adapters is None else self._device.adapters.names

    def _room_for_adapters(self) -> AdapterPlaces:
        if self._device.adapters is None:
            raise ValueError("this engine has no room for adapters; start it with adapter_room")
        return self._device.adapters

    def _find_adapter(self, name: str | None) -> Place:
        return NO_ADAPTER if name is None else self._room_for_adapters().find(name)

    @property
    def fault(self) -> str | None:
        """Why it takes no more requests, or None if it does."""
        thread = self._thread
        if self._rounds.closed is None and thread is not None and not thread.is_alive():
            return "the engine's thread has ended"
        return self._rounds.closed

    def silent_seconds(self) -> float:
        """Returns for how long it has had work without a sign of life; 0 where there is none.

        A sign is a round that begins or ends. The longest round is about the time of reading a prompt's chunk for every
        slot; much more than that means that the device, or the thread that serves, hangs.
        """
        return self._rounds.silent_seconds()

    def timings(self) -> Timings:
        """Returns how long requests waited and took so far."""
        return self._rounds.clock.read()

    def stats(self) -> Stats:
        """Returns counts of slots, requests, pages and compiled programs."""
        rounds = self._rounds
        tree, num_ended, num_compiled = rounds.seats.tree, rounds.num_ended, self._device.num_compiled
        return Stats(
            num_slots=self.num_slots,
            num_active=len(rounds.seats.taken),
            num_waiting=len(rounds.queue),
            num_pages=self.num_pages,
            num_free_pages=tree.num_available,
            num_cached_pages=tree.num_idle,
            num_saved_pages=tree.num_saved,
            num_compiled=num_compiled,
            num_compiled_late=0 if self._num_warm is None else num_compiled - self._num_warm,
            num_prompt_tokens=rounds.num_prompt_tokens,
            num_shared_tokens=rounds.num_shared_tokens,
            num_preempted=rounds.num_preempted,
            num_drawn_tokens=rounds.num_drawn_tokens,
            num_turns=rounds.num_turns,
            num_stopped=num_ended["stop"],
            num_cut=num_ended["length"],
            num_aborted=num_ended["aborted"],
            num_failed=num_ended["error"],
        )

    def _check(self, request: Request, tokens: list[int], session: Session | None) -> None:
        total = len(tokens) + request.max_new_tokens
        if not request.tokens:
            raise ValueError("the prompt is empty and has nothing to continue: begin it with the first token")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, given {request.max_new_tokens}")
        if total > self.max_context:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {request.max_new_tokens} new ones make {total}; this "
                f"engine serves up to {self.max_context}. Shorten the prompt or ask for fewer tokens."
            )
        if session is not None and total > session.max_length:
            raise ValueError(
                f"{len(session.tokens)} tokens of the session, {len(request.tokens)} of the turn and "
                f"{request.max_new_tokens} new ones make {total}; the session was opened for {session.max_length}. "
                "Ask for fewer tokens, or lengthen the session."
            )
        # The last token drawn is never fed, so it needs no place in the cache.
        num_pages = self._rounds.seats.num_pages_for(total - 1)
        if num_pages > self.num_pages:
            raise ValueError(
                f"{total} tokens need {num_pages} pages of {self.page_size}; the whole cache has "
                f"{self.num_pages}. Shorten the request or start the engine with more pages."
            )
        check_options(request, self.limits, vocab_size=self.config.vocab_size)

    def _frequencies(self, length: int) -> np.ndarray:
        """Returns the rotary frequencies of what can become `length` tokens long."""
        if length <= self.config.max_position_embeddings:
            return self._inv_freq_F
        return np.asarray(rope.inv_freq(self.config, length=length))

    # Lifetime.

    def warmup(self, on_program: Callable[[Compiled], None] | None = None) -> None:
        """Compiles every program by running it without effect; call it while no request is served.

        `on_program` is told of each when it is there.
        """
        assert not self._rounds.seats.taken, "warm-up runs before requests are served"
        self._device.warmup(on_program)
        self._num_warm = self._device.num_compiled

    def start(self) -> "Engine":
        """Compiles what is not compiled yet, then serves in a thread of its own; returns the engine."""
        if self._thread is not None:
            raise RuntimeError("the engine runs already")
        if self._num_warm is None:
            self.warmup()
        self._thread = threading.Thread(target=self._rounds.run, name="engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stops serving; every request that is not done ends as aborted."""
        self._rounds.close("the engine is closed and takes no more requests")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
        self._rounds.end_all("aborted", None)

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_) -> None:
        self.close()

    def tick(self) -> bool:
        """Does one round of admission, prompt reading and drawing; returns whether there was anything to do.

        For whoever drives an engine that was not started.
        """
        return self._rounds.tick()
