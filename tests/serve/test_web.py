"""The chat page: its files over HTTP, and in a headless browser against a real server whose engine has a script."""

import base64
import json
import os
import re
import struct
from functools import partial
from pathlib import Path

import httpx
import pytest

from internjax.decode.device import Compiled
from serve import __main__ as command
from serve.openai import create_app
from serve.operation.health import Starting
from serve.server import Server, start_server, take_port
from serve.web import FOLDER, page_routes
from tests.serve.page_texts import ATTACKS, LAWFUL, MARKDOWN, SHOW, SLOW

CALL = 'I add.<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 1, "b": 2}}<|action_end|><|im_end|>'
BROKEN_CALL = '<|action_start|><|plugin|>\n{"name": "add", <|action_end|><|im_end|>'
ADD = '[{"name": "add", "description": "Adds.", "parameters": {"type": "object"}}]'
SHOWN = """[...document.querySelectorAll('.turn')].map(
    (turn) => turn.querySelector('.bubble, .said, .output pre').textContent)"""
DONE = "!document.querySelector('[aria-busy]') && document.querySelectorAll('.turn').length"


# ---------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture(scope="module")
def files():
    return {path.name: path.read_text("utf-8") for path in FOLDER.iterdir()}


def test_the_page_and_its_files_are_served_strictly(scripted, files):
    with start_server(scripted("hi"), model_name="tiny", api_key="secret") as server, httpx.Client() as client:
        for name, text in files.items():
            path = "/" if name == "index.html" else f"/page/{name}"
            answer = client.get(server.url + path)  # the page needs no key; what it asks for does
            assert (answer.status_code, answer.text) == (200, text)
            kind = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
            assert answer.headers["content-type"].split(";")[0] == kind[name.split(".")[1]]
            policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["form-action"] == "'self'" and "script-src" not in policy
            assert policy["frame-ancestors"] == policy["object-src"] == policy["base-uri"] == "'none'"
            assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            tag = answer.headers["etag"]
            again = client.get(server.url + path, headers={"If-None-Match": f'"other", W/{tag}'})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
            assert client.get(server.url + path, headers={"If-None-Match": '"other"'}).status_code == 200
            head = client.head(server.url + path)
            assert (head.status_code, head.content, head.headers["content-length"]) == (
                200,
                b"",
                str(len(text.encode())),
            )
        for path in ("/page/", "/page/none.js", "/page/index.html", "/page/..%2Fweb.py", "/page/%2e%2e/web.py"):
            answer = client.get(server.url + path)
            assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error", path
        assert client.post(server.url).status_code == 405
        assert client.get(f"{server.url}/v1/models").status_code == 401
        described = client.get(f"{server.url}/openapi.json", headers={"Authorization": "Bearer secret"}).json()
        assert not [path for path in described["paths"] if "page" in path]


def test_the_page_is_whole_and_asks_nothing_of_others(files):
    texts = "\n".join(files.values())
    assert set(re.findall(r"https?://[\w./]+", texts)) == {"http://www.w3.org/2000/svg"}
    html = files["index.html"]
    assert not re.search(r"<script(?! type=\"module\" src=)|<style|\son\w+=|\sstyle=", html)
    wanted = set(re.findall(r'(?:src|href)="page/([\w.]+)"', html))
    wanted |= {name for text in files.values() for name in re.findall(r'^import .* from "\./([\w.]+)";$', text, re.M)}
    assert wanted == set(files) - {"index.html"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", texts)


def test_the_page_can_be_left_out(scripted):
    assert command.build_parser().parse_args(["model", "--no-web"]).web is False
    with start_server(scripted("hi"), model_name="tiny", web=False) as server:
        for path in ("/", "/page/main.js"):
            assert httpx.get(server.url + path).json()["error"]["message"] == f"there is no {path} here"


# ------------------------------------------------------------------------------------------------------- browser


@pytest.fixture
def visit(chromium, scripted, tokenizer):
    """visit(*texts, ...) -> (page, engine, server): the page open, over a model that says one text after the other.

    In the end the page must have thrown nothing and broken no policy.
    """
    servers = []

    def start(*texts, chunks=(1,), seconds_per_event=0.0, api_key=None):
        left = list(texts)

        def script(request):
            text = left.pop(0) if len(left) > 1 else left[0]
            return [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id] if isinstance(text, str) else text

        pipeline = scripted(script, chunks=chunks, seconds_per_event=seconds_per_event)
        server = start_server(pipeline, model_name="tiny", api_key=api_key, drain_seconds=1)
        servers.append(server)
        chromium.call("Storage.clearDataForOrigin", origin=server.url, storageTypes="all")
        chromium.resize(1200, 800)
        chromium.prefer("light")
        chromium.open(server.url)
        chromium.wait(f"location.origin === '{server.url}' && document.querySelector('#turns')")
        if api_key is None:
            chromium.wait("document.querySelector('#model').value === 'tiny'")
        return chromium, pipeline.engine, server

    yield start
    for server in servers:
        server.close()
    if servers:
        assert chromium.faults() == []


def say(page, text, num_turns):
    """Sends a text; waits until the conversation has so many turns and none is being written."""
    page.type("#input", text)
    page.press("Enter")
    page.wait(f"{DONE} === {num_turns}")
    return page.evaluate(SHOWN)


def told(engine, tokenizer, index=-1):
    """What the model was told, with its markers."""
    return tokenizer.decode(engine.requests[index].tokens, skip_special=False)


def test_answers_stream_and_the_whole_conversation_is_sent(visit, tokenizer):
    page, engine, _ = visit("one two " * 20, "The answer is **6**.", chunks=(2, 5), seconds_per_event=0.01)
    page.type("#input", "first")
    page.press("Enter", shift=True)
    page.call("Input.insertText", text="line two")
    page.press("Enter")
    part = page.wait("document.querySelector('[aria-busy] .said p')?.textContent")
    assert ("one two " * 20).startswith(part)
    assert page.evaluate("document.querySelector('#send').getAttribute('aria-label')") == "Stop the answer"
    page.wait(f"{DONE} === 2")
    assert page.evaluate(SHOWN) == ["first\nline two", ("one two " * 20).strip()]
    assert page.evaluate("document.querySelector('#input').value") == ""
    counters = page.evaluate("document.querySelector('.counters').innerText")
    prompt, said = len(engine.requests[0].tokens), len(tokenizer.encode("one two " * 20)) + 1
    assert f"{prompt} → {said} tokens" in counters and "first after" in counters and "tokens/s" in counters
    assert say(page, "second", 4)[2:] == ["second", "The answer is 6."]
    assert page.evaluate("document.querySelector('.said strong').textContent") == "6"
    conversation = told(engine, tokenizer)
    assert conversation.index("first\nline two") < conversation.index("one two") < conversation.index("second")
    assert page.evaluate("document.querySelector('#status').textContent").startswith("Answer: The answer is")


def test_stopped_answered_again_switched_and_kept(visit, eventually):
    page, engine, server = visit("never ending " * 200, "another", seconds_per_event=0.005)
    page.type("#input", "go on")
    page.press("Enter")
    page.wait("document.querySelector('[aria-busy] .said p')")
    assert len(engine.active) == 1
    page.press("Escape")
    page.wait(f"{DONE} === 2")
    eventually(lambda: not engine.active)
    _, first = page.evaluate(SHOWN)
    assert ("never ending " * 200).startswith(first) and len(first) < 2000
    assert page.evaluate("document.querySelector('.note').textContent") == "Stopped."
    page.click("[aria-label='Answer again']")
    page.wait(f"{DONE} === 2 && document.querySelector('.versions')")
    assert page.evaluate(SHOWN) == ["go on", "another"]
    page.click("[aria-label='Earlier version']")
    page.wait("document.querySelector('.versions').textContent === '1 / 2'")
    assert page.evaluate(SHOWN) == ["go on", first]
    page.reload()  # with the choice, from storage
    page.wait("document.querySelector('.versions')")
    assert page.evaluate(SHOWN) == ["go on", first]
    page.click("[aria-label='Later version']")
    page.wait("document.querySelector('.versions').textContent === '2 / 2'")
    assert page.evaluate(SHOWN) == ["go on", "another"]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") != "Later version"  # which is disabled


def test_a_question_is_edited_beside_what_it_was(visit, tokenizer):
    page, engine, _ = visit("one", "two", "three")
    say(page, "first", 2)
    say(page, "second", 4)
    page.click(".turn.user [aria-label='Edit and send again']")
    page.type(".edit textarea", "changed")
    page.press("Enter")
    page.wait(f"{DONE} === 2")
    assert page.evaluate(SHOWN) == ["changed", "three"]
    assert "changed" in told(engine, tokenizer) and "first" not in told(engine, tokenizer)
    page.click(".turn.user [aria-label='Earlier version']")
    page.wait(f"{DONE} === 4")
    assert page.evaluate(SHOWN) == ["first", "one", "second", "two"]


def test_conversations_are_listed_found_renamed_and_deleted(visit, eventually):
    page, engine, _ = visit("long " * 300, "short", seconds_per_event=0.005)
    page.type("#input", "about trees")
    page.press("Enter")
    page.wait("document.querySelector('[aria-busy] .said p')")
    page.press("o", ctrl=True, shift=True)
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0  # at once: what is typed now is typed there
    assert page.evaluate("document.querySelectorAll('#list .busy').length") == 1  # it goes on in the background
    assert say(page, "about stones", 2) == ["about stones", "short"]
    page.type("#input", "a draft")
    titles = "[...document.querySelectorAll('#list .open > span:last-child')].map((each) => each.textContent)"
    assert page.evaluate(titles) == ["about stones", "about trees"]
    page.click("#list li:nth-child(2) .open")
    page.wait("document.querySelector('.bubble')?.textContent === 'about trees'")
    assert page.evaluate("document.querySelector('#input').value") == "" and len(engine.active) == 1
    page.evaluate("history.back()")
    page.wait("document.querySelector('.bubble')?.textContent === 'about stones'")
    assert page.evaluate("document.querySelector('#input').value") == "a draft"
    page.evaluate("history.forward()")
    page.wait("document.querySelector('.bubble')?.textContent === 'about trees'")
    page.click("#send")  # stops
    page.wait(f"{DONE} === 2")
    eventually(lambda: not engine.active)
    page.click("#list li [aria-label='Rename about trees']")
    page.type("dialog input", "oaks <b>")
    page.press("Enter")
    page.wait("document.querySelector('#title').textContent === 'oaks <b>'")
    page.type("#search", "SHORT")
    page.wait(f"{titles}.join() === 'about stones'")
    page.type("#search", "no such text")
    page.wait(f"{titles}.length === 0")
    page.evaluate("document.querySelector('#search').value = ''")
    page.click("#new")
    page.reload()
    page.wait(f"{titles}.length === 2")
    page.click("#list li:nth-child(2) .open")
    # Another tab says more in it.
    page.evaluate("""(() => {
      const name = Object.keys(localStorage).find((each) => localStorage[each].includes("oaks"));
      const kept = JSON.parse(localStorage[name]);
      const more = {...kept.messages[0], id: "more", parent: kept.messages.at(-1).id, content: "from afar"};
      localStorage[name] = JSON.stringify({...kept, messages: [...kept.messages, more]});
      dispatchEvent(new StorageEvent("storage", {key: name}));
    })()""")
    page.wait("document.querySelector('.turn:last-child .bubble').textContent === 'from afar'")
    page.click("#list [aria-label='Delete oaks <b>']")
    page.click("dialog .plain")  # not yet
    page.click("#list [aria-label='Delete oaks <b>']")
    page.click("dialog .danger")
    page.wait(f"{titles}.join() === 'about stones'")
    assert page.evaluate("Object.keys(localStorage).filter((name) => name.includes('chat')).length") == 1


def test_settings_and_tool_calls(visit, tokenizer):
    page, engine, _ = visit(CALL, "It is 3.", BROKEN_CALL, "plain")
    page.click("#open-settings button")
    fields = {"temperature": "0.5", "top_k": "7", "seed": "11", "presence_penalty": "-1", "system": "Be brief."}
    for name, value in (fields | {"tools": ADD, "stop": "stop here\nor here"}).items():
        page.type(f"[name={name}]", value)
    for name, value in (("top_p", "1.5"), ("max_tokens", "0.5"), ("repetition_penalty", "0")):
        page.type(f"[name={name}]", value)
        page.wait(f"document.querySelector('[name={name}]').getAttribute('aria-invalid') === 'true'")
    assert page.evaluate("document.querySelector('.count').dataset.count") == "7"
    assert say(page, "add", 2) == ["add", "I add."]
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.top_p) == (0.5, 7, 11, 1.0)
    assert (
        sampling.presence_penalty == -1
        and "Be brief." in told(engine, tokenizer)
        and "Adds." in told(engine, tokenizer)
    )
    call = "document.querySelector('.call')"
    assert page.evaluate(f"{call}.querySelector('.name').innerText").split() == ["Calls", "add"]
    assert json.loads(page.evaluate(f"{call}.querySelector('pre').textContent")) == {"a": 1, "b": 2}
    page.type(".tool-output textarea", '{"sum": 3}')
    page.press("Enter")
    page.wait(f"{DONE} === 4")
    assert page.evaluate(SHOWN)[2:] == ['{"sum": 3}', "It is 3."]
    assert not page.evaluate("document.querySelector('.tool-output')")
    assert '<|im_start|>environment name=<|plugin|>\n{"sum": 3}<|im_end|>' in told(engine, tokenizer)
    say(page, "again", 6)
    assert "not JSON" in page.evaluate("document.querySelector('.call .fault').textContent")
    page.reload()
    page.wait(f"{DONE} === 6")
    page.press("o", ctrl=True, shift=True)  # another conversation has its own settings
    say(page, "plain?", 2)
    assert engine.requests[-1].sampling.temperature == 1 and "Be brief." not in told(engine, tokenizer)


def test_adapters_are_models_and_one_that_is_gone_is_replaced(visit):
    page, engine, _ = visit("hi")
    engine.adapters = ("terse",)
    page.reload()
    page.wait("document.querySelector('#model').length === 2")
    page.evaluate("(({model}) => { model.value = 'terse'; model.dispatchEvent(new Event('change')); })(window)")
    say(page, "short", 2)
    assert engine.requests[-1].adapter == "terse" and "terse" in page.evaluate(
        "document.querySelector('.counters').innerText"
    )
    engine.adapters = ()
    say(page, "and now?", 4)
    assert "'terse' is not served here; 'tiny' is" in page.evaluate("document.querySelector('.failure').innerText")
    page.wait("document.querySelector('#model').value === 'tiny'")
    page.click(".failure button")
    page.wait(f"{DONE} === 4 && !document.querySelector('.failure')")
    assert engine.requests[-1].adapter is None and all("404" in fault for fault in page.faults())


def test_a_key_is_asked_for_and_kept_for_the_tab(visit):
    page, _, _ = visit("welcome", api_key="secret")
    page.type("dialog input", "wrong")
    page.press("Enter")
    page.wait("document.querySelector('dialog input')?.value === ''")  # asked again
    page.type("dialog input", "secret")
    page.press("Enter")
    page.wait("document.querySelector('#model').value === 'tiny'")
    assert say(page, "hi", 2) == ["hi", "welcome"]
    page.reload()
    page.wait("document.querySelector('#model').value === 'tiny'")
    assert say(page, "hi", 4)[-1] == "welcome"
    assert not page.evaluate("JSON.stringify({...localStorage}).includes('secret')")
    page.evaluate("sessionStorage.clear()")
    page.reload()
    page.click("dialog .plain")
    page.type("#input", "no key")
    page.press("Enter")
    page.click("dialog .plain")
    page.click(".failure button")
    page.type("dialog input", "secret")
    page.press("Enter")
    page.wait(f"{DONE} === 6 && !document.querySelector('.failure')")
    assert all("401" in fault for fault in page.faults())


def fulfil(page, status, body, headers=None):
    """Answers the next request in the server's place."""
    asked = page.event("Fetch.requestPaused")["requestId"]
    given = [{"name": name, "value": value} for name, value in (headers or {}).items()]
    said = base64.b64encode(body.encode()).decode()
    page.call("Fetch.fulfillRequest", requestId=asked, responseCode=status, responseHeaders=given, body=said)


def test_what_fails_is_told_and_what_came_stays(visit, tokenizer):
    half = tokenizer.encode("half an answer")
    page, engine, server = visit(half, "whole", "never sent")
    (_, shown) = say(page, "hi", 2)
    assert shown and "half an answer".startswith(shown)
    failure = page.evaluate("document.querySelector('.failure').innerText")
    assert failure.startswith("The answer broke off: the engine failed: the script ran out. What had")
    page.click(".failure button")
    page.wait(f"{DONE} === 2 && !document.querySelector('.failure')")
    assert page.evaluate(SHOWN) == ["hi", "whole"]
    say(page, "much too long " * 400, 4)
    assert "context" in (text := page.evaluate("document.querySelector('.failure').innerText")) and "new chat" in text
    page.call("Fetch.enable", patterns=[{"urlPattern": "*/v1/chat/completions"}])
    page.type("#input", "hi")
    page.press("Enter")
    last = ".turn:last-child .failure button"
    chunk = 'data: {"choices": [{"delta": {"content": "cut o"}}]}\r\n\r\ndata: {"choi'  # by a proxy, say
    fulfil(page, 200, chunk)
    page.click(last)
    assert page.evaluate("document.querySelector('.turn:last-child .said').textContent") == ""
    fulfil(page, 429, "", {"Retry-After": "1"})
    page.call("Fetch.disable")
    page.click(".turn:last-child [aria-label='Earlier version']")
    page.wait("document.querySelector('.turn:last-child .said').textContent === 'cut o'")
    assert "The connection broke off before" in page.evaluate("document.querySelector('.turn:last-child').innerText")
    page.click(".turn:last-child [aria-label='Later version']")
    page.wait(f"document.querySelector('{last}')?.disabled")
    assert page.evaluate(f"document.querySelector('{last}').textContent") == "Try again in 1 s"
    server.close()
    page.click(last)  # waits until it may be pressed
    page.wait(
        f"document.querySelector('.turn:last-child .failure')?.innerText.includes('does not answer') && {DONE} === 6"
    )
    faults = page.faults()
    assert all(re.search("400|429|CONNECTION", fault) for fault in faults) and len(faults) == 3, faults


def test_storage_that_is_full_or_broken_is_told(visit):
    page, _, _ = visit("kept in memory")
    page.evaluate("localStorage.setItem('internjax.chat.torn', '{\"version\": 1, \"id\"')")
    page.reload()
    assert "cannot be read" in page.wait("document.querySelector('#notices p')?.textContent")
    fill = "for (let size = 1 << 22; size; size >>= 1) try { localStorage['fill' + size] = 'x'.repeat(size) } catch {}"
    page.evaluate(fill)
    assert say(page, "hi", 2) == ["hi", "kept in memory"]
    assert "storage is full" in page.wait("document.querySelector('[data-name=storage] p')?.textContent")
    page.evaluate("window.made = []; URL.createObjectURL = (blob) => { made.push(blob); return 'blob:x' }")
    page.evaluate("HTMLAnchorElement.prototype.click = function () { made.push(this.download) }")
    page.click("[data-name=storage] .plain")
    text, name = page.evaluate("made[0].text().then((text) => [text, made[1]])")
    exported = json.loads(text)
    assert name.endswith(".json") and list(exported["unreadable"].values()) == ['{"version": 1, "id"']
    assert [each["content"] for each in exported["conversations"][0]["messages"]] == ["hi", "kept in memory"]
    page.evaluate("Object.keys(localStorage).forEach((each) => /^fill/.test(each) && delete localStorage[each])")
    load = """((text) => {
      const files = new DataTransfer();
      files.items.add(new File([text], "chats.json"));
      document.querySelector("#file").files = files.files;
      document.querySelector("#file").dispatchEvent(new Event("change"));
    })"""
    changed = json.loads(text)
    changed["conversations"][0] |= {"title": "imported"}
    wrong = changed | {"conversations": [exported["conversations"][0] | {"messages": [{}]}]}
    for given, said in (
        (text, "0 conversations were imported"),
        ("{", "not JSON"),
        ('{"a": 1}', "not one that this page exported"),
        (json.dumps(wrong), "message 0 has no role"),
        (json.dumps(changed), "One conversation was imported"),
    ):
        page.evaluate(f"{load}({json.dumps(given)})")
        page.wait(f"document.querySelector('[data-name=import] p')?.textContent.includes({json.dumps(said)})")
    page.reload()
    page.wait("document.querySelectorAll('#list li').length === 1")  # the first one was never kept
    assert page.evaluate("document.querySelector('#list .open').textContent") == "imported"
    assert page.evaluate("localStorage.getItem('internjax.chat.torn')") == '{"version": 1, "id"'


WIDE = """\
A word: {word}, `{word}` and https://example.com/{word}

| a | b | c | d | e | f |
|---|---|---|---|---|---|
| {row} | 2 | 3 | 4 | 5 | 6 |

```python
print("{word}")
```
""".format(word="long" * 30, row="wide cell " * 6)
OVERFLOWING = """[...document.querySelectorAll('body *')].filter((each) => {
  const box = each.getBoundingClientRect();
  const scrolls = each.closest('#drawer') ?? each.parentElement.closest('pre, .scroll, svg');
  return !scrolls && box.width > 1 && (box.right > innerWidth + 1 || box.left < -1);
}).map((each) => each.outerHTML.slice(0, 80))"""


def test_a_narrow_screen_scrolls_down_only(visit):
    page, _, _ = visit(WIDE, CALL)
    say(page, "a" * 300, 2)
    page.click("#open-settings button")
    page.type("[name=tools]", ADD)
    page.click("#close-settings button")
    say(page, "call", 4)
    page.resize(360, 740)
    assert page.wait(f"document.querySelector('#drawer').inert && [{OVERFLOWING}]") == [[]]
    assert page.evaluate("document.querySelector('#scroll').scrollWidth <= 360")
    assert page.evaluate("document.querySelector('.code pre').scrollWidth > 360")
    page.click("#open-drawer button")
    page.wait(
        "!document.querySelector('#drawer').inert && document.querySelector('#drawer').getBoundingClientRect().x === 0"
    )
    assert page.evaluate("document.activeElement.id") == "new"
    page.press("Escape")
    page.wait("document.querySelector('#drawer').inert")
    page.click("#open-settings button")
    assert page.wait(f"[{OVERFLOWING}]") == [[]]


FOCUSED = "document.activeElement.closest('[id]').id"
INERT = "['main', '#skip', '#drawer', '#settings'].filter((each) => document.querySelector(each).inert)"


def test_what_is_closed_gives_the_focus_back_and_what_is_covered_is_out_of_reach(visit):
    page, _, _ = visit("hi")
    page.click("#open-settings button")
    page.type("[name=seed]", "1")
    page.press("Escape")
    assert page.evaluate(FOCUSED) == "open-settings" and page.evaluate("document.querySelector('#settings').hidden")
    page.click("#open-settings button")
    page.click("#close-settings button")
    assert page.evaluate(FOCUSED) == "open-settings"
    page.type("#input", "typed")
    page.press("o", ctrl=True, shift=True)  # what is not closed takes no focus
    assert page.evaluate(FOCUSED) == "input" and page.evaluate(INERT) == []
    page.resize(360, 740)
    page.wait(f"{INERT}.join() === '#drawer'")
    for place, own, other, beside in (
        ("open-drawer", "new", "#settings", 355),
        ("open-settings", "close-settings", "#drawer", 5),
    ):
        expanded = f"document.querySelector('#{place} button').getAttribute('aria-expanded')"
        for leave in (partial(page.press, "Escape"), partial(page.click_at, beside, 700)):
            page.click(f"#{place} button")
            page.wait(f"{FOCUSED} === '{own}'")
            assert page.evaluate(INERT) == ["main", "#skip", other] and page.evaluate(expanded) == "true"
            leave()
            page.wait(f"{FOCUSED} === '{place}'")
            assert page.evaluate(INERT) == ["#drawer"] and page.evaluate(expanded) == "false"
    page.click("#open-drawer button")
    page.click("#new")  # a new chat closes it too
    assert page.wait(f"{FOCUSED} === 'open-drawer'")


def test_escape_closes_what_is_used_before_it_stops_an_answer(visit, eventually):
    page, engine, _ = visit("never ending " * 200, seconds_per_event=0.005)
    page.type("#input", "go on")
    page.press("Enter")
    page.wait("document.querySelector('[aria-busy] .said p')")
    page.click("#open-settings button")
    page.type("[name=seed]", "1")
    page.press("Escape")
    assert page.evaluate("document.querySelector('#settings').hidden") and len(engine.active) == 1
    page.click("#open-settings button")
    page.evaluate("document.querySelector('#input').focus()")
    page.press("Escape")  # settings beside the conversation stay
    page.wait(f"{DONE} === 2")
    eventually(lambda: not engine.active)
    assert not page.evaluate("document.querySelector('#settings').hidden")
    page.press("Escape")
    assert page.evaluate("document.querySelector('#settings').hidden")


def test_the_page_is_there_while_the_model_is_loaded(chromium, scripted):
    starting = Starting("tiny", page=page_routes())
    with Server(starting, take_port("127.0.0.1", 0), model_name="tiny", drain_seconds=1) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == httpx.post(server.url).status_code == 503
        assert httpx.get(f"{server.url}/page/none.js").json()["error"]["code"] == "unavailable"
        assert httpx.get(f"{server.url}/health").json()["status"] == "loading"
        chromium.resize(1200, 800)
        chromium.open(server.url)
        told = "document.querySelector('[data-name=models] p')?.textContent"
        chromium.wait(f"{told} === 'The server is starting: loading. This page goes on by itself.'")
        starting.compiled(Compiled("draw", 1.0, 3, 9))
        chromium.wait(f"{told}?.includes('compiling 4 of 9')")
        server.use(create_app(scripted("here"), model_name="tiny"))
        chromium.wait("document.querySelector('#model').value === 'tiny' && !document.querySelector('.notice')")
        assert say(chromium, "hi", 2) == ["hi", "here"]
        assert all("503" in fault for fault in chromium.faults())


CONTRASTS = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number).concat(1).slice(0, 4);
  const over = ([r, g, b, a], below) => [r, g, b].map((each, i) => each * a + below[i] * (1 - a));
  const ancestors = (element) => element ? [...ancestors(element.parentElement), element] : [];
  const light = (rgb) => rgb.map((each) => each / 255)
    .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const look = (element, text, pseudo) => {
    const style = getComputedStyle(element, pseudo);
    const below = ancestors(element).map((each) => getComputedStyle(each));
    let ground = [255, 255, 255];
    for (const each of below) ground = over(parse(each.backgroundColor), ground);
    if (pseudo === "::after") ground = over(parse(style.backgroundColor), ground);
    const seen = [...below, ...(pseudo ? [style] : [])].reduce((share, each) => share * Number(each.opacity), 1);
    const [r, g, b, a] = parse(style.color);
    const [one, other] = [light(over([r, g, b, a * seen], ground)), light(ground)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([text.trim().slice(0, 40), element.tagName + "." + element.className, Math.round(100 * ratio) / 100]);
  };
  for (const element of document.querySelectorAll("body, body *")) {
    const box = element.getBoundingClientRect();
    const isShown = element.checkVisibility({visibilityProperty: true}) && box.width > 1;
    if (!isShown || element.closest(":disabled")) continue;
    const own = [...element.childNodes].filter((each) => each.nodeType === 3 && each.data.trim());
    if (own.length) look(element, own[0].data);
    if (element.value && element.matches("input, textarea, select")) look(element, element.value);
    else if (element.placeholder) look(element, element.placeholder, "::placeholder");
    if (/^"/.test(getComputedStyle(element, "::after").content)) look(element, "after", "::after");
  }
  return found.filter(([text]) => text);
})()"""
SEEN = """# A *heading*

Text with `code`, a [link](https://example.com) and

> what somebody said.

| a | b |
|---|---|
| 1 | 2 |

```python
def gcd(a, b):  # a comment
    return "text" if a else 12
```
"""


def test_text_is_seen_on_its_ground_in_both_themes(visit, tokenizer, tmp_path):
    """WCAG's contrast, level AA. Pictures of what is looked at go to the folder that PAGE_PICTURES names."""
    half = tokenizer.encode("half an answer")
    page, _, _ = visit(SEEN, CALL, half)
    folder = Path(os.environ.get("PAGE_PICTURES", tmp_path))
    page.click("#open-settings button")
    page.type("[name=tools]", ADD)
    page.type("[name=top_p]", "7")
    say(page, "hi", 2)
    say(page, "add", 4)
    say(page, "and fail", 6)
    page.click(".row button:last-child")  # a notice
    states = {
        "turns": lambda: page.evaluate("document.querySelector('.code').scrollIntoView()"),
        "end": lambda: page.evaluate("document.querySelector('#scroll').scrollTop = 1e6"),
        "dialog": lambda: page.click("#list [aria-label^='Delete']"),
        "new": lambda: (page.press("Escape"), page.wait("!document.querySelector('dialog')"), page.click("#new")),
    }
    looked_at = set()
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        for name, show in states.items():
            show()
            found = page.evaluate(CONTRASTS)
            assert [each for each in found if each[2] < 4.5] == [], (scheme, name)
            looked_at |= {where for _, where, _ in found}
            page.screenshot(folder / f"{scheme}-{name}.png")
            assert (folder / f"{scheme}-{name}.png").read_bytes()[:24].endswith(struct.pack(">2I", 1200, 800))
        page.evaluate("history.back()")
        page.wait("document.querySelectorAll('.turn').length === 6")
    wanted = {"H2.", "CODE.", "A.", "TD.", "SPAN.comment", "SPAN.string", "SPAN.number", "SPAN.word", "P.fault"}
    assert wanted <= looked_at, looked_at


def test_colours_follow_the_system_until_one_is_chosen(visit):
    page, _, _ = visit("hi")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.prefer("dark")
    dark = page.evaluate(colour)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)))
    page.click("#theme")
    assert page.evaluate(colour) == light
    page.reload()
    assert page.wait(colour) == light
    page.prefer("light")
    page.click("#theme")
    assert page.evaluate(colour) == dark
    assert page.evaluate("document.activeElement.id") == "theme"


def test_everything_has_a_name_and_its_turn(visit):
    page, _, _ = visit(CALL)
    page.click("#open-settings button")
    page.type("[name=tools]", ADD)
    say(page, "hi", 2)
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    widgets = ("button", "textbox", "searchbox", "spinbutton", "combobox", "link")
    named = [
        (node["role"]["value"], node["name"]["value"]) for node in tree if node.get("role", {}).get("value") in widgets
    ]
    assert len(named) > 20 and all(name for _, name in named), named
    roles = {node.get("role", {}).get("value") for node in tree}
    assert {"navigation", "main", "complementary", "log", "status", "heading"} <= roles
    page.evaluate("document.querySelector('#skip').focus()")
    seen = []
    for _ in range(5):
        page.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert seen == ["new", "search", "open", "quiet", "quiet"]


# ------------------------------------------------------------------------------------------------------ markdown


def test_markdown(visit):
    page, _, server = visit("hi")
    shown = page.evaluate(f"{SHOW}({json.dumps(list(MARKDOWN))})")
    for text, html in zip(MARKDOWN, shown, strict=True):
        assert html == MARKDOWN[text].replace("ORIGIN", server.url), text
    # Growing character by character it comes to the same, and blocks that are complete stay the elements they are.
    grown = """(async (text) => {
      const { showMarkdown } = await import("/page/markdown.js");
      const [once, grown] = [0, 0].map(() => document.createElement("div"));
      showMarkdown(once, text);
      let first = null;
      for (let end = 0; end <= text.length; end += 1) {
        showMarkdown(grown, text.slice(0, end));
        if (end > 40) first ??= grown.firstChild;
      }
      return [once.innerHTML === grown.innerHTML, first === grown.firstChild];
    })"""
    text = "\n\n".join(["The first paragraph, which is complete.", *MARKDOWN])
    assert page.evaluate(f"{grown}({json.dumps(text)})") == [True, True]


def test_no_markup_of_a_text_becomes_an_element(visit):
    page, _, _ = visit("\n\n".join(ATTACKS))
    for (faults, shown), text in zip(page.evaluate(f"({LAWFUL})({json.dumps(ATTACKS)})"), ATTACKS, strict=True):
        assert faults == [], text
        if text.startswith("<"):
            assert shown.strip() == text
    say(page, ATTACKS[0] + ATTACKS[1], 2)  # and as it comes from the model, and in the list
    # The one lawful image is not there, which the browser complains of when it comes to it.
    page.evaluate("document.querySelector('.said img').scrollIntoView()")
    page.wait("document.querySelector('.said img').complete")
    assert page.evaluate("document.querySelector('.said').textContent.includes('<script>window.pwned')")
    assert page.evaluate("typeof window.pwned") == "undefined"
    # The browser itself refuses what a mistake in the page would have let through.
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        page.evaluate("document.querySelector('#title').innerHTML = '<b>x</b>'")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'https://127.0.0.1:9/x.png'}))"
    )
    page.wait("document.querySelector('body > img')")
    assert page.evaluate("fetch('https://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    faults = page.faults()
    assert faults and all(re.search("Security Policy|TrustedHTML|404", fault) for fault in faults), faults


def test_texts_made_to_be_slow_are_shown(visit):
    page, _, _ = visit("hi")
    shown = page.evaluate(f"{SHOW}({json.dumps(SLOW)})")
    assert len(shown) == len(SLOW) and all(shown)
