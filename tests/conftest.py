"""Environment of every test, set before jax is imported: 8 fake CPU devices, quick compilation, no network.

A variable that is already set wins, so `JAX_PLATFORMS=cuda,cpu pytest -m gpu` reaches the GPU.
"""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Tests run tiny programs once or a few times: most of their time is compilation. Half of it goes away without LLVM's
# optimisation, and two thirds of the rest without XLA's newer fusion emitters, which jaxlib 0.10 can do without. To cut
# a tiny program into parts that are compiled side by side costs a sixth.
QUICK_COMPILATION = {"--xla_backend_optimization_level": "0"}
if version("jaxlib").startswith("0.10."):
    QUICK_COMPILATION |= {"--xla_cpu_use_fusion_emitters": "false", "--xla_cpu_parallel_codegen_split_count": "1"}
QUICK_FLAGS = " ".join(f"{flag}={setting}" for flag, setting in QUICK_COMPILATION.items())
"""XLA_FLAGS of processes that have one device, as a person's."""

for flag, setting in {"--xla_force_host_platform_device_count": "8", **QUICK_COMPILATION}.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={setting}".strip()

for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    # Tiny programs compile in less than the default threshold and would never be cached.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}.items():
    os.environ.setdefault(name, value)


# Tracing makes millions of small objects that stay; to search them all over and over took a tenth of the time.
gc.set_threshold(100_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Puts files with slow tests first: a worker that began one of them last would leave the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What was imported and collected stays: it is not searched again."""
    gc.collect()
    gc.freeze()


MOST_MAPS = 8_000


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Drops compiled programs once they are many: each holds memory maps, and a process may have some 65,000 of them.

    Until then they stay from file to file: what several files call is traced once. A thousand maps are 150 MB. Garbage
    is left to Python's own count, too: to search a million objects behind every file took a twentieth of the time.
    """
    yield
    if "jax" in sys.modules and num_maps() > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


def num_maps() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else MOST_MAPS + 1
