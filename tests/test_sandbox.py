"""Attacks end at a wall or at a limit, honest programs work, and nothing runs where the walls are missing."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from internjax import sandbox
from internjax.sandbox import Limits

ROOT = Path(__file__).resolve().parent.parent
QUICK = Limits(wall_seconds=1.5, cpu_seconds=1, output_bytes=10_000)
PATIENT = Limits(wall_seconds=30, cpu_seconds=10, output_bytes=10_000)
"""For what ends by itself, on a machine however busy."""

# Each attack prints ESCAPED if it comes through. REFUSED: every step of it raises; LIMIT: it goes on until it is ended.
REFUSED = {
    "ctypes_system": "import ctypes\nassert ctypes.CDLL(None).system(b'true') == 0",
    "subclasses_popen": """
        import subprocess
        found = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen']
        assert found[0](['/bin/true']).wait() == 0""",
    "exec_shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "exec_from_memory": """
        import os
        fd = os.memfd_create('x')
        os.write(fd, open('/bin/true', 'rb').read())
        os.execve(fd, ['x'], {})""",
    "read_passwd": "open('/etc/passwd').read()",
    "list_home": "import os\nos.listdir(HOME)",
    "list_root": "import os\nos.listdir('/')",
    "read_project": "open(PROJECT).read()",
    "read_parent_environment": "import os\nopen(f'/proc/{PARENT}/environ', 'rb').read()",
    "read_own_proc": "open('/proc/self/environ', 'rb').read()",
    "list_proc": "import os\nos.listdir('/proc')",
    "kill_parent": "import os\nos.kill(PARENT, 0)",
    "write_system_temporary": "open('/tmp/escaped', 'w').write('x')",
    "write_library": "import os\nopen(os.__file__, 'a').write('x')",
    "symlink_out": "import os\nos.symlink('/etc/passwd', 'link')\nopen('link').read()",
    "hard_link_out": "import os\nos.link(os.__file__, 'link')",
    "dot_dot": "open('../../../../../../etc/passwd').read()",
    "connect_loopback": "import socket\nsocket.create_connection(('127.0.0.1', 22), timeout=1)",
    "listen": "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    "connect_outside": "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=1)",
    "abstract_socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0x')",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/sandbox', b'tmpfs', 0, None) == 0",
    "new_user_namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(200)) >= 0",
    "become_root": "import os\nos.setuid(0)\nassert os.getuid() == 0 and False or open('/etc/shadow').read()",
    "raise_limits": """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))""",
    "one_gibibyte": "bytearray(1 << 30)",
    "huge_file": "open('big', 'wb').write(bytes(20 << 20))",
    "full_disk": """
        for index in range(100):
            open(f'big{index}', 'wb').write(bytes(4 << 20))""",
    "many_open_files": "import os\n[open('/dev/null') for _ in range(1000)]",
    "many_threads": """
        import threading, time
        for _ in range(200):
            threading.Thread(target=time.sleep, args=(1,), daemon=True).start()""",
}
LIMIT = {
    "loop": "while True: pass",
    "sleep_ignoring_signals": """
        import signal, time
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGXCPU, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(1000)""",
    "loop_ignoring_the_cpu_limit": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "unbounded_output": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "unbounded_errors": "import os\nwhile True: os.write(2, b'x' * 65536)",
    "loop_in_del": """
        class Bomb:
            def __del__(self):
                while True: pass
        bomb = Bomb()
        del bomb""",
    "sleep_at_exit": "import atexit, time\natexit.register(time.sleep, 1000)\nraise SystemExit",
    "closed_outputs": "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(1000)",
    "fork_bomb": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass""",
    "catch_everything": """
        while True:
            try:
                while True: pass
            except BaseException:
                pass""",
}
HARMLESS_OUTSIDE = ("ctypes_system", "subclasses_popen", "list_root", "read_parent_environment", "list_proc", "listen")


def source_of(body):
    constants = (
        f"HOME, PROJECT, PARENT = {os.path.expanduser('~')!r}, {str(ROOT / 'pyproject.toml')!r}, {os.getpid()}\n"
    )
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    ending = "    print('ESCAPED')\nexcept Exception as error:\n    print('REFUSED', type(error))\n"
    return f"{constants}try:\n{indented}\n{ending}"


def left_behind():
    """Command lines of sandbox processes of this test's process tree that still live."""
    alive = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"sandbox_child.py" in command and parent in (os.getpid(), 1):
            alive.append((folder.name, command))
    return alive


@pytest.mark.parametrize("name", REFUSED)
def test_attack_is_refused(name):
    outcome = sandbox.run(source_of(REFUSED[name]), limits=PATIENT)
    assert "ESCAPED" not in outcome.stdout and "REFUSED" in outcome.stdout, outcome
    assert outcome.status == "ok"  # the sandbox was there: the attack's own error is what it printed


@pytest.mark.parametrize("name", LIMIT)
def test_attack_ends_at_a_limit(name):
    outcome = sandbox.run(textwrap.dedent(LIMIT[name]), limits=QUICK)
    assert outcome.status in ("timeout", "killed") and outcome.reason.startswith("ended"), outcome
    assert outcome.seconds < 6
    assert len(outcome.stdout) <= QUICK.output_bytes and len(outcome.stderr) <= QUICK.output_bytes


@pytest.mark.parametrize("name", HARMLESS_OUTSIDE)
def test_the_attacks_work_outside(name):
    done = subprocess.run([sys.executable, "-c", source_of(REFUSED[name])], capture_output=True, text=True, timeout=30)
    assert "ESCAPED" in done.stdout, "an attack that never works shows nothing"


def test_daemon_that_leaves_its_session_dies_too():
    program = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in (0, 1, 2):
                    os.close(fd)
                time.sleep(1000)
            os._exit(0)
        print('started')
    """
    outcome = sandbox.run(textwrap.dedent(program), limits=QUICK)
    assert (outcome.status, outcome.stdout) == ("ok", "started\n")
    assert outcome.seconds < QUICK.wall_seconds
    assert not left_behind()


def test_secrets_of_the_environment_stay_outside(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    outcome = sandbox.run("import os\nprint(dict(os.environ))")
    assert outcome.status == "ok" and "hunter2" not in outcome.stdout and "HOME" in outcome.stdout


def test_honest_program_with_files():
    program = """
        import collections, csv, dataclasses, json, math, os, random, re, sqlite3, tempfile, threading, helper
        rows = list(csv.reader(open('data/in.csv')))
        with open('out.json', 'w') as file:
            json.dump(rows, file)
        os.mkdir('plots')
        open('plots/a.txt', 'w').write(helper.NAME)
        with tempfile.NamedTemporaryFile() as file:
            file.write(b'x')
        worker = threading.Thread(target=print, args=('in a thread',))
        worker.start(); worker.join()
        print(sqlite3.connect(':memory:').execute('select 1 + 1').fetchone(), math.gcd(12, 18))
    """
    given = {"data/in.csv": b"a,b\n1,2\n", "helper.py": b"NAME = 'me'\n"}
    outcome = sandbox.run(textwrap.dedent(program), files=given)
    assert outcome.status == "ok", outcome.stderr
    assert outcome.stdout == "in a thread\n(2,) 6\n"
    assert outcome.files == {"out.json": b'[["a", "b"], ["1", "2"]]', "plots/a.txt": b"me"}


def test_multiprocessing_and_asyncio_work():
    program = """
        import asyncio, multiprocessing
        async def main():
            return await asyncio.gather(*(asyncio.sleep(0, n) for n in range(3)))
        print(asyncio.run(main()))
        with multiprocessing.get_context('fork').Pool(2) as pool:
            print(pool.map(abs, [-1, 2]))
    """
    outcome = sandbox.run(textwrap.dedent(program))
    assert outcome.stdout == "[0, 1, 2]\n[1, 2]\n", outcome.stderr


def test_changed_files_come_back_and_links_do_not():
    program = (
        "import os\nopen('a', 'a').write('2')\nos.symlink('a', 'link')\nos.mkfifo('pipe') if False else None\nopen('c')"
    )
    outcome = sandbox.run(program, files={"a": b"1", "b": b"same"})
    assert outcome.status == "error" and "FileNotFoundError" in outcome.stderr
    assert outcome.files == {"a": b"12"}


def test_files_survive_a_timeout():
    outcome = sandbox.run("open('kept', 'w').write('x')\nwhile True: pass", limits=QUICK)
    assert outcome.status == "timeout" and outcome.files == {"kept": b"x"}


def test_exit_codes_errors_and_tracebacks():
    assert sandbox.run("print(6 * 7)").stdout == "42\n"
    assert sandbox.run("exit(3)").returncode == 3
    assert sandbox.run("raise SystemExit('gone')").stderr == "gone\n"
    broken = sandbox.run("def f():\n    return 1 / 0\nf()")
    assert (broken.status, broken.returncode) == ("error", 1)
    assert 'File "program.py", line 2, in f\n    return 1 / 0' in broken.stderr
    assert "sandbox_child" not in broken.stderr
    assert "SyntaxError" in sandbox.run("def").stderr
    aborted = sandbox.run("import os\nos.abort()")
    assert (aborted.status, aborted.returncode, aborted.reason) == ("killed", -6, "ended by signal SIGABRT")
    assert sandbox.run("print('\\ud800')").status == "error"
    assert sandbox.run("import sys\nsys.stdout.buffer.write(b'\\xff')").stdout == "\ufffd"
    assert sandbox.run("input()").status == "error"  # standard input is empty


def test_output_is_kept_up_to_the_cap():
    outcome = sandbox.run("print('x' * 5000)\nprint('y' * 90000)", limits=QUICK)
    assert outcome.status == "killed" and "10000 bytes of output" in outcome.reason
    assert outcome.stdout.startswith("x" * 5000) and len(outcome.stdout) == 10_000


def test_same_program_gives_the_same_output():
    program = "print(list({str(n) for n in range(50)}), hash('x'))"
    assert sandbox.run(program).stdout == sandbox.run(program).stdout


def test_packages_can_be_imported_but_not_written(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "tool.py").write_text("VALUE = 7\n")
    program = f"import tool\nprint(tool.VALUE)\nopen({str(tmp_path / 'tool.py')!r}, 'w')"
    outcome = sandbox.run(program, packages=[tmp_path])
    assert outcome.stdout == "7\n" and outcome.status == "error"
    assert (tmp_path / "tool.py").read_text() == "VALUE = 7\n"
    assert sandbox.run("import tool").status == "error"


def test_starts_quickly():
    seconds = [sandbox.run("pass").seconds for _ in range(7)]
    assert min(seconds) < 0.5, seconds  # 0.05-0.07 on an idle machine


def test_doctor_agrees_with_a_run():
    report = sandbox.doctor()
    assert tuple(report) == sandbox.LAYERS
    assert {name for name, holds in report.items() if holds is True} == set(sandbox.run("pass").layers)


def without(*layers, program="print('ran')"):
    return sandbox.launch(program, files={}, limits=QUICK, packages=(), without=layers)


@pytest.mark.parametrize(
    ("layers", "lacking"),
    [
        (["rlimits"], "limits"),
        (["no_new_privs"], "limits"),
        (["namespaces", "landlock"], "file isolation"),
        (["namespaces", "seccomp"], "network isolation, process isolation"),
    ],
)
def test_nothing_runs_where_a_wall_is_missing(layers, lacking):
    outcome = without(*layers)
    assert (outcome.status, outcome.returncode, outcome.stdout) == ("refused", None, "")
    assert outcome.reason.startswith("refused: no ") and lacking in outcome.reason
    assert "switched off" in outcome.reason and "Remedy: allow unprivileged user namespaces" in outcome.reason


@pytest.mark.parametrize("layer", ["landlock", "seccomp", "namespaces"])
def test_one_missing_layer_is_reported_and_the_others_hold(layer):
    outcome = without(layer, program=source_of("open('/etc/passwd').read()"))
    assert layer not in outcome.layers
    if layer == "namespaces" and outcome.status == "refused":  # as root, with a Python that others may not read
        assert os.geteuid() == 0 and "needs a Python all users may read" in outcome.reason
    else:
        assert outcome.status == "ok" and "REFUSED" in outcome.stdout
    connection = without(layer, program=source_of(REFUSED["connect_loopback"]))
    assert "ESCAPED" not in connection.stdout


def test_works_for_an_unprivileged_user(tmp_path_factory):
    """The same as another user: what root may do must not be what holds it up."""
    if os.geteuid() != 0:
        assert sandbox.run("import os\nprint(os.geteuid())").stdout.strip() == str(os.geteuid())
        return
    python = "/usr/bin/python3"
    probe = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if not os.path.exists(python) or subprocess.run(probe).returncode:
        pytest.skip(f"needs a Python >= 3.11 that every user may read at {python}")
    folder = tmp_path_factory.mktemp("package")
    for parent in [folder, *folder.parents][:-1]:
        if parent.owner() == "root" and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    (folder / "internjax").mkdir(mode=0o755)
    for name in ("sandbox.py", "sandbox_child.py"):
        (folder / "internjax" / name).write_bytes((ROOT / "internjax" / name).read_bytes())
        (folder / "internjax" / name).chmod(0o644)
    program = (
        "from internjax import sandbox;"
        'done = sandbox.run(\'import os; print(os.getuid()); open("a", "w").write("x")\');'
        "every = sorted(done.layers) == sorted(sandbox.LAYERS);"
        "print(done.status, done.stdout.strip(), done.files, every, done.reason);"
        "lame = sandbox.launch('print(1)', files={}, limits=sandbox.Limits(), packages=(), without=['namespaces']);"
        "print(lame.status, lame.layers)"
    )
    done = subprocess.run(
        [python, "-P", "-s", "-B", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {program}"],
        user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "ok 65534 {'a': b'x'} True ",
        "ok ('no_new_privs', 'rlimits', 'landlock', 'seccomp')",
    ], done


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", ".", "a//b", "a/./b"])
def test_file_names_stay_inside(name):
    with pytest.raises(ValueError, match="must be a plain path in the working directory"):
        sandbox.run("pass", files={name: b""})


def test_bad_arguments_say_what_is_wanted():
    with pytest.raises(ValueError, match="give Python source as text"):
        sandbox.run(b"pass")
    with pytest.raises(ValueError, match="give bytes"):
        sandbox.run("pass", files={"a": "text"})
    with pytest.raises(ValueError, match="raise limits.disk_bytes"):
        sandbox.run("pass", files={"a": bytes(2000)}, limits=Limits(disk_bytes=1000))
    with pytest.raises(ValueError, match="wall_seconds is 0; a limit is positive"):
        Limits(wall_seconds=0)
