"""/metrics: the server's figures in Prometheus' text format. Labels hold names that the server gave, never a client's.

What the engines count is read when it is asked for (`Engine.stats`, `Engine.timings`); only requests are counted
here. An answer is one of a request's `n`; series of the engines have the label `replica`. Programs that no engine runs
are told beside theirs: replica="embeddings", replica="scores".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client import generate_latest as text_of
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from internjax.decode.engine import Stats
from internjax.decode.timing import REQUEST_SECONDS, Spread
from serve.operation.guards import Doors
from serve.operation.request_log import Facts
from serve.pipeline import Pipeline

PREFIX = "internjax_"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
GAUGES: dict[str, tuple[str, Callable[[Stats], int]]] = {
    "slots": ("Answers that are drawn at once, at most.", lambda s: s.num_slots),
    "answers_running": ("Answers in a slot: their prompt is read, or they are drawn.", lambda s: s.num_active),
    "answers_waiting": ("Answers that wait for a slot.", lambda s: s.num_waiting),
    "pages": ("Pages of the cache.", lambda s: s.num_pages),
    "pages_free": ("Pages that no answer uses.", lambda s: s.num_free_pages),
    "pages_used": ("Pages that answers use.", lambda s: s.num_pages - s.num_free_pages),
    "pages_cached": ("Free pages that hold what a later prompt may begin with.", lambda s: s.num_cached_pages),
    "host_pages_used": ("Pages whose contents wait in the host's memory.", lambda s: s.num_saved_pages),
    "programs_compiled": ("Compiled programs.", lambda s: s.num_compiled),
}
COUNTERS: dict[str, tuple[str, Callable[[Stats], int]]] = {
    "prompt_tokens": ("Tokens of prompts.", lambda s: s.num_prompt_tokens),
    "prefix_hit_tokens": ("Tokens of prompts that were in the cache.", lambda s: s.num_shared_tokens),
    "generated_tokens": ("Tokens drawn.", lambda s: s.num_drawn_tokens),
    "turns": ("Turns of the model for them, counted for every answer.", lambda s: s.num_turns),
    "preemptions": ("Answers that gave up their pages and waited.", lambda s: s.num_preempted),
    "recompiled_programs": (
        "Programs compiled after warm-up. Of engines: should stay 0; embeddings and scores compile one for each width "
        "of rows, at its first use.",
        lambda s: s.num_compiled_late,
    ),
}
_OF_PROGRAMS = ("programs_compiled", "recompiled_programs")
FINISHES: dict[str, Callable[[Stats], int]] = {
    "stop": lambda s: s.num_stopped,
    "length": lambda s: s.num_cut,
    "aborted": lambda s: s.num_aborted,
    "error": lambda s: s.num_failed,
}
HISTOGRAMS = {
    "in_queue": ("queue_seconds", "From an answer's arrival until it has a slot."),
    "first_token": ("time_to_first_token_seconds", "From an answer's arrival until its first token."),
    "each_token": ("time_per_output_token_seconds", "Between tokens; those that come together share their time."),
    "whole": ("answer_seconds", "From arrival to the last token of answers that were not aborted."),
}


class Metrics:
    """The figures of one server."""

    def __init__(self, pipeline: Pipeline | None, doors: Doors, *, model_name: str):
        """pipeline: None for a server without engines."""
        self._pipeline, self._model_name = pipeline, model_name
        self._gauges: dict[str, tuple[str, Callable[[], int]]] = {}
        self._programs: dict[str, Callable[[], int]] = {}
        # Of its own: several servers in one process do not share figures.
        self._registry = CollectorRegistry()
        names = ["method", "route", "status"]
        of_http = {"namespace": "internjax", "subsystem": "http", "registry": self._registry}
        self._requests = Counter("requests", "HTTP requests that were answered.", names, **of_http)
        self._seconds = Histogram(
            "request_duration_seconds", "Until the response is complete.", ["route"], buckets=REQUEST_SECONDS, **of_http
        )
        of_grpc = of_http | {"subsystem": "grpc"}
        self._calls = Counter("requests", "gRPC requests, those in streams each.", ["method", "code"], **of_grpc)
        self._call_seconds = Histogram(
            "request_duration_seconds", "Until the answer is complete.", ["method"], buckets=REQUEST_SECONDS, **of_grpc
        )
        self.add_gauge("requests_running", "Requests that are worked on, HTTP and gRPC.", lambda: doors.num_running)
        self.add_gauge("requests_waiting", "Requests that wait for a place, likewise.", lambda: doors.num_waiting)
        if pipeline is not None:
            self.add_gauge("adapters", "Adapters that are loaded.", lambda: len(pipeline.adapters))
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def called(self, facts: Facts) -> None:
        """Counts a request of gRPC that is over. Its route is one of the methods that the server knows."""
        self._calls.labels(facts.route, str(facts.status or "none")).inc()
        self._call_seconds.labels(facts.route).observe(facts.seconds)

    def requested(self, facts: Facts) -> None:
        """Counts a request of HTTP that is over."""
        method = facts.method if facts.method in _METHODS else "other"
        self._requests.labels(method, facts.route, str(facts.status or "none")).inc()
        self._seconds.labels(facts.route).observe(facts.seconds)

    def add_gauge(self, name: str, help: str, value: Callable[[], int]) -> None:
        """Adds a figure of a part of the server that counts for itself."""
        self._gauges[name] = (help, value)

    def add_programs(self, name: str, count: Callable[[], int]) -> None:
        """Adds programs that no engine runs, and that are compiled when they are first needed."""
        self._programs[name] = count

    def text(self) -> bytes:
        """All series as they are now."""
        return text_of(self._registry)

    def describe(self) -> list:
        """Nothing: the registry asks only to find names that are taken."""
        return []

    def collect(self) -> Iterator[Any]:
        """The families, as the registry asks for them."""
        for name, (help, value) in self._gauges.items():
            yield GaugeMetricFamily(PREFIX + name, help, value=value())
        info = GaugeMetricFamily(PREFIX + "info", "The model that is served.", labels=["model"])
        info.add_metric([self._model_name], 1)
        yield info
        yield from self._of_engines()

    def _of_engines(self) -> Iterator[Any]:
        engines = {str(index): engine for index, engine in enumerate(self._pipeline.engines if self._pipeline else ())}
        stats = {replica: engine.stats() for replica, engine in engines.items()}
        for families, kind in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            for name, (help, value) in families.items():
                family = kind(PREFIX + name, help, labels=["replica"])
                for replica, found in stats.items():
                    family.add_metric([replica], value(found))
                for part, count in self._programs.items() if name in _OF_PROGRAMS else ():
                    family.add_metric([part], count())
                yield family
        answers = CounterMetricFamily(PREFIX + "answers", "Answers that ended, by how.", labels=["replica", "finish"])
        host = GaugeMetricFamily(PREFIX + "host_pages", "Pages that the host's memory may keep.", labels=["replica"])
        faults = GaugeMetricFamily(PREFIX + "engine_fault", "1: takes no more requests.", labels=["replica"])
        silent = GaugeMetricFamily(
            PREFIX + "engine_silent_seconds", "Without a sign of life while there is work.", labels=["replica"]
        )
        for replica, engine in engines.items():
            for finish, value in FINISHES.items():
                answers.add_metric([replica, finish], value(stats[replica]))
            host.add_metric([replica], engine.num_host_pages)
            faults.add_metric([replica], engine.fault is not None)
            silent.add_metric([replica], engine.silent_seconds())
        yield from (answers, host, faults, silent)
        timings = {replica: engine.timings() for replica, engine in engines.items()}
        for field, (name, help) in HISTOGRAMS.items():
            family = HistogramMetricFamily(PREFIX + name, help, labels=["replica"])
            for replica, found in timings.items():
                spread = getattr(found, field)
                family.add_metric([replica], _buckets(spread), spread.total)
            yield family


def _buckets(spread: Spread) -> list[tuple[str, float]]:
    """Counts up to each bound, as Prometheus has them."""
    total, buckets = 0, []
    for bound, count in zip((*map(str, spread.bounds), "+Inf"), spread.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


def add_metrics_route(app: FastAPI, metrics: Metrics) -> None:
    """Adds /metrics."""

    @app.get("/metrics", include_in_schema=False)
    def read() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def count_requests(scope: Mapping[str, Any], facts: Facts) -> None:
    """Counts a request in the metrics of the application that answered it, if one did."""
    if "app" in scope and (metrics := getattr(scope["app"].state, "metrics", None)) is not None:
        metrics.requested(facts)
