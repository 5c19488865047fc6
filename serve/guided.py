"""Guided decoding: an answer that follows a JSON schema, a regular expression, a grammar, or is one of given strings.

    Params(guide=JSONSchema({"type": "object", "properties": {"answer": {"type": "integer"}}}))

llguidance says, token by token, which of the vocabulary may come next. The engine never draws another one, and ends the
answer only where what it is guided to is complete; it may still be cut by max_tokens, a stop string or stop_token_ids.
"""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from internjax.text.tokenizer import ACTION_END, ACTION_START, INTERPRETER, PLUGIN, Tokenizer

MAX_COMPILED = 64
"""Compiled guides that are kept, those used last."""
# Between the parts of a JSON text: enough to indent it, and bounded, so that a model cannot write spaces for ever.
_JSON_SPACE = r"\n? {0,16}"


@dataclass(frozen=True)
class JSONSchema:
    """A JSON text that follows the schema (a mapping, a boolean, or its JSON text).

    strict: keywords of the schema that cannot be enforced are refused; without it they are left to the model.
    """

    schema: Mapping[str, Any] | bool | str
    strict: bool = True


@dataclass(frozen=True)
class AnyJSON:
    """A JSON object, whatever it holds."""


@dataclass(frozen=True)
class Regex:
    """A text that the expression matches from end to end. Rust's syntax: no look-around, no back-references."""

    pattern: str


@dataclass(frozen=True)
class Grammar:
    """A text of a context-free grammar, in llguidance's variant of Lark, or in GBNF (`root ::= ...`)."""

    text: str


@dataclass(frozen=True)
class Choice:
    """One of the strings."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class CallOf:
    """A call of one of the functions; "interpreter" is code.

    forced: it comes before any text. Else there is text, and the call only where the model makes one.
    """

    functions: tuple[CalledFunction, ...]
    forced: bool = True


class CalledFunction(NamedTuple):
    name: str
    parameters: Mapping[str, Any]
    """A JSON schema of an object."""
    strict: bool = False


GuideSpec = JSONSchema | AnyJSON | Regex | Grammar | Choice | CallOf


class GuideError(ValueError):
    """What an answer is to follow cannot be followed: it cannot be compiled, or grew too complex on the way."""


def grammars_of(spec: GuideSpec) -> dict[str | None, str]:
    """Returns the guide in llguidance's terms: of a whole answer (None), or of the bodies of calls by their marker.

    Raises GuideError for one that is none of its kind.
    """
    if not isinstance(spec, CallOf):
        return {None: _grammar_of(spec)}
    plugins = [function for function in spec.functions if function.name != "interpreter"]
    grammars = {PLUGIN: _calls_grammar(plugins)} if plugins else {}
    if len(plugins) < len(spec.functions):
        # A fence ends the code where the call ends; where the model goes on behind it, it was part of the code.
        grammars[INTERPRETER] = r"start: /\n```python\n(.|\n)*\n```/"
    if not grammars:
        raise GuideError("a call of no function is asked for; give one function at least")
    return grammars


def _calls_grammar(functions: Sequence[CalledFunction]) -> str:
    """A JSON object with name and parameters, spaced as the model is taught to write it.

    The parameters of each function are a grammar of their own, so that what a schema refers to is found in it.
    """
    space = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    lines = []
    for index, (name, parameters, strict) in enumerate(functions):
        schema = _parsed(parameters)
        _check_schema(schema)
        if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
            raise GuideError(f"the parameters of {name!r} are an object's schema, given {schema!r:.200}")
        own = {"type": "object"} | dict(schema) | {"x-guidance": space | {"lenient": not strict}}
        head = json.dumps(f'{{"name": {json.dumps(name)}, "parameters": ')
        lines += [f'call{index}: {head} parameters{index} "}}"', f"parameters{index}: %json {json.dumps(own)}"]
    either = " | ".join(f"call{index}" for index in range(len(functions)))
    return "\n".join([rf'start: "\n" ({either})', *lines])


def _grammar_of(spec: GuideSpec) -> str:
    import llguidance

    space = {"whitespace_pattern": _JSON_SPACE}
    match spec:
        case AnyJSON():
            return llguidance.LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=space)
        case JSONSchema(schema, strict):
            schema = _parsed(schema)
            _check_schema(schema)
            options = space | {"lenient": not strict}
            try:
                return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
            except (ValueError, TypeError, RecursionError) as error:
                raise GuideError(f"the schema cannot be read: {error}") from error
        case Regex(pattern) if isinstance(pattern, str) and pattern:
            return llguidance.LLMatcher.grammar_from_regex(pattern)
        case Grammar(text) if isinstance(text, str) and text.strip():
            try:
                return llguidance.grammar_from("grammar", text)
            except ValueError as error:
                raise GuideError(f"the grammar cannot be read: {error}") from error
        case Choice(options) if (
            options and not isinstance(options, str) and all(isinstance(o, str) and o for o in options)
        ):
            return llguidance.grammar_from("choice", list(options))
    kinds = "JSONSchema(schema), AnyJSON(), Regex(pattern), Grammar(text) or Choice(options), none of them empty"
    raise GuideError(f"guide must be {kinds}; given {spec!r:.200}")


def _parsed(schema: Any) -> Any:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GuideError(f"the schema is not JSON ({error}); give an object, or its JSON text") from error
    if not isinstance(schema, Mapping | bool):
        raise GuideError(f"a schema is an object (or true or false), given {schema!r:.200}")
    return schema


def _check_schema(schema: Mapping[str, Any] | bool) -> None:
    """Options of the library inside a schema would undo what is promised here."""
    if isinstance(schema, Mapping) and "x-guidance" in schema:
        raise GuideError("the schema has 'x-guidance', options of a library; leave them out")


class Guides:
    """What follows answers in the tokens of one model; compiled guides are kept for the answers to come."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, stop_ids: Sequence[int]):
        """vocab_size: of the model, which may have more rows than the tokenizer ids. stop_ids: what ends an answer."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = tuple(stop_ids)
        self._compiled: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        forbidden = sorted({*tokenizer.special.values()} - {*stop_ids})
        self._never = _words([token_id for token_id in forbidden if token_id < vocab_size], vocab_size)
        self._all = _words(range(min(vocab_size, tokenizer.vocab_size)), vocab_size)

    def compile(self, spec: GuideSpec) -> Following:
        """Returns what makes the guide of an answer. Raises GuideError, with the library's words, for a bad one."""
        matchers = {marker: self._matcher(grammar, spec) for marker, grammar in grammars_of(spec).items()}
        if not isinstance(spec, CallOf):
            guide = partial(AnswerGuide, matchers[None], self._never, self._vocab_size)
            return Following(guide)
        special = self._tokenizer.special
        missing = [marker for marker in (ACTION_START, ACTION_END, *matchers) if marker not in special]
        if missing:
            raise GuideError(f"the tokenizer lacks the markers of calls {missing}; no call can be asked for")
        markers = CallMarkers(
            special[ACTION_START], special[ACTION_END], {special[m]: matcher for m, matcher in matchers.items()}
        )
        text = ~self._never & self._all
        return Following(partial(CallGuide, markers, self._stop_ids, text, spec.forced, self._never, self._vocab_size))

    def _matcher(self, grammar: str, spec: GuideSpec):
        """The compiled grammar; copies of it follow answers."""
        import llguidance

        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:  # not under the lock: a large one takes a while, and others need not wait for it
            self._vocabulary = self._vocabulary or self._read_vocabulary()
            matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
            if matcher.is_error():
                raise GuideError(f"{type(spec).__name__} cannot be followed: {_first_lines(matcher.get_error())}")
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher

    @property
    def num_compiled(self) -> int:
        return len(self._compiled)

    def _read_vocabulary(self):
        """The vocabulary as bytes. Markers have none, so no grammar can lead to one; the ends are told by id."""
        import llguidance

        vocabulary = _Vocabulary(self._tokenizer, self._stop_ids)
        wrapped = llguidance.TokenizerWrapper(vocabulary)
        return llguidance.LLTokenizer(wrapped, eos_token=list(self._stop_ids))


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]):
        markers = {*tokenizer.special.values()} - {*stop_ids}
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.tokens = [b"" if i in markers else tokenizer.bytes_of(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(stop_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class Following:
    """Makes the guides of one request: each answer has its own. `fault` says why one of them could not go on."""

    def __init__(self, make: Callable[[Callable[[str], None]], AnswerGuide | CallGuide]):
        self._make = make
        self.fault: str | None = None

    def __call__(self) -> AnswerGuide | CallGuide:
        return self._make(self._note)

    def _note(self, fault: str) -> None:
        self.fault = fault


class AnswerGuide:
    """Follows one answer: the engine's `Guide`."""

    def __init__(self, matcher, never: np.ndarray, size: int, note: Callable[[str], None]):
        self._matcher, self._never, self._size, self._note = matcher.deep_copy(), never, size, note

    def mask(self) -> np.ndarray:
        words = np.zeros(-(-self._size // 32), np.uint32)
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(words)]
        words[: len(found)] = found
        words &= ~self._never
        if self._matcher.is_error() or not words.any():
            self._fail(self._matcher.get_error() or "no token of the vocabulary can come next")
        return words

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            self._fail(self._matcher.get_error())

    def _fail(self, why: str) -> None:
        why = _first_lines(why)
        self._note(why)
        raise GuideError(f"the answer cannot be guided any further: {why}")


class CallMarkers(NamedTuple):
    """Ids of the markers around a call, and by the marker of each tool what follows its body."""

    opening: int
    closing: int
    matchers: Mapping[int, Any]


class CallGuide:
    """Follows an answer that is a call, or may hold one: text, the two markers that begin it, its body, its end.

    No grammar can lead to a marker, so they are followed here and the bodies by grammars, each complete where the
    answer could end: there stands the closing marker.
    """

    def __init__(
        self,
        markers: CallMarkers,
        stop_ids: Sequence[int],
        text: np.ndarray,
        forced: bool,
        never: np.ndarray,
        size: int,
        note: Callable[[str], None],
    ):
        """text: mask of what may stand outside a call, its ends included."""
        self._markers, self._never, self._size, self._note = markers, never, size, note
        self._opening, self._closing = _words([markers.opening], size), _words([markers.closing], size)
        self._tools, self._ends = _words([*markers.matchers], size), _words(stop_ids, size)
        self._next = self._opening if forced else text | self._opening  # outside a body: what may come
        self._body: AnswerGuide | None = None

    def mask(self) -> np.ndarray:
        if self._body is None:
            return self._next.copy()
        words = self._body.mask()
        if (words & self._ends).any():
            words = (words & ~self._ends) | self._closing
        return words

    def take(self, token: int) -> None:
        if self._body is None:
            if token == self._markers.opening:
                self._next = self._tools
            elif token in self._markers.matchers:
                matcher = self._markers.matchers[token]
                self._body = AnswerGuide(matcher, self._never, self._size, self._note)
        elif token == self._markers.closing:
            self._body, self._next = None, self._ends
        else:
            self._body.take(token)


def _words(ids: Sequence[int], size: int) -> np.ndarray:
    """The ids as bits of uint32 words."""
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _first_lines(error: str) -> str:
    """An error of the library without the state and the grammar that it prints behind it."""
    return error.partition("<state>")[0].strip()[:600]
