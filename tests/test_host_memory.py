"""A program's temporaries are mapped once and not in every call, whether it runs on one device or on several."""

import os
import subprocess
import sys

PROGRAM = """
import os
import resource
import jax
import jax.numpy as jnp
import numpy as np
from internjax.host_memory import keep_freed

# A fork of what is imported, before any device is touched: a process that has asked cannot take it back.
child = os.fork()
kept = child and keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = jnp.ones((4096, 16))
program = jax.jit(lambda x: ((x @ x.T) @ x).sum())  # 64 MiB of temporaries: 16,384 pages
program(x).block_until_ready()
before = faults()
for _ in range(4):
    program(x).block_until_ready()
mesh = jax.make_mesh((4,), ("data",))
cut = jax.device_put(np.arange(8.0), jax.NamedSharding(mesh, jax.P("data")))
if child:
    assert os.waitpid(child, 0)[1] == 0
print(bool(kept), (faults() - before) // 4, float(jax.jit(jnp.sum)(cut)), flush=True)
"""


def test_temporaries_are_kept_between_calls():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (asked_not, without, sum_without), (asked, with_it, sum_with) = map(str.split, done.stdout.splitlines())
    assert (asked_not, asked) == ("False", "True") and float(sum_without) == float(sum_with) == 28
    assert int(without) > 10_000 and int(with_it) < 1000
