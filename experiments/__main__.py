"""Lists the experiments: `python -m experiments`."""

import ast
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """What an experiment file says of itself."""

    module: str
    title: str
    hardware: str
    time: str


def entries(folder: Path = Path(__file__).parent) -> list[Entry]:
    """Returns every runnable experiment: a file whose docstring has the lines "Hardware: ..." and "Time: ..."."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        facts = dict(
            line.split(": ", 1) for line in docstring.splitlines() if line.startswith(("Hardware: ", "Time: "))
        )
        if len(facts) == 2:
            module = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
            found.append(Entry(module, docstring.splitlines()[0].rstrip("."), facts["Hardware"], facts["Time"]))
    return found


def main() -> None:
    rows = entries()
    width = max(len(row.module) for row in rows)
    print("Run one with `python -m NAME`; `--help` lists its fields.\n")
    for row in rows:
        print(f"{row.module:{width}}  {row.title}\n{'':{width}}  {row.hardware} · {row.time}")


if __name__ == "__main__":
    main()
