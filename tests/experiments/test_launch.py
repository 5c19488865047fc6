"""Launchers: what they start, what they pass on, when they start again, and that their files fit the checkout."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiments.launch import local
from internjax.train import processes
from internjax.train.heartbeat import EXIT_PEER_LOST, EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "experiments" / "launch"
WHO = "import os; who = int(os.environ['JAX_PROCESS_ID']); "


def python(source: str) -> list[str]:
    return [sys.executable, "-c", WHO + source]


def test_each_process_is_told_where_it_stands(capfd):
    source = "print(os.environ['JAX_NUM_PROCESSES'], os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['XLA_FLAGS'])"
    assert local.main(["--processes", "3", "--devices", "2", "--", *python(source)]) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    assert [line[:5] for line in lines] == ["[0] 3", "[1] 3", "[2] 3"]
    assert len({line[4:] for line in lines}) == 1
    assert re.fullmatch(r"3 127\.0\.0\.1:\d+ .*--xla_force_host_platform_device_count=2", lines[0][4:])
    environment = local.environment_of(1, 3, 99, None, "job")
    assert processes.place(environment) == ("127.0.0.1:99", 3, 1, None)


def test_the_others_are_ended_when_one_fails(capfd):
    started = time.monotonic()
    source = "import sys, time; sys.exit(3) if who == 1 else time.sleep(100)"
    assert local.main(["--processes", "3", "--grace", "0.5", "--", *python(source)]) == 3
    assert time.monotonic() - started < 15
    assert "process 1 ended with exit code 3; the others have 0.5 s" in capfd.readouterr().err


def test_one_that_does_not_hear_sigterm_is_killed_and_a_killed_one_names_the_cause(capfd):
    source = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.kill(os.getpid(), 9) if who == 0 else time.sleep(100)"
    )
    assert local.main(["--processes", "2", "--grace", "0.3", "--", *python(source)]) == 137


@pytest.mark.parametrize("code, starts", [(EXIT_PREEMPTED, 3), (EXIT_PEER_LOST, 3), (1, 1), (0, 1)])
def test_what_is_started_again(tmp_path, code, starts):
    file = f"open(r'{tmp_path / 'starts'}' + str(who), 'a')"
    source = f"import sys; {file}.write(os.environ['INTERNJAX_JOB'] + ' '); sys.exit({code})"
    assert local.main(["--processes", "2", "--grace", "5", "--restarts", "2", "--", *python(source)]) == code
    jobs = [(tmp_path / f"starts{who}").read_text().split() for who in range(2)]
    assert jobs[0] == jobs[1] == jobs[0][:1] * starts  # one name for all starts


def test_sigterm_goes_to_all_and_is_no_reason_to_start_again(tmp_path):
    source = (
        f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_PREEMPTED})); "
        f"open(r'{tmp_path}/up' + str(who), 'w').close(); time.sleep(60)"
    )
    command = [sys.executable, "-m", "experiments.launch.local", "--processes", "2", "--restarts", "3", "--"]
    launcher = subprocess.Popen([*command, *python(source)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while len(list(tmp_path.iterdir())) < 2:
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == EXIT_PREEMPTED and b"started again" not in said


@pytest.mark.parametrize("arguments", [["--processes", "2"], ["--processes", "0", "--", "true"]])
def test_half_a_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        local.main(arguments)
    assert caught.value.code == 2 and "a command after --" in capsys.readouterr().err


def slurm(tmp_path, command: str, **environment: str) -> tuple[subprocess.Popen, Path]:
    """Starts slurm.sh with a srun that runs the command once and a scontrol that writes down what it is asked."""
    for name, body in {
        "srun": 'shift; exec bash -c "$*"',
        "scontrol": f'echo "$@" >> "{tmp_path}/asked"; [ "$1" != show ] || printf "node7\\nnode8\\n"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    around = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "5000",
        "SLURM_NTASKS": "2",
    }
    script = ["bash", str(LAUNCH / "slurm.sh"), *([command] if command else [])]
    process = subprocess.Popen(
        script, env=around | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process, tmp_path / "asked"


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (EXIT_PREEMPTED, True), (EXIT_PEER_LOST, True)])
def test_slurm_queues_the_job_again_when_that_helps(tmp_path, code, requeued):
    process, asked = slurm(tmp_path, f"echo $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $INTERNJAX_JOB; exit {code}")
    said, _ = process.communicate(timeout=30)
    assert "node7:62344 2 slurm-5000" in said
    assert process.returncode == (0 if requeued else code), said
    assert ("requeue 5000" in asked.read_text()) == requeued


def test_slurm_passes_sigterm_on_and_waits_for_the_save(tmp_path):
    trap = f"trap 'kill $!; sleep 0.5; echo saved; exit {EXIT_PREEMPTED}' TERM; touch {tmp_path}/up; sleep 60 & wait"
    process, asked = slurm(tmp_path, trap)
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "saved" in said and "requeue 5000" in asked.read_text(), said


def test_slurm_gives_up_after_as_many_restarts_as_it_was_allowed(tmp_path):
    process, asked = slurm(tmp_path, "exit 76", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 76 and "after 3 restarts" in said and "requeue" not in asked.read_text()
    process, _ = slurm(tmp_path, "")
    assert process.wait(30) == 2


def test_all_launchers_start_again_after_the_same_exit_codes():
    script = (LAUNCH / "slurm.sh").read_text()
    case = re.search(r"^  ([\d |]+)\) ;;", script, re.MULTILINE)[1]
    assert sorted(int(code) for code in case.split("|")) == sorted(local.RESTARTED)
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["values"] == sorted(local.RESTARTED)


def test_the_jobset_describes_one_job():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    environment = {item["name"]: item["value"] for item in container["env"]}
    # Pod 1 of the job finds pod 0 by the name that JobSet gives it.
    where = processes.place(environment | {"JOB_COMPLETION_INDEX": "1"})
    name = jobset["metadata"]["name"]
    assert where.address == f"{name}-{replicated['name']}-0-0.{name}:{container['ports'][0]['containerPort']}"
    assert where.num_processes == job["parallelism"] == job["completions"] == 2 and where.index == 1
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    module = container["command"][2].replace(".", "/")
    assert container["command"][:2] == ["python", "-m"] and (ROOT / f"{module}.py").is_file()


def test_the_image_is_made_of_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert {"internjax", "data_pipelines", "eval", "serve", "experiments"} <= set(copied)
    allowed = [line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert sorted(allowed) == sorted(copied)
    installs = [line for line in lines if "pip install" in line]
    assert "--require-hashes" in installs[0] and "requirements-cuda12.lock" in installs[0]
    assert "--no-deps" in installs[1] and "--no-build-isolation" in installs[1]
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 1000:1000"] and lines.index(users[0]) > max(map(lines.index, installs))


def test_the_commands_of_the_page_run():
    blocks = re.findall(r"```sh\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    commands = [block for block in blocks if not block.startswith("# needs")]
    assert len(commands) == 1 and len(blocks) == 3
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "-c", commands[0]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for process in range(2):
        assert f"process {process} of 2: 4 of 8 devices (cpu); the numbers of all devices add up to 28" in ran.stdout
