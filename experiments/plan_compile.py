"""Compiles the training step of a job for devices that are not there; a process of its own, started by plan --compile.

Reads the job as JSON (plan._job_json) from its input, prints the compiler's sizes for one device as a line of JSON.
"""

import json
import sys
import time


def main() -> None:
    """Compiles on as many fake CPU devices as the first argument says."""
    import jax

    from internjax import sharding
    from internjax.model.config import from_json
    from internjax.model.lora import LoraConfig
    from internjax.model.quantize import Quantised
    from internjax.train import memory, optimizer
    from internjax.train.freezing import joined
    from internjax.train.losses import next_token
    from internjax.train.step import make_step

    values, num_devices = json.load(sys.stdin), int(sys.argv[1])
    assert jax.device_count() == num_devices, jax.device_count()
    kind = values["optimizer"].pop("type")
    optimizer_value = getattr(optimizer, kind)(**values["optimizer"])
    lora = values["lora"] and LoraConfig(**(values["lora"] | {"targets": tuple(values["lora"]["targets"])}))
    job = memory.Job(
        **values
        | {
            "model": from_json(values["model"]),
            "optimizer": optimizer_value,
            "mesh": sharding.MeshConfig(**values["mesh"]),
            "lora": lora,
            "quantised": values["quantised"] and Quantised(**values["quantised"]),
            "freeze": tuple(values["freeze"]),
        }
    )
    mesh = sharding.make_mesh(job.mesh)
    how = optimizer.make_optimizer(optimizer_value, optimizer.Constant(), 1)
    loss = next_token(job.model, lora_config=job.lora, chunk_size=job.chunk_size)
    loss = joined(loss) if job.freeze else loss
    step = make_step(loss, how, accumulate=job.accumulate, mesh=mesh)
    started = time.perf_counter()
    analysis = step.lower(memory.job_state(job, mesh), memory.abstract_batch(job, mesh)).compile().memory_analysis()
    sizes = {
        "argument": analysis.argument_size_in_bytes,
        "temp": analysis.temp_size_in_bytes,
        "output": analysis.output_size_in_bytes,
        "alias": analysis.alias_size_in_bytes,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
