"""Continuous batching: requests come and go while one compiled step serves a fixed number of slots. Token ids only.

    with Engine(params, config, max_context=1024) as engine:
        handle = engine.submit(Request(tokens=(1, 42, 7), max_new_tokens=32))
        for event in handle.events():
            print(event.ids)

The host decides who sits in which slot and which pages it owns; the device holds one DecodeState for all slots. Every
shape is fixed by the engine's settings, so after `warmup` nothing is compiled again.

B slots, S longest context, M pages of a row, C prompt chunk, F frequencies, I stop ids.
"""

import collections
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internjax.decode.generate import FINISH_NAMES, decoding_params
from internjax.decode.pages import PageAllocator
from internjax.decode.programs import (
    Admission,
    PromptChunk,
    admit,
    clear_pages,
    decode_block,
    empty_state,
    read_chunk,
    score_chunk,
    unpack,
    unpack_scores,
)
from internjax.decode.request import Finish, Handle, Request, check_options, prompt_event, tokens_event
from internjax.decode.sample import Limits, stack
from internjax.model import rope
from internjax.model.cache import CacheDType
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora

_SMALLEST_CHUNK = 16


class Stats(NamedTuple):
    """What the engine holds at this moment."""

    num_slots: int
    num_active: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_compiled: int
    """Programs compiled so far; constant after warm-up."""


@dataclasses.dataclass(eq=False)
class _Slot:
    """A request in its slot, as the host knows it."""

    handle: Handle
    pages: list[int]
    inv_freq_F: np.ndarray
    num_read: int = 0
    """Prompt tokens in the cache."""
    drawing: bool = False
    longest: int = 0
    """Upper bound of the row's length after all blocks dispatched so far."""
    scores: list[tuple[int, jax.Array]] = dataclasses.field(default_factory=list)
    """How many prompt tokens each chunk scored, and their scores; not delivered yet."""
    prompt_delivered: bool = False

    @property
    def total(self) -> int:
        """The longest that the row can become."""
        return len(self.handle.request.tokens) + self.handle.request.max_new_tokens


class Engine:
    """Slots, pages, a queue and the compiled programs that serve them.

    `start` (or the context manager) runs it in a thread of its own; without it `tick` drives it. Requests are admitted
    in order of arrival, when a slot and all pages they may ever need are free.
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
        cache_dtype: CacheDType | None = None,
        lora: Lora | None = None,
        tokens_per_dispatch: int = 4,
        prefill_chunk: int = 64,
        context_buckets: tuple[int, ...] = (),
        limits: Limits = Limits(),
    ):
        """Prepares the device state; compiles nothing yet.

        max_context: longest prompt and answer together of a request. num_pages: pages of the cache, all slots full by
        default. prefill_chunk: prompt tokens read at once. context_buckets: shorter contexts, in tokens, for which
        attention is compiled too; while all rows fit into one, a step reads no more of the cache than that. A row's
        results then agree with those of another width up to rounding only; with none, they do not depend on the other
        rows at all. limits: what one request may ask for.
        """
        sizes = {"max_context": max_context, "num_slots": num_slots, "page_size": page_size}
        sizes |= {"tokens_per_dispatch": tokens_per_dispatch, "prefill_chunk": prefill_chunk}
        wrong = [f"{name}={value}" for name, value in sizes.items() if value < 1]
        if wrong or min(limits) < 0 or any(not 1 <= bucket <= max_context for bucket in context_buckets):
            raise ValueError(
                f"engine sizes must be positive and context_buckets in 1..{max_context} (max_context); "
                f"given {', '.join(wrong)} {limits} context_buckets={context_buckets}"
            )
        if config.head != "lm":
            raise ValueError("a model with a scalar head scores and cannot generate; use one with head='lm'")
        self.config, self.max_context, self.num_slots, self.page_size = config, max_context, num_slots, page_size
        pages_per_row = -(-max_context // page_size)
        self.num_pages = num_slots * pages_per_row if num_pages is None else num_pages
        self._allocator = PageAllocator(self.num_pages)
        self._tokens_per_dispatch, self.limits = tokens_per_dispatch, limits
        self._widths = sorted({-(-bucket // page_size) for bucket in context_buckets} | {pages_per_row})
        smaller = (_SMALLEST_CHUNK << i for i in range(20))
        self._chunks = [*(size for size in smaller if size < prefill_chunk), prefill_chunk]
        self._params = jax.tree.map(jnp.asarray, decoding_params(params, config))
        self._lora = lora
        self._inv_freq_F = np.asarray(rope.inv_freq(config))
        self._empty_state = jax.jit(
            functools.partial(
                empty_state,
                config=config,
                num_slots=num_slots,
                max_context=max_context,
                num_pages=self.num_pages,
                page_size=page_size,
                cache_dtype=cache_dtype or config.dtype,
                limits=limits,
            )
        )
        self._read_chunk = jax.jit(functools.partial(read_chunk, config=config), donate_argnums=1)
        self._score_chunk = jax.jit(
            functools.partial(score_chunk, config=config, num_top=limits.logprobs), donate_argnums=1
        )
        # Partials of nothing: jit shares the cache of one function, and this engine counts its own programs.
        self._admit = jax.jit(functools.partial(admit), donate_argnums=0)
        self._clear_pages = jax.jit(functools.partial(clear_pages), donate_argnums=0)
        self._decode_block = jax.jit(
            functools.partial(decode_block, config=config, num_tokens=tokens_per_dispatch), donate_argnums=1
        )
        self._reset()
        self._queue: collections.deque[Handle] = collections.deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed: str | None = None
        self._warm = False

    def _reset(self) -> None:
        """Begins with empty slots and a fresh device state."""
        B, pages_per_row = self.num_slots, self._widths[-1]
        self._slots: list[_Slot | None] = [None] * B
        self._page_table_BM = np.full((B, pages_per_row), self.num_pages, np.int32)
        self._in_flight: collections.deque[tuple[jax.Array, dict[int, _Slot]]] = collections.deque()
        self._state = self._empty_state()

    # From any thread.

    def submit(self, request: Request) -> Handle:
        """Returns the handle of a request that will be served; raises ValueError for one that never can be."""
        self._check(request)
        handle = Handle(request, self._notify)
        with self._wake:
            if self._closed:
                raise RuntimeError(self._closed)
            self._queue.append(handle)
            self._wake.notify_all()
        return handle

    def stats(self) -> Stats:
        """Returns counts of slots, requests, pages and compiled programs."""
        programs = (self._read_chunk, self._score_chunk, self._admit, self._clear_pages, self._decode_block)
        return Stats(
            self.num_slots,
            sum(slot is not None for slot in self._slots),
            len(self._queue),
            self.num_pages,
            self._allocator.num_free,
            sum(program._cache_size() for program in programs),
        )

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _num_pages_needed(self, request: Request) -> int:
        # The last token drawn is never fed, so it needs no place in the cache.
        return -(-(len(request.tokens) + request.max_new_tokens - 1) // self.page_size)

    def _check(self, request: Request) -> None:
        total = len(request.tokens) + request.max_new_tokens
        if not request.tokens:
            raise ValueError("the prompt is empty and has nothing to continue: begin it with the first token")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, given {request.max_new_tokens}")
        if total > self.max_context:
            raise ValueError(
                f"a prompt of {len(request.tokens)} tokens and {request.max_new_tokens} new ones make {total}; this "
                f"engine serves up to {self.max_context}. Shorten the prompt or ask for fewer tokens."
            )
        if self._num_pages_needed(request) > self.num_pages:
            raise ValueError(
                f"{total} tokens need {self._num_pages_needed(request)} pages of {self.page_size}; the whole cache has "
                f"{self.num_pages}. Shorten the request or start the engine with more pages."
            )
        check_options(request, self.limits, vocab_size=self.config.vocab_size)

    # Lifetime.

    def warmup(self, on_program: Callable[[str, float], None] | None = None) -> None:
        """Compiles every program by running it without effect; call it while no request is served.

        `on_program` is told the name of each and the seconds it took.
        """
        assert all(slot is None for slot in self._slots), "warm-up runs before requests are served"
        nobody_B = np.zeros(self.num_slots, bool)
        pages_M = np.full(self._widths[-1], self.num_pages, np.int32)
        # Twice: the first round may still change how the state's buffers are bound to their device.
        for report in (on_program, None):
            beginnings = [(size, self._width(size)) for size in self._chunks[:-1]]
            for size, width in beginnings + [(self._chunks[-1], width) for width in self._widths]:
                with _timed(f"read {size} prompt tokens, context {width * self.page_size}", report):
                    self._read(np.zeros(size, np.int32), pages_M[None, :width], 0, 0, self._inv_freq_F)
            with _timed(f"score {self._chunks[-1]} prompt tokens", report):
                zeros_C = np.zeros(self._chunks[-1], np.int32)
                self._score(zeros_C, zeros_C, pages_M[None], 0, 0, self._inv_freq_F, 1.0)
            for width in self._widths:
                with _timed(f"draw {self._tokens_per_dispatch} tokens, context {width * self.page_size}", report):
                    self._block(nobody_B, width)
            with _timed("admit and clear", report):
                slot = _Slot(Handle(Request((0,), 1), self._notify), [], self._frequencies(self.max_context))
                self._start_drawing(0, slot)
                self._state = self._clear_pages(self._state, pages_M)
            np.asarray(self._block(nobody_B, self._widths[-1]))
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
                self._wake.wait_for(lambda: self._closed or self._queue or self._in_flight or any(self._slots))
                if self._closed:
                    return
            self.tick()

    # In the thread that serves.

    def tick(self) -> bool:
        """Does one round of admission, prompt reading and drawing; returns whether there was anything to do."""
        try:
            self._drop_aborted()
            self._admit_waiting()
            for index, slot in enumerate(self._slots):
                if slot is not None and not slot.drawing:
                    self._guarded(index, slot, self._read_prompt)
            # The next block is dispatched before the last one is read, so the device never waits for the host.
            dispatched = self._dispatch()
            if self._in_flight and (len(self._in_flight) > 1 or not dispatched):
                self._deliver(*self._in_flight.popleft())
        except Exception as error:
            self._recover(error)
        return bool(self._queue or self._in_flight or any(self._slots))

    def _drop_aborted(self) -> None:
        for index, slot in enumerate(self._slots):
            if slot is not None and slot.handle.aborted:
                self._drop(index, "aborted", None)
        with self._wake:
            aborted = [handle for handle in self._queue if handle.aborted]
            for handle in aborted:
                self._queue.remove(handle)
        for handle in aborted:
            handle.end("aborted")

    def _admit_waiting(self) -> None:
        while self._queue and None in self._slots:
            request = self._queue[0].request
            pages = self._allocator.allocate(self._num_pages_needed(request))
            if pages is None:
                return  # in order: a small request does not overtake a large one for ever
            with self._wake:
                handle = self._queue.popleft()
            index = self._slots.index(None)
            slot = _Slot(handle, pages, self._inv_freq_F)
            self._slots[index] = slot
            self._guarded(index, slot, self._place)

    def _guarded(self, index: int, slot: _Slot, work: Callable[[int, _Slot], None]) -> None:
        """Runs the work of one request; if it fails, that request ends and the others go on."""
        try:
            work(index, slot)
        except Exception as error:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
                raise  # the failed program took the device state with it
            self._drop(index, "error", f"{type(error).__name__}: {error}")

    def _place(self, index: int, slot: _Slot) -> None:
        slot.inv_freq_F = self._frequencies(slot.total)
        self._page_table_BM[index, : len(slot.pages)] = slot.pages

    def _frequencies(self, length: int) -> np.ndarray:
        """Returns the rotary frequencies of a request, fixed by its longest possible length."""
        if length <= self.config.max_position_embeddings:
            return self._inv_freq_F
        return np.asarray(rope.inv_freq(self.config, length=length))

    def _width(self, length: int) -> int:
        return next(width for width in self._widths if width * self.page_size >= length or width == self._widths[-1])

    def _read(self, tokens_C: np.ndarray, page_table_1M, start: int, end: int, inv_freq_F) -> None:
        chunk = _chunk(tokens_C, page_table_1M, start, end, inv_freq_F)
        self._state = self._read_chunk(self._params, self._state, chunk, self._lora)

    def _score(self, tokens_C, next_C, page_table_1M, start: int, end: int, inv_freq_F, temperature: float):
        chunk = _chunk(tokens_C, page_table_1M, start, end, inv_freq_F)
        temperature_1 = np.array([temperature or 1.0], np.float32)
        self._state, packed = self._score_chunk(
            self._params, self._state, chunk, next_C[None], temperature_1, self._lora
        )
        packed.copy_to_host_async()
        return packed

    def _read_prompt(self, index: int, slot: _Slot) -> None:
        """Reads the next chunk of a prompt; after the last one the slot draws. The last token is the step's to feed."""
        tokens, start = slot.handle.request.tokens, slot.num_read
        end = min(start + self._chunks[-1], len(tokens) - 1)
        if end > start and slot.handle.request.prompt_logprobs is not None:
            # One shape of its own, so that scoring costs one program more.
            tokens_C, next_C = np.zeros((2, self._chunks[-1]), np.int32)
            tokens_C[: end - start], next_C[: end - start] = tokens[start:end], tokens[start + 1 : end + 1]
            page_table_1M = self._page_table_BM[index : index + 1].copy()
            temperature = slot.handle.request.sampling.temperature
            scores = self._score(tokens_C, next_C, page_table_1M, start, end, slot.inv_freq_F, temperature)
            slot.scores.append((end - start, scores))
            slot.num_read = end
        elif end > start:
            # Smaller chunks are for short prompts only, where they need one width: few programs to compile.
            size = self._chunks[-1] if start else next(size for size in self._chunks if size >= end)
            width = self._width(end if size == self._chunks[-1] else size)
            tokens_C = np.zeros(size, np.int32)
            tokens_C[: end - start] = tokens[start:end]
            page_table_1M = self._page_table_BM[index : index + 1, :width].copy()
            self._read(tokens_C, page_table_1M, start, end, slot.inv_freq_F)
            slot.num_read = end
        if end == len(tokens) - 1:
            self._start_drawing(index, slot)

    def _start_drawing(self, index: int, slot: _Slot) -> None:
        request = slot.handle.request
        length = len(request.tokens)
        tokens_S = np.zeros(self.max_context, np.int32)
        tokens_S[:length] = request.tokens
        stop_ids_I = np.full(self.limits.stop_ids, -1, np.int32)
        stop_ids_I[: len(request.stop_ids)] = request.stop_ids
        new = Admission(
            np.array(index, np.int32),
            tokens_S,
            np.array(length, np.int32),
            np.array(len(request.tokens), np.int32),
            np.array(slot.total, np.int32),
            stop_ids_I,
            slot.inv_freq_F,
            stack([request.sampling], limits=self.limits),
            np.array(bool(request.logprobs)),
        )
        self._state = self._admit(self._state, new)
        slot.drawing, slot.longest = True, length

    def _block(self, keep_B: np.ndarray, width: int) -> jax.Array:
        # A copy: the host changes its table while the device may still read what it was given.
        page_table_BM = self._page_table_BM[:, :width].copy()
        self._state, packed = self._decode_block(self._params, self._state, page_table_BM, keep_B, self._lora)
        return packed

    def _dispatch(self) -> bool:
        """Sends off one block for all slots that draw; returns whether there were any."""
        slots = enumerate(self._slots)
        drawing = {i: slot for i, slot in slots if slot is not None and slot.drawing and slot.longest < slot.total}
        if not drawing:
            return False
        for slot in drawing.values():
            slot.longest = min(slot.longest + self._tokens_per_dispatch, slot.total)
        keep_B = np.array([index in drawing for index in range(self.num_slots)])
        packed = self._block(keep_B, self._width(max(slot.longest for slot in drawing.values())))
        packed.copy_to_host_async()
        self._in_flight.append((packed, drawing))
        return True

    def _deliver(self, packed: jax.Array, drawing: dict[int, _Slot]) -> None:
        """Hands out the tokens of a block, and frees the slots of rows that are done."""
        block = unpack(np.asarray(packed), num_tokens=self._tokens_per_dispatch)
        for index, slot in drawing.items():
            if self._slots[index] is not slot:
                continue  # done or aborted before this block was read
            request, finish = slot.handle.request, FINISH_NAMES[block.finish_B[index]]
            if block.counts_B[index]:
                if request.prompt_logprobs is not None and not slot.prompt_delivered:
                    chunks = [unpack_scores(np.asarray(scores)[:count]) for count, scores in slot.scores]
                    slot.handle.deliver(prompt_event(request, chunks))
                    slot.prompt_delivered, slot.scores = True, []
                slot.handle.deliver(tokens_event(request, block, index, None if finish == "error" else finish))
            if finish == "error":
                self._drop(index, "error", "the model's logits are not finite (NaN or infinite)")
            elif finish:
                self._release(index)

    def _release(self, index: int) -> None:
        self._allocator.free(self._slots[index].pages)
        self._slots[index] = None
        self._page_table_BM[index] = self.num_pages

    def _drop(self, index: int, finish: Finish, error: str | None) -> None:
        """Ends one request early. What it left in its pages was never judged, so nobody gets them uncleared."""
        slot, pages_M = self._slots[index], self._page_table_BM[index].copy()
        self._release(index)
        slot.handle.end(finish, error)
        self._state = self._clear_pages(self._state, pages_M)

    def _recover(self, error: Exception) -> None:
        """The device state is lost: requests in slots end with the error, those that wait are served afresh."""
        message = f"{type(error).__name__}: {error}"
        for index, slot in enumerate(self._slots):
            if slot is not None:
                self._release(index)
                slot.handle.end("error", message)
        try:
            self._reset()
        except Exception as again:
            with self._wake:
                self._closed = f"the engine stopped: its state could not be made anew: {again} (after {message})"
            self._end_all("error", self._closed)

    def _end_all(self, finish: Finish, error: str | None) -> None:
        for index, slot in enumerate(self._slots):
            if slot is not None:
                self._release(index)
                slot.handle.end(finish, error)
        self._in_flight.clear()
        while self._queue:
            self._queue.popleft().end(finish, error)


def _chunk(tokens_C: np.ndarray, page_table_1M, start: int, end: int, inv_freq_F) -> PromptChunk:
    starts_and_ends = np.array([[start], [end]], np.int32)
    return PromptChunk(tokens_C[None], page_table_1M, *starts_and_ends, inv_freq_F[None])


@contextlib.contextmanager
def _timed(name: str, report: Callable[[str, float], None] | None):
    """Tells `report` how long the block took."""
    start = time.perf_counter()
    yield
    if report is not None:
        report(name, time.perf_counter() - start)
