"""Other people's chat templates: rendered in a Jinja sandbox, then to token ids with the loss mask.

The mask comes from `{% generation %}` blocks where the template has them, else from rendering every prefix.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
) -> TemplateText:
    """The template's text for `messages` (dicts of role, content, ...), and where the assistant's own words are.

    special_tokens: bos_token, eos_token, ... as strings. A template's refusal is raised with its own message.
    """
    import jinja2

    try:
        fenced = _compile(template).render(
            messages=list(messages),
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
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
    import datetime

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
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
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


def render_by_template(messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> Rendered:
    """Ids and mask by the tokenizer's own Jinja template.

    The text is encoded in one piece, as transformers does, except for markers that people typed: those stay plain text.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template and not all of InternLM2's markers; add chat_template.jinja to its "
            "folder, or use a chat model's tokenizer"
        )
    turns, tools = _template_turns(messages, tokenizer)
    draw = functools.partial(
        render_template, tokenizer.chat_template, special_tokens=named_specials(tokenizer), tools=tools
    )
    text, spans = draw(turns, add_generation_prompt=add_generation_prompt)
    if not re.search(r"\{%-?\s*generation\b", tokenizer.chat_template):
        spans = _spans_by_prefix(turns, text, draw)
    spans = [_without_trailing_newline(text, span, tokenizer) for span in spans]
    ids, mask, start = [], [], 0
    literal = False
    for piece in split_keeping(text, LITERAL_OPEN + LITERAL_CLOSE):
        if piece in (LITERAL_OPEN, LITERAL_CLOSE):
            literal = piece == LITERAL_OPEN
        else:
            encoded = tokenizer.encode_with_offsets(piece, allow_special=not literal)
            ids += encoded.ids
            offsets = [(start + low, start + high) for low, high in encoded.offsets]
            mask += [int(any(low <= a and b <= high for low, high in spans)) for a, b in offsets]
        start += len(piece)
    return Rendered(ids, mask)


def _template_turns(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[dict], list | None]:
    """OpenAI-like dicts with parsed arguments (what templates expect), and the declared tools."""
    tools: list = []
    turns = []
    for message in messages:
        if message.role == "system" and message.name == "plugin":
            tools += json.loads(message.content)
            continue
        turn = to_openai([message])[0] | {"content": _fence_markers(message.content, tokenizer)}
        for call in turn.get("tool_calls", []):
            arguments = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = {
                key: _fence_markers(value, tokenizer) if isinstance(value, str) else value
                for key, value in arguments.items()
            }
        turns.append(turn)
    return turns, tools or None


def _fence_markers(content: str, tokenizer: Tokenizer) -> str:
    """`content` with every special token that it spells out fenced, so that it is encoded as plain text."""
    if any(char in content for char in FENCES):
        raise ValueError("a message holds one of the noncharacters U+FDD0..U+FDD3, which are markers here; remove it")
    markers = sorted((text for text in tokenizer.special if text in content), key=len, reverse=True)
    if not markers:
        return content
    either = "|".join(map(re.escape, markers))
    return re.sub(either, lambda hit: LITERAL_OPEN + hit[0] + LITERAL_CLOSE, content)


def _spans_by_prefix(turns: list[dict], text: str, draw) -> list[tuple[int, int]]:
    """Where each assistant turn stands: between the prompt that asks for it and the text with it."""
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = draw(turns[:index], add_generation_prompt=True).text
        after = draw(turns[: index + 1], add_generation_prompt=False).text
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the tokenizer's chat template changes earlier text when turn {index} is added, so the loss mask "
                "is not defined; put {% generation %} ... {% endgeneration %} around the assistant's text in it"
            )
        spans.append((len(before), len(after)))
    return spans


def _without_trailing_newline(text: str, span: tuple[int, int], tokenizer: Tokenizer) -> tuple[int, int]:
    """The span without the whitespace behind its end marker, which the model never has to produce."""
    start, end = span
    said = text[start:end].rstrip()
    return (start, start + len(said)) if any(said.endswith(marker) for marker in tokenizer.special) else span


@functools.lru_cache(maxsize=64)
def template_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token with which the template closes an assistant's turn, if it uses one."""
    answer = "probe answer"
    turns = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": answer}]
    try:
        text = render_template(tokenizer.chat_template, turns, special_tokens=named_specials(tokenizer)).text
    except ValueError:  # a template that refuses two plain turns cannot be asked
        return ()
    ids = tokenizer.encode(text.rpartition(answer)[2].lstrip(), allow_special=True)
    return tuple(ids[:1]) if ids and ids[0] in tokenizer.special.values() else ()
