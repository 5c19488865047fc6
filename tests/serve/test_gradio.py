"""The gradio page of a running server: what it asks, what it says where something is missing, and, live, itself.

Gradio is what `make parity` installs; what the model says is a script.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serve import gradio as command
from tests.browser import browser, find_browser

ROOT = Path(__file__).resolve().parent.parent.parent
PART = {"type": "text"}


def test_a_conversation_is_asked_as_openai_has_it():
    history = [
        {"role": "user", "content": [PART | {"text": "two "}, PART | {"text": "parts"}], "metadata": None, "options": None},
        {"role": "assistant", "content": "a text", "metadata": {"title": None}},
    ]
    asked = [
        {"role": "user", "content": "two parts"},
        {"role": "assistant", "content": "a text"},
        {"role": "user", "content": " now\n"},
    ]
    assert command.turns(history, " now\n") == command.turns(history, " now\n", " \n") == asked
    assert command.turns(history, " now\n", "Be kind.") == [{"role": "system", "content": "Be kind."}, *asked]
    with pytest.raises(ValueError, match="only text parts"):
        command.turns([{"role": "user", "content": [{"type": "file", "file": {"path": "x"}}]}], "now")


def test_an_empty_field_is_not_sent():
    assert command.sampling(None, None, None) == {}
    assert command.sampling(0, 0.5, 7.0) == {"temperature": 0, "top_p": 0.5, "max_tokens": 7}
    assert type(command.sampling(0, 0.5, 7.0)["max_tokens"]) is int


def said_by(capsys, *arguments) -> str:
    """What the command says when it fails: one line."""
    assert command.main([*map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_what_is_missing_is_said_with_its_remedy(serve, capsys, monkeypatch):
    client, _ = serve(api_key="secret")
    url = str(client.base_url).removesuffix("/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert "python -m serve MODEL" in said_by(capsys, "runs/tiny/sft", "--port", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert f"nothing answers at http://127.0.0.1:{port}; start a server" in said_by(
            capsys, f"http://127.0.0.1:{port}", "--port", 0
        )
        taken.listen()
        assert f"port {port} on 127.0.0.1 is in use; give another one with --port" in said_by(
            capsys, url, "--port", port
        )
    assert "--model other is not offered" in (line := said_by(capsys, f"{url}/v1/", "--port", 0, "--model", "other"))
    assert "there are: tiny" in line
    assert "there is no" in said_by(capsys, f"{url}/other", "--port", 0)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "True")  # put back behind the test
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = said_by(capsys, f"{url}/v1/", "--port", 0)
    assert "pip install 'internjax[gradio]'" in line and f"own page at {url}/\n" in line
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"  # before gradio would have read it
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert "OPENAI_API_KEY" in (line := said_by(capsys, url, "--port", 0)) and "wrong" not in line


def test_the_readme_s_commands_and_flags_exist():
    text = (ROOT / "serve" / "README.md").read_text("utf-8").partition("### In gradio")[2].partition("\n## ")[0]
    (line,) = re.findall(r"`python -m serve\.gradio (.*?)`", text)
    assert command.build_parser().parse_args(shlex.split(line)).url.startswith("http://")
    assert all(flag in command.build_parser().format_help() for flag in re.findall(r"`(--[a-z-]+)`", text))


# Live, with the gradio that `make parity` installs.


@pytest.fixture
def front(serve, tmp_path):
    """front(flags, ...) -> (address of the page, pipeline): the command as a process. It must end well, and say nothing."""
    pytest.importorskip("gradio_client")
    with contextlib.ExitStack() as ending:

        def start(flags=(), **how):
            client, pipeline = serve(**how)
            (tmp_path / "home").mkdir()
            told = {"OPENAI_API_KEY": how.get("api_key") or "", "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
            process = subprocess.Popen(
                [sys.executable, "-m", "serve.gradio", str(client.base_url), "--port", "0", *flags],
                cwd=ROOT, env=os.environ | told, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            ending.callback(end, process)
            ready = process.stdout.readline()
            assert ready.startswith("ready"), process.stderr.read()
            return ready.split()[1], pipeline

        yield start


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        rest, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, rest, errors) == (0, "stopping\n", "")


@pytest.mark.parity
def test_gradio_s_client_chats_streams_stops_and_is_told(front, eventually, tokenizer):
    import gradio_client

    url, pipeline = front(api_key="secret", chunks=(2,))
    with contextlib.redirect_stdout(None):
        client = gradio_client.Client(url, analytics_enabled=False)
    engine = pipeline.engine

    def ask(said, system="", *sampling, model="tiny"):
        return client.submit(said, model, system, *sampling or (None, None, None), api_name="/chat")

    job = ask("first", "Be kind.", 0.5, 0.75, 40)
    assert job.result(timeout=20) == "The answer is 6, héllo 你好."
    assert len(parts := job.outputs()) > 2 and all(b.startswith(a) for a, b in zip(parts, parts[1:]))
    request = engine.requests[-1]
    assert (request.sampling.temperature, request.sampling.top_p, request.max_new_tokens) == (0.5, 0.75, 40)
    assert "Be kind." in tokenizer.decode(request.tokens, skip_special=False)
    ask("second").result(timeout=20)
    told = tokenizer.decode(engine.requests[-1].tokens, skip_special=False)
    assert "Be kind." not in told
    assert [told.find(text) >= 0 for text in ("first", "The answer is 6, héllo 你好.", "second")] == [True] * 3
    with pytest.raises(gradio_client.exceptions.AppError, match="top_p"):
        ask("third", "", None, 7.0, None).result(timeout=20)

    engine.script, engine.seconds_per_event = lambda request: [5] * 900, 0.01
    job = ask("long")
    eventually(lambda: job.outputs() and engine.active)
    job.cancel()
    eventually(lambda: not engine.active)
    assert len(job.outputs()) < 300
