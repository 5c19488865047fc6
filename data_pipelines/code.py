"""Files of a repository in the order of their dependencies, and a repository as one markdown text.

InternLM2's report, section 3.1.2: what a file imports comes before it, across folders; loops are broken in alphabetical
order; documents come before the first code file of their folder; batched imports (`__init__.py`) are followed to the
file that defines the name, and the unused edge is dropped. Python, by `ast`; files of other languages have no edges yet
and keep the alphabetical order.
"""

import heapq
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from data_pipelines.document import Document, make_document
from data_pipelines.outline import Import, outline

FENCE = re.compile(r"^`{3,}", re.MULTILINE)
Graph = Mapping[str, frozenset[str]]
"""Path -> the paths it depends on."""


class Repository(NamedTuple):
    """Paths of Python files by every dotted name they can be imported as."""

    modules: dict[str, str]
    texts: dict[str, str]


def index(texts: Mapping[str, str]) -> Repository:
    """Returns the repository's modules. A folder without `__init__.py` is also a root that names may start from."""
    packages = {path.rpartition("/")[0] for path in texts if path.rpartition("/")[2] == "__init__.py"}
    modules: dict[str, str] = {}
    for path in sorted(texts, key=lambda path: (path.count("/"), path)):
        if not path.endswith(".py"):
            continue
        parts = path.removesuffix(".py").split("/")
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        folders = path.split("/")[:-1]
        modules.setdefault(".".join(parts), path)
        for depth in range(1, len(parts)):
            if "/".join(folders[:depth]) in packages:
                break
            modules.setdefault(".".join(parts[depth:]), path)
    return Repository(modules, dict(texts))


def import_graph(texts: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Returns for every path the other files of the repository that it imports; missing modules and itself left out."""
    repository = index(texts)
    return {
        path: frozenset(_dependencies(path, repository)) - {path} if path.endswith(".py") else frozenset()
        for path in sorted(texts)
    }


def _dependencies(path: str, repository: Repository) -> Iterable[str]:
    for item in outline(repository.texts[path]).imports:
        yield from _resolve(item, path, repository, depth=0)


def _resolve(item: Import, path: str, repository: Repository, *, depth: int) -> Iterable[str]:
    if not item.names:
        found = _longest(item.module, path, repository)
        if found:
            yield found
        return
    for name in item.names:
        base = _module(item, path, repository)
        if base is None:
            # `from . import b` in a folder that is no package: b lies beside the file.
            beside = _beside(item, path, name, repository)
            if beside:
                yield beside
            continue
        as_module = _submodule(base, name, repository)
        yield as_module or _definition_of(name, base, repository, depth=depth)


def _module(item: Import, path: str, repository: Repository) -> str | None:
    """Returns the file of the module that a `from` import names, relative ones included."""
    if item.level == 0:
        return _exact(item.module, path, repository)
    folder = path.split("/")[:-1]
    if item.level - 1 > len(folder):
        return None
    parts = folder[: len(folder) - (item.level - 1)] + (item.module.split(".") if item.module else [])
    for candidate in ("/".join([*parts, "__init__.py"]), "/".join(parts) + ".py"):
        if candidate in repository.texts:
            return candidate
    return None


def _beside(item: Import, path: str, name: str, repository: Repository) -> str | None:
    if item.level == 0:
        return _exact(f"{item.module}.{name}", path, repository)
    folder = path.split("/")[:-1]
    if item.level - 1 > len(folder):
        return None
    parts = [*folder[: len(folder) - (item.level - 1)], *(item.module.split(".") if item.module else []), name]
    found = "/".join(parts)
    return next((c for c in (found + ".py", found + "/__init__.py") if c in repository.texts), None)


def _exact(module: str, path: str, repository: Repository) -> str | None:
    """Returns the file of an absolute module name; a script sees the files of its own folder first."""
    folder = path.rpartition("/")[0]
    if folder and f"{folder}/__init__.py" not in repository.texts:
        inside = f"{folder}/{module.replace('.', '/')}"
        for candidate in (f"{inside}.py", f"{inside}/__init__.py"):
            if candidate in repository.texts:
                return candidate
    return repository.modules.get(module)


def _longest(module: str, path: str, repository: Repository) -> str | None:
    parts = module.split(".")
    names = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((found for name in names if (found := _exact(name, path, repository))), None)


def _submodule(base: str, name: str, repository: Repository) -> str | None:
    if not base.endswith("__init__.py"):
        return None
    folder = base.removesuffix("__init__.py")
    return next((c for c in (f"{folder}{name}.py", f"{folder}{name}/__init__.py") if c in repository.texts), None)


def _definition_of(name: str, base: str, repository: Repository, *, depth: int) -> str:
    """Returns the file that a package's `__init__` takes the name from, else the `__init__` itself."""
    if depth >= 8 or not base.endswith("__init__.py"):
        return base
    for item in outline(repository.texts[base]).imports:
        if name in item.names:
            found = next(
                iter(_resolve(Import(item.module, (name,), item.level), base, repository, depth=depth + 1)), None
            )
            if found and found != base:
                return found
    return base


# --- order -----------------------------------------------------------------------------------------------------------


def components(graph: Graph) -> list[list[str]]:
    """Returns the strongly connected components (Tarjan 1972, without recursion), each sorted, the list sorted."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[list[str]] = []
    for start in sorted(graph):
        if start in number:
            continue
        work = [(start, iter(sorted(graph[start])))]
        number[start] = low[start] = len(number)
        stack.append(start)
        on_stack.add(start)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in number:
                    number[other] = low[other] = len(number)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(sorted(graph[other]))))
                    break
                if other in on_stack:
                    low[node] = min(low[node], number[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    at = stack.index(node)
                    found.append(sorted(stack[at:]))
                    on_stack.difference_update(stack[at:])
                    del stack[at:]
    return sorted(found)


def dependency_order(graph: Graph) -> list[str]:
    """Returns the paths so that each follows what it depends on; among those that are free, the alphabetical first.

    Only edges inside a loop can be broken: the alphabetically first file of the loop starts it.
    """
    member = {path: component[0] for component in components(graph) for path in component}
    loops = defaultdict(list)
    for path in sorted(graph):
        loops[member[path]].append(path)
    outer = {
        first: {member[other] for path in paths for other in graph[path]} - {first} for first, paths in loops.items()
    }
    order: list[str] = []
    for first in _free_first(outer):
        inside = {path: set(graph[path]) & set(loops[first]) for path in loops[first]}
        order.extend(_free_first(inside))
    return order


def _free_first(graph: Mapping[str, set[str]]) -> list[str]:
    """Kahn's algorithm with a heap; where nothing is free, the first of what is left starts."""
    waiting = {path: set(needs) for path, needs in graph.items()}
    users: dict[str, list[str]] = defaultdict(list)
    for path, needs in graph.items():
        for other in needs:
            users[other].append(path)
    free = [path for path, needs in waiting.items() if not needs]
    heapq.heapify(free)
    left, at = sorted(waiting), 0
    order = []
    done: set[str] = set()
    while len(order) < len(left):
        if free:
            path = heapq.heappop(free)
            if path in done:
                continue
        else:
            while left[at] in done:
                at += 1
            path = left[at]
        order.append(path)
        done.add(path)
        for user in users[path]:
            waiting[user].discard(path)
            if not waiting[user] and user not in done:
                heapq.heappush(free, user)
    return order


def order_files(texts: Mapping[str, str], *, is_code: Mapping[str, bool]) -> list[str]:
    """Returns all paths: code by dependency, and documents before the first code file of their folder.

    A folder without code of its own looks below itself, then above.
    """
    code = {path: text for path, text in texts.items() if is_code[path]}
    ordered = dependency_order(import_graph(code))
    place = {path: rank for rank, path in enumerate(ordered)}
    before: dict[int, list[str]] = defaultdict(list)
    for path in sorted(path for path in texts if not is_code[path]):
        before[_first_code(path.rpartition("/")[0], place)].append(path)
    result = [path for rank, code_path in enumerate(ordered) for path in [*before[rank], code_path]]
    return result + before[len(ordered)]


def _first_code(folder: str, place: Mapping[str, int]) -> int:
    while True:
        own = [rank for path, rank in place.items() if path.rpartition("/")[0] == folder]
        below = [rank for path, rank in place.items() if not folder or path.startswith(folder + "/")]
        if own or below:
            return min(own or below)
        if not folder:
            return len(place)
        folder = folder.rpartition("/")[0]


def order_documents(documents: Sequence[Document]) -> list[Document]:
    """Returns the documents with each repository's code files in dependency order, in the places that they held.

    Documents of a repository (field `repository` of meta) move among the places of that repository; others stay.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, document in enumerate(documents):
        repository = document.meta.get("repository")
        if repository:
            places[str(repository)].append(place)
    result = list(documents)
    for _, held in sorted(places.items()):
        by_path: dict[str, Document] = {}
        for place in held:
            by_path.setdefault(_inside(documents[place]), documents[place])
        if len(by_path) < len(held) or not any(documents[place].domain == "code" for place in held):
            continue  # two files of one path, or no code at all, are no repository; their order stays
        is_code = {path: document.domain == "code" for path, document in by_path.items()}
        order = order_files({path: document.text for path, document in by_path.items()}, is_code=is_code)
        for place, path in zip(held, order, strict=True):
            result[place] = by_path[path]
    return result


def _inside(document: Document) -> str:
    """The path inside its repository."""
    return document.path.removeprefix(f"{document.meta['repository']}/")


def markdown(documents: Sequence[Document], *, title: str, max_bytes: int | None = None) -> list[Document]:
    """Returns a repository as long markdown documents: path headings, fenced code, documents as they are.

    Files stay whole: a document is closed before the file that would take it past `max_bytes`.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for document in documents:
        piece = f"## {_inside(document) if 'repository' in document.meta else document.path}\n\n{_body(document)}\n"
        num_bytes = len(piece.encode())
        if max_bytes is not None and parts[-1] and size + num_bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += num_bytes
    return [
        make_document(
            f"# {title}\n\n" + "\n".join(pieces), source="repository", path=f"{title}/{number}", domain="code",
            language="markdown", meta={"repository": title},
        )
        for number, pieces in enumerate(parts)
        if pieces
    ]  # fmt: skip


def _body(document: Document) -> str:
    if document.domain != "code":
        return document.text.rstrip("\n") + "\n"
    longest = max((len(run) for run in FENCE.findall(document.text)), default=2)
    fence = "`" * max(3, longest + 1)
    end = "" if document.text.endswith("\n") else "\n"
    return f"{fence}{document.language}\n{document.text}{end}{fence}\n"
