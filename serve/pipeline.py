"""Text in, text out over the engine: rendering, sampling options, incremental text, stop strings, tool calls.

    with Pipeline(open_model("runs/tiny")) as pipeline:
        for event in pipeline.chat([Message("user", "What is 2 + 2?")], Params(max_tokens=64)):
            ...  # Delta(text, tokens) as it comes, CallStart to CallEnd(call) where a tool is called, then Result(...)

The engine knows token ids only; everything that is text is here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from internjax import sharding
from internjax.decode.adapters import places_bytes
from internjax.decode.device import AdapterRoom, Compiled
from internjax.decode.engine import Engine, Mode
from internjax.decode.request import Request, RequestError
from internjax.decode.request import Session as EngineSession
from internjax.decode.router import Router
from internjax.decode.sizing import buckets_of, fitting_pages, host_pages, page_bytes, weight_bytes
from internjax.decode.speculate import Speculation
from internjax.hf.open import Model
from internjax.model.cache import CacheDType
from internjax.model.config import NoScaling
from internjax.model.lora import Lora, apply_config
from internjax.text import chat as protocol
from internjax.text.message import INTERPRETER_PROMPT, Chat, Message, tools_message
from internjax.text.tokenizer import (
    ACTION_END,
    ACTION_START,
    INTERPRETER,
    PLUGIN,
    Tokenizer,
    differing_id,
    longest_token,
)
from serve.answering.adapters import read_adapter, room_for
from serve.answering.answer import Answer, Delta, Event, Prompt, Result, Token
from serve.answering.params import Params, sampling_of, with_sampling
from serve.answering.readers import MARKER_OF, ChatReader, PlainReader, Reader
from serve.answering.session import Answering, Session
from serve.answering.streams import all_or_none, events_of, submitted
from serve.guided import CallOf, Following, GuideError, Guides, GuideSpec

__all__ = [
    "Answer",
    "ContextTooLong",
    "Delta",
    "Event",
    "Params",
    "Pipeline",
    "Prompt",
    "Result",
    "Session",
    "Token",
    "chat_callable",
    "with_sampling",
]

Given = str | Sequence[int] | Sequence[Message]
"""What is answered: a text or token ids, which go on, or a conversation, which gets a turn."""

_FRACTION, _USUAL_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9"
"""What XLA takes of a GPU's memory, and what `python -m serve` sets it to where nobody asks for another share."""

_CALL_MARKERS = (ACTION_START, ACTION_END, PLUGIN, INTERPRETER)


class ContextTooLong(ValueError):
    """The prompt and the tokens asked for do not fit into the context."""


class Pipeline:
    """A model that answers in text. It owns its engine or engines: use it as a context manager, or `close` it."""

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
        max_pause: float | None = None,
        prefill_chunk: int | None = None,
        context_buckets: Sequence[int] | None = None,
        adapters: Mapping[str, str | os.PathLike] | None = None,
        max_adapters: int | None = None,
        adapter_rank: int | None = None,
        speculation: Speculation | None = None,
        draft: Model | None = None,
        mode: Mode = "fast",
        replicas: int = 1,
        longest_embedding: int | None = None,
        on_program: Callable[[Compiled], None] | None = None,
    ):
        """Compiles everything and starts the engine. Warns of a context beyond the trained one without rope scaling.

        max_context: prompt and answer together, None: what the model was trained for. cache_dtype None: the
        type of the computation. num_pages None: what the device has room for, or, where it does not say what it
        has, enough for all slots at full context. host_bytes: memory of the host for pages that the cache has
        no room for. tokens_per_dispatch, max_pause: how many tokens come together, see Engine. prefill_chunk:
        prompt tokens read at once, None: 512, or 64 on a CPU. context_buckets: shorter contexts with programs
        of their own, None: those of `sizing.buckets_of`, none in exact mode. adapters: folders by name, of
        which an answer may choose one (`Params.adapter`). max_adapters, adapter_rank: room for more than these,
        and of a larger rank. speculation, draft: drafts that are tried together, and the model of a DraftModel.
        mode: of the engine. replicas: engines, each with the model on as many devices as it is on now;
        num_slots and num_pages are of each, host_bytes of all. longest_embedding: tokens of a text that a
        server makes a vector of (`serve.rest.embeddings`), for which room is left beside the pages; None:
        max_context, 0: it makes none. on_program: told of each program that was compiled.
        """
        if model.tokenizer is None:
            raise ValueError("the model's folder has no tokenizer; add tokenizer.json and tokenizer_config.json to it")
        if model.config.head != "lm":
            raise ValueError("the model gives scores (head='scalar'), not text; python -m serve scores with it")
        if draft is not None:
            _check_draft(draft, model)
        meshes = sharding.meshes_beside(sharding.mesh_of(model.params), replicas)
        loaded = {name: read_adapter(folder, model) for name, folder in (adapters or {}).items()}
        max_context = model.config.max_position_embeddings if max_context is None else max_context
        cache_dtype = cache_dtype or model.config.dtype
        if prefill_chunk is None:
            prefill_chunk = 64 if jax.default_backend() == "cpu" else 512
        if context_buckets is None:
            context_buckets = () if mode == "exact" else buckets_of(max_context)
        draft_params = None if draft is None else draft.params
        room = room_for(loaded, num_places=max_adapters, rank=adapter_rank)
        page = page_bytes(model.config, page_size, cache_dtype)
        page += 0 if draft is None else page_bytes(draft.config, page_size, cache_dtype)
        memory_bytes = _memory_bytes()
        _warn(model, max_context=max_context, knows_memory=memory_bytes is not None)
        num_host_pages = host_pages(host_bytes, page_bytes=page, num_engines=replicas)
        longest_embedding = max_context if longest_embedding is None else min(longest_embedding, max_context)
        if num_pages is None and memory_bytes is not None:
            num_pages = fitting_pages(
                model.config,
                memory_bytes=memory_bytes,
                weight_bytes=_standing_bytes(model, draft, room),
                num_slots=num_slots,
                max_context=max_context,
                prefill_chunk=prefill_chunk,
                page_size=page_size,
                cache_dtype=cache_dtype,
                tensor=meshes[0].shape["tensor"],
                num_drafts=0 if speculation is None else speculation.num_drafts,
                draft=None if draft is None else draft.config,
                longest_embedding=longest_embedding,
            )

        def engine_of(params: dict, lora: Lora | None) -> Engine:
            return Engine(
                params,
                model.config,
                max_context=max_context,
                num_slots=num_slots,
                page_size=page_size,
                num_pages=num_pages,
                num_host_pages=num_host_pages,
                cache_dtype=cache_dtype,
                lora=lora,
                tokens_per_dispatch=tokens_per_dispatch,
                max_pause=max_pause,
                prefill_chunk=prefill_chunk,
                context_buckets=tuple(context_buckets),
                adapter_room=room,
                speculation=speculation,
                draft_params=draft_params,
                mode=mode,
            )

        engines = [engine_of(model.params, model.lora)]
        for mesh in meshes[1:]:
            engines.append(engine_of(*sharding.moved((model.params, model.lora), mesh)))
        engine = engines[0] if replicas == 1 else Router(engines)
        self._use(engine, model.tokenizer, eos_ids=model.generation.eos_ids, model=model)
        self.longest_embedding = longest_embedding
        for name, adapter in loaded.items():
            engine.load_adapter(name, apply_config(adapter.weights, adapter.config))
        engine.warmup(on_program)
        engine.start()

    @classmethod
    def over(cls, engine: Engine | Router, tokenizer: Tokenizer, *, model: Model | None = None) -> Pipeline:
        """A pipeline over an engine that runs already. model: for what is asked of it beside the engine."""
        pipeline = cls.__new__(cls)
        pipeline._use(engine, tokenizer, eos_ids=(), model=model)
        return pipeline

    def _use(
        self, engine: Engine | Router, tokenizer: Tokenizer, *, eos_ids: Sequence[int], model: Model | None = None
    ) -> None:
        self.engine = engine
        self.engines = engine.engines if isinstance(engine, Router) else (engine,)
        """Those of the replicas, or the one."""
        self.tokenizer = tokenizer
        self._model = model
        # The last token drawn needs no place in the cache.
        self.max_context = min(engine.max_context, engine.num_pages * engine.page_size + 1)
        self.longest_embedding = self.max_context
        self.stop_ids = tuple(sorted({*protocol.stop_ids(tokenizer), *eos_ids}))
        self._longest_token = longest_token(tokenizer)
        self._guides: Guides | None = None
        self.calls_tools = all(marker in tokenizer.special for marker in _CALL_MARKERS)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `Params.adapter` may have."""
        return self.engine.adapters

    def load_adapter(self, name: str, folder: str | os.PathLike) -> None:
        """Makes an adapter folder available by name. Raises ValueError for one of another base, or without room."""
        if self._model is None:
            raise ValueError(
                "this pipeline was made over an engine and knows no folder of its model: load adapters there"
            )
        adapter = read_adapter(folder, self._model)
        self.engine.load_adapter(name, apply_config(adapter.weights, adapter.config))

    def unload_adapter(self, name: str) -> None:
        """Frees the place of an adapter; raises RuntimeError while answers use it."""
        self.engine.unload_adapter(name)

    def fault(self) -> str | None:
        """Why no more requests are taken, or None if they are."""
        return self.engine.fault

    def faults(self) -> list[str | None]:
        """Of every replica, why it takes no more requests, or None if it does."""
        return [engine.fault for engine in self.engines]

    def silent_seconds(self) -> float:
        """For how long an engine has had work without a sign of life; see `Engine.silent_seconds`."""
        return self.engine.silent_seconds()

    def complete(self, prompt: str | Sequence[int], params: Params | None = None) -> Answer:
        """The continuation of a text, or of token ids (taken as they are). Markers in a text are plain text."""
        params = Params() if params is None else params
        is_text = isinstance(prompt, str)
        ids = self.prompt_ids(prompt)
        reader = PlainReader(self.tokenizer, behind_text=len(ids) > 1)  # one token: what begins every text
        return self._submit(ids, reader, params, hidden=int(is_text))

    def chat(
        self, messages: Sequence[Message], params: Params | None = None, *, tools: Sequence[Mapping] = ()
    ) -> Answer:
        """The assistant's next turn. `tools` are {name, description, parameters}; one named "interpreter" is code.

        Where neither tools nor a system turn named "interpreter" or "plugin" are given, a call is shown as text.
        """
        ids = self.chat_ids(messages, tools=tools)
        return self.answer_to(self._with_tools(messages, tools), ids, Params() if params is None else params)

    def chat_ids(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping] = (), add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation as `chat` has it read, up to where the assistant's next turn begins.

        Raises ContextTooLong as `refuse_long` does.
        """
        told = self._with_tools(messages, tools)
        self.refuse_long(text for message in told for text in message.texts)
        return protocol.render(told, self.tokenizer, add_generation_prompt=add_generation_prompt).ids

    def session(
        self, messages: Sequence[Message] = (), *, max_length: int | None = None, tools: Sequence[Mapping] = ()
    ) -> Session:
        """A conversation of which only new turns are read; `max_length` tokens in all (None: the engine's context)."""
        answering = Answering(self.engine, self.tokenizer, self.stop_ids, self.answer_to, self.refuse_long)
        return Session(answering, self.engine.open_session(max_length), self._with_tools(messages, tools))

    def stream(self, prompt: Given, params: Params | None = None, *, tools: Sequence[Mapping] = ()) -> Answer:
        """The answer to a text, to token ids or to a conversation: iterate it for its events."""
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Message):
            return self.chat(prompt, params, tools=tools)
        if tools:
            raise ValueError("tools are told in a conversation; give messages, or leave the tools out")
        return self.complete(prompt, params)

    def __call__(
        self, prompts: Given | Sequence[Given], params: Params | None = None, *, tools: Sequence[Mapping] = ()
    ) -> Result | list[Result]:
        """The whole answer to a text, to token ids or to a conversation; those to several of them, in their order."""
        if _is_one(prompts):
            return self.stream(prompts, params, tools=tools).result()
        answers = all_or_none(self._starts(prompts, params, tools))
        # Who watches for stop strings: at least every answer that is in a slot has somebody.
        with ThreadPoolExecutor(2 * self.engine.num_slots) as pool:
            try:
                return list(pool.map(Answer.result, answers))
            except BaseException:
                for answer in answers:
                    answer.abort()
                raise

    def _starts(
        self, prompts: Sequence[Given], params: Params | None, tools: Sequence[Mapping]
    ) -> list[Callable[[], Answer]]:
        return [partial(self.stream, prompt, params, tools=tools) for prompt in prompts]

    async def astream(
        self, prompt: Given, params: Params | None = None, *, tools: Sequence[Mapping] = ()
    ) -> AsyncIterator[Event]:
        """As `stream`, in an event loop; an answer that is left is aborted."""
        answers = await submitted(self._starts([prompt], params, tools))
        async with aclosing(events_of(answers)) as events:
            async for _, event in events:
                yield event

    async def acall(
        self, prompts: Given | Sequence[Given], params: Params | None = None, *, tools: Sequence[Mapping] = ()
    ) -> Result | list[Result]:
        """As the call, in an event loop; answers that are not waited for are aborted."""
        several = [prompts] if _is_one(prompts) else prompts
        answers = await submitted(self._starts(several, params, tools))
        async with aclosing(events_of(answers, num_readers=2 * self.engine.num_slots)) as events:
            async for _ in events:
                pass
        results = [answer.last for answer in answers]
        return results[0] if _is_one(prompts) else results

    def answer_to(
        self,
        messages: Sequence[Message],
        ids: Sequence[int],
        params: Params,
        *,
        session: EngineSession | None = None,
        kept: int = 0,
    ) -> Answer:
        """The answer to a conversation whose ids are known. Of a session the first `kept` are held already."""
        may_call = any(message.role == "system" and message.name in MARKER_OF for message in messages)
        if params.guide is not None and may_call != isinstance(params.guide, CallOf):
            raise ValueError(
                "a guide is given and tools are declared: a guided turn holds no calls; give one of them"
                if may_call
                else "a call is asked for and no tools are declared; give the tools"
            )
        if params.ignore_eos and may_call:
            raise ValueError("ignore_eos is set and tools are declared: past its end a turn holds no calls; give one")
        plain = params.ignore_eos
        reader = PlainReader(self.tokenizer) if plain else ChatReader(self.tokenizer, may_call=may_call)
        return self._submit(ids, reader, params, session=session, kept=kept)

    def _submit(
        self,
        ids: Sequence[int],
        reader: Reader,
        params: Params,
        *,
        hidden: int = 0,
        session: EngineSession | None = None,
        kept: int = 0,
    ) -> Answer:
        most = self.max_context if session is None else min(self.max_context, session.max_length)
        room = most - len(ids)
        wanted = max(1, room if params.max_tokens is None else params.max_tokens)
        if wanted > room:
            what = "context" if session is None else "session"
            asked = f"{wanted} are asked for" if params.max_tokens else "needs room for one more to be read"
            raise ContextTooLong(
                f"the {what} holds {most} tokens; the prompt has {len(ids)} and {asked}, "
                f"{len(ids) + wanted} together. Shorten the prompt" + (" or lower max_tokens" if wanted > 1 else "")
            )
        following = None if params.guide is None else self._following(params.guide)
        own_stops = () if params.ignore_eos else self.stop_ids
        request = Request(
            tokens=tuple(ids[kept:]),
            max_new_tokens=wanted,
            sampling=sampling_of(params, bad_words=self._bad_words(params.bad_words)),
            stop_ids=tuple(dict.fromkeys((*own_stops, *params.stop_token_ids))),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            adapter=params.adapter,
            guide=following,
        )
        if session is None:
            handle = self.engine.submit(request)
        else:
            session.rewind(kept)
            handle = self.engine.submit(request, session=session)
        return Answer(handle, reader, request, prompt=ids, hidden=hidden, params=params, following=following)

    def _following(self, spec: GuideSpec) -> Following:
        if self._guides is None:
            vocab_size = self.engine.config.vocab_size
            self._guides = Guides(self.tokenizer, vocab_size=vocab_size, stop_ids=self.stop_ids)
        try:
            return self._guides.compile(spec)
        except GuideError as error:
            raise RequestError("guide", str(error)) from error

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

    def prompt_ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        """Ids of a text behind the token that begins one, as evaluation scores it; ids as they are, once checked.

        Raises ContextTooLong as `refuse_long` does.
        """
        if not isinstance(prompt, str):
            return self._checked_ids(prompt)
        self.refuse_long([prompt])
        first = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        return [first, *self.tokenizer.encode(prompt)]

    @property
    def model(self) -> Model | None:
        """What answers; None where the pipeline was made over an engine."""
        return self._model

    def refuse_long(self, texts: Iterable[str]) -> None:
        """Raises ContextTooLong for texts that no ids in the context can spell; see the function of this name."""
        refuse_long(texts, longest_token=self._longest_token, max_context=self.max_context)

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


def refuse_long(texts: Iterable[str], *, longest_token: int | None, max_context: int) -> None:
    """Raises ContextTooLong for texts that together no `max_context` tokens of so many characters can spell.

    Before they are tokenised: that takes some 250 bytes for each character (measured), which an allocator may keep.
    longest_token: of the tokenizer, None where it has no bound; nothing is refused then.
    """
    if longest_token is None:
        return
    num_chars, most = sum(map(len, texts)), max_context * longest_token
    if num_chars > most:
        raise ContextTooLong(
            f"the prompt has {num_chars} characters; the context holds {max_context} tokens, which are {most} at "
            "most. Shorten the prompt"
        )


def _is_one(prompts: Given | Sequence[Given]) -> bool:
    """Whether it is one prompt and not several."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Message | int))


def _memory_bytes() -> int | None:
    """What a device may hold in all, where it says so."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _warn(model: Model, *, max_context: int, knows_memory: bool) -> None:
    """Warns of what is asked for and does nothing, or nothing good."""
    trained = model.config.max_position_embeddings
    if max_context > trained and isinstance(model.config.rope_scaling, NoScaling):
        warnings.warn(
            f"a context of {max_context:,} tokens, and the model was trained for {trained:,} and has no rope scaling: "
            "what it says beyond them is likely to be wrong",
            stacklevel=3,
        )
    if not knows_memory and os.environ.get(_FRACTION, _USUAL_FRACTION) != _USUAL_FRACTION:
        warnings.warn(
            f"{_FRACTION} (--memory-fraction) is {os.environ[_FRACTION]} and has no effect: a CPU does not say what "
            "memory it has for a cache. num_pages (--num-pages) sets its size",
            stacklevel=3,
        )


def _standing_bytes(model: Model, draft: Model | None, room: AdapterRoom | None) -> int:
    """The bytes of a device that are taken before there is any page."""
    standing = weight_bytes(model.params, model.config)
    standing += sum(leaf.nbytes for leaf in jax.tree.leaves(model.lora))
    standing += 0 if draft is None else weight_bytes(draft.params, draft.config)
    standing += 0 if room is None else places_bytes(model.params, **room._asdict(), dtype=model.config.dtype)
    return standing


def _check_draft(draft: Model, model: Model) -> None:
    """Raises ValueError where what the draft model says could not be what the model says."""
    if draft.lora is not None:
        raise ValueError("the draft model has an adapter; merge it into the model before (internjax.hf convert)")
    if draft.tokenizer is not None and (wrong := differing_id(model.tokenizer, draft.tokenizer)) is not None:
        ours, theirs = model.tokenizer.token(wrong), draft.tokenizer.token(wrong)
        raise ValueError(
            f"token {wrong} is {ours!r} for the model and {theirs!r} for the draft model; take one with the same "
            "tokenizer"
        )


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
