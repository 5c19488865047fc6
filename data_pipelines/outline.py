"""What a Python file says about itself, read with `ast` and never imported: its imports, definitions and docstrings."""

import ast
import functools
import gc
import hashlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple


class Import(NamedTuple):
    """`import a.b` is (module="a.b", names=(), level=0); `from ..a import b` is (module="a", names=("b",), level=2)."""

    module: str
    names: tuple[str, ...]
    level: int


class Definition(NamedTuple):
    """A documented class or function. name: qualified inside the module. Lines are 1-based, the last one included."""

    kind: Literal["class", "function"]
    name: str
    signature: str
    docstring: str
    first_line: int
    last_line: int


class Outline(NamedTuple):
    """data_share: the part of the text that lies in module-level literals (tables, not program; `__all__` aside)."""

    docstring: str
    imports: tuple[Import, ...]
    definitions: tuple[Definition, ...]
    num_statements: int
    data_share: float
    error: str | None


NUM_KNOWN_IMPORTS = 1 << 16
"""Files whose imports are remembered, about 1 KB each: the rules have parsed what is put in order later on."""
_KNOWN_IMPORTS: dict[bytes, tuple[Import, ...]] = {}
LITERALS = (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Constant)
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


@functools.lru_cache(maxsize=4096)
def outline(text: str) -> Outline:
    """The outline of a Python source text; `error` says why, where it does not parse.

    A text of a newer Python than this one has no error and an empty outline.
    """
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many small objects and no garbage: collecting meanwhile costs a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources are not our news
            tree = ast.parse(text)
        docstring = ast.get_docstring(tree) or ""
        imports: list[Import] = []
        definitions: list[Definition] = []
        num_statements = _read_block(tree.body, "", imports, definitions)
        _remember(text, tuple(imports))
        return Outline(docstring, tuple(imports), tuple(definitions), num_statements, _data_share(tree, text), None)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = None if _is_newer(error, text) else f"{type(error).__name__}: {error}"
        return Outline("", (), (), 0, 0.0, reason)
    finally:
        if collecting:
            gc.enable()


NEWER_STATEMENT = re.compile(r"\s*(?:(?:async\s+)?def\s+\w+\s*\[|class\s+\w+\s*\[|type\s+\w+\s*(?:\[.*\]\s*)?=)")
"""Of 3.12 (PEP 695): parameters of types in brackets, and names for types."""


def _is_newer(error: Exception, text: str) -> bool:
    """Whether a parser older than 3.12 stumbles over what that version allows: these, and f-strings in f-strings."""
    if sys.version_info >= (3, 12) or not isinstance(error, SyntaxError):
        return False
    lines = text.splitlines()
    line = lines[error.lineno - 1] if error.lineno and error.lineno <= len(lines) else ""
    return error.msg.startswith("f-string") or NEWER_STATEMENT.match(line) is not None


def imports_of(text: str) -> tuple[Import, ...]:
    """The imports of a Python source text, of which a text that was read before is not parsed again."""
    known = _KNOWN_IMPORTS.get(_digest(text))
    return outline(text).imports if known is None else known


def _remember(text: str, imports: tuple[Import, ...]) -> None:
    _KNOWN_IMPORTS[_digest(text)] = imports
    while len(_KNOWN_IMPORTS) > NUM_KNOWN_IMPORTS:
        _KNOWN_IMPORTS.pop(next(iter(_KNOWN_IMPORTS), b""), None)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _read_block(block: list[ast.stmt], prefix: str, imports: list[Import], definitions: list[Definition]) -> int:
    """Statements in the block and below; fills the two lists. `prefix` is None-like ("\\0") inside a function."""
    count = 0
    for node in block:
        count += 1
        if isinstance(node, ast.Import):
            imports.extend(Import(alias.name, (), 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imports.append(Import(node.module or "", tuple(alias.name for alias in node.names), node.level))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            is_class = isinstance(node, ast.ClassDef)
            if not prefix.startswith("\0"):
                docstring = ast.get_docstring(node)
                if docstring:
                    definitions.append(_definition(node, prefix + node.name, docstring))
            count += _read_block(node.body, prefix + node.name + "." if is_class else "\0", imports, definitions)
        else:
            for name in BLOCKS:
                inner = getattr(node, name, None)
                if inner:
                    count += _read_block(inner, prefix, imports, definitions)
    return count


def _definition(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str, docstring: str) -> Definition:
    first_line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if isinstance(node, ast.ClassDef):
        bases = ", ".join([*map(ast.unparse, node.bases), *(f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords)])
        signature = f"class {node.name}({bases})" if bases else f"class {node.name}"
        return Definition("class", name, signature, docstring, first_line, node.end_lineno or node.lineno)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    signature = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"
    return Definition("function", name, signature, docstring, first_line, node.end_lineno or node.lineno)


def _data_share(tree: ast.Module, text: str) -> float:
    lines = text.splitlines(keepends=True)
    inside = 0
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, LITERALS):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            exports = any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
            end = node.end_lineno or node.lineno
            if end > node.lineno and not exports:
                inside += sum(map(len, lines[node.lineno - 1 : end]))
    return inside / max(len(text), 1)


def string_table(text: str, name: str) -> Iterator[tuple[str, str]]:
    """(key, value) pairs of a module-level dictionary of strings such as `pydoc_data.topics.topics`."""
    for node in ast.parse(text).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            yield from sorted(ast.literal_eval(node.value).items())  # type: ignore[arg-type]
