"""Says who is there: the smallest job, to see that processes find each other and their devices add up.

    python -m experiments.launch.local --processes 2 --devices 4 -- python -m experiments.launch.hello

Hardware: any
Time: seconds
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from internjax import sharding
from internjax.train import processes


def main() -> None:
    with processes.job():
        mesh = sharding.make_mesh()
        placed = NamedSharding(mesh, PartitionSpec("fsdp"))
        total = jax.jit(lambda: jnp.sum(jax.lax.with_sharding_constraint(jnp.arange(mesh.size), placed)))()
        print(
            f"process {processes.index()} of {processes.count()}: {jax.local_device_count()} of {mesh.size} devices "
            f"({jax.devices()[0].device_kind}); the numbers of all devices add up to {int(total)}"
        )


if __name__ == "__main__":
    main()
