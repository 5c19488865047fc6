"""Files of a repository in the order of their dependencies, and a repository as one markdown text.

    python -m data_pipelines.code REPOSITORY [--output FILE.md]

InternLM2's report, section 3.1.2: what a file imports comes before it, across folders; loops are broken in alphabetical
order; documents come before the first code file of their folder. Imports are known of Python, Java, Go, C, C++,
JavaScript, TypeScript and Rust (`imports.py`); files of other languages keep the alphabetical order.
"""

import argparse
import heapq
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines import sources
from data_pipelines.code_languages import detect_languages, fenced
from data_pipelines.document import Document, make_document, to_batch, to_documents
from data_pipelines.imports import import_graph
from data_pipelines.licence import is_licence_file

Graph = Mapping[str, frozenset[str]]
"""Path -> the paths it depends on."""


class OrderReport(NamedTuple):
    """component_sizes: size of a strongly connected component -> how many there are. violations: imports that come
    after the file that wants them, each inside a loop; alphabetical_violations: those of the alphabetical order."""

    num_files: int
    num_edges: int
    component_sizes: dict[int, int]
    violations: int
    alphabetical_violations: int


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
                    component = [stack.pop()]
                    while component[-1] != node:
                        component.append(stack.pop())
                    found.append(sorted(component))
                    on_stack.difference_update(component)
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
        loop = set(loops[first])
        order.extend(_free_first({path: loop.intersection(graph[path]) for path in loops[first]}))
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


def order_report(graph: Graph, order: Sequence[str]) -> OrderReport:
    """Returns what the order makes of the graph. An import that is violated outside a loop is a RuntimeError."""
    parts = components(graph)
    member = {path: component[0] for component in parts for path in component}
    edges = [(path, other) for path in sorted(graph) for other in sorted(graph[path])]
    place = {path: rank for rank, path in enumerate(order)}
    violated = [(path, other) for path, other in edges if place[other] > place[path]]
    between = [f"{path} imports {other}" for path, other in violated if member[path] != member[other]]
    if between:
        raise RuntimeError(f"{len(between)} imports are out of order outside loops, the first: {between[0]}")
    sizes = Counter(map(len, parts))
    alphabetical = sum(other > path for path, other in edges)
    return OrderReport(len(graph), len(edges), dict(sorted(sizes.items())), len(violated), alphabetical)


def order_files(texts: Mapping[str, str], *, is_code: Mapping[str, bool]) -> list[str]:
    """Returns all paths: code by dependency, and documents before the first code file of their folder.

    A folder without code of its own looks below itself, then above.
    """
    imported = import_graph(texts)
    graph = {path: frozenset(p for p in imported[path] if is_code[p]) for path in imported if is_code[path]}
    ordered = dependency_order(graph)
    order_report(graph, ordered)
    own, below = _first_places(ordered)
    before: dict[int, list[str]] = defaultdict(list)
    for path in sorted(path for path in texts if not is_code[path]):
        folder = path.rpartition("/")[0]
        while folder and folder not in below:
            folder = folder.rpartition("/")[0]
        before[own.get(folder, below.get(folder, len(ordered)))].append(path)
    result = [path for rank, code_path in enumerate(ordered) for path in [*before[rank], code_path]]
    return result + before[len(ordered)]


def _first_places(ordered: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the place of the first code file by folder: of those in it, and of those in it or below."""
    own: dict[str, int] = {}
    below: dict[str, int] = {}
    for rank, path in enumerate(ordered):
        folder = path.rpartition("/")[0]
        own.setdefault(folder, rank)
        while folder not in below:
            below[folder] = rank
            folder = folder.rpartition("/")[0]
    return own, below


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
    return fenced(document.text, document.language)


def repository_documents(path: str | Path) -> list[Document]:
    """Returns a document per file of code or documentation of a repository, a folder or an archive of one."""
    read = sources.read([path], on_bad_row=lambda message: None)  # what is no text has no place in the order
    found = detect_languages(to_batch(row for row in read if "repository" in row.meta and row.text.strip()))
    rows = zip(to_documents(found.batch), found.reasons, strict=True)
    documents = [document for document, reason in rows if reason is None and not is_licence_file(document.path)]
    if not documents:
        raise ValueError(f"{path} holds no file of a known language; give a repository: its folder, a .tar or a .zip")
    return documents


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", help="a repository: its folder, a .tar (.tar.gz ...) or a .zip")
    parser.add_argument("--output", metavar="FILE.md", help="where the repository goes as one markdown text")
    given = parser.parse_args(arguments)
    try:
        documents = repository_documents(given.repository)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ordered = order_documents(documents)
    graph = import_graph({_inside(document): document.text for document in documents})
    found = order_report(graph, dependency_order(graph))
    languages = Counter(document.language for document in documents)
    print(", ".join(f"{count} {language}" for language, count in languages.most_common()))
    print(f"{found.num_files} files, {found.num_edges} imports between them")
    loops = [f"{count} of {size}" for size, count in found.component_sizes.items() if size > 1]
    print(f"loops: {', '.join(loops) + ' files' if loops else 'none'}")
    print(
        f"imports against the order: {found.violations}, all in loops; alphabetically {found.alphabetical_violations}"
    )
    if given.output:
        (text,) = markdown(ordered, title=ordered[0].path.partition("/")[0])
        try:
            Path(given.output).write_text(text.text, "utf-8")
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"written to {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
