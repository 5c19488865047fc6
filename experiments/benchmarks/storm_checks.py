"""What `experiments.benchmarks.storm` demands of a server: of every answer, and of its figures before and after."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.storm_client import Heard
from experiments.benchmarks.storm_traffic import Case, Step

MEMORY_GROWTH = 0.02
NEW_THREADS = 10
"""That pools of threads may still have begun after the first part: they grow when they are needed, up to their size."""
_SERIES = re.compile(r"^internjax_([a-z_]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Fault(NamedTuple):
    """An answer that should not be."""

    number: int
    kind: str
    step: int
    what: str


class Check(NamedTuple):
    """A demand. passed None: it could not be judged, `detail` says why."""

    name: str
    passed: bool | None
    detail: str


class Figures(NamedTuple):
    """A server at a moment when nothing is asked of it. None: not known."""

    series: Mapping[str, float]
    """Of /metrics, sums over their labels; those that count by status, code or finish also as `name:label`."""
    rss_bytes: int | None = None
    threads: int | None = None
    files: int | None = None


class Tally(NamedTuple):
    """What the clients saw."""

    statuses: Counter[str]
    """Of answers that the server counts under this status."""
    perhaps: Counter[str]
    """Of those that may have been refused before they were counted."""
    unknown: Counter[str]
    """Ends without a status, by end."""
    sent: Counter[str]
    """Cases, by kind and sort; where clients left."""
    tokens: Counter[str]
    """`generated`, as complete answers tell."""
    faults: list[Fault]


def new_tally() -> Tally:
    return Tally(Counter(), Counter(), Counter(), Counter(), Counter(), [])


# --- an answer --------------------------------------------------------------------------------------------------------


def fault_of(step: Step, heard: Heard) -> str | None:
    """What is wrong with what came of a step, or None."""
    status = heard.status
    if heard.end == "hung":
        return f"hung: {heard.why}, status {status}, {len(heard.body)} bytes"
    if status is not None and status >= 500 and status != 503:
        return f"status {status}: {heard.body[:300]!r}"
    if heard.end == "left":
        return None
    if heard.end == "broken":
        return None if step.wants == "closed" else f"the connection broke: {heard.why}, status {status}"
    assert status is not None
    if status in (429, 503):
        if not heard.headers.get("retry-after", "").isdigit():
            return f"status {status} without Retry-After: {heard.body[:300]!r}"
        return _no_envelope(step, heard)
    if 400 <= status < 500:
        if step.wants == "closed":
            return None
        if step.wants == "answer":
            return f"refused with {status}: {heard.body[:300]!r}"
        return _no_envelope(step, heard)
    if status != 200:
        return f"status {status}"
    if step.wants in ("refusal", "closed"):
        return f"taken, and should be refused: {step.asked.method} {step.asked.path} {step.asked.body[:200]!r}"
    return _wrong_in_answer(step, heard)


def _no_envelope(step: Step, heard: Heard) -> str | None:
    found, wrong = heard.json(), f"status {heard.status} without an error's envelope: {heard.body[:300]!r}"
    if not isinstance(found, dict) or set(found) != {"error"}:
        return wrong
    error = found["error"]
    if isinstance(error, str):  # KServe's
        return None if step.asked.path.startswith("/v2") and error else wrong
    is_whole = isinstance(error, dict) and set(error) >= {"message", "type", "param", "code"}
    return None if is_whole and isinstance(error["message"], str) and error["message"] else wrong


def _wrong_in_answer(step: Step, heard: Heard) -> str | None:
    if heard.headers.get("content-type", "").startswith("text/event-stream"):
        return _wrong_in_stream(step, heard)
    if step.asked.path in ("/metrics",):
        return None
    found = heard.json()
    if found is None:
        return f"the answer is no JSON: {heard.body[:300]!r}"
    if step.is_stream:
        return "a stream was asked for, and none came"
    if step.num_choices is None:
        return None
    texts = [
        (choice["index"], choice["text"] if "text" in choice else choice["message"].get("content") or "")
        for choice in found["choices"]
    ]
    finishes = {choice["index"]: [choice["finish_reason"]] for choice in found["choices"]}
    return _wrong_in_choices(step, dict(texts), finishes)


def _wrong_in_stream(step: Step, heard: Heard) -> str | None:
    events = heard.events()
    try:
        values = [json.loads(event) for event in events if event != "[DONE]"]
    except ValueError:
        return f"an event of the stream is no JSON: {heard.body[-300:]!r}"
    if wrong := next((value for value in values if value.get("error") or value.get("type") == "error"), None):
        return f"the stream ends with an error: {json.dumps(wrong)[:300]}"
    if step.asked.path == "/v1/responses":
        last = values[-1].get("type") if values else None
        return None if last in ("response.completed", "response.incomplete") else f"the stream's last event is {last}"
    if events[-1:] != ["[DONE]"]:
        return f"the stream does not end with [DONE]: {heard.body[-300:]!r}"
    texts: Counter[int] = Counter()
    spoken: dict[int, str] = {}
    finishes: dict[int, list[str]] = {}
    for value in values:
        for choice in value["choices"]:
            index, piece = choice["index"], choice["text"] if "text" in choice else choice["delta"].get("content")
            spoken[index] = spoken.get(index, "") + (piece or "")
            texts[index] += 1
            if choice["finish_reason"] is not None:
                finishes.setdefault(index, []).append(choice["finish_reason"])
    return _wrong_in_choices(step, spoken, finishes) if step.num_choices is not None else None


def _wrong_in_choices(step: Step, texts: Mapping[int, str], finishes: Mapping[int, list[str]]) -> str | None:
    if sorted(texts) != list(range(step.num_choices or 0)):
        return f"{step.num_choices} answers were asked for, and those of the indices {sorted(texts)} came"
    for index, text in texts.items():
        ends = finishes.get(index, [])
        if len(ends) != 1 or ends[0] not in ("stop", "length", "tool_calls"):
            return f"answer {index} ends with {ends}"
        if step.follows is not None and ends == ["stop"]:
            try:
                follows = step.follows(text)
            except (ValueError, KeyError, TypeError):
                follows = False
            if not follows:
                return f"the answer does not follow its guide: {text!r:.200}"
    return None


def told(tally: Tally, case: Case, index: int, step: Step, heard: Heard) -> None:
    """Counts what came of a step, and keeps its fault."""
    if heard.status is None:
        tally.unknown[heard.end] += 1
    else:
        (tally.perhaps if step.wants == "closed" else tally.statuses)[str(heard.status)] += 1
    if step.asked.leaves is not None:
        tally.sent[f"left: {step.asked.leaves}"] += 1
    if heard.end == "complete" and heard.status == 200:
        tally.tokens["generated"] += _generated(heard)
    if (what := fault_of(step, heard)) is not None:
        tally.faults.append(Fault(case.number, f"{case.kind}, {case.sort}", index, what))


def _generated(heard: Heard) -> int:
    """Tokens drawn for an answer, as far as it tells."""
    values = [heard.json()]
    if heard.headers.get("content-type", "").startswith("text/event-stream"):
        values = [json.loads(event) for event in heard.events()[-2:] if event.startswith("{")]
    usages = [value["usage"] for value in values if isinstance(value, dict) and isinstance(value.get("usage"), dict)]
    return sum(usage.get("completion_tokens", 0) for usage in usages)


# --- a server before and after ----------------------------------------------------------------------------------------


def series_of(text: str) -> dict[str, float]:
    """The series of /metrics: see Figures."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if (match := _SERIES.match(line)) is not None:
            name, labels, value = match.groups()
            found[name] += float(value)
            for label, given in _LABEL.findall(labels or ""):
                if label in ("status", "finish", "code"):
                    found[f"{name}:{given}"] += float(value)
    return dict(found)


def process_figures(pid: int) -> dict[str, int]:
    """Memory, threads and open files of a process of this machine."""
    words = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"rss_bytes": int(words["VmRSS"].split()[0]) * 1024, "threads": int(words["Threads"]), "files": files}


def checks(
    tally: Tally,
    start: Figures,
    mark: Figures | None,
    end: Figures,
    *,
    tokens: tuple[Any, Any],
    sessions_left: int | None,
    log: str | None,
) -> list[Check]:
    """All demands. start: after warm-up. mark: after the first part of the storm; None: it was a short one.

    tokens: those of greedy answers before and after. log: what the server wrote.
    """
    found = [
        _answers("no undeclared 5xx", tally.faults, ("status 5",)),
        _answers("no hangs", tally.faults, ("hung", "no server")),
        _answers("errors have their envelope", tally.faults, ("status 4", "without an error's")),
        _answers("answers are as asked for", tally.faults, ()),
        _equal("pages and slots are back", start, end, ("pages_free", "pages_used")),
        _zero("nothing runs or waits", end),
        _equal("nothing was compiled", start, end, ("programs_compiled", "recompiled_programs_total")),
        _counts(tally, start, end),
        Check("greedy tokens are the same", tokens[0] == tokens[1], f"{tokens[0]!r:.200}"),
    ]
    if not tokens[0] or not all(tokens[0]):
        found[-1] = found[-1]._replace(passed=False, detail="there were no tokens to compare")
    if sessions_left is None:
        found.append(Check("sessions are gone", None, "the server has none"))
    else:
        found.append(Check("sessions are gone", sessions_left == 0, f"{sessions_left} left"))
    found += _of_process(mark or start, end, is_long=mark is not None)
    if log is None:
        found.append(Check("no traceback in the log", None, "the server's log is not at hand"))
    else:
        count, at = log.count("Traceback (most recent"), log.find("Traceback (most recent")
        found.append(
            Check("no traceback in the log", count == 0, f"{count}" + (f": {log[at:][:3000]}" if count else ""))
        )
    return found


def _answers(name: str, faults: Iterable[Fault], beginnings: tuple[str, ...]) -> Check:
    """Faults of one sort; without beginnings those that are of none of the others."""
    of_others = ("status 5", "hung", "no server", "status 4")
    is_ours = [
        fault
        for fault in faults
        if (fault.what.startswith(beginnings) if beginnings else not fault.what.startswith(of_others))
    ]
    first = "; ".join(f"{fault.number} ({fault.kind}, step {fault.step}) {fault.what}" for fault in is_ours[:2])
    return Check(name, not is_ours, f"{len(is_ours)} faults" + (f": {first}" if is_ours else ""))


def _equal(name: str, start: Figures, end: Figures, series: Iterable[str]) -> Check:
    known = [key for key in series if key in start.series and key in end.series]
    if not known:
        return Check(name, None, "the server has no /metrics that tell")
    told = ", ".join(f"{key} {start.series[key]:g} -> {end.series[key]:g}" for key in known)
    return Check(name, all(start.series[key] == end.series[key] for key in known), told)


IDLE = ("answers_running", "answers_waiting", "requests_running", "requests_waiting")


def _zero(name: str, end: Figures) -> Check:
    known = [key for key in IDLE if key in end.series]
    if not known:
        return Check(name, None, "the server has no /metrics that tell")
    return Check(
        name, not any(end.series[key] for key in known), ", ".join(f"{key} {end.series[key]:g}" for key in known)
    )


def _counts(tally: Tally, start: Figures, end: Figures) -> Check:
    """Every answer that a client saw is counted, none is counted that no client can have caused."""
    name, wrong = "/metrics tell what was sent", []
    prefix = "http_requests_total:"
    counted: Counter[str] = Counter()
    for key, value in end.series.items():
        if key.startswith(prefix):
            counted[key.removeprefix(prefix)] = int(value - start.series.get(key, 0))
    if not counted:
        return Check(name, None, "the server does not count by status")
    unknown = sum(tally.unknown.values())
    for status in sorted(counted.keys() | tally.statuses.keys()):
        least, most = tally.statuses[status], tally.statuses[status] + tally.perhaps[status] + unknown
        if not least <= counted[status] <= most:
            wrong.append(f"status {status} is counted {counted[status]} times, and was seen {least} to {most} times")
    answered = end.series.get("grpc_requests_total:OK", 0) - start.series.get("grpc_requests_total:OK", 0)
    least = tally.sent["grpc: ok"]
    if not least <= answered <= least + tally.sent["grpc: cancelled"] + tally.sent["grpc: hung"]:
        wrong.append(f"{answered:g} calls of gRPC are counted as answered, and {least} were seen")
    drawn = end.series.get("generated_tokens_total", 0) - start.series.get("generated_tokens_total", 0)
    if drawn < tally.tokens["generated"]:
        wrong.append(f"{drawn:g} tokens are counted, and answers tell of {tally.tokens['generated']}")
    failed = end.series.get("answers_total:error", 0) - start.series.get("answers_total:error", 0)
    if failed:
        wrong.append(f"{failed:g} answers are counted as failed")
    aborted = end.series.get("answers_total:aborted", 0) - start.series.get("answers_total:aborted", 0)
    seen = f"{dict(counted)}, {drawn:g} tokens, {aborted:g} answers aborted"
    return Check(name, not wrong, "; ".join(wrong) or seen)


def _of_process(before: Figures, end: Figures, *, is_long: bool) -> list[Check]:
    names = ("memory stays", "threads end", "files are closed")
    if before.rss_bytes is None or end.rss_bytes is None:
        return [Check(name, None, "the server is no process of this machine") for name in names]
    assert before.threads is not None and end.threads is not None
    assert before.files is not None and end.files is not None
    growth = end.rss_bytes / before.rss_bytes - 1
    grown = f"{before.rss_bytes / 2**20:.1f} -> {end.rss_bytes / 2**20:.1f} MiB, {growth:+.2%}"
    if not is_long:
        whys = "{}, not judged: the storm was a short one"
        return [
            Check(names[0], None, whys.format(grown)),
            Check(names[1], None, whys.format(f"{before.threads} -> {end.threads}")),
            Check(names[2], end.files <= before.files, f"{before.files} -> {end.files}"),
        ]
    return [
        Check(names[0], growth < MEMORY_GROWTH, grown),
        Check(names[1], end.threads <= before.threads + NEW_THREADS, f"{before.threads} -> {end.threads}"),
        Check(names[2], end.files <= before.files, f"{before.files} -> {end.files}"),
    ]
