"""One of two processes of 4 devices that place a batch, started by test_mesh.py: python placed_rows.py PORT PROCESS."""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from internjax import sharding
from internjax.sharding import MeshConfig
from internjax.train.step import put_batch

ROWS, TIME = 16, 8
# Rows apart; rows apart and time cut within a process; the same rows in both, time cut between them; all the same.
MESHES = {
    MeshConfig(data=2, fsdp=4): (8, 8),
    MeshConfig(fsdp=4, sequence=2): (8, 8),
    MeshConfig(fsdp=1, sequence=2, tensor=4): (16, 16),
    MeshConfig(fsdp=1, tensor=8): (16, 16),
}


def main(port: str, process: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    whole = np.arange(ROWS * TIME).reshape(ROWS, TIME).astype(np.int32)
    for config, held in MESHES.items():
        mesh = sharding.make_mesh(config)
        rows = sharding.process_rows(mesh, ROWS)
        assert len(rows) == held[process] and list(rows) == sorted(rows), (config, rows)
        local = {"tokens": whole[list(rows)], "lengths": whole[list(rows), 0], "scale": np.float32(3)}
        placed = put_batch(local, mesh)
        assert placed["tokens"].shape == whole.shape and placed["lengths"].shape == (ROWS,)
        for shard in placed["tokens"].addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        for name, wanted in (("tokens", whole), ("lengths", whole[:, 0])):
            gathered = multihost_utils.process_allgather(placed[name], tiled=True)
            np.testing.assert_array_equal(gathered, wanted)
        again = put_batch(placed, mesh)["tokens"]  # a global array stays what it is
        assert again.shape == whole.shape and again.sharding == placed["tokens"].sharding
        if len(rows) < ROWS:
            try:
                put_batch({"tokens": whole[:3]}, mesh)
            except ValueError as error:
                assert f"process {process} gives 3 rows" in str(error), error
            else:
                raise AssertionError("3 rows of a process were taken")
    print(f"placed {len(MESHES)} batches")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
