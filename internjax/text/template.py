"""Other people's chat templates: rendered in a Jinja sandbox, then to token ids with the loss mask.

The mask comes from `{% generation %}` blocks where the template has them, else from rendering every prefix: an answer
is what stands behind the prompt that asks for it. Where prefixes change later on, each answer becomes a sample.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from internjax.text.message import Message, Rendered, to_openai
from internjax.text.tokenizer import Tokenizer

# Unicode noncharacters (never assigned, never typed) that fence a stretch of text through a template.
GENERATION_OPEN, GENERATION_CLOSE = "\ufdd0", "\ufdd1"
LITERAL_OPEN, LITERAL_CLOSE = "\ufdd2", "\ufdd3"
FENCES = GENERATION_OPEN + GENERATION_CLOSE + LITERAL_OPEN + LITERAL_CLOSE


class TemplateText(NamedTuple):
    """A rendered conversation. `spans` are the (start, end) characters inside `{% generation %}` blocks."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render_template(
    template: str,
    messages: Sequence[Mapping],
    *,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping] | None = None,
    add_generation_prompt: bool = False,
    date: datetime.datetime | None = None,
) -> TemplateText:
    """The template's text for `messages` (dicts of role, content, ...), and where the assistant's own words are.

    special_tokens: bos_token, eos_token, ... as strings. date: what a template that writes the date is told (None: the
    present). A template's refusal is raised with its own message.
    """
    import jinja2

    try:
        fenced = _compile(template).render(
            messages=list(messages),
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=(date or datetime.datetime.now()).strftime,
            **special_tokens,
        )
    except (jinja2.TemplateError, TypeError) as error:
        roles = [message.get("role") for message in messages]
        raise ValueError(
            f"the tokenizer's chat template refuses this conversation: {error}. Given roles {roles}; "
            "give turns in the order that the template wants, or replace the template"
        ) from error
    return _take_spans(fenced)


def _take_spans(fenced: str) -> TemplateText:
    """`fenced` without its generation marks, and the spans they enclosed."""
    pieces, spans, start, length = [], [], None, 0
    for char_run in split_keeping(fenced, GENERATION_OPEN + GENERATION_CLOSE):
        if char_run == GENERATION_OPEN:
            start = length
        elif char_run == GENERATION_CLOSE:
            assert start is not None, "a generation block closes that was not opened"
            spans.append((start, length))
            start = None
        else:
            pieces.append(char_run)
            length += len(char_run)
    return TemplateText("".join(pieces), tuple(spans))


def split_keeping(text: str, separators: str) -> list[str]:
    """`text` cut at every separator character, the separators kept as pieces of their own."""
    return [piece for piece in re.split(f"([{separators}])", text) if piece]


@functools.lru_cache(maxsize=32)
def _compile(template: str):
    """The compiled template, with all that transformers' templates may use."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: fences the block's output, so that its place in the text is known afterwards."""

        tags = {"generation"}

        def parse(self, parser):
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("fence"), [], [], body).set_lineno(lineno)

        def fence(self, caller):
            return GENERATION_OPEN + caller() + GENERATION_CLOSE

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the tokenizer's chat template is not valid Jinja (line {error.lineno}: {error}); "
            "repair chat_template in tokenizer_config.json or chat_template.jinja"
        ) from error


def named_specials(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, ... as the template's variables; an absent one is empty text."""
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {role: "" if token_id is None else tokenizer.token(token_id) or "" for role, token_id in named.items()}


def render_by_template(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool,
    learned: Sequence[bool] | None = None,
) -> Rendered:
    """Ids and mask by the tokenizer's own Jinja template.

    The text is encoded in one piece, as transformers does, except for markers that people typed: those stay plain text.
    With `add_generation_prompt` nothing is learned: the mask is zero. `learned` says of every message whether it is
    learned, if it is the assistant's.
    """
    drawn = _drawn(messages, tokenizer)
    whole = drawn.draw(drawn.turns, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:  # it is read, never learned
        return _encoded(whole.text, [], tokenizer)
    spans = _assistant_spans(drawn, whole, tokenizer)
    if spans is None:
        raise ValueError(
            "the tokenizer's chat template writes earlier turns anew when a later one is added, so one loss mask for "
            "the whole conversation is not defined; use render_samples, which gives one sample per assistant turn"
        )
    return _encoded(whole.text, _learned_spans(spans, learned), tokenizer)


def writes_date(template: str) -> bool:
    """Whether a template asks for the date, so that its text depends on the day."""
    return "strftime_now" in template


def samples_by_template(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    learned: Sequence[bool] | None = None,
    date: datetime.datetime | None = None,
) -> list[Rendered]:
    """What there is to train on in a conversation: one sample, or one per assistant turn.

    Several where the template writes earlier turns anew as the conversation goes on (Qwen3 takes the thoughts out of
    past answers): then each learned turn stands at the end of a sample of its own, behind the very prompt that the
    model is given for it. A last turn that the template leaves without an end marker gets the tokenizer's EOS. Raises
    ValueError where an assistant's turn is not found behind its prompt.
    """
    drawn = _drawn(messages, tokenizer, date)
    whole = drawn.draw(drawn.turns, add_generation_prompt=False)
    spans = _assistant_spans(drawn, whole, tokenizer)
    if spans is not None:
        return [_ended(_encoded(whole.text, _learned_spans(spans, learned), tokenizer), tokenizer)]
    samples = []
    for message, index in drawn.places.items():
        if drawn.turns[index]["role"] != "assistant" or not (learned is None or learned[message]):
            continue
        before = drawn.draw(drawn.turns[:index], add_generation_prompt=True).text
        text = drawn.draw(drawn.turns[: index + 1], add_generation_prompt=False).text
        samples.append(
            _ended(_encoded(text, [_until_end(text, (len(before), len(text)), tokenizer)], tokenizer), tokenizer)
        )
    return samples


class _Drawn(NamedTuple):
    """A conversation as its template takes it: its turns, where each message went among them, and the renderer."""

    turns: list[dict]
    places: dict[int, int]
    draw: Callable[..., TemplateText]
    has_generation: bool


def _drawn(messages: Sequence[Message], tokenizer: Tokenizer, date: datetime.datetime | None = None) -> _Drawn:
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(
            "this tokenizer has no chat template and not all of InternLM2's markers; add chat_template.jinja to its "
            "folder, or use a chat model's tokenizer"
        )
    turns, places, tools = _template_turns(messages, tokenizer)
    draw = functools.partial(
        render_template, template, special_tokens=named_specials(tokenizer), tools=tools, date=date
    )
    drawn = _Drawn(turns, places, draw, re.search(r"\{%[-+]?\s*generation\b", template) is not None)
    _check_tools_are_drawn(drawn, tools or [])
    return drawn


def _check_tools_are_drawn(drawn: _Drawn, tools: Sequence[Mapping]) -> None:
    """Refuses a template that drops tools or calls in silence: their names must be in the text."""
    names = {tool.get("function", {}).get("name") for tool in tools}
    names |= {call["function"]["name"] for turn in drawn.turns for call in turn.get("tool_calls", [])}
    names = {name for name in names if name}
    if not names:
        return
    text = drawn.draw(drawn.turns, add_generation_prompt=False).text
    missing = sorted(name for name in names if name not in text)
    if missing:
        raise ValueError(
            f"the tokenizer's chat template leaves the tools {', '.join(missing)} out of the text: it knows no tools. "
            "Give a tokenizer whose template has them (InternLM2's does), or data without tool turns"
        )


def _assistant_spans(drawn: _Drawn, whole: TemplateText, tokenizer: Tokenizer) -> dict[int, tuple[int, int]] | None:
    """Message -> where in the text its answer stands, end marker included; None where the template rewrites history."""
    messages = [message for message, index in drawn.places.items() if drawn.turns[index]["role"] == "assistant"]
    if drawn.has_generation:
        spans = [_without_trailing_newline(whole.text, span, tokenizer) for span in whole.spans if span[0] < span[1]]
        if len(spans) != len(messages):
            raise ValueError(
                f"the conversation has {len(messages)} assistant turns, and the chat template's "
                f"{{% generation %}} blocks mark {len(spans)}; put one around the assistant's text of every turn"
            )
        return dict(zip(messages, spans))
    spans = {}
    for message in messages:
        index = drawn.places[message]
        before = drawn.draw(drawn.turns[:index], add_generation_prompt=True).text
        after = drawn.draw(drawn.turns[: index + 1], add_generation_prompt=False).text
        if not after.startswith(before):
            at = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
            raise ValueError(
                f"the chat template's prompt for turn {index} ends {before[at : at + 40]!r} where the turn itself has "
                f"{after[at : at + 40]!r}, so what the assistant says cannot be told from its prompt. Put "
                "{% generation %} ... {% endgeneration %} around the assistant's text in the template"
            )
        if not whole.text.startswith(after):
            return None
        spans[message] = _until_end(whole.text, (len(before), len(after)), tokenizer)
    return spans


def _learned_spans(spans: Mapping[int, tuple[int, int]], learned: Sequence[bool] | None) -> list[tuple[int, int]]:
    return [span for message, span in spans.items() if learned is None or learned[message]]


def _encoded(text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Rendered:
    """Ids of a template's text; learned are those that lie in a span."""
    ids, mask, start = [], [], 0
    literal = False
    for piece in split_keeping(text, LITERAL_OPEN + LITERAL_CLOSE):
        if piece in (LITERAL_OPEN, LITERAL_CLOSE):
            literal = piece == LITERAL_OPEN
        else:
            encoded = tokenizer.encode_with_offsets(piece, allow_special=not literal)
            ids += encoded.ids
            offsets = [(start + low, start + high) for low, high in encoded.offsets]
            mask += [int(any(low <= a < high and b <= high for low, high in spans)) for a, b in offsets]
        start += len(piece)
    return Rendered(ids, mask)


def _ended(sample: Rendered, tokenizer: Tokenizer) -> Rendered:
    """The sample with EOS, learned, behind a last turn that is learned and ends without a marker."""
    if not sample.ids or not sample.mask[-1] or sample.ids[-1] in tokenizer.special.values():
        return sample
    return Rendered([*sample.ids, tokenizer.eos_id], [*sample.mask, 1])


def _until_end(text: str, span: tuple[int, int], tokenizer: Tokenizer) -> tuple[int, int]:
    """The span up to its end marker; where it has none, with the marker that follows it (GLM's next `<|user|>`)."""
    start, end = _without_trailing_newline(text, span, tokenizer)
    if any(text.endswith(marker, start, end) for marker in tokenizer.special):
        return start, end
    following = max((marker for marker in tokenizer.special if text.startswith(marker, end)), key=len, default="")
    return start, end + len(following)


def _template_turns(
    messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[list[dict], dict[int, int], list | None]:
    """OpenAI-like dicts with parsed arguments (what templates expect), where each message went, the declared tools."""
    tools: list = []
    turns: list[dict] = []
    places: dict[int, int] = {}
    call_id = ""
    for number, message in enumerate(messages):
        if message.role == "system" and message.name == "plugin":
            declared = json.loads(message.content)
            tools += [tool if "function" in tool else {"type": "function", "function": tool} for tool in declared]
            continue
        turn = to_openai([message])[0] | {"content": _fence_markers(message.content, tokenizer)}
        for call in turn.get("tool_calls", []):
            arguments = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = _fenced_values(arguments, tokenizer)
            call["id"] = call_id = f"call{number:05d}"  # nine letters and digits, as Mistral's template wants
        if turn["role"] == "tool" and call_id:
            turn["tool_call_id"] = call_id
        places[number] = len(turns)
        turns.append(turn)
    return turns, places, tools or None


def _fenced_values(value: Any, tokenizer: Tokenizer) -> Any:
    """JSON values with the markers that their texts spell out fenced."""
    if isinstance(value, str):
        return _fence_markers(value, tokenizer)
    if isinstance(value, list):
        return [_fenced_values(each, tokenizer) for each in value]
    if isinstance(value, dict):
        return {key: _fenced_values(each, tokenizer) for key, each in value.items()}
    return value


def _fence_markers(content: str, tokenizer: Tokenizer) -> str:
    """`content` with every special token that it spells out fenced, so that it is encoded as plain text."""
    if any(char in content for char in FENCES):
        raise ValueError("a message holds one of the noncharacters U+FDD0..U+FDD3, which are markers here; remove it")
    markers = sorted((text for text in tokenizer.special if text in content), key=len, reverse=True)
    if not markers:
        return content
    either = "|".join(map(re.escape, markers))
    return re.sub(either, lambda hit: LITERAL_OPEN + hit[0] + LITERAL_CLOSE, content)


def _without_trailing_newline(text: str, span: tuple[int, int], tokenizer: Tokenizer) -> tuple[int, int]:
    """The span without the whitespace behind its end marker, which the model never has to produce."""
    start, end = span
    said = text[start:end].rstrip()
    return (start, start + len(said)) if any(said.endswith(marker) for marker in tokenizer.special) else span


@functools.lru_cache(maxsize=64)
def template_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token with which the template closes an assistant's turn, or opens the next one, if there is one."""
    answer = "probe answer"
    turns = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": answer}]
    turns.append(turns[0])
    try:
        text = render_template(tokenizer.chat_template, turns, special_tokens=named_specials(tokenizer)).text
    except ValueError:  # a template that refuses plain turns cannot be asked
        return ()
    ids = tokenizer.encode(text.rpartition(answer)[2].lstrip(), allow_special=True)
    return tuple(ids[:1]) if ids and ids[0] in tokenizer.special.values() else ()
