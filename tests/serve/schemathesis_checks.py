"""Loaded by schemathesis (test_description.py): what it is to look for beside its own checks."""

import schemathesis

OF_ONE_FIELD = {"invalid_value", "unknown_parameter", "unsupported_value"}


@schemathesis.check
def what_is_described_is_taken(ctx, response, case) -> None:
    """No field of a body that the description allows is refused for itself.

    In place of `positive_data_acceptance`, because a description cannot say how fields depend on each other, or how
    many tokens a text has: such a request is refused with another code.
    """
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    error = response.json()["error"]
    assert error["code"] not in OF_ONE_FIELD, error


@schemathesis.hook
def before_call(ctx, case, kwargs) -> None:
    """To JSON Schema 16.0 is an integer, here it is none: whole numbers are sent as such."""
    case.body = _whole(case.body)


def _whole(value):
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    return [_whole(each) for each in value] if isinstance(value, list) else value


@schemathesis.check
def errors_have_one_form(ctx, response, case) -> None:
    """Also those of what the description does not list: unknown methods, heads that are too long."""
    if response.status_code >= 400 and response.content:
        (error,) = response.json().values()
        assert set(error) == {"message", "type", "param", "code"} and error["message"], error
