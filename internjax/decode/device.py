"""The device's side of the engine: the state of all slots and the compiled programs that change it.

Every shape is fixed at the start, so after `warmup` nothing is compiled again. A call is dispatched and not awaited;
calls take effect in their order.

S longest context, M pages of a row, R rows that are read or admitted together, C prompt chunk, F frequencies,
I stop ids.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internjax import sharding
from internjax.decode.adapters import AdapterPlaces, RowAdapters
from internjax.decode.generate import DecodeState, decoding_params
from internjax.decode.prefix_tree import Moves
from internjax.decode.programs import (
    ROWS_TOGETHER,
    Admission,
    PromptChunk,
    Weights,
    admit,
    block_tokens,
    clear_pages,
    copy_page,
    decode_block,
    empty_state,
    load_pages,
    read_chunk,
    read_shapes,
    save_pages,
    score_chunk,
)
from internjax.decode.sample import Allowed, Limits, SamplingParams, stack
from internjax.decode.speculate import DraftModel, Speculation
from internjax.model import decoder, rope
from internjax.model.cache import CacheDType
from internjax.model.config import ModelConfig
from internjax.model.lora import ATTENTION_TARGETS, FFN_TARGETS, Lora, with_gains

_PAGES_AT_ONCE = 16
"""Pages that travel to or from the host's memory in one call."""


class AdapterRoom(NamedTuple):
    """How many adapters can be loaded at once, the largest rank of one, and the kernels that one may change."""

    num_places: int
    rank: int = 64
    targets: tuple[str, ...] = ATTENTION_TARGETS + FFN_TARGETS


class Part(NamedTuple):
    """The next tokens of a prompt, the position of the first of them, and the row that they belong to."""

    tokens: Sequence[int]
    pages_M: np.ndarray
    start: int
    inv_freq_F: np.ndarray
    adapter: int = -1


class Newcomer(NamedTuple):
    """A row whose tokens are in the cache, up to the last one, and which begins to draw."""

    slot: int
    tokens: Sequence[int]
    num_prompt: int
    """Tokens from here on are the answer's."""
    total: int
    stop_ids: Sequence[int]
    inv_freq_F: np.ndarray
    sampling: SamplingParams
    wants_top: bool


class Compiled(NamedTuple):
    """A program that warm-up has compiled: the `number`th of `count`."""

    name: str
    seconds: float
    number: int
    count: int


class Device:
    """One DecodeState and its programs."""

    def __init__(
        self,
        params: dict,
        config: ModelConfig,
        *,
        max_context: int,
        num_slots: int,
        page_size: int,
        num_pages: int,
        cache_dtype: CacheDType,
        lora: Lora | None,
        adapter_room: AdapterRoom | None,
        tokens_per_dispatch: int,
        prefill_chunk: int,
        context_buckets: Sequence[int],
        row_buckets: Sequence[int],
        reads_together: bool,
        exact: bool,
        limits: Limits,
        saves_pages: bool,
        speculation: Speculation | None,
        draft_params: dict | None,
    ):
        """Compiles nothing yet.

        lora: one adapter for all rows. adapter_room: places for several, each row having its own (`adapters`).
        row_buckets: how many slots a block may be for, besides all: the first ones, as many as hold a row.
        reads_together: short parts of several prompts are read at once (`read_shapes`).
        exact: programs that compute are compiled with `exact_options`.
        saves_pages: contents of pages can be fetched to the host's memory and back. draft_params: of a DraftModel.
        """
        self.config, self._max_context, self._num_slots, self._page_size = config, max_context, num_slots, page_size
        self._num_pages, self._limits, self._saves_pages = num_pages, limits, saves_pages
        self.pages_per_row = -(-max_context // page_size)
        self.turns_per_block = tokens_per_dispatch
        self.tokens_per_block = block_tokens(tokens_per_dispatch, speculation)
        """The most that a row can grow by in one block."""
        self.widths = sorted({-(-bucket // page_size) for bucket in context_buckets} | {self.pages_per_row})
        self._row_counts = sorted({*row_buckets, num_slots})
        self._read_shapes = read_shapes(prefill_chunk, num_slots=num_slots, together=reads_together)
        self.chunks = sorted({size for _, size in self._read_shapes})
        self._admitted = 1, min(ROWS_TOGETHER, num_slots)
        params = jax.tree.map(jnp.asarray, decoding_params(params, config))
        self._mesh, self._lora = sharding.mesh_of(params), None if lora is None else with_gains(lora, params)
        if (draft := _draft(speculation)) is not None:
            draft_params = jax.device_put(decoding_params(draft_params, draft.config), sharding.replicated(self._mesh))
        self._weights = Weights(*(each and decoder.with_layers_apart(each) for each in (params, draft_params)))
        self.adapters = None
        if adapter_room is not None:
            self.adapters = AdapterPlaces(params, **adapter_room._asdict(), dtype=config.dtype)
        self._programs = _programs(
            config,
            self._mesh,
            num_slots=num_slots,
            max_context=max_context,
            num_pages=num_pages,
            page_size=page_size,
            cache_dtype=cache_dtype,
            limits=limits,
            num_turns=tokens_per_dispatch,
            speculation=speculation,
            options=exact_options(self._mesh) if exact else (),
        )
        self._num_compiled = 0
        # On the device: most blocks have no guide in them.
        self._all_allowed = {count: self._allowed(count, {}) for count in self._row_counts}
        self.moves = Moves(self._renew, self._copy, self._save, self._load, self._hand_over)
        self.reset()

    def reset(self) -> None:
        """Begins with empty slots and empty pages."""
        # Pages with contents whose results were not looked at yet: they may hold NaN.
        self._unjudged: set[int] = set()
        self._state = self._run(self._programs.empty_state)

    def _run(self, program: Callable, *arguments):
        known = program._cache_size()
        with sharding.use(self._mesh):
            results = program(*arguments)
        self._num_compiled += program._cache_size() - known
        return results

    @property
    def lost(self) -> bool:
        """Whether a program failed and took the state with it."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state))

    @property
    def num_compiled(self) -> int:
        """Programs compiled for it so far; what an earlier engine of the same kind has left is not compiled again."""
        return self._num_compiled + (0 if self.adapters is None else self.adapters.num_compiled)

    def width(self, length: int) -> int:
        """Returns the pages of a row that a token drawn attends to while no row is longer than `length`."""
        return next(width for width in self.widths if width * self._page_size >= length or width == self.widths[-1])

    # Rows.

    def _rows(self, adapter_ids: Sequence[int]) -> Lora | RowAdapters | None:
        if self.adapters is None:
            return self._lora
        return RowAdapters(self.adapters.stacked, np.array(adapter_ids, np.int32))

    def read(self, parts: Sequence[Part]) -> None:
        """Reads parts of prompts, each of at most `chunks[-1]` tokens, into the pages of their rows."""
        # A smaller chunk is for the end of a prompt, or for a turn of a session, wherever it starts.
        of_size: dict[int, list[Part]] = {}
        for part in parts:
            of_size.setdefault(next(size for size in self.chunks if size >= len(part.tokens)), []).append(part)
        for size, alike in of_size.items():
            most = max(count for count, each in self._read_shapes if each == size)
            while alike:
                count = most if len(alike) > most // 2 else 1
                self._read(count, size, alike[:count])
                del alike[:count]

    def _read(self, count: int, size: int, parts: Sequence[Part]) -> None:
        chunk, rows = self._chunk(count, size, parts), self._rows(_filled([part.adapter for part in parts], count, -1))
        self._state = self._run(self._programs.read_chunk, self._weights, self._state, chunk, rows)

    def _chunk(self, count: int, size: int, parts: Sequence[Part]) -> PromptChunk:
        """Returns the parts as one chunk, and for the rest of its `count` rows nothing that would be written."""
        tokens_RC = np.zeros((count, size), np.int32)
        # A copy: the host changes its table while the device may still read what it was given.
        table_RM = np.full((count, self.pages_per_row), self._num_pages, np.int32)
        start_R, end_R = np.zeros((2, count), np.int32)
        inv_freq_RF = np.zeros((count, len(parts[0].inv_freq_F)), np.float32)
        for row, part in enumerate(parts):
            start_R[row], end_R[row] = part.start, part.start + len(part.tokens)
            tokens_RC[row, : len(part.tokens)] = part.tokens
            table_RM[row], inv_freq_RF[row] = part.pages_M, part.inv_freq_F
        return PromptChunk(tokens_RC, table_RM, start_R, end_R, inv_freq_RF)

    def score(self, part: Part, following: Sequence[int], *, temperature: float) -> jax.Array:
        """Does what `read` does; returns the packed Scores of the tokens that follow each, on their way to the host."""
        # One shape of its own, so that scoring costs one program more.
        chunk, next_C = self._chunk(1, self.chunks[-1], [part]), np.zeros(self.chunks[-1], np.int32)
        next_C[: len(following)] = following
        temperature_1, rows = np.array([temperature or 1.0], np.float32), self._rows([part.adapter])
        self._state, packed = self._run(
            self._programs.score_chunk, self._weights, self._state, chunk, next_C[None], temperature_1, rows
        )
        packed.copy_to_host_async()
        return packed

    def admit(self, rows: Sequence[Newcomer]) -> None:
        """Lets slots draw for rows that were read."""
        count = self._admitted[len(rows) > 1]
        for start in range(0, len(rows), count):
            self._admit(count, rows[start : start + count])

    def _admit(self, count: int, rows: Sequence[Newcomer]) -> None:
        self._state = self._run(self._programs.admit, self._state, self._admission(count, rows))

    def _admission(self, count: int, rows: Sequence[Newcomer]) -> Admission:
        tokens_RS = np.zeros((count, self._max_context), np.int32)
        stop_ids_RI = np.full((count, self._limits.stop_ids), -1, np.int32)
        for index, row in enumerate(rows):
            tokens_RS[index, : len(row.tokens)], stop_ids_RI[index, : len(row.stop_ids)] = row.tokens, row.stop_ids
        # What is nobody's is for no slot.
        rows = _filled(rows, count, rows[0]._replace(slot=self._num_slots))
        return Admission(
            slot_R=np.array([row.slot for row in rows], np.int32),
            tokens_RS=tokens_RS,
            length_R=np.array([len(row.tokens) for row in rows], np.int32),
            prompt_length_R=np.array([row.num_prompt for row in rows], np.int32),
            max_length_R=np.array([row.total for row in rows], np.int32),
            stop_ids_RI=stop_ids_RI,
            inv_freq_RF=np.stack([row.inv_freq_F for row in rows]),
            sampling_R=stack([row.sampling for row in rows], limits=self._limits),
            top_asked_R=np.array([row.wants_top for row in rows]),
        )

    def block(
        self,
        page_table_BM: np.ndarray,
        turns_B: np.ndarray,
        *,
        adapters: Sequence[int],
        masks: Mapping[int, np.ndarray],
    ) -> jax.Array:
        """Draws for the slots with turns (`decode_block`); returns the packed Block, on its way to the host.

        The Block is of the first slots, of enough of them to hold all that are not empty. masks: of slots with a guide,
        the words of their Allowed.
        """
        last = max(np.flatnonzero(turns_B >= 0), default=0)
        count = next(count for count in self._row_counts if count > last)
        return self._block(count, page_table_BM, turns_B, adapters=adapters, masks=masks)

    def _block(self, count: int, page_table_BM: np.ndarray, turns_B: np.ndarray, *, adapters, masks) -> jax.Array:
        allowed = self._allowed(count, masks) if masks else self._all_allowed[count]
        # A copy: the host changes its table while the device may still read what it was given.
        table_BM, rows = page_table_BM[:count].copy(), self._rows(adapters[:count])
        self._state, packed = self._run(
            self._programs.decode_block, self._weights, self._state, table_BM, turns_B[:count], allowed, rows
        )
        packed.copy_to_host_async()
        return packed

    def _allowed(self, count: int, masks: Mapping[int, np.ndarray]) -> Allowed:
        words_BW = np.full((count, -(-self.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        guided_B = np.zeros(count, bool)
        for index, words_W in masks.items():
            words_BW[index], guided_B[index] = words_W, True
        # Placed, with masks and without: an array of the host would make another program.
        return jax.device_put(Allowed(words_BW, guided_B), sharding.replicated(self._mesh))

    # Pages.

    def judge(self, pages: Sequence[int]) -> None:
        """Notes that what these pages hold led to finite logits."""
        self._unjudged.difference_update(pages)

    def unjudged(self, pages: Sequence[int]) -> list[int]:
        """Returns those of the pages whose contents were not judged."""
        return [page for page in pages if page in self._unjudged]

    def _renew(self, pages: list[int]) -> None:
        left = self.unjudged(pages)
        for start in range(0, len(left), self.pages_per_row):
            pages_M = np.full(self.pages_per_row, self._num_pages, np.int32)
            part = left[start : start + self.pages_per_row]
            pages_M[: len(part)] = part
            self._state = self._run(self._programs.clear_pages, self._state, pages_M)
        self._unjudged.update(pages)

    def _hand_over(self, page: int) -> bool:
        if page in self._unjudged:
            return False
        self._unjudged.add(page)
        return True

    def _copy(self, source: int, target: int, count: int) -> None:
        self._state = self._run(
            self._programs.copy_page, self._state, np.int32(source), np.int32(target), np.int32(count)
        )

    def _parts(self, pages: list[int]) -> list[np.ndarray]:
        padded = np.full(-(-len(pages) // _PAGES_AT_ONCE) * _PAGES_AT_ONCE, self._num_pages, np.int32)
        padded[: len(pages)] = pages
        return list(padded.reshape(-1, _PAGES_AT_ONCE))

    def _save(self, pages: list[int]) -> list[Any]:
        fetched = [
            jax.device_get(self._run(self._programs.save_pages, self._state, part_W)) for part_W in self._parts(pages)
        ]
        # Copies: a page that stays must not hold on to those that were fetched with it.
        return [[x[i].copy() for x in part] for part in fetched for i in range(_PAGES_AT_ONCE)][: len(pages)]

    def _load(self, saved: list[Any], pages: list[int]) -> None:
        for index, part_W in enumerate(self._parts(pages)):
            part = saved[index * _PAGES_AT_ONCE : (index + 1) * _PAGES_AT_ONCE]
            part += [part[-1]] * (_PAGES_AT_ONCE - len(part))
            self._state = self._run(self._programs.load_pages, self._state, part_W, [np.stack(x) for x in zip(*part)])

    # Lifetime.

    def warmup(self, on_program: Callable[[Compiled], None] | None = None) -> None:
        """Compiles every program by running it without effect; `on_program` is told of each."""
        nobody_B, no_adapters = np.full(self._num_slots, -1, np.int32), [-1] * self._num_slots
        table_BM = np.full((self._num_slots, self.pages_per_row), self._num_pages, np.int32)
        draw = functools.partial(self._block, turns_B=nobody_B, adapters=no_adapters, masks={})
        programs = self._named_programs(table_BM, draw)
        # Twice: the first round may still change how the state's buffers are bound to their device.
        for report in (on_program, None):
            for number, (name, run) in enumerate(programs.items(), start=1):
                start = time.perf_counter()
                run()
                if report is not None:
                    report(Compiled(name, time.perf_counter() - start, number, len(programs)))
            np.asarray(draw(self._num_slots, table_BM))

    def _named_programs(
        self, table_BM: np.ndarray, draw: Callable[[int, np.ndarray], jax.Array]
    ) -> dict[str, Callable[[], Any]]:
        """Returns by name what runs every program once, for nobody."""
        inv_freq_F = np.asarray(rope.inv_freq(self.config))
        nothing = Part([], table_BM[0], 0, inv_freq_F)
        nobody = Newcomer(self._num_slots, [], 0, 0, [], inv_freq_F, SamplingParams(), False)

        def score() -> None:
            self.score(nothing, [], temperature=1.0)

        def admit_clear_copy() -> None:
            for count in self._admitted:
                self._admit(count, [nobody])
            self._state = self._run(self._programs.clear_pages, self._state, table_BM[0])
            self._copy(0, self._num_pages, 0)

        programs: dict[str, Callable[[], Any]] = {
            f"read {count} x {size} prompt tokens": functools.partial(self._read, count, size, [nothing])
            for count, size in self._read_shapes
        }
        programs[f"score {self.chunks[-1]} prompt tokens"] = score
        programs |= {
            f"draw {self.tokens_per_block} tokens for {count} answers, context {width * self._page_size}": (
                functools.partial(draw, count, table_BM[:, :width])
            )
            for count in self._row_counts
            for width in self.widths
        }
        programs["admit, clear and copy"] = admit_clear_copy
        if self._saves_pages:
            programs["save and load pages"] = lambda: self._load(self._save([0]), [self._num_pages])
        if self.adapters is not None:
            programs["load an adapter"] = self.adapters.warmup
        return programs


class _Programs(NamedTuple):
    """What changes the state, compiled where it is called for the first time with shapes."""

    empty_state: Callable
    read_chunk: Callable
    admit: Callable
    clear_pages: Callable
    copy_page: Callable
    load_pages: Callable
    save_pages: Callable
    score_chunk: Callable
    decode_block: Callable


def exact_options(mesh: Mesh) -> tuple[tuple[str, bool], ...]:
    """Returns the options, name and value, that XLA compiles the programs of exact mode with, for the mesh's devices.

    That every block and chunk has one shape is what makes an answer the same in any company; these fix what a shape
    leaves open. `xla_allow_excess_precision` off, on all devices: what the model computes in bfloat16 is rounded after
    every operation, and not only where XLA's fusions happen to end. `xla_gpu_deterministic_ops` on, on a GPU: no
    operation whose result depends on which thread comes first, and no kernel that is chosen by how long a trial took
    (XLA turns its autotuning off with it), so another process computes with the same ones. What the second costs has
    not been measured.
    """
    options = (("xla_allow_excess_precision", False),)
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    return (*options, ("xla_gpu_deterministic_ops", True)) if is_gpu else options


@functools.lru_cache(maxsize=16)
def _programs(
    config: ModelConfig,
    mesh: Mesh,
    *,
    num_slots: int,
    max_context: int,
    num_pages: int,
    page_size: int,
    cache_dtype: CacheDType,
    limits: Limits,
    num_turns: int,
    speculation: Speculation | None,
    options: tuple[tuple[str, bool], ...],
) -> _Programs:
    """Returns the programs of a kind of engine. They stay when it ends: the next one of its kind starts at once.

    options: XLA's, of the programs that compute; the others move what is there.
    """
    draft = _draft(speculation)
    begin = functools.partial(
        empty_state,
        config=config,
        num_slots=num_slots,
        max_context=max_context,
        num_pages=num_pages,
        page_size=page_size,
        cache_dtype=cache_dtype,
        limits=limits,
        draft=draft,
    )
    placed = _placed(jax.eval_shape(begin), config, mesh)
    # Partials of nothing: jit shares the cache of one function, and these programs are counted.
    program = functools.partial(jax.jit, out_shardings=placed)
    compute = functools.partial(jax.jit, donate_argnums=1, compiler_options=dict(options) or None)
    with_result = functools.partial(compute, out_shardings=(placed, sharding.replicated(mesh)))
    return _Programs(
        empty_state=program(begin),
        read_chunk=compute(functools.partial(read_chunk, config=config, draft=draft), out_shardings=placed),
        admit=program(functools.partial(admit), donate_argnums=0),
        clear_pages=program(functools.partial(clear_pages), donate_argnums=0),
        copy_page=program(functools.partial(copy_page), donate_argnums=0),
        load_pages=program(functools.partial(load_pages), donate_argnums=0),
        save_pages=jax.jit(functools.partial(save_pages)),
        score_chunk=with_result(
            functools.partial(score_chunk, config=config, num_top=limits.logprobs, draft=draft),
        ),
        decode_block=with_result(
            functools.partial(decode_block, config=config, num_turns=num_turns, speculation=speculation),
        ),
    )


def _draft(speculation: Speculation | None) -> DraftModel | None:
    return speculation if isinstance(speculation, DraftModel) else None


def _placed(state: DecodeState, config: ModelConfig, mesh: Mesh) -> DecodeState:
    """Returns where the state lies on a mesh: key/value heads are cut over `tensor`, all else is on every device."""
    others = {axis: size for axis, size in mesh.shape.items() if axis != "tensor" and size > 1}
    if others:
        raise ValueError(
            f"an engine cuts a model over the mesh axis tensor alone; given {others}. For more answers at once start "
            "more engines."
        )
    if config.num_kv_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"{mesh.shape['tensor']} devices cannot share {config.num_kv_heads} key/value heads evenly; use a number "
            "that divides them"
        )

    def place(leaf):
        return NamedSharding(mesh, PartitionSpec(*(None,) * 3, "tensor") if leaf.ndim > 3 else PartitionSpec())

    # The model that drafts is small: every device has all of it.
    everything = jax.tree.map(lambda leaf: sharding.replicated(mesh), state)
    return dataclasses.replace(everything, cache=jax.tree.map(place, state.cache))


def _filled(rows: Sequence[Any], count: int, nobody: Any) -> list[Any]:
    return [*rows, *[nobody] * (count - len(rows))]
