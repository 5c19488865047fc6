"""The inside of the sandbox: run by `internjax.sandbox` as a script of its own, never imported (standard library only).

Three processes, so that nothing escapes and the working directory can be read afterwards:
    launcher   enters the namespaces, builds a small file tree, keeps the clock, collects the files
    init       is process 1 of the new pid namespace: when it ends, the kernel kills all that the program started
    program    takes every right from itself (uid, capabilities, Landlock, seccomp, limits), then runs the given source
Layers that the kernel does not give are reported; without network isolation, file isolation and limits nothing runs.
"""

import base64
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
WORK, SHM = "/sandbox", "/dev/shm"  # what the program may write to inside the built file tree

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NEWCGROUP, CLONE_NEWTIME = 0x02000000, 0x00000080
NAMESPACES = {"mount": CLONE_NEWNS, "network": CLONE_NEWNET, "ipc": CLONE_NEWIPC, "pid": CLONE_NEWPID}
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_RECURSIVE = 2, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 22, 36, 38

SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

# Syscall numbers: x86_64, aarch64 (None where it does not exist there). Numbers from 424 on are the same everywhere.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
DENIED = {
    "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "acct": (163, 89), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "syslog": (103, 116), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "personality": (135, 92), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
}  # fmt: skip
# Without a pid namespace other processes are in sight: neither signals nor priorities, and no way out of the group.
DENIED_IN_SIGHT = {
    "setsid": (112, 157), "setpgid": (109, 154), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "prlimit64": (302, 261), "setpriority": (141, 140), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "process_madvise": (440, 440), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
PIVOT_ROOT = DENIED["pivot_root"]


def check(result: int, what: str) -> int:
    """`result` of a C call; raises OSError with the call's name when it is -1."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments) -> int:
    wide = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    return check(LIBC.syscall(ctypes.c_long(number), *wide), f"syscall {number}")


def prctl(option: int, value=0) -> None:
    zero = ctypes.c_ulong(0)
    value = ctypes.c_ulong(value) if isinstance(value, int) else value
    check(LIBC.prctl(option, value, zero, zero, zero), f"prctl {option}")


def mount(source, target, kind, flags, data=None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


# ---------------------------------------------------------------------------------------------------- the launcher


def launch(request: dict, result_fd: int) -> None:
    """Sets the sandbox up, runs the program in it, writes one JSON object to `result_fd`."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        os._exit(1)
    layers, missing = [], {}
    readable = existing_paths(request["readable"])
    user = enter_namespaces(request, layers, missing)
    work = build_tree(request, readable, user, layers, missing)
    os.chdir(work)
    write_files(request["files"], user)

    setup_read, setup_write = os.pipe()
    status_read, status_write = os.pipe()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for fd in (result_fd, setup_read, status_read):
            os.close(fd)
        if "pid" in layers and become_init(status_write):
            os._exit(0)
        os.close(status_write)
        confine(request, readable, work, user, layers, missing, setup_write)
        return run_program(request["program"], work, request["readable"])
    os.close(setup_write)
    os.close(status_write)
    signal.signal(signal.SIGTERM, lambda *_: stop(child))
    nothing = {"layers": [], "missing": {"setup": "it ended early"}, "ready": False}
    setup = json.loads(read_all(setup_read) or "null") or nothing
    ended = {"by": None}

    def at_deadline(*_):
        ended["by"] = "wall"
        stop(child)

    signal.signal(signal.SIGALRM, at_deadline)
    signal.setitimer(signal.ITIMER_REAL, request["limits"]["wall_seconds"])
    status = os.waitpid(child, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    if "pid" in layers:
        from_init = read_all(status_read)
        status = struct.unpack("i", from_init)[0] if len(from_init) == 4 else status
    else:
        send(os.killpg, child)  # what the program left behind in its group
    reap_all()
    files, left_out = collect_files(request) if setup["ready"] else ({}, 0)
    answer = setup | {"status": status, "ended_by": ended["by"], "files": files, "left_out": left_out}
    with os.fdopen(result_fd, "wb") as result:
        result.write(json.dumps(answer).encode())
    os._exit(0)


def enter_namespaces(request: dict, layers: list, missing: dict) -> int | None:
    """Unshares what the kernel allows. Returns the uid that the program must change to, None for the present one.

    1. As root: namespaces without a user namespace; the program gets a uid of its own, which nothing else has.
    2. Otherwise, as any user, or as root without the right to do 1: inside a new user namespace.
    3. Neither: no namespace, and the other layers have to hold.
    """
    flags = CLONE_NEWUTS
    for flag in NAMESPACES.values():
        flags |= flag
    own_uid = 2**30 + os.getpid()
    if "namespaces" in request["without"]:
        missing.update(dict.fromkeys(NAMESPACES, "switched off"))
    elif os.geteuid() == 0 and LIBC.unshare(flags) == 0:
        layers += [*NAMESPACES]
        return own_uid
    if os.geteuid() == 0:  # limits of processes do not bind uid 0, so it is given up here and now
        os.chown(request["work"], own_uid, own_uid)
        change_user(own_uid)
        if not os.access(os.__file__, os.R_OK):
            missing["rlimits"] = f"root without namespaces needs a Python all users may read; {sys.base_prefix} is not"
            return None
    if "namespaces" in request["without"]:
        return None
    uid, gid = os.geteuid(), os.getegid()
    try:
        check(LIBC.unshare(flags | CLONE_NEWUSER), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        layers += ["user", *NAMESPACES]
    except OSError as error:
        missing.update(dict.fromkeys(["user", *NAMESPACES], str(error)))
    return None


def build_tree(request: dict, readable: list, user: int | None, layers: list, missing: dict) -> str:
    """Makes a file tree of the readable paths alone the root directory. Returns the working directory."""
    base = request["work"]
    if "mount" not in layers:
        return base
    layers.remove("mount")
    owner = f",uid={user},gid={user}" if user is not None else ""
    mounted = False
    try:
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
        mounted = True
        for path in [*readable, *filter(os.path.exists, DEVICES)]:
            expose(path, base + path, read_only=path not in DEVICES)
        size = f"size={request['limits']['disk_bytes']},nr_inodes=2048,mode=700{owner}"
        for folder in (WORK, SHM):
            os.mkdir(base + folder)
            mount("tmpfs", base + folder, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size)
        os.chdir(base)
        syscall(PIVOT_ROOT[machine()[0]], ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
        check(LIBC.umount2(b".", MNT_DETACH), "umount2")
        os.chdir("/")
    except (OSError, KeyError) as error:
        missing["mount"] = f"no file tree of its own: {error}"
        if mounted:
            LIBC.umount2(os.fsencode(base), MNT_DETACH)
        if user is not None:
            os.chown(base, user, user)
        return base
    layers.append("mount")
    return WORK


def expose(path: str, target: str, *, read_only: bool) -> None:
    """Shows `path` of the machine at `target`."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(path, target, None, MS_BIND | MS_REC)
    flags = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV if read_only else MOUNT_ATTR_NOSUID
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    number = DENIED["mount_setattr"][0]
    where, size = ctypes.c_char_p(os.fsencode(target)), len(attributes)
    syscall(number, -100, where, AT_RECURSIVE, ctypes.c_char_p(attributes), size)


def existing_paths(extra: list) -> list:
    """The system's library paths, Python's and `extra`, those that exist, none inside another."""
    paths = []
    for path in sorted({*SYSTEM_PATHS, sys.base_prefix, sys.base_exec_prefix, *extra}):
        if os.path.exists(path) and not any(path.startswith(f"{known}/") for known in paths):
            paths.append(path)
    return paths


def write_files(files: dict, user: int | None) -> None:
    for name, content in files.items():
        folder = ""
        for part in name.split("/")[:-1]:
            folder = os.path.join(folder, part)
            if not os.path.isdir(folder):
                os.mkdir(folder)
                give(folder, user)
        with open(name, "wb") as file:
            file.write(base64.b64decode(content))
        give(name, user)


def give(path: str, user: int | None) -> None:
    if user is not None:
        os.chown(path, user, user)


def collect_files(request: dict) -> tuple[dict, int]:
    """Regular files of the working directory that are new or changed, and how many were left out for their size."""
    files, left_out, total = {}, 0, 0
    for folder, _, names in os.walk(".", followlinks=False):
        for name in sorted(names):
            path = os.path.relpath(os.path.join(folder, name), ".")
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:  # a link, a socket, or gone
                continue
            with os.fdopen(fd, "rb") as file:
                information = os.fstat(fd)
                if information.st_mode & 0o170000 != 0o100000:
                    continue
                total += information.st_size
                if len(files) >= 256 or total > request["limits"]["disk_bytes"]:
                    left_out += 1
                    continue
                content = base64.b64encode(file.read(request["limits"]["disk_bytes"])).decode()
            if request["files"].get(path) != content:
                files[os.fsencode(path).decode("utf-8", "replace")] = content
    return files, left_out


def stop(child: int) -> None:
    """Kills the child, and the group that it leads where there is no pid namespace."""
    send(os.killpg, child)
    send(os.kill, child)


def send(kill, target: int) -> None:
    try:
        kill(target, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def reap_all() -> None:
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as pipe:
        return pipe.read()


# ------------------------------------------------------------------------------------------------------------- init


def become_init(status_write: int) -> bool:
    """Splits: returns False in a new process, the program's; and True in init, once that one has ended."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    # Without handlers of its own, process 1 cannot be hurt by signals from inside.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    program = os.fork()
    if program == 0:
        return False
    os.closerange(3, status_write)
    os.closerange(status_write + 1, 64)
    while True:
        process, status = os.wait()
        if process == program:
            os.write(status_write, struct.pack("i", status))
            return True


# ------------------------------------------------------------------------------------------------------ the program


def confine(
    request: dict, readable: list, work: str, user: int | None, layers: list, missing: dict, setup: int
) -> None:
    """Takes all rights from this process, tells the launcher what holds, and ends here if that is not enough."""
    if "pid" not in layers:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if user is not None:
        change_user(user)
        layers.append("user")
    steps = {
        "no_new_privs": lambda: (drop_capabilities(), prctl(PR_SET_NO_NEW_PRIVS, 1)),
        "rlimits": lambda: set_limits(request["limits"]),
        "landlock": lambda: restrict_files(readable, work),
        "seccomp": lambda: restrict_syscalls("pid" in layers),
    }
    for name, step in steps.items():
        if name in request["without"]:
            missing[name] = "switched off"
        elif name not in missing:
            try:
                step()
                layers.append(name)
            except OSError as error:
                missing[name] = str(error)
    holds = {
        "network isolation": "network" in layers or "seccomp" in layers,
        "file isolation": "mount" in layers or "landlock" in layers,
        "process isolation": "pid" in layers or "seccomp" in layers,
        "limits": "rlimits" in layers and "no_new_privs" in layers,
    }
    refused = [name for name, held in holds.items() if not held]
    answer = {"layers": layers, "missing": missing, "refused": refused, "ready": not refused}
    os.write(setup, json.dumps(answer).encode())
    os.close(setup)
    if refused:
        os._exit(1)


def change_user(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def drop_capabilities() -> None:
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # without the right to drop there is none in use, or it is beyond the kernel's last one
            break
    header, empty = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(LIBC.capset(ctypes.c_char_p(header), ctypes.c_char_p(empty)), "capset")


def set_limits(limits: dict) -> None:
    values = {
        resource.RLIMIT_CPU: (limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in values.items():
        soft, hard = value if isinstance(value, tuple) else (value, value)
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        try:
            resource.setrlimit(kind, (soft, hard))
        except ValueError as error:
            raise OSError(errno.EINVAL, f"setrlimit {kind}: {error}") from error


def restrict_files(readable: list, work: str) -> None:
    """Landlock: reading below `readable`, everything below `work`, nothing else; no TCP, no signals to the outside."""
    abi = syscall(444, None, 0, 1)
    files = (1 << 13) - 1  # the rights of ABI 1; later ones add to it
    for version, right in ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15)):
        files |= right if abi >= version else 0
    attributes = struct.pack("Q", files)
    attributes += struct.pack("Q", 3) if abi >= 4 else b""
    attributes += struct.pack("Q", 3) if abi >= 6 else b""
    rules = syscall(444, ctypes.c_char_p(attributes), len(attributes), 0)
    write_file, read_file, read_dir, truncate = 1 << 1, 1 << 2, 1 << 3, 1 << 14
    special = 1 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15  # execute, device nodes, sockets, fifos, ioctl
    writable = [WORK, SHM] if work == WORK else [work]
    for path in [*readable, *writable, *DEVICES]:
        if not os.path.exists(path):
            continue
        if path in writable:
            rights = files & ~special
        else:
            rights = read_file | (read_dir if os.path.isdir(path) else 0)
            rights |= (write_file | truncate) & files if path == "/dev/null" else 0
        fd = os.open(path, os.O_PATH)
        syscall(445, rules, 1, ctypes.c_char_p(struct.pack("=Qi", rights, fd)), 0)
        os.close(fd)
    syscall(446, rules, 0)
    os.close(rules)


def machine() -> tuple[int, int]:
    """Column of the syscall numbers and the audit code of this machine; KeyError where neither is known."""
    return MACHINES[platform.machine()]


def restrict_syscalls(own_pid_namespace: bool) -> None:
    """seccomp: a deny-list, whose calls fail with EPERM. New namespaces cannot be made, clone3 is said not to exist."""
    if platform.machine() not in MACHINES:
        raise OSError(errno.ENOSYS, f"no table of syscall numbers for {platform.machine()}")
    column, audit = machine()
    load, equal, at_least, any_bit, give_back = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, fail = 0x7FFF0000, 0x80000000, 0x00050000
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (give_back, 0, 0, kill), (load, 0, 0, 0)]
    if platform.machine() == "x86_64":  # the second numbering of the same calls (x32)
        code += [(at_least, 0, 1, 0x40000000), (give_back, 0, 0, fail | errno.EPERM)]
    denied = DENIED if own_pid_namespace else DENIED | DENIED_IN_SIGHT
    for numbers in denied.values():
        if numbers[column] is not None:
            code += [(equal, 0, 1, numbers[column]), (give_back, 0, 0, fail | errno.EPERM)]
    code += [(equal, 0, 1, CLONE3[column]), (give_back, 0, 0, fail | errno.ENOSYS)]
    new = CLONE_NEWUTS | CLONE_NEWUSER | CLONE_NEWCGROUP | CLONE_NEWTIME
    for flag in NAMESPACES.values():
        new |= flag
    new &= ~CLONE_NEWTIME  # in clone's flags that bit belongs to the exit signal
    code += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, new)]
    code += [(give_back, 0, 0, fail | errno.EPERM), (give_back, 0, 0, allow)]
    filters = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(filters)
    program = struct.pack("H6xQ", len(code), ctypes.addressof(buffer))
    check(LIBC.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.c_char_p(program), 0, 0), "seccomp")


def run_program(source: str, work: str, readable: list) -> None:
    """Runs `source` as `__main__` of this interpreter, with the exit code and traceback that a script has."""
    import builtins
    import linecache
    import traceback
    import types

    name = "program.py"
    module = types.ModuleType("__main__")
    module.__file__ = name
    module.__builtins__ = builtins
    sys.modules["__main__"] = module
    sys.argv = [name]
    sys.path[:] = [work, *(path for path in sys.path if path and path != os.path.dirname(__file__)), *readable]
    os.environ["HOME"] = os.environ["TMPDIR"] = work
    builtins.exit = builtins.quit = sys.exit
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, frames)
        sys.exit(1)


if __name__ == "__main__":
    with os.fdopen(0, "rb", closefd=False) as pipe:
        asked = json.loads(pipe.read())
    launch(asked, int(sys.argv[1]))
