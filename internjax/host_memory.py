"""Memory that a program on a CPU frees is kept for its next call.

XLA asks malloc for all temporaries of a call at once. A block of 32 MiB or more glibc takes from the system and gives
back each time, so every page is zeroed and mapped anew in every step: 19,000 page faults in a step of the tiny model
(4 rows of 256 tokens), a quarter of its CPU time. Two settings of malloc keep such blocks in the heap instead. Only the
heap of the main thread may grow so large, hence the third setting: programs run in the thread that calls them.
"""

import ctypes
import os
from pathlib import Path

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MOST_KEPT = 2**31 - 1
"""Bytes at the end of the heap that stay with the process: the largest number that mallopt takes."""


def keep_freed() -> bool:
    """Has the process keep what programs on a CPU free; returns whether it does (glibc alone can be asked).

    For a command to call before its first program. Where an NVIDIA driver is loaded nothing is changed, unless
    JAX_PLATFORMS says cpu: temporaries lie on the card. JAX_CPU_ENABLE_ASYNC_DISPATCH, where it is set, stays.
    """
    if Path("/proc/driver/nvidia").exists() and os.environ.get("JAX_PLATFORMS") != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)):
        return False
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True
