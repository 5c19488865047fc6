"""The house keeps its own law: which way imports point, what the core may load, and what no file may hold.

Every rule is a function `root -> list of violations` and runs twice: on the checkout, where the list must be empty,
and on a toy tree with one planted violation, where it must not.
"""

import ast
import functools
import graphlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = {
    "internjax": set(),
    "data_pipelines": {"internjax"},
    "eval": {"internjax"},
    "serve": {"internjax"},
    "experiments": {"internjax", "data_pipelines", "eval", "serve"},
}
# Inside the core a room imports from its own layer and from those before it.
CORE_LAYERS = (
    {"sharding", "sandbox", "sandbox_child", "report", "chart", "figures", "text", "kernels"},
    {"model"},
    {"decode", "train", "hf"},
    {"rlhf"},
)
CORE_DEPTH = {room: depth for depth, layer in enumerate(CORE_LAYERS) for room in layer}
CORE_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
CORE_IMPORTS = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "ml_dtypes"}
AGENTS_IMPORT = ("internjax.text", "internjax.sandbox", "serve.agents", "serve.tools")
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Import(NamedTuple):
    importer: str
    target: str  # the module, as far as files can tell: `from a.b import c` gives a.b.c if that is a module, else a.b
    place: str
    at_import: bool  # runs when the importer is imported: not inside a function, not under TYPE_CHECKING


def python_files(root: Path, folders: tuple[str, ...] = tuple(FOLDERS)) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py") if path.is_file())


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level_nodes(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from top_level_nodes(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level_nodes(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level_nodes(handler.body)


class Facts(NamedTuple):
    """What the rules ask of one file."""

    imports: list[tuple[ast.Import | ast.ImportFrom, bool]]  # and whether it runs when the file is imported
    faults: list[tuple[int, str]]  # line, what is wrong there


@functools.cache
def facts(source: str, *, in_tests: bool) -> Facts:
    """Parses a file once for all rules: to parse them all is most of the work of each."""
    tree = ast.parse(source)
    eager = {id(node) for node in top_level_nodes(tree.body)}
    found = Facts([], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.imports.append((node, id(node) in eager))
        if fault := statement_fault(node, in_tests=in_tests):
            found.faults.append((node.lineno, fault))
    return found


def imports(root: Path) -> list[Import]:
    files = python_files(root)
    modules = {module_name(path, root) for path in files}
    found = []
    for path in files:
        for node, at_import in facts(path.read_text("utf-8"), in_tests=False).imports:
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                origin = "." * node.level + (node.module or "")
                targets = [full if (full := f"{origin}.{alias.name}") in modules else origin for alias in node.names]
            place = f"{path.relative_to(root)}:{node.lineno}"
            found += [Import(module_name(path, root), target, place, at_import) for target in targets]
    return found


def folder_violations(root: Path) -> list[str]:
    wrong = []
    for item in imports(root):
        own, target = item.importer.split(".")[0], item.target.split(".")[0]
        if item.target.startswith("."):
            wrong.append(f"{item.place}: relative import {item.target}; write it in full")
        elif target in FOLDERS and target != own and target not in FOLDERS[own]:
            wrong.append(f"{item.place}: {own} imports {item.target}; it may import {sorted(FOLDERS[own]) or 'none'}")
    return wrong


def core_violations(root: Path) -> list[str]:
    wrong = []
    for item in imports(root):
        importer, target = item.importer.split("."), item.target.split(".")
        if importer[0] != "internjax" or target[0] != "internjax" or len(importer) == 1:
            continue  # internjax/__init__.py is the front door: it may name every room
        rooms = importer[1], target[1] if len(target) > 1 else ""
        if not rooms[1]:
            wrong.append(f"{item.place}: the core imports the package itself; name the room (from internjax.model ...)")
        elif unknown := [room for room in rooms if room not in CORE_DEPTH]:
            wrong.append(f"{item.place}: internjax.{unknown[0]} has no layer in {Path(__file__).name}")
        elif CORE_DEPTH[rooms[1]] > CORE_DEPTH[rooms[0]]:
            wrong.append(f"{item.place}: internjax.{rooms[0]} imports {item.target}, which lies above it")
    return wrong


def cycle_violations(root: Path) -> list[str]:
    """Cycles between modules anywhere, and between rooms of the core or of serve; imports inside functions count.

    A file beside the rooms is one for itself.
    """
    modules, rooms = {}, {}
    known = {module_name(path, root) for path in python_files(root)}
    for item in imports(root):
        if item.target in known and item.importer not in ("internjax", item.target):
            modules.setdefault(item.importer, set()).add(item.target)
        importer, target = item.importer.split("."), item.target.split(".")
        if importer[0] == target[0] in ("internjax", "serve") and len(importer) > 1 < len(target):
            here, there = importer[:2], target[:2]
            if here != there:
                rooms.setdefault(".".join(here), set()).add(".".join(there))
    wrong = []
    for graph in (modules, rooms):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            wrong.append("cycle: " + " -> ".join(error.args[1]))
    return wrong


def heavy_import_violations(root: Path) -> list[str]:
    return [
        f"{item.place}: {item.target} at the top of a core file; import it inside the function that needs it"
        for item in imports(root)
        if item.at_import
        and item.importer.split(".")[0] == "internjax"
        and (top := item.target.split(".")[0]) not in {"internjax", ""} | CORE_IMPORTS
        and top not in sys.stdlib_module_names
    ]


def agent_violations(root: Path) -> list[str]:
    """Agents and tools are clients: they know messages, the sandbox and each other, never an engine or a server."""
    return [
        f"{item.place}: {item.importer} imports {item.target}; agents may import {', '.join(AGENTS_IMPORT)}"
        for item in imports(root)
        if item.importer.startswith(("serve.agents", "serve.tools"))
        and item.target.split(".")[0] in FOLDERS
        and not any((item.target + ".").startswith(room + ".") for room in AGENTS_IMPORT)
    ]


def statement_violations(root: Path) -> list[str]:
    """Statements that are wrong wherever they stand, in tests too except for `pickle`."""
    wrong = []
    for path in python_files(root, (*FOLDERS, "tests")):
        in_tests = path.relative_to(root).parts[0] == "tests"
        faults = facts(path.read_text("utf-8"), in_tests=in_tests).faults
        wrong += [f"{path.relative_to(root)}:{line}: {fault}" for line, fault in faults]
    return wrong


def statement_fault(node: ast.AST, *, in_tests: bool) -> str | None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name == "eval" or (alias.name.startswith("eval.") and not alias.asname):
                return "`import eval` hides the builtin; write `from eval.run import ...`"
            if alias.name.split(".")[0] in UNSAFE and not in_tests:
                return f"`import {alias.name}`: no pickle in this project"
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE and not in_tests:
        return f"`from {node.module} import`: no pickle in this project"
    if isinstance(node, ast.With | ast.AsyncWith):
        for item in node.items:
            call = isinstance(item.context_expr, ast.Call)
            name = ast.unparse(item.context_expr.func if call else item.context_expr).split(".")[-1]
            if name in ("Mesh", "make_mesh") if call else name.lower().endswith("mesh"):
                return "`with mesh:` makes constraints silent no-ops; write `with sharding.use(mesh):`"
    if isinstance(node, ast.keyword):
        value = node.value.value if isinstance(node.value, ast.Constant) else None
        if node.arg == "trust_remote_code" and value is not False:
            return "trust_remote_code runs other people's code; leave it out"
        if node.arg == "allow_pickle" and value is not False and not in_tests:
            return "allow_pickle: no pickle in this project"
    return None


def tracked_files(root: Path) -> list[Path]:
    """Files git knows or would take; every file where there is no git (an unpacked archive)."""
    listing = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listing.returncode == 0:
        return [path for name in listing.stdout.decode().split("\0") if name and (path := root / name).is_file()]
    hidden = {".venv", ".cache", ".git", "runs", "__pycache__"}
    return [path for path in root.rglob("*") if path.is_file() and not hidden & set(path.relative_to(root).parts)]


# Spelled in pieces, so that this file does not hold what it looks for.
HOSTS = re.compile("|".join(("python" + "hosted", "pypi" + r"\.org", "registry" + r"\.npm", "deb" + r"\.debian")), re.I)
MACHINE = re.compile(r"(^|[^\w.])/(" + "|".join(("wo" + "rk", "ro" + "ot", "tmp" + "/w", "fa" + "rm")) + ")/")
UNFINISHED = re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + "X|NotImplemented" + "Error)\\b")


def text_violations(root: Path) -> list[str]:
    wrong = []
    for path in tracked_files(root):
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        relative = path.relative_to(root)
        product = relative.parts[0] in FOLDERS and path.suffix == ".py"
        for number, line in enumerate(lines, 1):
            faults = (
                ("a package host's name", HOSTS.search(line)),
                ("a path of one machine", MACHINE.search(line)),
                ("an unfinished word", product and UNFINISHED.search(line)),
            )
            wrong += [f"{relative}:{number}: {what}: {line.strip()[:80]}" for what, hit in faults if hit]
    return wrong


RULES = (
    folder_violations,
    core_violations,
    cycle_violations,
    heavy_import_violations,
    agent_violations,
    statement_violations,
    text_violations,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_checkout_keeps_the_law(rule):
    assert rule(ROOT) == []


CLEAN = {
    "internjax/__init__.py": "def load(name):\n    from internjax.hf import open\n    return open.open_model(name)\n",
    "internjax/text/chat.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tokenizers\n",
    "internjax/sharding.py": "import jax\ndef use(mesh):\n    return jax.set_mesh(mesh)\n",
    "internjax/model/decoder.py": "import flax\nfrom internjax import sharding\nfrom internjax.text import chat\n",
    "internjax/hf/open.py": "import internjax.model.decoder\ndef load():\n    import safetensors\n",
    "internjax/train/step.py": "from internjax.model.decoder import linen\n",
    "serve/tools/python.py": "from internjax.sandbox import run\n",
    "serve/agents/react.py": "from internjax.text.chat import Message\nfrom serve.tools.python import run\n",
    "experiments/tiny.py": "from eval.run import evaluate\nfrom internjax.train.step import make_step\nimport torch\n",
    "tests/test_x.py": "import pickle\nwith jax.set_mesh(mesh):\n    pass\nwith use(mesh):\n    pass\n",
    "README.md": "Run make quickstart.\n",
}

PLANTED = {
    "core imports a program": (folder_violations, "internjax/model/rope.py", "from eval import run"),
    "lazily too": (folder_violations, "internjax/model/rope.py", "def f():\n    import serve.openai"),
    "an arrow in the middle": (folder_violations, "serve/bench/__main__.py", "from data_pipelines.tokens import read"),
    "a program imports experiments": (folder_violations, "eval/run.py", "import experiments.tiny"),
    "a relative import": (folder_violations, "internjax/model/rope.py", "from . import decoder"),
    "a room imports one above it": (core_violations, "internjax/model/rope.py", "from internjax.train import step"),
    "kernels import the model": (
        core_violations,
        "internjax/kernels/a.py",
        "def f():\n    import internjax.model.decoder",
    ),
    "the core imports its front door": (core_violations, "internjax/hf/a.py", "from internjax import open_model"),
    "a room without a layer": (core_violations, "internjax/utils/a.py", "from internjax.model import decoder"),
    "a cycle of modules": (cycle_violations, "internjax/text/a.py", "from internjax.text import a_user"),
    "a cycle of rooms": (cycle_violations, "internjax/train/a.py", "from internjax.hf.open import load"),
    "a cycle of rooms of serve": (cycle_violations, "serve/tools/a.py", "from serve.agents.trace import Trace"),
    "a heavy import": (heavy_import_violations, "internjax/text/tokenizer.py", "import tokenizers"),
    "a heavy import under try": (
        heavy_import_violations,
        "internjax/report.py",
        "try:\n    from matplotlib import pyplot\nexcept ImportError:\n    pass",
    ),
    "an agent imports an engine": (agent_violations, "serve/agents/a.py", "from internjax.decode.engine import Engine"),
    "an agent imports the server": (agent_violations, "serve/agents/a.py", "import serve.openai"),
    "import eval": (statement_violations, "experiments/a.py", "import eval"),
    "import eval.run": (statement_violations, "tests/test_a.py", "import eval.run"),
    "with mesh": (statement_violations, "internjax/train/a.py", "with self.mesh:\n    pass"),
    "with Mesh(...)": (statement_violations, "tests/test_a.py", "with jax.sharding.Mesh(devices, names):\n    pass"),
    "remote code": (statement_violations, "experiments/a.py", "load(name, trust_remote_code=True)"),
    "pickle": (statement_violations, "serve/a.py", "def f():\n    from pickle import loads"),
    "pickled arrays": (statement_violations, "data_pipelines/a.py", "numpy.load(path, allow_pickle=True)"),
    "a package host": (text_violations, "requirements.lock", "--index-url https://pypi" + ".org/simple"),
    "a machine's path": (text_violations, "README.md", "cd /wo" + "rk/main"),
    "an unfinished word": (text_violations, "eval/a.py", "x = 1  # TO" + "DO later"),
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_clean_tree_is_clean(rule, tmp_path):
    write_tree(tmp_path, CLEAN)
    assert rule(tmp_path) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name, tmp_path):
    rule, file, source = PLANTED[name]
    # The other halves of the two planted cycles; both are lawful alone.
    others = {
        "internjax/text/a_user.py": "def f():\n    from internjax.text.a import x\n" if "text/a.py" in file else "",
        "internjax/hf/b.py": "from internjax.train.step import x\n" if "train/a.py" in file else "",
    }
    write_tree(tmp_path, CLEAN | others)
    assert rule(tmp_path) == []
    write_tree(tmp_path, {file: source + "\n"})
    assert any(file.removesuffix(".py").split("/")[-1] in line or "cycle" in line for line in rule(tmp_path))


def test_the_folders_imported_are_those_of_the_checkout():
    for folder in FOLDERS:
        if (ROOT / folder).is_dir():
            spec = find_spec(folder)
            assert spec is not None and [Path(place) for place in spec.submodule_search_locations] == [ROOT / folder]


def closure(packages: tuple[str, ...]) -> set[str]:
    """Distributions that `packages` bring along, themselves included, extras left out."""
    seen, queue = set(), list(packages)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in seen:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a dependency of another platform
        seen.add(name)
        queue += [re.match(r"[\w.-]+", line)[0] for line in requires if "extra ==" not in line]
    return seen


IMPORT_THE_CORE = """
import importlib, json, pathlib, sys
import internjax
first = sorted(sys.modules)
import jax, flax.linen, optax, orbax.checkpoint
packages = set(sys.modules)  # with what they load only where it happens to be installed
root = pathlib.Path(internjax.__file__).parent
names = []
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root.parent).with_suffix("").parts
    if parts[-1] not in ("__init__", "__main__"):
        names.append(".".join(parts))
for name in names:
    importlib.import_module(name)
assert not jax._src.xla_bridge._backends, "importing the core started a backend"
print(json.dumps({"first": first, "core": sorted(set(sys.modules) - packages)}))
"""


def test_importing_the_core_loads_only_its_five_packages():
    lawful = closure(CORE_PACKAGES)
    owners = metadata.packages_distributions()
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_THE_CORE], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    loaded = json.loads(result.stdout.splitlines()[-1])
    foreign = {
        module: sorted(distributions)
        for module in {name.split(".")[0] for name in loaded["core"]}
        if (distributions := {re.sub(r"[-_.]+", "-", name).lower() for name in owners.get(module, [])})
        and not distributions & (lawful | {"internjax"})
    }
    assert foreign == {}
    assert not {"flax", "optax", "orbax", "matplotlib", "tokenizers"} & set(loaded["first"]), "internjax is not lazy"
