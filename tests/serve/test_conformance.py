"""The table of fields: as committed, complete against the server's own description, never written with a hole."""

import dataclasses

import pytest

from internjax.rlhf.reward import from_lm
from serve import conformance
from serve.conformance import PAGE, ROUTES, page, rows
from serve.openai import create_app, create_score_app
from serve.pipeline import Pipeline
from serve.requests import Fields
from serve.scores import Scorer
from tests.serve.conftest import ScriptedEngine


@pytest.fixture(scope="module")
def described(tokenizer, tiny_model, tmp_path_factory):
    """Route -> names of the fields of its body, by the OpenAPI descriptions of both kinds of server."""
    params, config = from_lm(tiny_model.params, tiny_model.config)
    scorer = Scorer(dataclasses.replace(tiny_model, params=params, config=config))
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for app in (
        create_app(Pipeline.over(ScriptedEngine(None), tokenizer), model_name="tiny", adapter_root=folder),
        create_score_app(scorer, model_name="tiny"),
    ):
        description = app.openapi()
        for route, methods in description["paths"].items():
            if body := methods.get("post", {}).get("requestBody"):
                name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                found[route] = description["components"]["schemas"][name]
    return found


def test_the_page_is_what_the_classes_and_tables_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m serve.conformance"


def test_every_route_and_field_that_the_server_describes_is_in_the_table(described):
    assert {*ROUTES} == {*described}
    for route, parts in ROUTES.items():
        told = {row.field for row in rows(parts[0])}
        assert told == {*described[route]["properties"]}, route
        assert described[route]["additionalProperties"] is False


class Holed(Fields):
    kept: str
    forgotten: int = 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fields": Holed, "honoured": {"kept": "yes"}}, "neither honoured nor refused: forgotten"),
        ({"fields": Holed, "honoured": {"kept": "", "forgotten": "", "gone": ""}}, "no field of the request: gone"),
        ({"documented": ("chat.ChatCompletionFunctionToolParam",)}, "documented by OpenAI and not known: function"),
    ],
)
def test_a_hole_is_told(changes, said):
    part = conformance.Part("", Holed, {"kept": "", "forgotten": ""})
    assert len(list(rows(part))) == 2
    with pytest.raises(ValueError, match=said):
        list(rows(part._replace(**changes)))
