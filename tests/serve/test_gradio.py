"""The gradio page of a running server: what it asks, what it says where something is missing, and, live, itself.

Gradio is what `make parity` installs; what the model says is a script.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from internjax.text.tokenizer import Tokenizer
from serve import gradio as command
from serve.pipeline import Pipeline
from serve.server import start_server
from tests.serve.conftest import ScriptedEngine

ROOT = Path(__file__).resolve().parent.parent.parent
PART = {"type": "text"}


def test_a_conversation_is_asked_as_openai_has_it():
    history = [
        {
            "role": "user",
            "content": [PART | {"text": "two "}, PART | {"text": "parts"}],
            "metadata": None,
            "options": None,
        },
        {"role": "assistant", "content": "a text", "metadata": {"title": None}},
    ]
    asked = [
        {"role": "user", "content": "two parts"},
        {"role": "assistant", "content": "a text"},
        {"role": "user", "content": " now\n"},
    ]
    assert command.turns(history, " now\n") == command.turns(history, " now\n", " \n") == asked
    assert command.turns(history, " now\n", "Be kind.") == [{"role": "system", "content": "Be kind."}, *asked]
    told = [{"role": "user", "content": "no"}, command.note("No answer", "<b> is busy")]
    assert told[1]["content"] == "&lt;b&gt; is busy"
    assert command.turns([*history, *told], " now\n") == [*asked[:2], told[0], asked[2]]
    with pytest.raises(ValueError, match="only text parts"):
        command.turns([{"role": "user", "content": [{"type": "file", "file": {"path": "x"}}]}], "now")


def test_an_empty_field_is_not_sent():
    assert command.sampling("", " ", "") == {}
    assert command.sampling("0", " .5", "7") == {"temperature": 0, "top_p": 0.5, "max_tokens": 7}
    for fields, said in ((("hot", "", ""), "temperature is 'hot'; give a number"), (("", "", "7.5"), "a whole number")):
        with pytest.raises(ValueError, match=said):
            command.sampling(*fields)


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
        assert f"nothing answers at http://127.0.0.1:{port}, or no longer; start a server" in said_by(
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
    assert "pip install -e '.[gradio]'" in line and f"own page at {url}/\n" in line
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"  # before gradio would have read it
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert "OPENAI_API_KEY" in (line := said_by(capsys, url, "--port", 0)) and "wrong" not in line


def test_the_readme_s_commands_and_flags_exist():
    text = (ROOT / "serve" / "README.md").read_text("utf-8").partition("### In gradio")[2].partition("\n## ")[0]
    (line,) = re.findall(r"`python -m serve\.gradio (.*?)`", text)
    assert command.build_parser().parse_args(shlex.split(line)).url.startswith("http://")
    assert all(flag in command.build_parser().format_help() for flag in re.findall(r"`(--[a-z-]+)`", text))


# Live, with the gradio that `make parity` installs.


KEY, TEXT, LONG = "k-7391", "The answer is 6, héllo 你好.", "one two " * 100


class Front(NamedTuple):
    url: str
    engine: ScriptedEngine
    tokenizer: Tokenizer

    def says(self, text: str) -> None:
        """Has the model answer so from now on."""
        self.engine.script = lambda request: [*self.tokenizer.encode(text), self.tokenizer.eos_id]

    def told(self) -> str:
        """What the model was told last, with its markers."""
        return self.tokenizer.decode(self.engine.requests[-1].tokens, skip_special=False)


@pytest.fixture(scope="module")
def front(tokenizer, tmp_path_factory):
    """The command as a process before a server whose engine has a script. It must end well and quietly."""
    pytest.importorskip("gradio_client")
    home = str(tmp_path_factory.mktemp("home"))
    engine = ScriptedEngine(None, chunks=(2,), seconds_per_event=0.01)
    with start_server(Pipeline.over(engine, tokenizer), model_name="tiny", api_key=KEY, drain_seconds=1) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.gradio", server.url, "--port", "0", "--temperature", "0.25"],
            cwd=ROOT, env=os.environ | {"OPENAI_API_KEY": KEY, "HOME": home, "TMPDIR": home}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            ready = process.stdout.readline()
            assert ready.startswith("ready"), process.stderr.read()
            yield Front(ready.split()[1], engine, tokenizer)
            process.send_signal(signal.SIGTERM)
            rest, errors = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, rest, errors) == (0, "stopping\n", "")


FIELD = "textarea.no-label"
ANSWERS = "[...document.querySelectorAll('[data-testid=bot]')].map((answer) => answer.innerText.trim())"
IDLE = "document.querySelector('.submit-button')"
MARKED = "**6**, ![](http://example.invalid/x.png) <script>window.broken = true</script>"


@pytest.mark.parity
def test_in_a_browser_answers_stream_stop_are_made_anew_and_taken_back(front, chromium, eventually):
    page, engine = chromium, front.engine
    front.says(LONG)
    page.call("Network.enable")
    page.open(front.url)

    def say(text, num_answers):
        page.type(FIELD, text)
        page.press("Enter")
        page.wait(f"{IDLE} && {ANSWERS}.length === {num_answers}")
        return page.evaluate(ANSWERS)

    assert page.wait("document.querySelector('input[aria-label=Model]')?.value") == "tiny"
    page.type(FIELD, "first")
    page.press("Enter")
    part = page.wait(f"{ANSWERS}[0]")
    assert LONG.startswith(part)
    page.click(".stop-button")
    eventually(lambda: not engine.active)
    page.wait(IDLE)
    (stopped,) = page.evaluate(ANSWERS)
    assert part in stopped and stopped != LONG.strip()
    assert engine.requests[-1].sampling.temperature == 0.25

    front.says(MARKED)
    assert say("second", 2)[1].startswith("6,")
    told = front.told()
    assert "first" in told and stopped in told
    page.wait("document.querySelector('[data-testid=bot] strong')")
    front.says("anew")
    page.click("button[title=Retry]")
    page.wait(f"{IDLE} && {ANSWERS}[1] === 'anew'")
    assert front.told() == told
    page.click("button[title=Undo]")
    page.wait(f"{ANSWERS}.length === 1 && document.querySelector('{FIELD}').value === 'second'")

    asked = {each["params"]["request"]["url"] for each in page.events if each["method"] == "Network.requestWillBeSent"}
    assert {each for each in asked if not each.startswith((front.url, "data:"))} == {"http://example.invalid/x.png"}
    faults = page.faults()  # that one was not sent: the page's policy stood before it
    assert faults and all("http://example.invalid/x.png" in each and "Policy" in each for each in faults)
    assert page.evaluate("window.broken") is None

    front.says(LONG)
    page.type(FIELD, "long")
    page.press("Enter")
    eventually(lambda: engine.active)
    page.open("about:blank")
    eventually(lambda: not engine.active)


@pytest.mark.parity
def test_gradio_s_client_chats_streams_stops_and_is_told(front, eventually):
    import gradio_client

    client, engine = gradio_client.Client(front.url, analytics_enabled=False, verbose=False), front.engine
    front.says(TEXT)

    def ask(said, system="", *sampling, model="tiny"):
        return client.submit(said, model, system, *sampling or ("", "", ""), api_name="/chat")

    job = ask("first", "Be kind.", "0.5", "0.75", "40")
    assert job.result(timeout=20) == TEXT
    assert len(parts := job.outputs()) > 2 and all(b.startswith(a) for a, b in zip(parts, parts[1:]))
    request = engine.requests[-1]
    assert (request.sampling.temperature, request.sampling.top_p, request.max_new_tokens) == (0.5, 0.75, 40)
    assert "Be kind." in front.told()
    ask("second").result(timeout=20)
    assert "Be kind." not in front.told() and re.search(f"first.*{TEXT}.*second", front.told(), re.DOTALL)
    (failed,) = ask("third", "", "", "7", "").result(timeout=20)
    assert failed["metadata"] == {"title": "No answer"} and "says: top_p: " in failed["content"]
    text, cut = ask("fourth", "", "", "", "3").result(timeout=20)
    assert cut["metadata"] == {"title": "Cut"} and TEXT.startswith(text)
    assert "third" in front.told() and "top_p" not in front.told()
    front.engine.script = lambda request: front.tokenizer.encode(TEXT)  # neither the end nor enough
    text, broken = ask("fifth").result(timeout=20)
    assert broken["metadata"] == {"title": "Broken off"} and text and "script ran out" in broken["content"]

    front.says(LONG)
    job = ask("long")
    eventually(lambda: job.outputs() and engine.active)
    job.cancel()
    eventually(lambda: not engine.active)
    assert len(job.outputs()) < len(LONG) / 8

    page = httpx.get(front.url)
    assert "default-src 'self'" in page.headers["content-security-policy"] and KEY not in page.text
    assert httpx.post(f"{front.url}gradio_api/upload", files={"files": ("a.txt", b"text")}).status_code == 413
    ask("long")
    eventually(lambda: engine.active)  # and goes on to the end of the page
