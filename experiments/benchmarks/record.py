"""What every benchmark's JSON says of the machine and the versions that it was measured with."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch", "transformers", "peft",
    "bitsandbytes", "pyarrow", "numba", "tokenizers", "fastapi", "starlette", "uvicorn", "uvloop", "httptools",
)  # fmt: skip


def packages() -> dict[str, str]:
    """Returns the versions of the packages that are measured."""
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions() if dist.name}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def environment() -> dict[str, Any]:
    """Returns hardware, load of the machine just now, and the versions of the packages that are measured."""
    import jax

    devices = jax.devices()
    return {
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": packages(),
    }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")
