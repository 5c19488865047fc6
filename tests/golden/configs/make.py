"""Writes the resolved config of every experiment beside this file: python -m tests.golden.configs.make"""

import importlib
import json
from pathlib import Path
from typing import Any

from experiments.__main__ import entries
from internjax.train.tracking import to_json

HERE = Path(__file__).parent


def configs() -> dict[str, Any]:
    """Returns module name -> CONFIG of the experiments that have one."""
    modules = {entry.module: importlib.import_module(entry.module) for entry in entries()}
    return {name: module.CONFIG for name, module in modules.items() if hasattr(module, "CONFIG")}


def path_of(module: str) -> Path:
    return HERE / f"{module.removeprefix('experiments.')}.json"


def text_of(config: Any) -> str:
    return json.dumps(to_json(config), indent=1) + "\n"


if __name__ == "__main__":
    for old in HERE.glob("*.json"):
        old.unlink()
    for module, config in configs().items():
        path_of(module).write_text(text_of(config))
        print(path_of(module))
