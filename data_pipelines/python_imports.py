"""Which files of a repository a Python file imports, by `ast`.

Batched imports (`from package import name`) are followed to the file that defines the name, and the edge to the
package's `__init__`, which then carries nothing, is dropped.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from data_pipelines.outline import Import, imports_of

MAX_REEXPORTS = 8
"""How many files that only hand a name on are gone through."""


class PythonFiles(NamedTuple):
    """Paths of Python files by every dotted name they can be imported as, and all texts by path.

    definitions: what was found for (name, package's file, files gone through). A package whose functions import from
    it, as many do against loops, would else be gone through again for each of them, and for each of these again.
    """

    modules: dict[str, str]
    texts: Mapping[str, str]
    definitions: dict[tuple[str, str, int], str]


def python_files(texts: Mapping[str, str]) -> PythonFiles:
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
    return PythonFiles(modules, texts, {})


def python_imports(path: str, repository: PythonFiles) -> Iterable[str]:
    """Yields the files that a file imports; what is not in the repository is left out."""
    for item in imports_of(repository.texts[path]):
        yield from _resolve(item, path, repository, depth=0)


def _resolve(item: Import, path: str, repository: PythonFiles, *, depth: int) -> Iterable[str]:
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


def _module(item: Import, path: str, repository: PythonFiles) -> str | None:
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


def _beside(item: Import, path: str, name: str, repository: PythonFiles) -> str | None:
    if item.level == 0:
        return _exact(f"{item.module}.{name}", path, repository)
    folder = path.split("/")[:-1]
    if item.level - 1 > len(folder):
        return None
    parts = [*folder[: len(folder) - (item.level - 1)], *(item.module.split(".") if item.module else []), name]
    found = "/".join(parts)
    return next((c for c in (found + ".py", found + "/__init__.py") if c in repository.texts), None)


def _exact(module: str, path: str, repository: PythonFiles) -> str | None:
    """Returns the file of an absolute module name; a script sees the files of its own folder first."""
    folder = path.rpartition("/")[0]
    if folder and f"{folder}/__init__.py" not in repository.texts:
        inside = f"{folder}/{module.replace('.', '/')}"
        for candidate in (f"{inside}.py", f"{inside}/__init__.py"):
            if candidate in repository.texts:
                return candidate
    return repository.modules.get(module)


def _longest(module: str, path: str, repository: PythonFiles) -> str | None:
    parts = module.split(".")
    names = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((found for name in names if (found := _exact(name, path, repository))), None)


def _submodule(base: str, name: str, repository: PythonFiles) -> str | None:
    if not base.endswith("__init__.py"):
        return None
    folder = base.removesuffix("__init__.py")
    return next((c for c in (f"{folder}{name}.py", f"{folder}{name}/__init__.py") if c in repository.texts), None)


def _definition_of(name: str, base: str, repository: PythonFiles, *, depth: int) -> str:
    """Returns the file that a package's `__init__` takes the name from, else the `__init__` itself."""
    if depth >= MAX_REEXPORTS or not base.endswith("__init__.py"):
        return base
    key = (name, base, depth)
    if key not in repository.definitions:
        taken = (_resolve(item, base, repository, depth=depth + 1) for item in _taken(repository.texts[base], name))
        files = (next(iter(found), None) for found in taken)
        repository.definitions[key] = next((found for found in files if found and found != base), base)
    return repository.definitions[key]


def _taken(text: str, name: str) -> Iterable[Import]:
    """Returns the imports of the name alone, in order, each once."""
    return _by_name(text).get(name, ())


@functools.lru_cache(maxsize=4096)
def _by_name(text: str) -> Mapping[str, Iterable[Import]]:
    found: dict[str, dict[Import, None]] = defaultdict(dict)
    for item in imports_of(text):
        for name in item.names:
            found[name][Import(item.module, (name,), item.level)] = None
    return found
