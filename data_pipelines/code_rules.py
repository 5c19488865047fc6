"""Rules that drop files of programs: generated, minified, data without program, Python that does not parse.

As in `rules.py`, each has a named reason and a visible threshold, a default of this project.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipelines.document import Check, Outcome
from data_pipelines.outline import outline

MARKS_OF_GENERATED_CODE = re.compile(
    r"(?:(?P<file>[\w-]+\.\w{1,4}) (?:is|was) )?(?:auto-?\s?|automatically |machine )generated"
    r"(?=\W*$|[ \t]*[.,:;!*()-]|[ \t]+(?:by|from|with|using(?! an? )|via|for|at|on|in|during|when|through|and|files?|"
    r"code|content|stubs?|template|data|module|source)\b)|@generated|"
    r"do not (?:edit|modify)(?: this file| it)?"
    r"(?:(?: this)? directly| the \w+(?: and \w+)? \w+ by hand| by hand| manually)?"
    r"(?=[ \t]*(?:[.!*,;:-]|$)| as )|"
    r"generated (?:by|from|with|using) [^\s:`]*(?:script|sphinx|swig|yacc|bison|flex|lex|antlr|protoc|"
    r"the protocol buffer|protocol buffer|thrift|grpc|cython|openapi|swagger|bindgen|mockgen|sqlc|stringer|django|"
    r"autoconf|automake|tool|codec|mapping)",
    re.IGNORECASE | re.MULTILINE,
)
"""Said of the file itself: `version.py is auto-generated` in another file, `auto-generated documentation` and
`do not edit this line` are no marks."""
GO_GENERATED = re.compile(r"^// Code generated .* DO NOT EDIT\.$", re.MULTILINE)
"""Go's own line, which may stand anywhere before the package clause."""
GENERATED_NAMES = re.compile(
    r"_pb2(_grpc)?\.pyi?|\.pb\.(go|cc|h)|\.g\.dart|\.designer\.(cs|vb)|\.generated\.\w+|package-lock\.json|"
    r"yarn\.lock|pnpm-lock\.yaml|cargo\.lock|go\.sum|poetry\.lock|composer\.lock"
)
MINIFIED_NAMES = re.compile(r"[.-]min\.(m?js|css)|\.bundle\.m?js|\.map")
WEB_LANGUAGES = ("javascript", "typescript", "css")
DATA_LANGUAGES = ("json", "csv", "xml")
DATA_LINE = re.compile(
    r"""^(?>[ \t\[\](){},:;=+-]+|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|0[xX][0-9a-fA-F]+[uUlL]*"""
    r"""|[0-9][0-9_.]*(?:[eE][+-]?[0-9]+)?[fFuUlL]*|(?:true|false|null|nil|NULL|None|True|False)\b)+$""",
    re.MULTILINE,
)
"""A line of numbers, texts, brackets and commas, and no name: part of a table."""
NOT_ALPHANUMERIC = re.compile(r"[^\w]+")
ASCII_SEPARATORS = bytes(value for value in range(128) if not (chr(value).isalnum() or chr(value) == "_"))


@dataclass(frozen=True)
class CodeRules:
    """Bounds for files of programs."""

    max_bytes: int = 1_000_000
    max_mean_line: int = 100
    max_line: int = 1000
    min_alphanumeric: float = 0.25
    max_data_share: float = 0.6
    """Share of a file that is tables: in Python module-level literals (`__all__` aside), in other languages lines of
    literals alone. JSON, CSV and XML are tables as a whole."""
    min_data_characters: int = 2000
    """Smaller tables are no reason."""
    min_white_space: float = 0.06
    """Of JavaScript, TypeScript and CSS; less is minified, however its lines are broken."""
    header_characters: int = 400
    """Where a mark of generated code is looked for."""


def code_rules(rules: CodeRules) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops generated, minified, data-only and (Python) unparsable files."""

    def apply(batch: pa.RecordBatch) -> Outcome:
        columns = (batch.column(name).to_pylist() for name in ("text", "language", "path"))
        measured: list[dict[str, float]] = [{} for _ in range(batch.num_rows)]
        verdicts = [_code_reason(*row, rules, found) for *row, found in zip(*columns, measured, strict=True)]
        checks = [
            Check(name, np.array([found.get(name, np.nan) for found in measured], np.float64), side, bound)
            for name, side, bound in (
                ("characters", "above", rules.max_bytes),
                ("longest_line", "above", rules.max_line),
                ("mean_line", "above", rules.max_mean_line),
                ("white_space", "below", rules.min_white_space),
                ("table_share", "above", rules.max_data_share),
                ("letters_and_digits", "below", rules.min_alphanumeric),
            )
        ]
        return Outcome(batch, [reason for reason, _ in verdicts], [detail for _, detail in verdicts], checks)

    return apply


def _code_reason(
    text: str, language: str, path: str, rules: CodeRules, measured: dict[str, float]
) -> tuple[str | None, str | None]:
    """Returns the first reason that a file gives, and its detail; `measured` is told what was measured up to there."""
    if not text.strip():
        return "empty", "no character"
    measured["characters"] = len(text)
    if len(text) > rules.max_bytes:
        return "huge_file", f"{len(text)} characters are above {rules.max_bytes}"
    name = path.rpartition("/")[2].lower()
    if GENERATED_NAMES.search(name):
        return "generated", f"its name is {name}"
    marks = MARKS_OF_GENERATED_CODE.finditer(text, 0, rules.header_characters)
    mark = next((mark for mark in marks if (mark["file"] or name).lower() == name), None)
    mark = mark or (GO_GENERATED.search(text) if language == "go" else None)
    if mark:
        return "generated", f"its head says {mark.group()!r}"
    minified = _minified(text, language, name, rules, measured)
    if minified:
        return "minified", minified
    data = _data_only(text, language, rules, measured)
    if data:
        return "data_only", data
    alphanumeric = measured["letters_and_digits"] = _num_word_characters(text) / len(text)
    if alphanumeric < rules.min_alphanumeric:
        return "few_letters_and_digits", f"{alphanumeric:.2f} is below {rules.min_alphanumeric}"
    if language == "python" and (error := outline(text).error):
        return "does_not_parse", error
    return None, None


def _minified(text: str, language: str, name: str, rules: CodeRules, measured: dict[str, float]) -> str | None:
    """Returns what shows that a file is minified, or None."""
    if MINIFIED_NAMES.search(name):
        return f"its name is {name}"
    lines = text.splitlines()
    longest, mean = max(map(len, lines)), len(text) / len(lines)
    measured |= {"longest_line": longest, "mean_line": mean}
    if longest > rules.max_line or mean > rules.max_mean_line:
        return f"longest line {longest}, mean {mean:.0f}: above {rules.max_line} or {rules.max_mean_line}"
    if language in WEB_LANGUAGES:
        white = measured["white_space"] = 1 - len("".join(text.split())) / len(text)
        if white < rules.min_white_space:
            return f"white space is {white:.3f} of it, below {rules.min_white_space}"
    return None


def _data_only(text: str, language: str, rules: CodeRules, measured: dict[str, float]) -> str | None:
    """Returns what shows that a file is a table, or None."""
    if len(text) < rules.min_data_characters:
        return None
    if language in DATA_LANGUAGES:
        measured["table_share"] = 1.0
        return f"{len(text)} characters of {language}, at least {rules.min_data_characters}"
    if language == "python":
        share = outline(text).data_share
    else:
        share = sum(found.end() - found.start() + 1 for found in DATA_LINE.finditer(text)) / len(text)
    if share * len(text) < rules.min_data_characters:
        return None
    measured["table_share"] = share
    if share > rules.max_data_share:
        return f"{share:.2f} of it is tables, above {rules.max_data_share}"
    return None


def _num_word_characters(text: str) -> int:
    """Returns the number of letters, digits and underscores."""
    if text.isascii():
        return len(text.encode().translate(None, ASCII_SEPARATORS))
    return len(NOT_ALPHANUMERIC.sub("", text))
