"""Loops that are compiled into others have no way in from Python: nothing there may call them."""

import importlib
import pkgutil
import types

import pytest
from numba.core.registry import CPUDispatcher

import data_pipelines
from data_pipelines import blocks, ngram_scan


def names_in(code):
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def functions_of(module):
    """The functions and methods of a module that Python runs; those of numba are none of them."""
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    members = [member for value in own if isinstance(value, type) for member in vars(value).values()]
    for value in [*own, *members]:
        if isinstance(value, CPUDispatcher):
            continue
        value = getattr(getattr(value, "__func__", value), "fget", None) or getattr(value, "__func__", value)
        value = getattr(value, "__wrapped__", value)
        if isinstance(value, types.FunctionType):
            yield value


def calls_without_a_way_in(module):
    for function in functions_of(module):
        names = set(names_in(function.__code__))
        scopes = [function.__globals__, *(vars(v) for v in map(function.__globals__.get, names) if is_module(v))]
        for scope in scopes:
            for name in names & scope.keys():
                if isinstance(scope[name], CPUDispatcher) and scope[name].targetoptions.get("no_cpython_wrapper"):
                    yield function.__qualname__, name


def is_module(value):
    return isinstance(value, types.ModuleType) and value.__name__.startswith("data_pipelines.")


@pytest.mark.parametrize("name", [info.name for info in pkgutil.iter_modules(data_pipelines.__path__)])
def test_python_calls_no_loop_that_has_no_way_in(name):
    assert not [*calls_without_a_way_in(importlib.import_module(f"data_pipelines.{name}"))]


def test_such_a_call_is_found(monkeypatch):
    monkeypatch.setattr(ngram_scan, "_enter_all", blocks.inlined(ngram_scan._enter_all.py_func))
    assert [*calls_without_a_way_in(ngram_scan)] == [("table", "_enter_all")]
