"""A program's temporaries are mapped once and not in every call, whether it runs on one device or on several."""

import os
import subprocess
import sys

PROGRAM = """
import resource
import sys
import jax
import jax.numpy as jnp
import numpy as np
from internjax.host_memory import keep_freed

kept = sys.argv[1] == "keep" and keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = jnp.ones((4096, 16))
program = jax.jit(lambda x: ((x @ x.T) @ x).sum())  # 64 MiB of temporaries: 16,384 pages
program(x).block_until_ready()
before = faults()
for _ in range(4):
    program(x).block_until_ready()
mesh = jax.make_mesh((4,), ("data",))
cut = jax.device_put(np.arange(8.0), jax.NamedSharding(mesh, jax.P("data")))
print(kept, (faults() - before) // 4, float(jax.jit(jnp.sum)(cut)))
"""


def run(how: str) -> tuple[bool, int]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    kept, faults, total = done.stdout.split()
    assert float(total) == 28
    return kept == "True", int(faults)


def test_temporaries_are_kept_between_calls():
    kept, faults = run("keep")
    assert kept and faults < 1000
    kept, faults = run("not")
    assert not kept and faults > 10_000
