"""The processes of one job: how they find each other, agree on small things, and end together.

    with processes.job():            # does nothing in a job of one process
        train(...)

The launcher says by environment variables where this process stands; experiments/launch sets them.

    JAX_COORDINATOR_ADDRESS     host:port on which process 0 listens
    JAX_NUM_PROCESSES           or SLURM_STEP_NUM_TASKS
    JAX_PROCESS_ID              or SLURM_PROCID, or JOB_COMPLETION_INDEX of a Kubernetes Job
    INTERNJAX_SILENCE_SECONDS   a process without a sign of life for so long ends the job (60)
    INTERNJAX_STEP_SECONDS      a job in which no step ended for so long hangs, and ends (1800)

What they agree on goes through the key-value store of `jax.distributed`, never through the devices: collectives of a
background thread would meet those of the training step in another order on each process.
"""

import contextlib
import itertools
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from internjax.train.heartbeat import EXIT_PREEMPTED, Heartbeat

TIMEOUT = 600.0
"""Seconds that processes wait for each other at most, where no other time is given."""

_calls: Counter[str] = Counter()
_heartbeat: Heartbeat | None = None
_where: "Place | None" = None


class Place(NamedTuple):
    """Where this process stands in its job."""

    address: str
    num_processes: int
    index: int
    local_devices: tuple[int, ...] | None
    """Devices of this machine that belong to this process; None: all of them."""


def place(environment: Mapping[str, str]) -> Place | None:
    """Returns what the environment says, or None for a job of one process. Raises ValueError for half a description."""
    names = {
        "JAX_NUM_PROCESSES": ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS"),
        "JAX_PROCESS_ID": ("JAX_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX"),
    }
    given = {
        key: next((environment[name] for name in known if name in environment), None) for key, known in names.items()
    }
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None and "JAX_NUM_PROCESSES" not in environment:
        address = _slurm_address(environment)
        if address is None:
            return None
    given["JAX_COORDINATOR_ADDRESS"] = address
    if given["JAX_NUM_PROCESSES"] == "1":
        return None
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"this process is told that it is part of a job, but not {' and '.join(missing)}; set all of "
            f"{', '.join(sorted(given))}, or none to run alone. `python -m experiments.launch.local` sets them."
        )
    try:
        num_processes, index = int(given["JAX_NUM_PROCESSES"]), int(given["JAX_PROCESS_ID"])
    except ValueError:
        num_processes, index = 0, 0
    if not 0 <= index < num_processes or not address.rpartition(":")[2].isdigit():
        raise ValueError(
            f"given JAX_COORDINATOR_ADDRESS={address}, JAX_NUM_PROCESSES={given['JAX_NUM_PROCESSES']}, JAX_PROCESS_ID="
            f"{given['JAX_PROCESS_ID']}; wanted host:port, a number, and a number from 0 to below it"
        )
    local = None
    if int(environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]) > 1:
        local = (int(environment["SLURM_LOCALID"]),)
    return Place(address, num_processes, index, local)


def _slurm_address(environment: Mapping[str, str]) -> str | None:
    """Returns where process 0 of a Slurm step of several tasks listens: its first node, a port made of the job id."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "SLURM_PROCID" not in environment:
        return None
    # "node[003-007,009],other" begins with node003.
    head, bracket, rest = environment["SLURM_STEP_NODELIST"].partition("[")
    host = head + rest.replace("]", ",").replace("-", ",").split(",")[0] if bracket and "," not in head else head
    return f"{host.split(',')[0]}:{61440 + int(environment['SLURM_JOB_ID']) % 4096}"


def initialize(environment: Mapping[str, str] | None = None) -> bool:
    """Joins the job that the environment describes and starts the heartbeat; returns False when there is none.

    Call it before JAX is asked for a device. Raises OSError when the other processes do not come in five minutes.
    """
    global _heartbeat, _where
    environment = os.environ if environment is None else environment
    if jax.distributed.is_initialized():
        return True
    where = place(environment)
    if where is None:
        return False
    silence = _seconds(environment, "INTERNJAX_SILENCE_SECONDS", 60.0)
    step_deadline = _seconds(environment, "INTERNJAX_STEP_SECONDS", 1800.0)
    # It would take SIGTERM for itself; who is told to stop is agreed on by `stop_after`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            where.address,
            where.num_processes,
            where.index,
            local_device_ids=where.local_devices,
            cluster_detection_method="deactivate",
            # JAX ends a process with a stack trace; it comes second, in case the heartbeat here could not.
            heartbeat_timeout_seconds=max(100, round(3 * silence)),
        )
    except RuntimeError as error:
        raise OSError(
            f"process {where.index} of {where.num_processes} could not join the job at {where.address}: {error}. Is "
            "process 0 running there, is the port free and open, and were all processes started?"
        ) from error
    _where, client = where, _client()

    def read() -> dict[int, str]:
        found = client.key_value_dir_get("internjax/beat/")
        return {int(key.rpartition("/")[2]): value for key, value in found}

    _heartbeat = Heartbeat(
        lambda text: client.key_value_set(f"internjax/beat/{where.index}", text, allow_overwrite=True),
        read,
        index=where.index,
        num_processes=where.num_processes,
        silence=silence,
        step_deadline=step_deadline,
    )
    _heartbeat.start()
    return True


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Joins the job that the environment describes, for what runs inside, and leaves it together with the others.

    An exception inside ends this process at once with its exit code and lets the others know; without that they would
    wait for it in the next collective. In a job of one process nothing is done.
    """
    global _heartbeat
    initialize()
    heartbeat = _heartbeat
    if heartbeat is None:
        yield
        return
    try:
        yield
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code not in (0, EXIT_PREEMPTED):
            heartbeat.end_now(code, f"exit code {code}; its own output says why")
        heartbeat.leave(code)
        raise
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A peer that dies fails the collective here: the heartbeat is about to find out, and ends this process.
            time.sleep(heartbeat.seconds_to_judge)
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        heartbeat.end_now(code, f"{type(error).__name__}: {error}")
    else:
        heartbeat.leave(0)
    finally:
        _heartbeat = None


def count() -> int:
    """Returns the number of processes of this job."""
    if _where is not None:
        return _where.num_processes
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Returns which of the processes this is; process 0 writes what is written once."""
    if _where is not None:
        return _where.index
    return jax.process_index() if jax.distributed.is_initialized() else 0


def watched(data: Callable[[int], Iterator[Any]]) -> Callable[[int], Iterator[Any]]:
    """Returns `data` (position -> batches) whose iterators tell the heartbeat how far the training is.

    A loop asks for a batch once per step, so a step that hangs, or a batch that never comes, is seen here.
    """
    heartbeat = _heartbeat
    if heartbeat is None:
        return data

    def batches(position: int) -> Iterator[Any]:
        try:
            inner = data(position)
            for at in itertools.count(position):
                heartbeat.doing(f"waits for batch {at}", at)
                batch = next(inner, None)
                heartbeat.doing(f"trains, with batch {at} at hand", at + 1)
                if batch is None:
                    return
                yield batch
        finally:
            heartbeat.doing("no training", None)

    return batches


def stop_after(step: int, asked: bool) -> bool:
    """Returns whether the job stops after `step`: what all processes agree on once one of them was asked to.

    A signal reaches the processes at different steps; stopping where it came would leave the others in a collective.
    Call it on every process after each step was begun.
    """
    return asked if _heartbeat is None else _heartbeat.stop_after(step, asked)


def gather(
    name: str, value: str, *, timeout: float = TIMEOUT, failed: Callable[[], str | None] = lambda: None
) -> list[str]:
    """Returns the value that each process gave, in order of process. All must call it equally often under a name.

    Raises OSError naming the processes that have not come in time, or saying why when `failed` returns a reason.
    """
    if count() == 1:
        return [value]
    client, own = _client(), index()
    call = _calls[name]
    _calls[name] += 1
    client.key_value_set(f"internjax/gather/{name}/{call}/{own}", value)
    if call >= 2:
        # All came to the call before this one, so none still reads the one before that.
        client.key_value_delete(f"internjax/gather/{name}/{call - 2}/{own}")
    deadline, pause = time.monotonic() + timeout, 0.005
    while True:
        found = {int(k.rpartition("/")[2]): v for k, v in client.key_value_dir_get(f"internjax/gather/{name}/{call}/")}
        if len(found) == count():
            return [found[process] for process in range(count())]
        absent = ", ".join(str(process) for process in range(count()) if process not in found)
        if (reason := failed()) is not None:
            raise OSError(reason)
        if time.monotonic() > deadline:
            raise OSError(f"process {absent} did not come to {name!r} within {timeout:g} s, and this one waited for it")
        time.sleep(pause)
        pause = min(0.25, 1.5 * pause)


def first(name: str, call: Callable[[], Any], *, timeout: float = TIMEOUT) -> Any:
    """Returns on every process what `call` returns on process 0 (JSON values); a ValueError or OSError likewise."""
    if count() == 1:
        return call()
    outcome: dict[str, Any] = {}
    if index() == 0:
        try:
            outcome = {"value": call()}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error), "is_value": isinstance(error, ValueError)}
    outcome = json.loads(gather(name, json.dumps(outcome), timeout=timeout)[0])
    if "error" in outcome:
        raise ValueError(outcome["error"]) if outcome["is_value"] else OSError(outcome["error"])
    return outcome["value"]


def peek(name: str) -> dict[int, str]:
    """Returns what others gave so far to the gather of that name that this process comes to next; does not wait."""
    if count() == 1:
        return {}
    found = _client().key_value_dir_get(f"internjax/gather/{name}/{_calls[name]}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}


def _client() -> Any:
    # The one use of a private name: JAX has no public way to its key-value store (Orbax takes the same).
    from jax._src.distributed import global_state

    return global_state.client


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    try:
        seconds = float(environment.get(name, default))
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ValueError(f"{name} is a number of seconds above 0; given {environment[name]!r}")
    return seconds
