"""Runs generated Python in a box: the only place of the project where code that a model wrote is executed.

    run("print(6 * 7)").stdout == "42\\n"

One process per program, never a fork of this one (which may hold JAX's threads). Layers, from outside in: namespaces
(mount, network, ipc, pid; a user namespace or a uid of its own), no new privileges and no capabilities, Landlock,
seccomp, limits, an own session, a clean environment, capped output, a wall clock. It fails closed: without network
isolation, file isolation, process isolation and limits nothing is run, and the outcome says what is missing.

Not covered: memory is limited per process, not in sum, so `limits.processes` times `limits.memory_bytes` is the most.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

_CHILD = Path(__file__).with_name("sandbox_child.py")
_GRACE_SECONDS = 10.0  # set-up and collecting of files, on a machine that is busy
LAYERS = ("user", "mount", "network", "ipc", "pid", "no_new_privs", "rlimits", "landlock", "seccomp")
_REMEDY = (
    "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces>0, "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt seccomp=unconfined), or use a "
    "kernel >= 5.13 with Landlock and seccomp on x86_64 or aarch64; `python -m internjax.sandbox` shows every layer"
)


@dataclass(frozen=True)
class Limits:
    """What one program may use. Seconds of CPU and bytes of memory are per process, the rest for all of it."""

    wall_seconds: float = 5.0
    cpu_seconds: int = 3
    memory_bytes: int = 512 << 20
    file_bytes: int = 8 << 20  # size of one file
    disk_bytes: int = 32 << 20  # size of the working directory
    processes: int = 32
    output_bytes: int = 64 << 10  # of standard output, and as much of standard error

    def __post_init__(self):
        for limit in fields(self):
            if not getattr(self, limit.name) > 0:
                raise ValueError(f"{limit.name} is {getattr(self, limit.name)}; a limit is positive")


class Outcome(NamedTuple):
    """What became of a program. `reason` is a sentence where status is not "ok" or "error"."""

    status: Literal["ok", "error", "timeout", "killed", "refused"]
    returncode: int | None  # -n for signal n, None where nothing ran
    stdout: str
    stderr: str
    seconds: float
    layers: tuple[str, ...]  # that were active
    files: dict[str, bytes]  # new or changed ones of the working directory
    reason: str


def run(
    program: str,
    *,
    files: Mapping[str, bytes] | None = None,
    limits: Limits = Limits(),
    packages: Sequence[str | os.PathLike] = (),
) -> Outcome:
    """Outcome of running Python source in a fresh sandbox.

    files: name -> content, laid into the working directory first. packages: folders that the program may read and
    import from (a site-packages for numpy, say), readable to every user if this
    is root. The same program and files give the same output (hash seed 0).
    """
    return launch(program, files=files or {}, limits=limits, packages=packages, without=())


def doctor() -> dict[str, bool | str]:
    """Every layer: True if it holds on this machine, else the reason why not."""
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(LAYERS, f"the sandbox needs Linux, this is {sys.platform}")
    answer = _start("", {}, Limits(), (), ())[0]
    missing = answer.get("missing", {})
    return {name: name in answer.get("layers", ()) or missing.get(name, "not reached") for name in LAYERS}


def launch(
    program: str,
    *,
    files: Mapping[str, bytes],
    limits: Limits,
    packages: Sequence[str | os.PathLike],
    without: Sequence[str],
) -> Outcome:
    """`run` with layers switched off ("namespaces", "landlock", "seccomp", "rlimits"), to see what remains."""
    if not isinstance(program, str):
        raise ValueError(f"program is a {type(program).__name__}; give Python source as text")
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != name or "\0" in name:
            raise ValueError(f"file name {name!r} must be a plain path in the working directory, like 'data/a.csv'")
        if not isinstance(content, bytes):
            raise ValueError(f"content of {name!r} is a {type(content).__name__}; give bytes")
    total = sum(map(len, files.values()))
    if total > limits.disk_bytes:
        raise ValueError(
            f"files hold {total} bytes; the working directory has {limits.disk_bytes}: raise limits.disk_bytes"
        )
    if not sys.platform.startswith("linux"):
        reason = f"refused: the sandbox needs Linux, this is {sys.platform}"
        return Outcome("refused", None, "", "", 0.0, (), {}, reason)
    answer, stdout, stderr, seconds, ended_by = _start(program, files, limits, packages, without)
    status, reason = _verdict(answer, ended_by or answer.get("ended_by"), limits)
    code = answer.get("status")
    return Outcome(
        status=status,
        returncode=None if status == "refused" or code is None else os.waitstatus_to_exitcode(code),
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        seconds=seconds,
        layers=tuple(answer.get("layers", ())),
        files={name: base64.b64decode(content) for name, content in answer.get("files", {}).items()},
        reason=reason,
    )


def _verdict(answer: dict, ended_by: str | None, limits: Limits) -> tuple[str, str]:
    """Status and reason of the launcher's answer."""
    if answer.get("refused") or not answer.get("ready"):
        because = (
            "; ".join(f"{layer}: {why}" for layer, why in answer.get("missing", {}).items()) or "it could not start"
        )
        lacking = ", ".join(answer.get("refused", ())) or "set-up"
        return "refused", f"refused: no {lacking} ({because}). Remedy: {_REMEDY}"
    if ended_by == "output":
        return "killed", f"ended: more than {limits.output_bytes} bytes of output"
    if ended_by in ("wall", "launcher"):
        return "timeout", f"ended: wall clock of {limits.wall_seconds:g} s"
    code = os.waitstatus_to_exitcode(answer["status"])
    if -code == signal.SIGXCPU:
        return "timeout", f"ended: {limits.cpu_seconds} s of CPU time"
    if code < 0:
        return "killed", f"ended by signal {signal.Signals(-code).name}"
    left_out = f"{answer['left_out']} files left out (over {limits.disk_bytes} bytes)" if answer.get("left_out") else ""
    return ("ok" if code == 0 else "error"), left_out


def _start(program, files, limits, packages, without) -> tuple[dict, bytes, bytes, float, str | None]:
    """Launcher's answer, standard output and error, seconds, and what made this side end it."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as work:
        request = {
            "program": program,
            "files": {name: base64.b64encode(content).decode() for name, content in files.items()},
            "limits": asdict(limits),
            "readable": [os.path.realpath(path) for path in packages],
            "work": work,
            "parent": os.getpid(),
            "without": list(without),
        }
        result_read, result_write = os.pipe()
        interpreter = getattr(sys, "_base_executable", sys.executable)  # the venv's folder is not shown inside
        # Of -I all but -E: the environment is ours, and the hash seed in it makes outputs repeatable.
        command = [interpreter, "-P", "-s", "-S", str(_CHILD), str(result_write)]
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=work,
            start_new_session=True,
            pass_fds=(result_write,),
        )
        os.close(result_write)
        try:
            body = json.dumps(request).encode()
            answer, stdout, stderr, ended_by = _watch(child, body, result_read, limits, started)
        finally:
            os.close(result_read)
            _kill_group(child)
            child.stdin.close()
            child.stdout.close()
            child.stderr.close()
            child.wait()
        return answer, stdout, stderr, time.monotonic() - started, ended_by


def _watch(child, body: bytes, result_fd: int, limits: Limits, started: float):
    """Feeds the launcher, keeps its outputs up to their caps, and ends it when it passes them or hangs."""
    kept = {name: bytearray() for name in ("stdout", "stderr", "result")}
    caps = {"stdout": limits.output_bytes, "stderr": limits.output_bytes, "result": 4 * limits.disk_bytes + (1 << 20)}
    ended_by, unsent = None, memoryview(body)
    backstop = started + limits.wall_seconds + _GRACE_SECONDS
    with selectors.DefaultSelector() as selector:
        for source, name in ((child.stdout, "stdout"), (child.stderr, "stderr"), (result_fd, "result")):
            os.set_blocking(source if isinstance(source, int) else source.fileno(), False)
            selector.register(source, selectors.EVENT_READ, name)
        os.set_blocking(child.stdin.fileno(), False)
        selector.register(child.stdin, selectors.EVENT_WRITE, "request")
        while selector.get_map():
            ready = selector.select(max(0.0, backstop - time.monotonic()))
            if not ready:
                ended_by = ended_by or "launcher"
                _kill_group(child)
                break
            for key, _ in ready:
                if key.data == "request":
                    try:
                        unsent = unsent[os.write(key.fd, unsent) :]
                    except BrokenPipeError:
                        unsent = unsent[:0]
                    if not unsent:
                        selector.unregister(child.stdin)
                        child.stdin.close()
                    continue
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                    continue
                room = caps[key.data] - len(kept[key.data])
                kept[key.data] += chunk[: max(0, room)]
                if len(chunk) > room and ended_by is None:
                    ended_by = "output"
                    child.send_signal(signal.SIGTERM)  # the launcher ends the program and still hands its files out
    try:
        answer = json.loads(kept["result"])
    except ValueError:
        last = kept["stderr"].decode("utf-8", "replace").strip().splitlines()[-1:]
        started_up = ended_by is not None
        answer = {"ready": started_up, "missing": {"launcher": last[0] if last else "it ended without an answer"}}
        answer["status"] = signal.SIGKILL.value if started_up else None
    return answer, bytes(kept["stdout"]), bytes(kept["stderr"]), ended_by


def _kill_group(child: subprocess.Popen) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def main() -> int:
    """`python -m internjax.sandbox`: prints every layer and whether programs can be run."""
    for name, holds in doctor().items():
        print(f"{name:14s} {'holds' if holds is True else holds}")
    outcome = run("print('a program ran')")
    print(outcome.stdout.strip() or outcome.reason, f"({outcome.seconds * 1000:.0f} ms)")
    return 0 if outcome.status == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
