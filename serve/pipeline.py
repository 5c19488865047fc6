"""Text in, text out over the engine: rendering, sampling options, incremental text, stop strings, tool calls.

    with Pipeline(open_model("runs/tiny")) as pipeline:
        for event in pipeline.chat([Message("user", "What is 2 + 2?")], Params(max_tokens=64)):
            ...  # Delta(text, tokens) as it comes, CallEnd(call) where a tool is called, Result(...) at the end

The engine knows token ids only; everything that is text is here. Stop strings watch the answer's text, not the body of
a tool call. A tool call ends its answer, as in InternLM2's protocol.
"""

from __future__ import annotations

import collections
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import jax

from internjax.decode.engine import Engine
from internjax.decode.request import Handle, Request
from internjax.decode.sample import SamplingParams
from internjax.decode.sizing import fitting_pages, page_bytes
from internjax.hf.open import Model
from internjax.model.cache import CacheDType
from internjax.text import chat as protocol
from internjax.text.chat import CallBroken, CallDelta, CallEnd, CallStart, TextDelta
from internjax.text.message import INTERPRETER_PROMPT, Chat, Message, ToolCall, tools_message
from internjax.text.tokenizer import ACTION_END, ACTION_START, INTERPRETER, PLUGIN, StreamDecoder, Tokenizer
from serve.stops import StopStrings

_MARKER_OF = {"interpreter": INTERPRETER, "plugin": PLUGIN}
_CALL_MARKERS = (ACTION_START, ACTION_END, PLUGIN, INTERPRETER)


@dataclass(frozen=True)
class Params:
    """How one answer is generated. `max_tokens` None: until the context is full. `seed` None: a random one."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self):
        _sampling_of(self)  # which refuses what cannot be sampled with
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, or None, given {self.max_tokens!r}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a tuple of strings that are not empty, given {self.stop!r}")


def _sampling_of(params: Params) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        seed=secrets.randbits(32) if params.seed is None else params.seed,
    )


class ContextTooLong(ValueError):
    """The prompt and the tokens asked for do not fit into the context."""


class Token(NamedTuple):
    """A generated token: `text` is what it added to the answer, from character `offset` on (the texts of all tokens
    joined are the answer; a token that only begins a character adds nothing)."""

    id: int
    text: str
    logprob: float
    offset: int


class Delta(NamedTuple):
    """More of the answer's text, and the tokens that are now complete (empty unless `Params.logprobs`)."""

    text: str
    tokens: tuple[Token, ...]


class Result(NamedTuple):
    """The whole answer. `ids` are all generated ids, the stop id included; `tokens` are those of the text."""

    text: str
    call: ToolCall | None
    finish: Literal["stop", "length", "tool_calls", "aborted"]
    stop: str | None  # the stop string that ended it
    num_prompt_tokens: int
    ids: tuple[int, ...]
    tokens: tuple[Token, ...]

    @property
    def message(self) -> Message:
        return Message("assistant", self.text, call=self.call)


Event = Delta | CallEnd | Result


class Answer:
    """One answer while it is generated: iterate it once, in one thread; `abort` may be called from any.

    However the iteration ends, the engine is told to drop the request.
    """

    def __init__(
        self, handle: Handle, reader: _Reader, *, num_prompt_tokens: int, stop_ids: frozenset[int], params: Params
    ):
        self._handle = handle
        self._reader = reader
        self._num_prompt_tokens = num_prompt_tokens
        self._stop_ids = stop_ids
        self._logprobs = params.logprobs
        self._stops = StopStrings(params.stop)
        self._text: list[str] = []
        self._num_shown = 0  # characters in _text
        self._num_read = 0  # characters that the reader has given, shown or held back
        self._pending: collections.deque[Token] = collections.deque()
        self._tokens: list[Token] = []
        self._ids: list[int] = []
        self._call: ToolCall | None = None
        self.last: Result | None = None  # once the answer is complete

    def __iter__(self) -> Iterator[Event]:
        try:
            finish = yield from self._read()
            self.last = Result(
                "".join(self._text),
                self._call,
                finish,
                self._stops.hit,
                self._num_prompt_tokens,
                tuple(self._ids),
                tuple(self._tokens),
            )
            yield self.last
        finally:
            self._handle.abort()

    def abort(self) -> None:
        """Ends the answer where it stands; the iteration still gives its Result."""
        self._handle.abort()

    def result(self) -> Result:
        """The whole answer, when it is there."""
        for _ in self:
            pass
        return self.last

    def _read(self) -> Iterator[Event]:
        finish = "aborted"
        for event in self._handle.events():
            if event.error is not None:
                raise RuntimeError(f"the engine failed: {event.error}")
            finish = event.finish or finish
            for token_id, logprob in zip(event.ids, event.logprobs or [0.0] * len(event.ids)):
                self._ids.append(token_id)
                if token_id in self._stop_ids:
                    break
                yield from self._take(token_id, logprob)
                if self._call is not None:
                    return "tool_calls"
                if self._stops.hit is not None:
                    return "stop"
        for part in self._reader.close():
            yield from self._show(self._stops.push(_text_of(part)))
        if self._stops.hit is not None:
            return "stop"
        yield from self._show(self._stops.flush())
        return finish

    def _take(self, token_id: int, logprob: float) -> Iterator[Event]:
        parts = self._reader.push([token_id])
        text = "".join(_text_of(part) for part in parts)
        if self._logprobs and self._reader.in_text:
            self._pending.append(Token(token_id, text, logprob, self._num_read))
        self._num_read += len(text)
        yield from self._show(self._stops.push(text))
        for part in parts:
            if isinstance(part, CallEnd) and self._stops.hit is None:
                yield from self._show(self._stops.flush())
                self._call = part.call
                yield part

    def _show(self, text: str) -> Iterator[Delta]:
        self._text.append(text)
        self._num_shown += len(text)
        ready = []
        while self._pending and self._pending[0].offset + len(self._pending[0].text) <= self._num_shown:
            ready.append(self._pending.popleft())
        if self._stops.hit is not None:  # the tokens of the stop string are not part of the answer
            cut = self._num_shown
            ready += [
                token._replace(text=token.text[: cut - token.offset]) for token in self._pending if token.offset < cut
            ]
            self._pending.clear()
        self._tokens += ready
        if text or ready:
            yield Delta(text, tuple(ready))


class Pipeline:
    """A model that answers in text. It owns its engine: use it as a context manager, or `close` it."""

    def __init__(
        self,
        model: Model,
        *,
        num_slots: int = 8,
        page_size: int = 16,
        num_pages: int | None = None,
        host_bytes: int = 0,
        max_context: int | None = None,
        cache_dtype: CacheDType | None = None,
        tokens_per_dispatch: int = 4,
        prefill_chunk: int | None = None,
        on_program: Callable[[str, float], None] | None = None,
    ):
        """Compiles everything and starts the engine.

        max_context: prompt and answer together, None: what the model was trained for. cache_dtype None: the type of the
        computation. num_pages None: what the device has room for, or, where it does not say what it has, enough for all
        slots at full context. host_bytes: memory of the host for pages that the cache has no room for. prefill_chunk:
        prompt tokens read at once, None: 512, or 64 on a CPU. on_program: told the name of each compiled program and
        the seconds it took.
        """
        if model.tokenizer is None:
            raise ValueError("the model's folder has no tokenizer; add tokenizer.json and tokenizer_config.json to it")
        if model.config.head != "lm":
            raise ValueError("the model gives scores (head='scalar'), not text; serve a language model")
        max_context = model.config.max_position_embeddings if max_context is None else max_context
        cache_dtype = cache_dtype or model.config.dtype
        if prefill_chunk is None:
            prefill_chunk = 64 if jax.default_backend() == "cpu" else 512
        memory_bytes = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if num_pages is None and memory_bytes is not None:
            num_pages = fitting_pages(
                model.config,
                memory_bytes=memory_bytes,
                weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves((model.params, model.lora))),
                num_slots=num_slots,
                max_context=max_context,
                prefill_chunk=prefill_chunk,
                page_size=page_size,
                cache_dtype=cache_dtype,
            )
        engine = Engine(
            model.params,
            model.config,
            max_context=max_context,
            num_slots=num_slots,
            page_size=page_size,
            num_pages=num_pages,
            num_host_pages=host_bytes // page_bytes(model.config, page_size, cache_dtype),
            cache_dtype=cache_dtype,
            lora=model.lora,
            tokens_per_dispatch=tokens_per_dispatch,
            prefill_chunk=prefill_chunk,
        )
        self._use(engine, model.tokenizer, eos_ids=model.generation.eos_ids)
        engine.warmup(on_program)
        engine.start()

    @classmethod
    def over(cls, engine: Engine, tokenizer: Tokenizer) -> Pipeline:
        """A pipeline over an engine that runs already."""
        pipeline = cls.__new__(cls)
        pipeline._use(engine, tokenizer, eos_ids=())
        return pipeline

    def _use(self, engine: Engine, tokenizer: Tokenizer, *, eos_ids: Sequence[int]) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        # The last token drawn needs no place in the cache.
        self.max_context = min(engine.max_context, engine.num_pages * engine.page_size + 1)
        self.stop_ids = tuple(sorted({*protocol.stop_ids(tokenizer), *eos_ids}))
        self.calls_tools = all(marker in tokenizer.special for marker in _CALL_MARKERS)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    def fault(self) -> str | None:
        """Why the engine takes no more requests, or None if it does: it is offered one, which is withdrawn at once."""
        try:
            self.engine.submit(Request((self.stop_ids[0],), 1)).abort()
        except RuntimeError as error:
            return str(error)
        return None

    def complete(self, prompt: str | Sequence[int], params: Params | None = None) -> Answer:
        """The continuation of a text, or of token ids (taken as they are). Markers in a text are plain text."""
        params = Params() if params is None else params
        ids = self._prompt_ids(prompt) if isinstance(prompt, str) else self._checked_ids(prompt)
        return self._submit(ids, _PlainReader(self.tokenizer), params)

    def chat(
        self, messages: Sequence[Message], params: Params | None = None, *, tools: Sequence[Mapping] = ()
    ) -> Answer:
        """The assistant's next turn. `tools` are {name, description, parameters}; one named "interpreter" is code.

        Where neither tools nor a system turn named "interpreter" or "plugin" are given, a call is shown as text.
        """
        params = Params() if params is None else params
        messages = self._with_tools(messages, tools)
        may_call = any(message.role == "system" and message.name in _MARKER_OF for message in messages)
        rendered = protocol.render(messages, self.tokenizer, add_generation_prompt=True)
        return self._submit(rendered.ids, _ChatReader(self.tokenizer, may_call=may_call), params)

    def _submit(self, ids: Sequence[int], reader: _Reader, params: Params) -> Answer:
        room = self.max_context - len(ids)
        wanted = max(1, room) if params.max_tokens is None else params.max_tokens
        if wanted > room:
            raise ContextTooLong(
                f"the context holds {self.max_context} tokens; the prompt has {len(ids)} and {wanted} are asked for, "
                f"{len(ids) + wanted} together. Shorten the prompt or lower max_tokens"
            )
        request = Request(
            tokens=tuple(ids),
            max_new_tokens=wanted,
            sampling=_sampling_of(params),
            stop_ids=self.stop_ids,
            logprobs=params.logprobs,
        )
        return Answer(
            self.engine.submit(request),
            reader,
            num_prompt_tokens=len(ids),
            stop_ids=frozenset(self.stop_ids),
            params=params,
        )

    def _prompt_ids(self, text: str) -> list[int]:
        """Ids of a text behind the token that begins one, as evaluation scores it."""
        first = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        return [first, *self.tokenizer.encode(text)]

    def _checked_ids(self, ids: Sequence[int]) -> Sequence[int]:
        if not ids:
            raise ValueError("the prompt has no tokens; give at least one token id, or a text")
        wrong = [token_id for token_id in ids if not 0 <= token_id < self.tokenizer.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} does not exist; ids are 0..{self.tokenizer.vocab_size - 1}")
        return ids

    def _with_tools(self, messages: Sequence[Message], tools: Sequence[Mapping]) -> list[Message]:
        """The conversation with the tools declared behind its first system turns."""
        if not tools:
            return list(messages)
        if not self.calls_tools:
            raise ValueError(
                f"this model's tokenizer lacks the markers {', '.join(_CALL_MARKERS)}, so its tool calls cannot be "
                "told from text; leave tools out, or use a model of the InternLM2 chat protocol"
            )
        plugins = [tool for tool in tools if tool["name"] != "interpreter"]
        declared = [tools_message(plugins)] if plugins else []
        for tool in tools:
            if tool["name"] == "interpreter":
                declared.append(Message("system", tool.get("description") or INTERPRETER_PROMPT, name="interpreter"))
        start = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
        return [*messages[:start], *declared, *messages[start:]]


def chat_callable(pipeline: Pipeline, params: Params | None = None) -> Chat:
    """The pipeline as agents and judges take a model: chat(messages, *, tools, stop, sampling) -> Message.

    `sampling` holds fields of Params that replace those of `params`; `stop` adds to its stop strings.
    """
    params = Params() if params is None else params

    def chat(
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping] = (),
        stop: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ) -> Message:
        chosen = with_sampling(params, sampling)
        chosen = replace(chosen, stop=(*chosen.stop, *stop))
        return pipeline.chat(messages, chosen, tools=tools).result().message

    return chat


def with_sampling(params: Params, sampling: Mapping[str, Any] | None) -> Params:
    """`params` with the given fields replaced. Raises ValueError for a name that is none of them."""
    known = [field.name for field in fields(Params)]
    unknown = sorted(set(sampling or {}) - set(known))
    if unknown:
        raise ValueError(f"sampling has unknown fields {unknown}; give any of {known}")
    return replace(params, **(sampling or {}))


class _PlainReader:
    """Text of ids; special tokens are invisible."""

    in_text = True  # whether the ids read last are part of the text

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer)

    def push(self, ids: Sequence[int]) -> list[protocol.Event]:
        return [TextDelta(self._decoder.push(ids))]

    def close(self) -> list[protocol.Event]:
        return [TextDelta(self._decoder.flush())]


class _ChatReader:
    """Events of an assistant's turn; calls become text where nobody declared tools."""

    def __init__(self, tokenizer: Tokenizer, *, may_call: bool):
        self._parser = protocol.ToolParser(tokenizer)
        self._may_call = may_call
        self._opening = tokenizer.special.get(ACTION_START)
        self._in_call = False
        self.in_text = True

    def push(self, ids: Sequence[int]) -> list[protocol.Event]:
        parts = self._parser.push(ids)
        if not self._may_call:
            return [_as_text(part) for part in parts]
        closed = False
        for part in parts:
            if isinstance(part, CallStart | CallEnd):
                self._in_call = isinstance(part, CallStart)
                closed = not self._in_call
        self.in_text = not (self._in_call or closed or ids[-1] == self._opening)
        return parts

    def close(self) -> list[protocol.Event]:
        # The body of a call that is not closed is text; if calls are text already, it has been shown as it came.
        parts = self._parser.close()
        return [_as_text(p) for p in parts if self._may_call or not isinstance(p, CallBroken)]


_Reader = _PlainReader | _ChatReader


def _text_of(part: protocol.Event) -> str:
    return part.text if isinstance(part, TextDelta) else ""


def _as_text(part: protocol.Event) -> TextDelta:
    """The text that stands for a part of a turn when calls are nothing but text."""
    match part:
        case CallStart(name):
            return TextDelta(ACTION_START + _MARKER_OF[name])
        case CallDelta(text):
            return TextDelta(text)
        case CallEnd():
            return TextDelta(ACTION_END)
        case CallBroken(name, text):
            return TextDelta(ACTION_START + _MARKER_OF[name] + text)
        case _:
            return part
