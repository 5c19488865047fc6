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
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import jax

from internjax.decode.engine import Engine
from internjax.decode.request import Handle, PromptLogprobs, Ranked, Request, RequestError
from internjax.decode.sample import SamplingParams
from internjax.decode.sizing import fitting_pages, page_bytes
from internjax.hf.open import Model
from internjax.model.cache import CacheDType
from internjax.text import chat as protocol
from internjax.text.chat import CallEnd
from internjax.text.message import INTERPRETER_PROMPT, Chat, Message, ToolCall, tools_message
from internjax.text.tokenizer import ACTION_END, ACTION_START, INTERPRETER, PLUGIN, StreamDecoder, Tokenizer
from serve.readers import MARKER_OF, ChatReader, PlainReader, Reader, text_of
from serve.stops import StopStrings

_CALL_MARKERS = (ACTION_START, ACTION_END, PLUGIN, INTERPRETER)


@dataclass(frozen=True)
class Params:
    """How one answer is generated; what the numbers do is in `SamplingParams`.

    Log-probabilities are the model's at the answer's temperature (1 if greedy), before penalties, bias and truncation.
    """

    max_tokens: int | None = None  # None: until the context is full; 0: the prompt is only read
    min_tokens: int = 0  # until so many are drawn, nothing stops the answer: no stop id is drawn, no stop string seen
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int | str, float] = field(default_factory=dict)  # by token id, also in decimal digits
    bad_words: tuple[str, ...] = ()  # banned as they are tokenised at the start, behind a space, and behind a newline
    seed: int | None = None  # None: a random one
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # beside those of the model
    ignore_eos: bool = False  # those of the model do not end the answer; a chat answer is then text, without calls
    logprobs: int | None = None  # of the tokens drawn, with so many most likely ones in the place of each
    prompt_logprobs: int | None = None  # likewise of the prompt

    def __post_init__(self):
        if self.max_tokens is not None and not _is_count(self.max_tokens):
            raise ValueError(f"max_tokens must be a whole number >= 0, or None, given {self.max_tokens!r}")
        if not _is_count(self.min_tokens):
            raise ValueError(f"min_tokens must be a whole number >= 0, given {self.min_tokens!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must not pass max_tokens, given {self.min_tokens} and {self.max_tokens}")
        for name in ("stop", "bad_words"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(given):
                raise ValueError(f"{name} must be a tuple of strings that are not empty, given {given!r}")
        for name in ("logprobs", "prompt_logprobs"):
            given = getattr(self, name)
            if given is not None and not _is_count(given):
                raise ValueError(f"{name} must be a number of most likely tokens (0: none), or None, given {given!r}")
        _sampling_of(self)  # which refuses what cannot be sampled with


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sampling_of(params: Params, *, bad_words: tuple[tuple[int, ...], ...] = ()) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple((_token_id(token), bias) for token, bias in params.logit_bias.items()),
        bad_words=bad_words,
        min_new_tokens=params.min_tokens,
        seed=secrets.randbits(32) if params.seed is None else params.seed,
    )


def _token_id(token: int | str) -> int:
    if isinstance(token, str) and not (token.isascii() and token.isdigit()):
        raise ValueError(f"logit_bias must be given by token ids, given {token!r}; encode a text to learn its ids")
    return int(token)


class ContextTooLong(ValueError):
    """The prompt and the tokens asked for do not fit into the context."""


class Token(NamedTuple):
    """A token: `text` is what it added to the answer (or the prompt), from character `offset` on. The texts of all
    tokens joined are the whole; a token that only begins a character adds nothing."""

    id: int
    text: str
    logprob: float | None  # None for a prompt's first token, which nothing stands before
    offset: int
    top: tuple[Alternative, ...] = ()


class Alternative(NamedTuple):
    """One of the most likely tokens in a place, whether drawn there or not. `piece`: the bytes it adds to a text."""

    id: int
    piece: bytes
    logprob: float


class Prompt(NamedTuple):
    """The prompt's tokens with their log-probabilities, if `Params.prompt_logprobs`: the first event of an answer.

    Of a prompt that is a text, the token that begins every text is not one of them.
    """

    tokens: tuple[Token, ...]


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
    prompt: tuple[Token, ...] = ()  # with Params.prompt_logprobs

    @property
    def message(self) -> Message:
        return Message("assistant", self.text, call=self.call)


Event = Prompt | Delta | CallEnd | Result


class Answer:
    """One answer while it is generated: iterate it once, in one thread; `abort` may be called from any.

    However the iteration ends, the engine is told to drop the request.
    """

    def __init__(self, handle: Handle, reader: Reader, request: Request, *, hidden: int, params: Params):
        """`hidden`: tokens at the prompt's beginning that are no part of its text."""
        self._handle = handle
        self._reader = reader
        self._prompt_ids = request.tokens
        self._hidden = hidden
        self._stop_ids = frozenset(request.stop_ids)
        self._params = params
        self._prompt: tuple[Token, ...] = ()
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
                len(self._prompt_ids),
                tuple(self._ids),
                tuple(self._tokens),
                self._prompt,
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
            if event.prompt is not None:
                self._prompt = self._tokens_of_prompt(event.prompt)
                yield Prompt(self._prompt)
            if self._params.max_tokens == 0:
                continue  # the engine draws one token at least
            nothing = (None,) * len(event.ids)
            for token_id, logprob, ranked in zip(event.ids, event.logprobs or nothing, event.top_logprobs or nothing):
                self._ids.append(token_id)
                if token_id in self._stop_ids:
                    break
                yield from self._take(token_id, logprob, ranked or ())
                if self._call is not None:
                    return "tool_calls"
                if self._stops.hit is not None:
                    return "stop"
        if self._params.max_tokens == 0:
            return "aborted" if finish == "aborted" else "length"
        for part in self._reader.close():
            yield from self._show(self._stops.push(text_of(part)))
        if self._stops.hit is not None:
            return "stop"
        yield from self._show(self._stops.flush())
        return finish

    def _tokens_of_prompt(self, prompt: PromptLogprobs) -> tuple[Token, ...]:
        decoder, tokens, offset = StreamDecoder(self._reader.tokenizer), [], 0
        for token_id, logprob, ranked in list(zip(self._prompt_ids, *prompt))[self._hidden :]:
            text = decoder.push([token_id])
            tokens.append(Token(token_id, text, logprob, offset, self._alternatives(ranked)))
            offset += len(text)
        if tokens and (rest := decoder.flush()):
            tokens[-1] = tokens[-1]._replace(text=tokens[-1].text + rest)
        return tuple(tokens)

    def _alternatives(self, ranked: Ranked) -> tuple[Alternative, ...]:
        return tuple(Alternative(token_id, self._reader.tokenizer.bytes_of(token_id), p) for token_id, p in ranked)

    def _take(self, token_id: int, logprob: float | None, ranked: Ranked) -> Iterator[Event]:
        parts = self._reader.push([token_id])
        text = "".join(text_of(part) for part in parts)
        if self._params.logprobs is not None and self._reader.in_text:
            self._pending.append(Token(token_id, text, logprob, self._num_read, self._alternatives(ranked)))
        self._num_read += len(text)
        early = len(self._ids) <= self._params.min_tokens
        yield from self._show(text if early else self._stops.push(text))
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
        is_text = isinstance(prompt, str)
        ids = self._prompt_ids(prompt) if is_text else self._checked_ids(prompt)
        return self._submit(ids, PlainReader(self.tokenizer), params, hidden=int(is_text))

    def chat(
        self, messages: Sequence[Message], params: Params | None = None, *, tools: Sequence[Mapping] = ()
    ) -> Answer:
        """The assistant's next turn. `tools` are {name, description, parameters}; one named "interpreter" is code.

        Where neither tools nor a system turn named "interpreter" or "plugin" are given, a call is shown as text.
        """
        params = Params() if params is None else params
        messages = self._with_tools(messages, tools)
        may_call = any(message.role == "system" and message.name in MARKER_OF for message in messages)
        rendered = protocol.render(messages, self.tokenizer, add_generation_prompt=True)
        if params.ignore_eos and may_call:
            raise ValueError("ignore_eos is set and tools are declared: past its end a turn holds no calls; give one")
        if params.ignore_eos:
            return self._submit(rendered.ids, PlainReader(self.tokenizer), params)
        return self._submit(rendered.ids, ChatReader(self.tokenizer, may_call=may_call), params)

    def _submit(self, ids: Sequence[int], reader: Reader, params: Params, *, hidden: int = 0) -> Answer:
        room = self.max_context - len(ids)
        wanted = max(1, room if params.max_tokens is None else params.max_tokens)
        if wanted > room:
            raise ContextTooLong(
                f"the context holds {self.max_context} tokens; the prompt has {len(ids)} and {wanted} are asked for, "
                f"{len(ids) + wanted} together. Shorten the prompt or lower max_tokens"
            )
        own_stops = () if params.ignore_eos else self.stop_ids
        request = Request(
            tokens=tuple(ids),
            max_new_tokens=wanted,
            sampling=_sampling_of(params, bad_words=self._bad_words(params.bad_words)),
            stop_ids=tuple(dict.fromkeys((*own_stops, *params.stop_token_ids))),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
        )
        return Answer(self.engine.submit(request), reader, request, hidden=hidden, params=params)

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The sequences of ids that the words have at the start of a text, behind a space and behind a newline."""
        encode, newline = self.tokenizer.encode, self.tokenizer.encode("\n")
        forms: dict[tuple[int, ...], None] = {}
        for word in words:
            behind = encode("\n" + word)
            forms |= dict.fromkeys(tuple(ids) for ids in (encode(word), encode(" " + word)))
            if behind[: len(newline)] == newline and len(behind) > len(newline):
                forms[tuple(behind[len(newline) :])] = None
        limits = self.engine.limits
        if len(forms) > limits.bad_words:
            raise RequestError(
                "bad_words",
                f"{len(words)} bad words are {len(forms)} sequences of tokens; this server takes up to "
                f"{limits.bad_words}. Give fewer",
            )
        for word in words:
            if len(encode(" " + word)) > limits.bad_word_length:
                raise RequestError(
                    "bad_words",
                    f"the bad word {word!r} has {len(encode(' ' + word))} tokens; this server takes up to "
                    f"{limits.bad_word_length}. Give its first words",
                )
        return tuple(forms)

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
    known = [each.name for each in fields(Params)]
    unknown = sorted(set(sampling or {}) - set(known))
    if unknown:
        raise ValueError(f"sampling has unknown fields {unknown}; give any of {known}")
    return replace(params, **(sampling or {}))
