"""The files for systemd and Kubernetes fit the server that they start."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from fastapi.routing import APIRoute

from serve.__main__ import build_parser
from serve.openai import create_app
from serve.operation.guards import OPEN_PATHS

DEPLOY = Path(__file__).resolve().parent.parent.parent / "serve" / "deploy"
UNIT = DEPLOY / "internjax.service"


def settings() -> dict[str, str]:
    lines = (line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_starts_the_server_as_it_can_be_started():
    found = settings()
    _, module, name, *flags = shlex.split(found["ExecStart"])
    assert (module, name) == ("-m", "serve")
    args = build_parser().parse_args(flags)
    assert args.drain_seconds + 5 < float(found["TimeoutStopSec"])
    assert args.api_key_file == Path("${CREDENTIALS_DIRECTORY}/keys") and found["LoadCredential"].startswith("keys:")
    assert found["CacheDirectory"] == found["Environment"].rpartition("/")[2]


def complaints(text: str, folder: Path) -> str:
    """What systemd says of a unit."""
    unit = folder / UNIT.name
    # With a command that is there: what is said of one that is not is no fault of the unit.
    unit.write_text(text.replace("/opt/internjax/.venv/bin/python", "/bin/true"))
    return subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60).stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd to ask")
def test_systemd_takes_the_unit(tmp_path):
    assert UNIT.name not in complaints(UNIT.read_text(), tmp_path)
    assert UNIT.name in complaints(UNIT.read_text().replace("Restart=", "Wrong="), tmp_path)


def test_the_deployment_starts_the_server_and_asks_what_it_answers(scripted):
    claim, deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert (claim["kind"], deployment["kind"], service["kind"]) == ("PersistentVolumeClaim", "Deployment", "Service")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python", "-m", "serve"]
    args = build_parser().parse_args(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": args.port, "grpc": args.grpc_port}
    assert args.port == int(pod["metadata"]["annotations"]["prometheus.io/port"])
    targets = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
    assert targets == {"http": "http", "grpc": "grpc"}
    # Else a cluster asks a registry for an image that was built beside it.
    assert container["image"].endswith(":latest") and container["imagePullPolicy"] == "IfNotPresent"
    labels = deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == labels == pod["metadata"]["labels"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + args.drain_seconds + 5 < pod["spec"]["terminationGracePeriodSeconds"]
    paths = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    paths |= {pod["metadata"]["annotations"]["prometheus.io/path"]}
    routes = {route.path for route in create_app(scripted("x"), model_name="x").routes if isinstance(route, APIRoute)}
    assert paths <= routes & OPEN_PATHS, "a probe has no key"
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert volumes["programs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["JAX_COMPILATION_CACHE_DIR"] == mounts["programs"]
    assert args.api_key_file.is_relative_to(mounts["keys"]) and Path(args.model).is_relative_to(mounts["models"])


def test_the_files_say_what_they_need():
    for path in DEPLOY.iterdir():
        (command,) = re.findall(rf"(?:cp|apply -f) (serve/deploy/{path.name})", path.read_text())
        assert (DEPLOY.parent.parent / command).is_file()
