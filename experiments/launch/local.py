"""Starts the processes of one job on this machine: to try several hosts on one, or one process per GPU.

    python -m experiments.launch.local --processes 2 --devices 4 -- python -m experiments.internlm2_1_8b --mesh.fsdp 8

Hardware: what the command needs
Time: what the command takes

Everything after -- is the command of each process; `initialize` of internjax.train.processes finds the others by the
variables that are set here. Output is passed on line by line with the number of its process in front. When one process
fails, the others get --grace seconds (they know why to end by then), then SIGTERM, then SIGKILL. SIGTERM and Ctrl-C go
to all processes; a run saves and ends with code 75. A job that was preempted (75) or lost a process (76, 134, 137, 143)
is started again up to --restarts times; after any other failure it is not: the same would happen again. The exit code
is that of the process that failed first.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence

from internjax.train.heartbeat import EXIT_PEER_LOST, EXIT_PREEMPTED, JOB

RESTARTED = (EXIT_PREEMPTED, EXIT_PEER_LOST, 134, 137, 143)
"""Exit codes after which the same command goes on: preempted, peer lost, coordinator lost, SIGKILL, SIGTERM."""
_FAKE_DEVICES = "--xla_force_host_platform_device_count"


def environment_of(index: int, num_processes: int, port: int, devices: int | None, job: str) -> dict[str, str]:
    """Returns the environment of one process of the job."""
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
        JOB: job,
        "PYTHONUNBUFFERED": "1",
    }
    if devices is not None:
        others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_FAKE_DEVICES)]
        environment |= {"XLA_FLAGS": " ".join([*others, f"{_FAKE_DEVICES}={devices}"]), "JAX_PLATFORMS": "cpu"}
    return environment


def exit_code(returncode: int) -> int:
    """Returns the exit code as a shell tells it: 128 + number for a process that a signal ended."""
    return returncode if returncode >= 0 else 128 - returncode


def run_once(
    command: Sequence[str], *, num_processes: int, devices: int | None, grace: float, asked: threading.Event, job: str
) -> int:
    """Runs the job once and returns its exit code: that of the process that failed first, 0 when none did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, printers = [], []
    try:
        for index in range(num_processes):
            process = subprocess.Popen(
                command,
                env=environment_of(index, num_processes, port, devices, job),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C of the terminal comes here alone, and goes to all from here
            )
            processes.append(process)
            printers.append(threading.Thread(target=_pass_on, args=(process.stdout, index), daemon=True))
            printers[-1].start()
        return _watch(processes, grace, asked)
    finally:
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()
        for printer in printers:
            printer.join(5)


def _watch(processes: Sequence[subprocess.Popen], grace: float, asked: threading.Event) -> int:
    """Waits for all processes; ends those that are left when one has failed or the job was asked to end."""
    first, told, deadline = None, False, None
    while None in [process.poll() for process in processes]:  # every one is polled: who failed first is told
        failed = [(index, process.returncode) for index, process in enumerate(processes) if process.returncode]
        if failed and first is None:
            # One that was killed says more than one that noticed it.
            index, returncode = min(failed, key=lambda one: (exit_code(one[1]) == EXIT_PEER_LOST, one[0]))
            first, deadline = exit_code(returncode), time.monotonic() + grace
            print(
                f"process {index} ended with exit code {first}; the others have {grace:g} s",
                file=sys.stderr,
                flush=True,
            )
        if asked.is_set() and not told:
            told = True
            for process in processes:
                _signal(process, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            number = signal.SIGKILL if told else signal.SIGTERM
            told, deadline = True, time.monotonic() + min(grace, 10)
            for process in processes:
                _signal(process, number)
        time.sleep(0.05)
    codes = [exit_code(process.returncode) for process in processes if process.returncode]
    return first if first is not None else (codes[0] if codes else 0)


def _signal(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _pass_on(lines, index: int) -> None:
    for line in lines:
        print(f"[{index}] {line}", end="", flush=True)


def run(
    command: Sequence[str], *, num_processes: int, devices: int | None = None, grace: float = 120.0, restarts: int = 0
) -> int:
    """Returns the exit code of the job after as many restarts as it needed and was allowed."""
    asked, job = threading.Event(), os.environ.get(JOB) or f"local-{uuid.uuid4().hex[:8]}"
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(restarts + 1):
            code = run_once(command, num_processes=num_processes, devices=devices, grace=grace, asked=asked, job=job)
            if code not in RESTARTED or asked.is_set() or attempt == restarts:
                return code
            print(f"exit code {code}: started again ({attempt + 1} of {restarts})", file=sys.stderr, flush=True)
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the job that the command line describes."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.launch.local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, required=True, help="processes of the job, all on this machine")
    parser.add_argument("--devices", type=int, help="fake CPU devices of each process; without it, what JAX finds")
    parser.add_argument("--grace", type=float, default=120.0, help="seconds to end in once another process has failed")
    parser.add_argument(
        "--restarts", type=int, default=0, help="times to start again after a preemption or the loss of a process"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...: what each process runs")
    args = parser.parse_args(arguments)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or args.processes < 1 or args.restarts < 0 or (args.devices or 1) < 1:
        parser.error("wanted: --processes of 1 or more, --restarts of 0 or more, and a command after --")
    return run(command, num_processes=args.processes, devices=args.devices, grace=args.grace, restarts=args.restarts)


if __name__ == "__main__":
    sys.exit(main())
