"""Which files of a repository each of its files imports: Python by `ast`, the other languages by regular expressions.

Java, Go, C and C++, JavaScript and TypeScript, Rust. An import counts where it leads to a file of the repository; what
lies outside, what cannot be told apart (two headers of one name, equally near) and a file's import of itself are left
out. Batched imports lead to the files that define what is used: `import a.b.*`, Go packages, `index.js`, `pub use`.
Paths that differ from the import in case alone are taken where there is one such path.
"""

import functools
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from data_pipelines.code_languages import language_of
from data_pipelines.python_imports import MAX_REEXPORTS, PythonFiles, python_files, python_imports


class Repository(NamedTuple):
    """texts: by path. lowered: paths by themselves in lower case. named: paths by file name in lower case.

    classes: paths by a Java class's full name. modules, packages: Go's folders by module path, files by folder.
    crates: folders of Rust's roots by crate name. exports: what was found for (name, file, files gone through) in
    JavaScript: folders whose indexes hand each other's names on would be gone through along every way there is.
    """

    texts: Mapping[str, str]
    python: PythonFiles
    lowered: dict[str, list[str]]
    named: dict[str, list[str]]
    classes: dict[str, list[str]]
    modules: dict[str, str]
    packages: dict[str, list[str]]
    crates: dict[str, str]
    exports: dict[tuple[str, str, int], str]


def import_graph(texts: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Returns for every path the other files of the repository that it imports; missing files and itself left out.

    Files that only say how imports are meant (go.mod, Cargo.toml) may be among the texts.
    """
    repository = _index(texts)
    graph = {}
    for path in sorted(texts):
        found = IMPORTS.get(language_of(path))
        graph[path] = frozenset(found(path, repository)) - {path} if found else frozenset()
    return graph


def _index(texts: Mapping[str, str]) -> Repository:
    lowered, named, classes, packages = (defaultdict(list) for _ in range(4))
    modules, crates, declared = {}, {}, {}
    for path in sorted(texts):
        folder, _, name = path.rpartition("/")
        lowered[path.lower()].append(path)
        named[name.lower()].append(path)
        if name.endswith(".java"):
            package = next(iter(_statements(JAVA_PACKAGE, texts[path])), None)
            classes[f"{package}.{name[:-5]}" if package else name[:-5]].append(path)
        elif name.endswith(".go") and not name.endswith("_test.go"):
            packages[folder].append(path)
        elif name == "go.mod" and (module := GO_MODULE.search(texts[path])):
            modules[module[1]] = folder
        elif name == "lib.rs":
            home = folder.removesuffix("src").rstrip("/") if folder.split("/")[-1] == "src" else folder
            crates[home.rpartition("/")[2].replace("-", "_")] = folder
        elif name == "Cargo.toml" and (crate := CARGO_NAME.search(texts[path])):
            declared[crate[1].replace("-", "_")] = join(folder, "src")
    crates |= {name: folder for name, folder in declared.items() if join(folder, "lib.rs") in texts}
    return Repository(texts, python_files(texts), lowered, named, classes, modules, packages, crates, {})


COMMENT = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|//[^\n]*|/\*.*?\*/""", re.DOTALL)


@functools.lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """Returns the text of a language of C's kind without its comments; strings stay."""
    if "//" not in text and "/*" not in text:
        return text
    return COMMENT.sub(lambda found: found[1] or " ", text)


def _statements(pattern: re.Pattern[str], text: str) -> list:
    """Returns what `findall` gives outside comments, for a pattern that begins at the start of a line.

    Comments are taken out only where a match may lie inside one: doing so costs more than the search.
    """
    for found in pattern.finditer(text):
        if text.rfind("/*", 0, found.start()) > text.rfind("*/", 0, found.start()):
            return pattern.findall(plain(text))
    return pattern.findall(text)


def join(folder: str, name: str) -> str:
    """Returns the normalised path of a name seen from a folder; "" is the repository itself."""
    path = posixpath.normpath(f"{folder}/{name}" if folder else name)
    return "" if path == "." else path


def _find(path: str, repository: Repository) -> str | None:
    """Returns the file of this path, else the only one that differs from it in case alone."""
    if path in repository.texts:
        return path
    others = repository.lowered.get(path.lower(), [])
    return others[0] if len(others) == 1 else None


def _nearest(candidates: Sequence[str], path: str) -> str | None:
    """Returns the candidate that shares the most folders with the path, or None where two share equally many."""

    def shared(candidate: str) -> int:
        pairs = zip(candidate.split("/")[:-1], path.split("/")[:-1])
        return next(
            (depth for depth, (one, other) in enumerate(pairs) if one != other), min(_depth(candidate), _depth(path))
        )

    ranked = sorted(((shared(candidate), candidate) for candidate in candidates), reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        return None
    return ranked[0][1]


def _depth(path: str) -> int:
    return path.count("/")


# --- C and C++ -------------------------------------------------------------------------------------------------------

INCLUDE = re.compile(r'^[ \t]*#[ \t]*(?:include|import)[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)
STANDARD_HEADERS = frozenset(
    "assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign stdarg stdatomic "
    "stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar wctype".split()
)


def _c_imports(path: str, repository: Repository) -> Iterator[str]:
    folder = path.rpartition("/")[0]
    for quoted, angled in _statements(INCLUDE, repository.texts[path]):
        beside = _find(join(folder, quoted), repository) if quoted else None
        if angled.removesuffix(".h") in STANDARD_HEADERS:
            continue
        found = beside or _by_suffix(quoted or angled, path, repository)
        if found:
            yield found


def _by_suffix(name: str, path: str, repository: Repository) -> str | None:
    """Returns the file whose path ends in the name, whole folders at a time; of several the nearest one."""
    ending = "/" + "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
    same_name = repository.named.get(ending.rpartition("/")[2].lower(), [])
    exact = [candidate for candidate in same_name if f"/{candidate}".endswith(ending)]
    return _nearest(exact or [c for c in same_name if f"/{c}".lower().endswith(ending.lower())], path)


# --- Java ------------------------------------------------------------------------------------------------------------

JAVA_PACKAGE = re.compile(r"^\s*package\s+([\w.]+)\s*;", re.MULTILINE)
JAVA_IMPORT = re.compile(r"^\s*import\s+(?:static\s+)?([\w.]+)(\.\*|\*)?\s*;", re.MULTILINE)
WORD = re.compile(r"\w+")


def _java_imports(path: str, repository: Repository) -> Iterator[str]:
    text = repository.texts[path]
    used: set[str] = set()
    for name, star in _statements(JAVA_IMPORT, text):
        name = name.rstrip(".")
        found = _java_class(name, path, repository)
        if found:
            yield found
        elif star:
            used = used or set(WORD.findall(JAVA_IMPORT.sub("", plain(text))))
            for full, paths in repository.classes.items():
                package, _, simple = full.rpartition(".")
                if package == name and simple in used and (nearest := _nearest(paths, path)):
                    yield nearest


def _java_class(name: str, path: str, repository: Repository) -> str | None:
    """Returns the file of the class; of a nested class and of a static member that of the class around it."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        paths = repository.classes.get(".".join(parts[:size]))
        if paths:
            return _nearest(paths, path)
    return None


# --- Go --------------------------------------------------------------------------------------------------------------

GO_MODULE = re.compile(r'^module\s+"?([^\s"]+)', re.MULTILINE)
GO_PACKAGE = re.compile(r"^package\s+(\w+)", re.MULTILINE)
GO_IMPORT = re.compile(r'^import\s*(?:\(([^)]*)\)|((?:[\w.]+\s+)?["`][^"`\n]+["`]))', re.MULTILINE)
GO_SPEC = re.compile(r'(?:([\w.]+)[ \t]+)?["`]([^"`\n]+)["`]')
GO_BLOCK = re.compile(r"^(?:var|const|type)\s*\((.*?)^\)", re.MULTILINE | re.DOTALL)
GO_BLOCK_NAME = re.compile(r"^(?:\t| +)(\w+(?:[ \t]*,[ \t]*\w+)*)", re.MULTILINE)
GO_NAME = re.compile(r"^(?:func|type|var|const)\s+(\w+(?:[ \t]*,[ \t]*\w+)*)", re.MULTILINE)


def _go_imports(path: str, repository: Repository) -> Iterator[str]:
    text = plain(repository.texts[path])
    for block, single in GO_IMPORT.findall(text):
        for alias, name in GO_SPEC.findall(block or single):
            files = repository.packages.get(_go_folder(name, repository), [])
            if not files:
                continue
            package = GO_PACKAGE.search(plain(repository.texts[files[0]]))
            qualifier = alias or (package[1] if package else name.rpartition("/")[2])
            used = set(re.findall(rf"\b{re.escape(qualifier)}\.([A-Z]\w*)", text))
            defining = [file for file in files if used & _go_names(plain(repository.texts[file]))]
            yield from defining or files  # `_` and `.` imports, and names of kinds not known here: the whole package


def _go_folder(name: str, repository: Repository) -> str | None:
    for module in sorted(repository.modules, key=len, reverse=True):
        if name == module or name.startswith(module + "/"):
            return join(repository.modules[module], name[len(module) :].lstrip("/"))
    if repository.modules or "." not in name.split("/")[0]:
        return None
    # Without a go.mod: the longest end of an address that is a folder with Go files.
    parts = name.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in repository.packages), None)


@functools.lru_cache(maxsize=4096)
def _go_names(text: str) -> frozenset[str]:
    groups = [
        *GO_NAME.findall(text),
        *(group for block in GO_BLOCK.findall(text) for group in GO_BLOCK_NAME.findall(block)),
    ]
    return frozenset(name for group in groups for name in WORD.findall(group))


# --- JavaScript and TypeScript ---------------------------------------------------------------------------------------

JS_FROM = re.compile(r"""\b(import|export)\b\s*(?:type\b\s*)?([^'"`;()=]*?)\bfrom\s*['"]([^'"\n]+)['"]""")
JS_PLAIN = re.compile(r"""(?:\bimport\s*\(?|\brequire\s*\()\s*['"]([^'"\n]+)['"]""")
JS_BRACES = re.compile(r"\{([^}]*)\}")
JS_SUFFIXES = (".js", ".mjs", ".cjs", ".jsx")
TS_SUFFIXES = (".ts", ".tsx", ".mts", ".cts", ".d.ts")


class FromClause(NamedTuple):
    """What an `import ... from` or `export ... from` says: pairs of the name there and the name here; whole: the file
    itself is meant as well (a default or namespace import); star: everything is handed on."""

    target: str
    names: tuple[tuple[str, str], ...]
    whole: bool
    star: bool


@functools.lru_cache(maxsize=4096)
def _js_clauses(text: str) -> tuple[FromClause, ...]:
    clauses = []
    for kind, clause, target in JS_FROM.findall(text):
        names = []
        for braces in JS_BRACES.findall(clause):
            for item in braces.split(","):
                words = item.removeprefix("type ").split()
                if words:
                    names.append((words[0], words[-1]))
        rest = JS_BRACES.sub("", clause).replace(",", " ").split()
        star = kind == "export" and rest == ["*"]
        names += [("", rest[-1])] if rest and not star else []  # the name of a default or namespace import
        clauses.append(FromClause(target, tuple(names), bool(rest), star))
    return tuple(clauses)


def _js_imports(path: str, repository: Repository) -> Iterator[str]:
    text = plain(repository.texts[path])
    for target in JS_PLAIN.findall(text):
        if found := _js_file(target, path, repository):
            yield found
    for clause in _js_clauses(text):
        found = _js_file(clause.target, path, repository)
        if found is None:
            continue
        if clause.whole or clause.star or not clause.names:
            yield found
        for name, _ in clause.names:
            yield _js_definition(name, found, repository, depth=0) if name else found


def _js_file(target: str, path: str, repository: Repository) -> str | None:
    """Returns the file of a relative import: as it stands, with a suffix, a folder's index; foo.js may mean foo.ts."""
    if not re.match(r"\.\.?(/|$)", target):
        return None
    base = join(path.rpartition("/")[0], target.partition("?")[0])
    is_typed = language_of(path) == "typescript"
    suffixes = (*TS_SUFFIXES, *JS_SUFFIXES) if is_typed else (*JS_SUFFIXES, *TS_SUFFIXES)
    typed = [
        base[: -len(end)] + other
        for end, other in ((".js", ".ts"), (".js", ".tsx"), (".mjs", ".mts"))
        if base.endswith(end)
    ]
    candidates = [base, *typed, *(base + end for end in (*suffixes, ".vue", ".svelte"))]
    candidates += [join(base, f"index{end}") for end in suffixes]
    return next((found for candidate in candidates if (found := _find(candidate, repository))), None)


def _js_definition(name: str, path: str, repository: Repository, *, depth: int) -> str:
    """Returns the file that a folder's index takes the name from, else the index."""
    if depth >= MAX_REEXPORTS or not path.rpartition("/")[2].startswith("index."):
        return path
    key = (name, path, depth)
    if key not in repository.exports:
        repository.exports[key] = _js_source(name, path, repository, depth=depth)
    return repository.exports[key]


def _js_source(name: str, path: str, repository: Repository, *, depth: int) -> str:
    clauses = _js_clauses(plain(repository.texts[path]))
    for clause in clauses:
        source = next((there for there, here in clause.names if here == name), None)
        if source is not None and (found := _js_file(clause.target, path, repository)):
            return _js_definition(source, found, repository, depth=depth + 1) if source else found
    exported = re.compile(rf"\bexport\b[^;=(]*\b{re.escape(name)}\b")
    for clause in clauses:
        found = _js_file(clause.target, path, repository) if clause.star else None
        if found is None or found == path:
            continue
        found = _js_definition(name, found, repository, depth=depth + 1)
        if exported.search(plain(repository.texts[found])):
            return found
    return path


# --- Rust ------------------------------------------------------------------------------------------------------------

CARGO_NAME = re.compile(r'^\[package\][^\[]*?^\s*name\s*=\s*"([^"\n]+)"', re.MULTILINE)
RUST_MOD = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?\s+)?mod\s+(\w+)\s*;", re.MULTILINE)
RUST_USE = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?\s+)?use\s+([^;]+);", re.MULTILINE)
RUST_ROOTS = ("lib.rs", "main.rs")


def _rust_imports(path: str, repository: Repository) -> Iterator[str]:
    text = repository.texts[path]
    root, own = _rust_place(path, repository)
    for child in _statements(RUST_MOD, text):
        if found := _rust_module(root, [*own, child], repository, whole=True):
            yield found[0]
    for parts, _ in _rust_uses(text):
        if found := _rust_use(parts, root, own, repository, depth=0):
            yield found


def _rust_place(path: str, repository: Repository) -> tuple[str, list[str]]:
    """Returns the folder of the crate's root, the nearest with a lib.rs or main.rs, and the module's path in it."""
    folder = path.rpartition("/")[0]
    root = folder
    while not any(join(root, name) in repository.texts for name in RUST_ROOTS):
        if not root:
            root = folder
            break
        root = root.rpartition("/")[0]
    inside = path.removeprefix(root).lstrip("/").removesuffix(".rs").split("/")
    return root, inside[:-1] if inside[-1] in ("mod", "lib", "main") else inside


def _rust_module(
    root: str, parts: Sequence[str], repository: Repository, *, whole: bool
) -> tuple[str, list[str]] | None:
    """Returns the file of the longest part of a module path that has one, and the names left (whole: none)."""
    for size in range(len(parts), len(parts) - 1 if whole else -1, -1):
        base = join(root, "/".join(parts[:size]))
        ends = (f"{base}.rs", f"{base}/mod.rs") if size else tuple(join(root, name) for name in RUST_ROOTS)
        found = next((end for end in ends if end in repository.texts), None)
        if found:
            return found, list(parts[size:])
    return None


def _rust_use(parts: Sequence[str], root: str, own: Sequence[str], repository: Repository, *, depth: int) -> str | None:
    first, rest = parts[0], list(parts[1:])
    if first == "crate":
        found = _rust_module(root, rest, repository, whole=False)
    elif first in ("self", "super"):
        base = list(own)
        while rest and first == "super":
            base, (first, *rest) = base[:-1], rest
        found = _rust_module(
            root, [*base, *rest] if first == "self" else [*base, first, *rest], repository, whole=False
        )
    elif _rust_module(root, [*own, first], repository, whole=True):
        found = _rust_module(root, [*own, *parts], repository, whole=False)
    elif first in repository.crates:
        found = _rust_module(repository.crates[first], rest, repository, whole=False)
    else:
        return None
    if found is None or not found[1] or depth >= MAX_REEXPORTS:
        return found and found[0]
    # `pub use`: the file that the name is taken from.
    path, names = found
    inner_root, inner_own = _rust_place(path, repository)
    for other, name in _rust_uses(repository.texts[path]):
        if name == names[0]:
            return _rust_use(other, inner_root, inner_own, repository, depth=depth + 1) or path
    return path


@functools.lru_cache(maxsize=4096)
def _rust_uses(text: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Returns the paths of all `use` declarations, trees of braces unfolded, each with the name it is known by here."""
    return tuple(
        item for tree in _statements(RUST_USE, text) for item in _rust_tree("".join(plain(tree).split("\n")), ())
    )


def _rust_tree(tree: str, before: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    head, brace, inner = tree.strip().partition("{")
    path, _, alias = head.partition(" as ")
    parts = (*before, *(part.strip() for part in path.split("::") if part.strip() not in ("", "*")))
    if not brace:
        if parts and parts[-1] == "self" and len(parts) > 1:
            parts = parts[:-1]
        if parts:
            yield parts, alias.strip() or parts[-1]
        return
    depth, start = 0, 0
    inner = inner.rstrip().removesuffix("}")
    for place, character in enumerate(inner + ","):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            yield from _rust_tree(inner[start:place], parts)
            start = place + 1


def _python(path: str, repository: Repository) -> Iterable[str]:
    return python_imports(path, repository.python)


IMPORTS: Mapping[str, Callable[[str, Repository], Iterable[str]]] = {
    "python": _python, "java": _java_imports, "go": _go_imports, "c": _c_imports, "cpp": _c_imports,
    "objectivecpp": _c_imports, "javascript": _js_imports, "typescript": _js_imports, "vue": _js_imports,
    "svelte": _js_imports, "rust": _rust_imports,
}  # fmt: skip
