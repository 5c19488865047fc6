"""The table of fields: as committed, complete against the server's own description, never written with a hole."""

import dataclasses
import typing

import pytest

from internjax.rlhf.reward import from_lm
from serve.openai import create_app, create_score_app
from serve.pipeline import Pipeline
from serve.rest import conformance, replies, requests, response_requests
from serve.rest.conformance import PAGE, ROUTES, page, rows
from serve.rest.requests import Fields
from serve.rest.scores import Scorer
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
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m serve.rest.conformance"


def test_every_route_and_field_that_the_server_describes_is_in_the_table(described):
    assert {*ROUTES} == {*described}
    for route, parts in ROUTES.items():
        told = {row.field for row in rows(parts[0])}
        assert told == {*described[route]["properties"]}, route
        assert described[route]["additionalProperties"] is False


def objects_in(annotation) -> set[type[Fields]]:
    """The classes of all objects that a value of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Fields):
        fields = annotation.model_fields.values()
        return {annotation}.union(*(objects_in(field.annotation) for field in fields))
    return set().union(*map(objects_in, typing.get_args(annotation)))


def test_every_object_within_a_request_is_in_the_table():
    told = {part.fields for parts in ROUTES.values() for part in parts}
    wanted = set().union(*(objects_in(parts[0].fields) for parts in ROUTES.values()))
    items = {fields for fields, _ in response_requests.KINDS.values()}  # the input of a response is checked apart
    wanted |= items.union(*map(objects_in, items)) - {replies.TokenLogprob, replies.TopLogprob}
    assert {requests.CalledTool, requests.FunctionCall, response_requests.InputText} <= wanted
    assert wanted <= told, {each.__name__ for each in wanted - told}


def test_the_command_writes_the_page_and_helps(tmp_path, capsys):
    before = PAGE.stat()
    with pytest.raises(SystemExit) as ended:
        conformance.main(["--help"])
    assert ended.value.code == 0 and "--output FILE" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        conformance.main(["--no-such-flag"])
    assert conformance.main(["--output", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page() and PAGE.stat() == before


class Holed(Fields):
    kept: str
    forgotten: int = 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fields": Holed, "honoured": {"kept": "yes"}}, "neither honoured nor refused: forgotten"),
        ({"fields": Holed, "honoured": {"kept": "", "forgotten": "", "gone": ""}}, "no field of the request: gone"),
        ({"idle": {"kept": ""}}, "both honoured and without effect: kept"),
        ({"documented": ("chat.ChatCompletionFunctionToolParam",)}, "documented by OpenAI and not known: function"),
    ],
)
def test_a_hole_is_told(changes, said):
    part = conformance.Part("", Holed, {"kept": "", "forgotten": ""})
    assert len(list(rows(part))) == 2
    told = rows(part._replace(honoured={"kept": ""}, idle={"forgotten": "a whole number"}))
    assert [*told][1] == ("forgotten", "without effect, beyond OpenAI", "a whole number")
    with pytest.raises(ValueError, match=said):
        list(rows(part._replace(**changes)))
