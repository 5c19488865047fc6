"""The commands: what they print, how they end, and, of some that serve or fail, that processes end."""

import contextlib
import io
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from internjax.hf.save import save_model
from internjax.text.message import Message
from serve import __main__ as server
from serve import chat, quantize
from serve.bench import __main__ as bench
from serve.chat import _show
from serve.openai import create_app
from serve.operation.guards import Operation
from serve.pipeline import Params
from serve.rest import protocol, requests, response_requests, tokenize_routes

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = {"serve": server, "serve.chat": chat, "serve.quantize": quantize, "serve.bench": bench}


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "my tiny"
    save_model(path, config=tiny_model.config, params=tiny_model.params, tokenizer=tiny_model.tokenizer)
    return path


def command(module: str, *arguments) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


@pytest.fixture
def run(capsys, monkeypatch):
    """run(module, *arguments, said=...): the command in this process, and how it would have ended as one."""

    def call(module: str, *arguments, said: str = "") -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        capsys.readouterr()
        try:
            code = COMMANDS[module].main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return call


POOLS = """
import ctypes, sys, threading
from serve.__main__ import share_memory
if sys.argv[1:]:
    share_memory()
libc, meet = ctypes.CDLL(None), threading.Barrier(4)
threads = [threading.Thread(target=lambda: (meet.wait(), libc.malloc(100), meet.wait())) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no such pools")
def test_threads_take_memory_from_one_pool():
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}

    def pools(*arguments, **more) -> int:
        command = [sys.executable, "-c", POOLS, *arguments]
        told = subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True, check=True)
        return told.stdout.count("<heap nr=")

    assert pools() > 2 and pools("shared") == 1
    assert pools("shared", MALLOC_ARENA_MAX="2") == 2, "what the environment says counts"


@contextlib.contextmanager
def serving(*arguments, program: Sequence[str] = ("-m", "serve")) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """A server process that is ready, and the lines that it printed so far."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *program, *map(str, arguments)], cwd=ROOT, **how)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("port"):
                health = httpx.get(line.split()[1])
                assert (health.status_code, health.json()["status"]) == (503, "loading")
                assert httpx.get(line.split()[1].removesuffix("health")).headers["content-type"].startswith("text/html")
            if line.startswith("ready"):
                break
        assert lines and lines[-1].startswith("ready"), process.stderr.read()
        yield process, lines
    finally:
        process.kill()
        process.communicate()


def test_a_server_from_start_to_kill_and_from_start_to_sigterm(folder, tmp_path):
    """On one port: who was served by the first is told by the second that it has gone."""
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    flags = ("--max-batch", 2, "--max-context", 64, "--api-key-file", keys, "--log-format", "json")
    turn = {"model": "my tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    client = httpx.Client(headers={"Authorization": "Bearer secret"}, timeout=30)
    with serving(folder, "--port", 0, *flags) as (process, lines), client:
        url = lines[-1].split()[1]
        session = client.post(f"{url}/sessions", json={"model": "my tiny"}).json()["id"]
        assert client.post(f"{url}/chat/completions", json=turn | {"session_id": session}).status_code == 200
        # So many answers on two slots that it cannot be over when its first line is read.
        asked = {"model": "my tiny", "prompt": "a", "n": 128, "max_tokens": 50, "ignore_eos": True, "stream": True}
        came = []
        with client.stream("POST", f"{url}/completions", json=asked) as response:
            assert response.status_code == 200
            with pytest.raises(httpx.TransportError):
                for line in response.iter_lines():
                    came.append(line)
                    process.kill()
        assert came and not any("[DONE]" in line or '"error"' in line for line in came), "it ends as no answer does"
        assert process.wait() == -signal.SIGKILL
    port = url.removesuffix("/v1").rpartition(":")[2]
    with serving(folder, "--port", port, *flags) as (process, lines):
        printed = "".join(lines)
        assert "float32" in printed and "8 pages of 16 tokens" in printed and "2.0 conversations of 64" in printed
        assert "vectors  of texts of up to 64 tokens" in printed
        assert lines[-1] == f"ready    {url}  model my tiny\n" and url.startswith("http://127.0.0.1:")
        assert lines[-2] == f"page     {url.removesuffix('v1')}\n"
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=30) as client:
            with pytest.raises(openai.NotFoundError, match="the server was started anew. Begin another one") as caught:
                client.chat.completions.create(**turn, extra_body={"session_id": session})
            assert caught.value.code == "session_not_found"
            (model,) = client.models.list()
            again = client.post("/sessions", body={"model": model.id}, cast_to=object)["id"]
            answer = client.chat.completions.create(**turn, extra_body={"session_id": again})
        assert answer.usage.completion_tokens <= 4 and again != session
        assert "cygrpc" not in Path(f"/proc/{process.pid}/maps").read_text()  # nobody asked for --grpc-port
        process.send_signal(signal.SIGTERM)
        rest, log = process.communicate(timeout=30)
        assert (process.returncode, rest) == (0, "stopping\n"), log
        lines = [json.loads(line) for line in log.splitlines()]
        assert "Traceback" not in log and "secret" not in log
        lost, line = [line for line in lines if line.get("route") == "/v1/chat/completions"]
        assert line["finish"] in ("stop", "length") and (lost["status"], line["status"]) == (404, 200)


BREAKS = """
import sys
from internjax.decode.device import Device
from internjax.decode.rounds import Rounds
from serve.__main__ import main

def broken(*_):
    Device.reset = broken
    raise MemoryError("planted")

Rounds._admit_waiting = broken
sys.exit(main())
"""


def test_a_server_whose_engine_has_failed_answers_who_waits_and_ends(folder):
    flags = (folder, "--port", 0, "--max-batch", 1, "--max-context", 64, "--max-concurrent", 1)
    with serving(*flags, program=("-c", BREAKS)) as (process, lines), ThreadPoolExecutor(3) as pool:
        url, asked = lines[-1].split()[1], {"model": "my tiny", "prompt": "a", "max_tokens": 4}
        answers = [pool.submit(httpx.post, f"{url}/completions", json=asked, timeout=30) for _ in range(3)]
        assert {answer.result().status_code for answer in answers} <= {500, 503}
        rest, log = process.communicate(timeout=30)
    assert (process.returncode, rest) == (1, "stopping\n"), log
    assert "the server ends, to be started anew: the engine stopped" in log and "planted" in log


def test_a_server_that_does_not_answer_any_more_ends():
    stopping = threading.Event()
    wait = partial(server.wait_until_end, fault=lambda: None, stopping=stopping, every=0.001)
    assert wait(SimpleNamespace(alive=False)) == "the thread that answers has ended"
    stopping.set()
    assert wait(SimpleNamespace(alive=True)) is None


def check_failed(result: subprocess.CompletedProcess, *said: str) -> None:
    assert result.returncode not in (0, -9) and "Traceback" not in result.stderr, result.stderr
    assert all(text in result.stderr for text in said), result.stderr
    assert len(result.stderr.splitlines()) <= 24


def test_a_port_in_use_is_said_before_the_model_is_read(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = command("serve", folder, "--port", port)
        result = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, timeout=120)
    check_failed(result, f"port {port} on 127.0.0.1 is in use", "--port")
    assert result.stdout == ""


@pytest.mark.parametrize("module", ["serve", "serve.chat"])
def test_an_unknown_model_is_said(run, module, tmp_path):
    arguments = ["--port", "0"] if module == "serve" else []
    check_failed(run(module, tmp_path / "nowhere", *arguments), f"{module}: ", "nowhere")


def test_the_terminal_command_ends_as_a_process(tmp_path):
    process = command("serve.chat", tmp_path / "nowhere")
    result = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, timeout=120)
    check_failed(result, "serve.chat: ", "nowhere")
    assert result.stdout == ""


def test_wrong_flags_are_said(run, folder):
    check_failed(run("serve", folder, "--port", 99999), "port is 99999")
    check_failed(run("serve", folder, "--port", 0, "--host", "no.such.host.invalid"), "no.such.host.invalid")
    check_failed(run("serve", folder, "--quantize", "int3"), "int3")
    check_failed(run("serve.chat", folder, "--temperature", "-1"), "temperature")
    check_failed(run("serve.chat", folder, "--adapter", "here"), "NAME=FOLDER")
    check_failed(run("serve.chat", folder, "--drafts", 3), "--speculate")
    check_failed(run("serve", folder, "--adapter-root", folder), "--max-adapters")


def test_numbers_that_are_none_are_said_with_what_is_wanted(run):
    wanted = {"--max-batch": "a whole number of 1 or more", "--page-size": "1 or more", "--num-pages": "1 or more"}
    wanted |= {"--max-sessions": "a whole number of 0 or more", "--drain-seconds": "seconds over 0"}
    wanted |= {"--max-body": "MiB in (0, 1024]", "--host-memory": "GiB, 0 or more", "--memory-fraction": "(0, 1]"}
    for flag, what in wanted.items():
        for value in ("many", "-1"):
            result = run("serve", "MODEL", f"{flag}={value}")
            check_failed(result, f"argument {flag}: ", f"{what}, given {value}")
            assert result.returncode == 2 and "_seconds" not in result.stderr


@pytest.mark.parametrize("origin", ["https://x.org/", "x.org", "https://X.org", "https://x.org:443", "https://x.org/a"])
def test_an_origin_that_no_page_has_is_said(run, scripted, origin):
    check_failed(run("serve", "MODEL", "--allow-origin", origin), "argument --allow-origin: ", f"given {origin}")
    with pytest.raises(ValueError, match="an origin is a scheme, a host"):
        create_app(scripted("hi"), model_name="tiny", operation=Operation(origins=(origin,)))


def test_origins_that_pages_have_are_taken():
    origins = ["http://localhost:3000", "https://x.org", "http://[::1]:8080", "chrome-extension://abc", "*", "null"]
    flags = [word for origin in origins for word in ("--allow-origin", origin)]
    assert server.build_parser().parse_args(["MODEL", *flags]).allow_origin == origins


def test_help_has_every_flag_in_a_group(run):
    result = run("serve", "--help")
    assert result.returncode == 0
    sections = {part.partition(":\n")[0]: part for part in result.stdout.split("\n\n")}
    titles = ("where it answers, and what of", "the model", "its answers", "the cache", "adapters", "speculation")
    titles += (
        "who may ask, and for what",
        "how much it takes on",
        "what is kept for clients, until the server ends",
        "the log",
    )
    assert [title for title in sections if title in titles] == [*titles]
    flags = {name: re.findall(r"^  (--?[a-z-]+)", part, re.MULTILINE) for name, part in sections.items()}
    assert flags["options"] == ["-h"] and flags["the log"] == ["--log-format", "--log-prompts"]
    in_groups = [flag for title in titles for flag in flags[title]]
    assert len(in_groups) == len({*in_groups}) == len(vars(server.build_parser().parse_args(["MODEL"]))) - 1
    assert max(len(flags[title]) for title in titles) <= 8


def test_a_conversation_in_the_terminal(run, folder, tmp_path):
    file = tmp_path / "said.jsonl"
    commands = ["/history", "/top-p 7", "/top-k x", "/max-tokens 3", "/max-tokens", "/nothing", "/help"]
    commands += ["/system Be brief.", f"/save {file}", f"/save {tmp_path}"]
    said = "hello\n\n" + "long " * 100 + "\n/reset\nhello\n" + "\n".join(commands) + "\n/exit\nnever read\n"
    flags = ("--temperature", 0, "--max-tokens", 5, "--max-context", 128, "--quantize", "nf4", "--kv", "int8")
    flags += ("--speculate", "lookup", "--drafts", 2, "--mode", "exact")
    result = run("serve.chat", folder, *flags, said=said)
    assert result.returncode == 0, result.stderr
    assert "2 tokens at once, looked up" in result.stdout and "1 answers at once, exact mode" in result.stdout
    _, first, empty, refused, forgotten, again, *done, end = result.stdout.split("> ")
    assert "the session holds 128 tokens" in refused and forgotten == "(forgotten)\n"
    assert first == again and first.strip()  # greedy, and the same conversation: what was too long left no trace
    assert (empty, end) == ("", "")
    history, top_p, top_k, fewer, shown, unknown, helped, told, saved, unsaved = done
    assert history.startswith(f"[user] hello\n[assistant] {again.partition(' (cut')[0].strip()}")
    assert "top_p must" in top_p and "stays 0.9" in top_p and "invalid literal" in top_k and "stays 0" in top_k
    assert fewer == shown == "(max-tokens is 3)\n" and "no /nothing" in unknown and "/temperature X" in helped
    assert "starts anew" in told and "1 messages added" in saved and "not saved" in unsaved
    assert json.loads(file.read_text()) == {"messages": [{"role": "system", "content": "Be brief."}]}


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(scripted, capsys):
    pipeline = scripted(lambda request: [70] * 900, seconds_per_event=0.02)
    before = signal.getsignal(signal.SIGINT)

    def interrupt():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    answer = pipeline.chat([Message("user", "hi")], Params())
    _show(answer)
    printed = capsys.readouterr().out
    assert answer.last.text and printed == f"{answer.last.text} (stopped)\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert not pipeline.engine.active


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "serve" / "README.md").read_text(), re.DOTALL)


def test_the_commands_of_the_readme_are_ones_that_exist():
    lines = [line for block in readme_blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 3
    for line in lines:
        _, _, module, *arguments = shlex.split(line)
        parser = COMMANDS[module].build_parser()
        assert parser.parse_args(arguments).model == "runs/tiny/sft"


def test_the_readme_s_python_runs(folder, capsys):
    (code,) = readme_blocks("python")
    code = code.replace("runs/tiny/sft", str(folder)).replace("max_context=1024", "max_context=2048")
    exec(compile(code, "serve/README.md", "exec"), {})
    assert "max_turns" in capsys.readouterr().out


def test_the_readme_names_every_field():
    text = (ROOT / "serve" / "README.md").read_text()
    refused = protocol.REFUSED_OF_CHATS | protocol.REFUSED_OF_COMPLETIONS | protocol.REFUSED_OF_MESSAGES
    refused |= protocol.REFUSED_OF_STREAMS | protocol.REFUSED_OF_ADAPTERS
    known = {*refused, *requests.ChatRequest.model_fields, *requests.CompletionRequest.model_fields}
    known |= {*response_requests.ResponseRequest.model_fields}
    known |= {*requests.LoadAdapterRequest.model_fields, *requests.UnloadAdapterRequest.model_fields}
    known |= {*tokenize_routes.TokenizeRequest.model_fields, *tokenize_routes.DetokenizeRequest.model_fields}
    assert {name for name in known if f"`{name}`" not in text} == set()
