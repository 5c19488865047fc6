"""Continuous batching: requests come and go while one compiled step serves a fixed number of slots. Token ids only.

    with Engine(params, config, max_context=1024) as engine:
        handle = engine.submit(Request(tokens=(1, 42, 7), max_new_tokens=32))
        for event in handle.events():
            print(event.ids)

The host decides who sits in which slot and which pages it owns; the device holds one DecodeState for all slots
(`decode.device`). Pages are taken as a row grows, and shared between rows that begin alike (`decode.prefix_tree`). When
none is left, the youngest row gives up its pages and waits to be continued: it draws the same tokens then, because a
draw depends on its seed and position alone.

B slots, M pages of a row, F frequencies.
"""

import collections
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from internjax.decode.adapters import NO_ADAPTER, AdapterPlaces, Place
from internjax.decode.device import AdapterRoom, Device
from internjax.decode.generate import FINISH_NAMES
from internjax.decode.programs import Admission, unpack, unpack_scores
from internjax.decode.request import Finish, Handle, Request, Session, check_options, prompt_event, tokens_event
from internjax.decode.sample import Limits, stack
from internjax.decode.seats import Mode, Row, Seats
from internjax.decode.speculate import DraftModel, Speculation
from internjax.model import rope
from internjax.model.cache import CacheDType
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora


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
    num_prompt_tokens: int
    """Prompt tokens of all requests that got a slot."""
    num_shared_tokens: int
    """Of those, tokens that did not have to be read."""
    num_preempted: int
    """How often a row gave up its pages."""
    num_drawn_tokens: int
    num_turns: int
    """How often the model was asked for them, counted for every row: fewer, where drafts came true."""


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
        which each request may name one (`load_adapter`). prefill_chunk: prompt tokens read at once. context_buckets:
        shorter contexts, in tokens, for which attention is compiled too; while all rows fit into one, a step reads no
        more of the cache than that. A row's results then agree with those of another width up to rounding only; with
        none, they do not depend on the other rows at all. limits: what one request may ask for. speculation: drafts
        that are tried together, looked up in the row or drawn by a model with `draft_params`. mode: see Mode; "exact"
        wants no context_buckets and a prefill_chunk of whole pages.
        """
        sizes = {"max_context": max_context, "num_slots": num_slots, "page_size": page_size}
        sizes |= {"tokens_per_dispatch": tokens_per_dispatch, "prefill_chunk": prefill_chunk}
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
        self.num_host_pages, self.limits, self._mode = num_host_pages, limits, mode
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
            limits=limits,
            saves_pages=num_host_pages > 0,
            speculation=speculation,
            draft_params=draft_params,
        )
        self._forget_all()
        self._queue: collections.deque[Row] = collections.deque()
        self._arrivals = itertools.count()
        self._num_prompt_tokens = self._num_shared_tokens = self._num_preempted = 0
        self._num_drawn_tokens = self._num_turns = 0
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed: str | None = None
        self._warm = False

    def _forget_all(self) -> None:
        """Begins with empty slots and pages, as far as the host is concerned."""
        # Blocks that were dispatched and not read yet, with the rows in their slots and the turn of each.
        self._in_flight: collections.deque[tuple[jax.Array, dict[int, tuple[Row, int]]]] = collections.deque()
        self._seats = Seats(
            self._device.moves,
            num_slots=self.num_slots,
            num_pages=self.num_pages,
            num_host_pages=self.num_host_pages,
            page_size=self.page_size,
            pages_per_row=self._device.pages_per_row,
            chunk=self._device.chunks[-1],
            tokens_per_block=self._device.tokens_per_block,
            mode=self._mode,
        )

    # From any thread.

    def submit(self, request: Request, *, session: Session | None = None) -> Handle:
        """Returns the handle of a request that will be served; raises ValueError for one that never can be.

        With a session the request's tokens are those of the new turn only; the session grows by them and by the answer
        (not by one that ends with an error). Raises RuntimeError for a session whose last request is not done.
        """
        handle = Handle(request, self._notify)
        if session is None:
            self._enqueue(handle, None)
            return handle
        with self._wake:
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
        with self._wake:
            if self._closed:
                raise RuntimeError(self._closed)
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
            self._queue.append(row)
            self._wake.notify_all()

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
        with self._wake:
            places.load(name, prepared)

    def unload_adapter(self, name: str) -> None:
        """Frees the place of an adapter; raises RuntimeError while requests use it."""
        with self._wake:
            if num_users := self.num_users(name):
                raise RuntimeError(f"{num_users} requests use adapter {name!r}; wait until they are done or abort them")
            self._device.adapters.unload(name)

    def num_users(self, adapter: str) -> int:
        """Returns how many requests that are not done use an adapter."""
        with self._wake:
            place = self._room_for_adapters().find(adapter)
            return sum(row.adapter == place for row in (*self._seats.taken.values(), *self._queue))

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
        return self._closed

    def stats(self) -> Stats:
        """Returns counts of slots, requests, pages and compiled programs."""
        return Stats(
            num_slots=self.num_slots,
            num_active=len(self._seats.taken),
            num_waiting=len(self._queue),
            num_pages=self.num_pages,
            num_free_pages=self._seats.tree.num_available,
            num_cached_pages=self._seats.tree.num_idle,
            num_saved_pages=self._seats.tree.num_saved,
            num_compiled=self._device.num_compiled,
            num_prompt_tokens=self._num_prompt_tokens,
            num_shared_tokens=self._num_shared_tokens,
            num_preempted=self._num_preempted,
            num_drawn_tokens=self._num_drawn_tokens,
            num_turns=self._num_turns,
        )

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

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
        num_pages = self._seats.num_pages_for(total - 1)
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

    def warmup(self, on_program: Callable[[str, float], None] | None = None) -> None:
        """Compiles every program by running it without effect; call it while no request is served.

        `on_program` is told the name of each and the seconds it took.
        """
        assert not self._seats.taken, "warm-up runs before requests are served"
        self._device.warmup(on_program)
        self._warm = True

    def start(self) -> "Engine":
        """Compiles what is not compiled yet, then serves in a thread of its own; returns the engine."""
        if self._thread is not None:
            raise RuntimeError("the engine runs already")
        if not self._warm:
            self.warmup()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stops serving; every request that is not done ends as aborted."""
        with self._wake:
            self._closed = self._closed or "the engine is closed and takes no more requests"
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
        self._end_all("aborted", None)

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._queue or self._in_flight or any(self._seats.rows))
                if self._closed:
                    return
            self.tick()

    # In the thread that serves.

    def tick(self) -> bool:
        """Does one round of admission, prompt reading and drawing; returns whether there was anything to do."""
        try:
            self._drop_aborted()
            self._admit_waiting()
            for index, row in self._seats.taken.items():
                if not row.drawing:
                    self._guarded(index, row, self._read_prompt)
            # The next block is dispatched before the last one is read, so the device never waits for the host.
            dispatched = self._dispatch()
            if self._in_flight and (len(self._in_flight) > 1 or not dispatched):
                self._deliver(*self._in_flight.popleft())
        except Exception as error:
            self._recover(error)
        return bool(self._queue or self._in_flight or any(self._seats.rows))

    def _drop_aborted(self) -> None:
        for index, row in self._seats.taken.items():
            if row.handle.aborted:
                self._leave(index, whole_pages=True)
                self._end(row, "aborted")
        with self._wake:
            aborted = [row for row in self._queue if row.handle.aborted]
            for row in aborted:
                self._queue.remove(row)
        for row in aborted:
            self._end(row, "aborted")

    def _admit_waiting(self) -> None:
        for row in list(self._queue):
            if None not in self._seats.rows:
                return
            if self._seats.is_read_elsewhere(row):
                continue  # soon it need not be read; whoever came later may go first
            if not self._seats.has_pages_for(row):
                return  # in order: a small request does not overtake a large one for ever
            with self._wake:  # whoever looks from another thread sees the row in one of both
                self._queue.remove(row)
                index = self._seats.seat(row)
            self._guarded(index, row, self._place)

    def _guarded(self, index: int, row: Row, work: Callable[[int, Row], None]) -> None:
        """Runs the work of one request; if it fails, that request ends and the others go on."""
        try:
            work(index, row)
        except Exception as error:
            if self._device.lost:
                raise
            self._fail(index, f"{type(error).__name__}: {error}")

    def _place(self, index: int, row: Row) -> None:
        """Gives a row its pages."""
        self._seats.give_pages(index)
        if row.num_turns == 1:
            row.handle.num_shared = row.num_read
            self._num_prompt_tokens += row.num_prompt
            self._num_shared_tokens += row.num_read

    def _read_prompt(self, index: int, row: Row) -> None:
        """Reads the next chunk of what a row begins with; after the last one it draws."""
        start = row.num_read
        end = min(start + self._device.chunks[-1], len(row.tokens) - 1)
        if end > start:
            place = {"inv_freq_F": row.inv_freq_F, "adapter": row.adapter.index}
            tokens, pages_M = row.tokens[start:end], self._seats.page_table_BM[index]
            if row.scored:
                self._device.read(tokens, pages_M, start, **place)
            else:
                following, temperature = row.tokens[start + 1 : end + 1], row.handle.request.sampling.temperature
                scores = self._device.score(tokens, following, pages_M, start, temperature=temperature, **place)
                row.scores.append((end - start, scores))
            row.num_read = end
        if end == len(row.tokens) - 1:
            self._seats.keep(index, whole_pages=True)
            self._start_drawing(index, row)

    def _start_drawing(self, index: int, row: Row) -> None:
        request, length = row.handle.request, len(row.tokens)
        tokens_S = np.zeros(self.max_context, np.int32)
        tokens_S[:length] = row.tokens
        stop_ids_I = np.full(self.limits.stop_ids, -1, np.int32)
        stop_ids_I[: len(request.stop_ids)] = request.stop_ids
        self._device.admit(
            Admission(
                slot=np.array(index, np.int32),
                tokens_S=tokens_S,
                length=np.array(length, np.int32),
                prompt_length=np.array(row.num_prompt, np.int32),
                max_length=np.array(row.total, np.int32),
                stop_ids_I=stop_ids_I,
                inv_freq_F=row.inv_freq_F,
                sampling_1=stack([request.sampling], limits=self.limits),
                top_asked=np.array(bool(request.logprobs)),
            )
        )
        row.drawing, row.longest, row.num_in_flight = True, length, 0

    def _dispatch(self) -> bool:
        """Sends off one block for all slots that draw; returns whether there were any."""
        self._grow()
        drawing = {index: row for index, row in self._seats.taken.items() if row.drawing}
        # What is under way may be all that a row needs; and a guide has to see a token before it knows the next.
        going = {index: row for index, row in drawing.items() if self._seats.longest_next(row) > row.longest}
        masks = self._masks(going)
        going = {index: row for index, row in going.items() if self._seats.rows[index] is row}
        if not going:
            return False
        turns_B = np.full(self.num_slots, -1, np.int32)
        turns_B[[*drawing]] = 0
        for index, row in going.items():
            turns_B[index] = self._device.turns_per_block if row.guide is None else 1
            row.longest = self._seats.longest_next(row)
            row.num_in_flight += 1
        width = self._device.width(max(row.longest for row in drawing.values()))
        adapters = [-1 if row is None else row.adapter.index for row in self._seats.rows]
        packed = self._device.block(self._seats.page_table_BM[:, :width], turns_B, adapters=adapters, masks=masks)
        self._in_flight.append((packed, {index: (row, row.num_turns) for index, row in going.items()}))
        return True

    def _masks(self, rows: dict[int, Row]) -> dict[int, np.ndarray]:
        """Returns what guides allow next; a row whose guide fails ends."""
        masks = {}

        def ask(index: int, row: Row) -> None:
            words_W, wanted = np.asarray(row.guide.mask()), -(-self.config.vocab_size // 32)
            if words_W.shape != (wanted,) or words_W.dtype != np.uint32:
                raise ValueError(
                    f"a guide's mask must be {wanted} words of uint32, given {words_W.dtype}{words_W.shape}"
                )
            masks[index] = words_W

        for index, row in rows.items():
            if row.guide is not None:
                self._guarded(index, row, ask)
        return masks

    def _grow(self) -> None:
        """Gives every row that draws the pages of its next block, the oldest first; the youngest may have to leave."""
        for index in self._seats.oldest_first():
            while (row := self._seats.rows[index]) is not None and row.drawing and not self._seats.grow(index):
                self._preempt(self._seats.oldest_first()[-1])

    def _preempt(self, index: int) -> None:
        row = self._seats.rows[index]
        with self._wake:
            self._leave(index, whole_pages=True)
            self._queue.appendleft(row)
        row.num_read, row.num_judged, row.drawing, row.scores = 0, 0, False, []
        self._num_preempted += 1

    def _deliver(self, packed: jax.Array, drawing: dict[int, tuple[Row, int]]) -> None:
        """Hands out the tokens of a block, and frees the slots of rows that are done."""
        block = unpack(np.asarray(packed), num_tokens=self._device.tokens_per_block)
        for index, (row, turn) in drawing.items():
            if self._seats.rows[index] is not row or row.num_turns != turn:
                continue  # done, aborted or preempted before this block was read
            finish = FINISH_NAMES[block.finish_B[index]]
            event = tokens_event(row.handle.request, block, index, None if finish == "error" else finish)
            row.tokens += event.ids
            row.num_in_flight -= 1
            # Where drafts did not come true it is shorter than it could have been.
            most = 1 if row.guide is not None else self._device.tokens_per_block
            row.longest = min(len(row.tokens) + row.num_in_flight * most, row.total)
            self._num_drawn_tokens += len(event.ids)
            self._num_turns += int(block.turns_B[index])
            if event.ids:
                judged = row.num_cached // self.page_size
                self._device.judge(row.pages[row.num_judged : judged])
                row.num_judged = judged
                self._deliver_scores(row)
            if finish and finish != "error":
                self._device.judge(row.pages)
                self._leave(index, whole_pages=False)
                if row.session is not None:
                    row.session.end(row.tokens)
            if event.ids:
                row.handle.deliver(event)
            if finish == "error":
                self._fail(index, "the model's logits are not finite (NaN or infinite)")
            elif not finish and row.guide is not None:
                self._guarded(index, row, functools.partial(_guide_on, event.ids))

    def _deliver_scores(self, row: Row) -> None:
        """Hands out the scores of a prompt, before its first token."""
        if not row.scored:
            chunks = [unpack_scores(np.asarray(scores)[:count]) for count, scores in row.scores]
            row.handle.deliver(prompt_event(row.handle.request, chunks))
            row.scored, row.scores = True, []

    def _leave(self, index: int, *, whole_pages: bool) -> None:
        """Frees a slot; what its row did so far stays until the pages are needed."""
        self._seats.keep(index, whole_pages=whole_pages)
        self._seats.release(index)

    def _end(self, row: Row, finish: Finish, error: str | None = None) -> None:
        """Ends a request without further tokens. An aborted turn of a session counts as far as it was delivered."""
        if row.session is not None:
            row.session.end(row.tokens if finish == "aborted" and len(row.tokens) > row.num_prompt else None)
        row.handle.end(finish, error)

    def _fail(self, index: int, error: str) -> None:
        """Ends a request that failed; nobody is to begin with what it left unjudged."""
        row = self._seats.rows[index]
        self._seats.tree.forget(self._device.unjudged(row.pages))
        self._seats.release(index)
        self._end(row, "error", error)

    def _recover(self, error: Exception) -> None:
        """The device state is lost: requests in slots end with the error, those that wait are served afresh."""
        message = f"{type(error).__name__}: {error}"
        rows = list(self._seats.taken.values())
        try:
            self._device.reset()
        except Exception as again:
            with self._wake:
                self._closed = f"the engine stopped: its state could not be made anew: {again} (after {message})"
        self._forget_all()
        for row in rows:
            self._end(row, "error", message)
        if self._closed:
            self._end_all("error", self._closed)

    def _end_all(self, finish: Finish, error: str | None) -> None:
        for index, row in self._seats.taken.items():
            self._seats.release(index)
            self._end(row, finish, error)
        self._in_flight.clear()
        while self._queue:
            self._end(self._queue.popleft(), finish, error)


def _guide_on(ids: Sequence[int], index: int, row: Row) -> None:
    for token in ids:
        row.guide.take(token)
