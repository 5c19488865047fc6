"""Conversations as token ids: rendering with the loss mask, and the incremental parse of what a model answers.

InternLM2's protocol, native at the level of ids (every marker is one id, so nothing a person types can become one):

    <s>
    <|im_start|>{role}[ name=<|interpreter|>]\\n{content}<|im_end|>\\n             one turn
    {text}<|action_start|><|interpreter|>\\n```python\\n{code}\\n```<|action_end|>   an assistant's call
    {text}<|action_start|><|plugin|>\\n{"name": ..., "parameters": ...}<|action_end|>  a tool instead

Each content is encoded on its own: the ids of a conversation are the ids of its turns, one after the other, and what
a model generates behind a prompt is what it was trained on. Other tokenizers are rendered by their own Jinja template.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from internjax.text.message import (
    INTERPRETER_PROMPT,
    Chat,
    Message,
    Rendered,
    ToolCall,
    from_openai,
    to_dict,
    to_openai,
    tools_message,
)
from internjax.text.template import (
    named_specials,
    render_by_template,
    render_template,
    samples_by_template,
    template_stop_ids,
    writes_date,
)
from internjax.text.tokenizer import (
    ACTION_END,
    ACTION_START,
    IM_END,
    IM_START,
    INTERNLM2_TEMPLATE,
    INTERPRETER,
    PLUGIN,
    StreamDecoder,
    Tokenizer,
)

__all__ = [
    "CODE_OPEN",
    "INTERPRETER_PROMPT",
    "CallBroken",
    "CallDelta",
    "CallEnd",
    "CallStart",
    "Chat",
    "Message",
    "Rendered",
    "TextDelta",
    "ToolCall",
    "ToolParser",
    "depends_on_date",
    "from_openai",
    "parse",
    "render",
    "render_on",
    "render_samples",
    "render_turn",
    "stop_ids",
    "to_dict",
    "to_openai",
    "tools_message",
]

CODE_OPEN = "\n```python\n"
"""How the body of a call to the interpreter begins, its code behind it."""
_MARKER_OF: dict[str, str] = {"interpreter": INTERPRETER, "plugin": PLUGIN}
_PROTOCOL = (IM_START, IM_END, ACTION_START, ACTION_END, INTERPRETER, PLUGIN)


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    learned: Sequence[bool] | None = None,
) -> Rendered:
    """Ids and loss mask of a conversation, ready to train on, or to be continued with `add_generation_prompt`.

    InternLM2's protocol where the tokenizer speaks it, else the tokenizer's own chat template. `learned` says of every
    message whether it is learned, if it is the assistant's (None: all of them are).
    """
    assert learned is None or len(learned) == len(messages)
    if not _speaks_internlm2(tokenizer):
        return render_by_template(messages, tokenizer, add_generation_prompt=add_generation_prompt, learned=learned)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    mask = [0] * len(ids)
    for number, message in enumerate(messages):
        turn = render_turn(message, tokenizer)
        ids += turn.ids
        mask += turn.mask if learned is None or learned[number] else [0] * len(turn.ids)
    if add_generation_prompt:
        prompt = _header("assistant", None, tokenizer)
        ids += prompt
        mask += [0] * len(prompt)
    return Rendered(ids, mask)


def render_on(
    ids: Sequence[int],
    earlier: Sequence[Message],
    more: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Ids of `render` of the earlier messages and more, where `ids` are those of the earlier ones ([]: not known).

    In InternLM2's protocol only what is more is tokenised; a template may write earlier turns anew.
    """
    if not ids or not _speaks_internlm2(tokenizer):
        return render([*earlier, *more], tokenizer, add_generation_prompt=add_generation_prompt).ids
    new = render(more, tokenizer, add_generation_prompt=add_generation_prompt).ids
    return [*ids, *new[tokenizer.bos_id is not None :]]


def render_samples(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    learned: Sequence[bool] | None = None,
    date: datetime.datetime | None = None,
) -> list[Rendered]:
    """What there is to train on in a conversation: `render` of it, or one sample per assistant turn.

    Several where the tokenizer's template writes earlier turns anew as the conversation goes on (Qwen3 takes the
    thoughts out of past answers). date: what a template that writes the date is told (None: the present; see
    `depends_on_date`). Raises ValueError where a sample would teach nothing, or its prompt as well.
    """
    assert learned is None or len(learned) == len(messages)
    if _speaks_internlm2(tokenizer):
        samples = [render(messages, tokenizer, learned=learned)]
    else:
        samples = samples_by_template(messages, tokenizer, learned=learned, date=date)
    for sample in samples:
        if all(sample.mask) or not any(sample.mask):
            raise ValueError(
                f"the loss mask marks {sum(sample.mask)} of {len(sample.ids)} tokens: a conversation teaches what the "
                "assistant says and nothing else. The chat template marks no assistant turn, or none is to be learned"
            )
    return samples


def depends_on_date(tokenizer: Tokenizer) -> bool:
    """Whether a conversation's ids depend on the day: its chat template writes the date (Llama 3.2's does)."""
    return not _speaks_internlm2(tokenizer) and writes_date(tokenizer.chat_template or "")


def render_turn(message: Message, tokenizer: Tokenizer) -> Rendered:
    """One turn of InternLM2's protocol, without BOS: `render(a + [b])` is `render(a)` followed by it."""
    if not _speaks_internlm2(tokenizer):
        raise ValueError("single turns exist only in InternLM2's protocol; render the whole conversation instead")
    header = _header(message.role, message.name, tokenizer)
    body = tokenizer.encode(message.content)
    if message.call is not None:
        body += [tokenizer.special[ACTION_START], tokenizer.special[_MARKER_OF[message.call.name]]]
        body += tokenizer.encode(_call_body(message.call))
        body += [tokenizer.special[ACTION_END]]
    body += [tokenizer.special[IM_END]]
    newline = tokenizer.encode("\n")
    learned = int(message.role == "assistant")
    return Rendered(header + body + newline, [0] * len(header) + [learned] * len(body) + [0] * len(newline))


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an assistant's turn: EOS, `<|im_end|>`, and what the chat template closes the turn with."""
    found = {tokenizer.eos_id}
    if IM_END in tokenizer.special:
        found.add(tokenizer.special[IM_END])
    if tokenizer.chat_template is not None and not _speaks_internlm2(tokenizer):
        found.update(template_stop_ids(tokenizer))
    return tuple(sorted(found))


def parse(ids: Iterable[int], tokenizer: Tokenizer) -> Message:
    """The assistant's message in generated ids: the inverse of `render` behind a generation prompt.

    A call that is not closed is not a call: its text stays in the content, and nothing can be run by accident.
    """
    parser = ToolParser(tokenizer)
    content, call = [], None
    for event in parser.push(ids) + parser.close():
        match event:
            case TextDelta(text):
                content.append(text)
            case CallEnd(ended) if call is None:
                call = ended
            case CallEnd(ended):  # the protocol has one call per turn; further ones are kept as text
                content.append(_as_text(ended.name, _call_body(ended)) + ACTION_END)
            case CallBroken(name, text):
                content.append(_as_text(name, text))
    return Message("assistant", "".join(content), call=call)


class TextDelta(NamedTuple):
    text: str


class CallStart(NamedTuple):
    name: str


class CallDelta(NamedTuple):
    """More of a call's body as generated, code fence included."""

    text: str


class CallEnd(NamedTuple):
    call: ToolCall


class CallBroken(NamedTuple):
    """The turn ended inside a call; `text` is all of its body. There is nothing to run."""

    name: str
    text: str


Event = TextDelta | CallStart | CallDelta | CallEnd | CallBroken


class ToolParser:
    """Events of an assistant's turn from its ids, however they are cut into pushes. `done` is true behind a stop id."""

    def __init__(self, tokenizer: Tokenizer):
        self._markers = {tokenizer.special[text]: text for text in _PROTOCOL if text in tokenizer.special}
        self._stops = frozenset(stop_ids(tokenizer))
        self._decoder = StreamDecoder(tokenizer)
        self._call: str | None = None  # name of the call that is open
        self._opening = False  # <|action_start|> has come, the tool's marker has not
        self._body: list[str] = []
        self._events: list[Event] = []
        self.done = False

    def push(self, ids: Iterable[int]) -> list[Event]:
        """Events that these ids complete. Ids behind the end of the turn are not looked at."""
        run: list[int] = []
        for token_id in ids:
            if self.done:
                break
            marker = self._markers.get(token_id)
            if marker is None and token_id not in self._stops and not self._opening:
                run.append(token_id)
                continue
            self._emit(self._decoder.push(run))
            run = []
            if token_id in self._stops or marker == IM_START:
                self._end()
            else:
                run = self._take_marker(token_id, marker)
        self._emit(self._decoder.push(run))
        return self._take_events()

    def close(self) -> list[Event]:
        """What was still held back, when no more ids will come."""
        if not self.done:
            self._end()
        return self._take_events()

    def _take_marker(self, token_id: int, marker: str | None) -> list[int]:
        """Moves on by a marker, or by the id behind <|action_start|>. Returns the ids that prove ordinary."""
        name = {text: name for name, text in _MARKER_OF.items()}.get(marker)
        if self._opening:
            self._opening = False
            if name is not None:
                self._call = name
                self._events.append(CallStart(name))
                return []
            self._emit(ACTION_START)
            if marker is None:
                return [token_id]
        self._emit(self._decoder.flush())
        if marker == ACTION_START and self._call is None:
            self._opening = True
        elif marker == ACTION_END and self._call is not None:
            self._events.append(CallEnd(_call_of(self._call, "".join(self._body))))
            self._call, self._body = None, []
        else:  # out of place: shown as it is
            self._emit(marker)
        return []

    def _end(self) -> None:
        self._emit(self._decoder.flush())
        if self._opening:
            self._opening = False
            self._emit(ACTION_START)
        if self._call is not None:
            self._events.append(CallBroken(self._call, "".join(self._body)))
            self._call, self._body = None, []
        self.done = True

    def _emit(self, text: str) -> None:
        if not text:
            return
        if self._call is not None:
            self._body.append(text)
            self._events.append(CallDelta(text))
        else:
            self._events.append(TextDelta(text))

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _header(role: str, name: str | None, tokenizer: Tokenizer) -> list[int]:
    start = [tokenizer.special[IM_START]]
    if name is None:
        return start + tokenizer.encode(f"{role}\n")
    if name in _MARKER_OF and role != "user":
        marker = [tokenizer.special[_MARKER_OF[name]]]
        return start + tokenizer.encode(f"{role} name=") + marker + tokenizer.encode("\n")
    return start + tokenizer.encode(f"{role} name={name}\n")


def _call_body(call: ToolCall) -> str:
    return f"{CODE_OPEN}{call.content}\n```" if call.name == "interpreter" else f"\n{call.content}"


def _call_of(name: str, body: str) -> ToolCall:
    """The call in a body: exactly what `_call_body` wrote, else what a model plausibly meant (other fences, spaces).

    Behind the fence as it is taught all is code but a closing fence, so that code can be told while it is written.
    """
    if name == "plugin":
        return ToolCall(name, body.removeprefix("\n"))
    if body.startswith(CODE_OPEN):
        code = body[len(CODE_OPEN) :]
        closed = code.rstrip()
        return ToolCall(name, closed[:-3].rstrip(" \t").removesuffix("\n") if closed.endswith("```") else code)
    fenced = re.fullmatch(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", body, flags=re.DOTALL)
    return ToolCall(name, fenced[1] if fenced else body.strip("\n"))


def _as_text(name: str, body: str) -> str:
    return ACTION_START + _MARKER_OF[name] + body


@functools.lru_cache(maxsize=64)
def _speaks_internlm2(tokenizer: Tokenizer) -> bool:
    """Whether the native protocol is the tokenizer's own: it has the markers, and its template says the same."""
    if not all(text in tokenizer.special for text in _PROTOCOL):
        return False
    if tokenizer.chat_template is None or tokenizer.chat_template == INTERNLM2_TEMPLATE:
        return True
    probe = [{"role": role, "content": f"probe {role}"} for role in ("system", "user", "assistant", "user")]
    specials = named_specials(tokenizer)
    try:
        theirs, ours = (
            render_template(source, probe, special_tokens=specials, add_generation_prompt=True).text
            for source in (tokenizer.chat_template, INTERNLM2_TEMPLATE)
        )
    except ValueError:
        return False
    return theirs == ours
