"""/openapi.json against what the server does: over every example, and fuzzed by schemathesis (`make parity`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from internjax.decode.request import check_options
from serve.openai import create_app
from serve.pipeline import Pipeline
from serve.rest.description import EXAMPLES, REPLIES
from serve.server import start_server
from tests.serve.conftest import ScriptedEngine

CHECKS = Path(__file__).with_name("schemathesis_checks.py")


class CheckingEngine(ScriptedEngine):
    """Refuses what the real engine refuses before it begins: as many likely tokens as an integer can say."""

    def submit(self, request, *, session=None):
        check_options(request, self.limits, vocab_size=self.config.vocab_size)
        return super().submit(request, session=session)


@pytest.fixture(scope="module")
def server(tokenizer, tiny_model, tmp_path_factory):
    """Of an engine that says one sentence, and a model for vectors; adapters may be loaded from an empty folder."""
    said = [*tokenizer.encode("The answer is 6."), tokenizer.eos_id]
    pipeline = Pipeline.over(CheckingEngine(lambda request: said, chunks=(4,)), tokenizer, model=tiny_model)
    folder = tmp_path_factory.mktemp("adapters")
    with start_server(pipeline, model_name="tiny", drain_seconds=1, adapter_root=folder) as server:
        yield server


@pytest.fixture(scope="module")
def description(server):
    return httpx.get(f"{server.url}/openapi.json").json()


def reply_schema(description, path: str, method: str, kind: str = "application/json", status: str = "200") -> dict:
    content = description["paths"][path][method]["responses"][status]["content"]
    return content[kind]["schema"] | {"components": description["components"]}


def test_every_route_is_described_and_no_reply_that_is_not_sent(description):
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            assert operation["operationId"] == REPLIES[method, path][0]
            assert "422" not in operation["responses"]
            assert ("requestBody" in operation) <= {"400", "413", "429", "503"}.issubset(operation["responses"])
    names = [operation["operationId"] for methods in description["paths"].values() for operation in methods.values()]
    assert len(names) == len({*names})
    links = [
        link
        for methods in description["paths"].values()
        for operation in methods.values()
        for link in operation["responses"]["200"].get("links", {}).values()
    ]
    assert links and {link["operationId"] for link in links} <= {*names}


def test_a_field_that_is_refused_is_described_by_the_values_that_ask_for_nothing(description):
    fields = description["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["store"]["enum"] == [False, None] and "nothing is stored" in fields["store"]["description"]
    assert fields["web_search_options"]["enum"] == [None]
    assert fields["model"] == {"enum": ["tiny"]}
    assert fields["seed"]["anyOf"][0]["exclusiveMaximum"] == 2**63  # not 9.223372036854776e+18


@pytest.fixture(scope="module")
def jsonschema():
    import jsonschema  # takes three seconds, which every worker would spend on collecting this file

    return jsonschema


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path != "/v1/score"])
def test_examples_are_taken_and_answered_as_described(server, description, path, jsonschema):
    body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    examples = description["components"]["schemas"][body.rpartition("/")[2]]["examples"]
    assert [{"model": "tiny"} | example for example in EXAMPLES[path]] == examples
    for example in examples:
        response = httpx.post(server.url + path, json=example)
        assert response.status_code == 200, response.text
        kind = response.headers["content-type"].partition(";")[0]
        schema = reply_schema(description, path, "post", kind)
        if kind == "application/json":
            jsonschema.validate(response.json(), schema)
            continue
        assert example["stream"]
        events = [line[len("data: ") :] for line in response.text.splitlines() if line.startswith("data: ")]
        held = schema["properties"]["data"]["else"]["contentSchema"] | {"components": description["components"]}
        for event in events:
            if event != "[DONE]":
                jsonschema.validate(json.loads(event), held)
                assert "error" not in json.loads(event)
        assert len(events) > 3


def test_what_is_not_as_described_would_be_seen(server, description, jsonschema):
    """The schemas of replies are closed: a field too many or too few is told."""
    schema = reply_schema(description, "/v1/completions", "post")
    sent = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x"}).json()
    for wrong in (sent | {"more": 1}, {name: sent[name] for name in sent if name != "usage"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_a_server_with_a_key_says_so(tokenizer):
    app = create_app(Pipeline.over(ScriptedEngine(None), tokenizer), model_name="tiny", api_key="secret")
    found = app.openapi()
    assert found["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert found["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "401" in found["paths"]["/v1/models"]["get"]["responses"]
    assert "security" not in found["paths"]["/health"]["get"]


def test_models_that_come_and_go_are_described(tokenizer):
    engine = ScriptedEngine(None)
    app = create_app(Pipeline.over(engine, tokenizer), model_name="tiny")
    first = app.openapi()
    assert app.openapi() is first
    engine.adapters = ("terse",)
    fields = app.openapi()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["model"] == {"enum": ["tiny", "terse"]}


@pytest.mark.parity
def test_schemathesis_finds_nothing(server, tmp_path):
    """All phases, data that the description allows and data that it does not, and all checks but one.

    positive_data_acceptance: see `schemathesis_checks`, which has another in its place.
    """
    pytest.importorskip("schemathesis")
    examples = os.environ.get("SCHEMATHESIS_EXAMPLES", "5")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--mode", "all",
        "--phases", "examples,coverage,fuzzing,stateful", "--checks", "all",
        "--exclude-checks", "positive_data_acceptance", "--max-examples", examples, "--seed", "7",
        "--continue-on-failure", "--generation-database", "none", "--no-color", "--output-sanitize", "false",
    ]  # fmt: skip
    environment = os.environ | {"SCHEMATHESIS_HOOKS": str(CHECKS), "NO_PROXY": "*"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert "Coverage" in done.stdout and "Stateful" in done.stdout
