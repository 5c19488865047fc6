"""Conversations turn by turn, and the offline call: one, many, streamed, awaited."""

import asyncio
import dataclasses
import threading

import pytest

from internjax.text.message import Message
from serve.answering import streams
from serve.answering.session import Session
from serve.pipeline import ContextTooLong, Delta, Params, Pipeline, Result

FIRST, SECOND, THIRD = (Message("user", text) for text in ("hello", "and now?", "say it again"))
GREEDY = Params(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    with Pipeline(tiny_model, num_slots=2, max_context=256) as pipeline:
        yield pipeline


def test_a_turn_reads_only_what_is_new_and_answers_as_if_all_was_read(pipeline):
    with pipeline.session([Message("system", "Be brief.")], max_length=200) as session:
        first = session.chat(FIRST, GREEDY).result()
        assert session.messages == (Message("system", "Be brief."), FIRST, first.message)
        before = pipeline.engine.stats()
        second = session.chat(SECOND, GREEDY).result()
        after = pipeline.engine.stats()
        assert session.notice is None
        # The last token of a turn is fed by the step that draws the next one, so it is read with the new turn.
        unread = after.num_prompt_tokens - before.num_prompt_tokens - second.num_cached_tokens
        assert second.num_cached_tokens >= first.num_prompt_tokens + len(first.ids) - 1
        assert unread < second.num_prompt_tokens - first.num_prompt_tokens
        held = session._held.tokens
        assert held[: first.num_prompt_tokens + len(first.ids)][-len(first.ids) :] == first.ids
        prompt = held[: second.num_prompt_tokens]
        assert pipeline.complete(prompt, GREEDY).result().ids == second.ids
        other = session.fork()
        assert other.chat(THIRD, GREEDY).result().ids == session.chat(THIRD, GREEDY).result().ids
        assert other.messages == session.messages


def test_an_answer_that_is_left_leaves_no_trace_and_one_cut_by_a_stop_string_its_text(pipeline):
    session = pipeline.session()
    whole = session.chat(FIRST, GREEDY).result()
    next(iter(session.chat(SECOND, GREEDY)))
    assert session.messages == (FIRST, whole.message)
    again = session.chat(SECOND, GREEDY).result()
    assert session.messages == (FIRST, whole.message, SECOND, again.message)
    cut = pipeline.session()
    stop = whole.text[2:5]
    short = cut.chat(FIRST, Params(max_tokens=12, temperature=0.0, stop=(stop,))).result()
    assert short.text == whole.text[: whole.text.index(stop)]
    assert cut.chat(SECOND, GREEDY).result().ids == pipeline([*cut.messages[:2], SECOND], GREEDY).ids


def test_an_answer_that_was_aborted_need_not_be_read(pipeline):
    session = pipeline.session()
    session.chat(FIRST, Params(max_tokens=200)).abort()
    assert session.messages == ()
    again = session.chat(FIRST, GREEDY).result()
    assert again.ids == pipeline([FIRST], GREEDY).ids and session.messages == (FIRST, again.message)


def test_a_stop_token_is_no_part_of_the_conversation_that_goes_on(pipeline):
    """As `render` has it: the text of the answer, and the end of its turn."""
    stop = pipeline([FIRST], GREEDY).ids[4]
    session = pipeline.session()
    cut = session.chat(FIRST, dataclasses.replace(GREEDY, stop_token_ids=(stop,))).result()
    assert cut.ids[-1] == stop and cut.finish == "stop"
    second = session.chat(SECOND, GREEDY).result()
    held, behind = session._held.tokens, cut.num_prompt_tokens + len(cut.ids) - 1
    assert second.num_prompt_tokens > behind and held[behind - 1] == cut.ids[-2]
    assert held[behind] in pipeline.stop_ids and stop not in pipeline.stop_ids


def test_limits_of_a_session(pipeline):
    session = pipeline.session(max_length=40)
    with pytest.raises(ContextTooLong, match="the session holds 40 tokens"):
        session.chat(FIRST, Params(max_tokens=39))
    answer = session.chat(FIRST, GREEDY)
    with pytest.raises(RuntimeError, match="not read to its end"):
        session.chat(SECOND)
    answer.result()
    with pytest.raises(ContextTooLong):
        session.chat(Message("user", "long " * 20), GREEDY)
    assert session.lengthen(200) is False and session.max_length == 200
    assert session.chat(SECOND, GREEDY).result().num_cached_tokens > 0


def test_a_template_that_rewrites_history_is_read_anew_and_said(pipeline, monkeypatch):
    session: Session = pipeline.session()
    session.chat(FIRST, GREEDY).result()
    render = session.chat.__globals__["protocol"].render

    def rewriting(ids, earlier, more, tokenizer, **how):
        messages = [*earlier, *more]
        last = len(messages) - 1
        thoughtless = [
            m if m.role == "user" or i == last else Message("assistant", "-") for i, m in enumerate(messages)
        ]
        return render(thoughtless, tokenizer, **how).ids

    monkeypatch.setattr("serve.answering.session.protocol.render_on", rewriting)
    result = session.chat(SECOND, GREEDY).result()
    assert "wrote earlier turns anew" in session.notice
    assert result.ids == pipeline([FIRST, Message("assistant", "-"), SECOND], GREEDY).ids


def test_one_prompt_has_a_result_and_many_a_list(pipeline):
    prompts = ["def gcd(", [5, 6, 7], [FIRST], "The", [SECOND]]
    alone = [pipeline(prompt, GREEDY) for prompt in prompts]
    assert all(isinstance(result, Result) for result in alone) and pipeline([], GREEDY) == []
    assert [result.text for result in pipeline(prompts, GREEDY)] == [result.text for result in alone]
    assert alone[2].ids == pipeline.chat([FIRST], GREEDY).result().ids
    *deltas, last = pipeline.stream([FIRST], GREEDY)
    assert "".join(delta.text for delta in deltas) == last.text == alone[2].text
    with pytest.raises(ValueError, match="tools are told in a conversation"):
        pipeline("x", GREEDY, tools=[{"name": "f"}])
    with pytest.raises(ValueError, match="does not exist"):
        pipeline(["good", [99999]], GREEDY)


def test_the_same_in_an_event_loop(pipeline, eventually):
    async def ask():
        many, one = await asyncio.gather(pipeline.acall(["def gcd(", [FIRST]], GREEDY), pipeline.acall("The", GREEDY))
        events = [event async for event in pipeline.astream([FIRST], GREEDY)]
        async for event in pipeline.astream("x", Params(max_tokens=200)):
            if isinstance(event, Delta):
                break
        return many, one, events

    many, one, events = asyncio.run(ask())
    assert [result.text for result in [*many, one]] == [
        result.text for result in pipeline(["def gcd(", [FIRST], "The"], GREEDY)
    ]
    assert events[-1].text == many[1].text
    eventually(lambda: pipeline.engine.stats().num_active == 0)


def test_what_is_submitted_when_nobody_waits_any_more_is_aborted(pipeline, eventually, monkeypatch):
    """Cancelled while a thread submits: the answer comes after that, and does not run on."""
    begun, go_on = threading.Event(), threading.Event()
    stream, answers = pipeline.stream, []

    def slowly(*arguments, **how):
        begun.set()
        go_on.wait(10)
        answers.append(stream(*arguments, **how))
        return answers[-1]

    monkeypatch.setattr(pipeline, "stream", slowly)

    async def leave():
        asking = asyncio.ensure_future(pipeline.acall("The", Params(max_tokens=200)))
        await asyncio.to_thread(begun.wait, 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        go_on.set()

    asyncio.run(leave())
    eventually(lambda: len(answers) == 1 and answers[0].aborted)


def test_many_prompts_are_awaited_with_few_readers(pipeline, monkeypatch):
    readers = []

    class Reader(threading.Thread):
        def start(self):
            readers.append(self)
            super().start()

    monkeypatch.setattr(streams.threading, "Thread", Reader)
    results = asyncio.run(pipeline.acall(["The"] * 40, Params(max_tokens=2, temperature=0.0)))
    assert len({result.ids for result in results}) == 1 and len(results) == 40
    assert sum(reader.name.startswith("reader-") for reader in readers) == 2 * pipeline.engine.num_slots


class Held:
    """An answer that is over when it is let go on."""

    def __init__(self):
        self.go_on, self.is_read = threading.Event(), threading.Event()

    def __iter__(self):
        self.is_read.set()
        self.go_on.wait(10)
        yield Result("", None, "stop", None, 0, (), ())

    def abort(self):
        self.go_on.set()


def test_readers_that_others_give_back_are_taken_by_who_has_few(monkeypatch):
    monkeypatch.setattr(streams, "_more", more := threading.BoundedSemaphore(1))
    first, second, third, fourth = answers = [Held() for _ in range(4)]

    async def read():
        events = streams.events_of(answers)
        first.go_on.set()
        more.acquire()  # somebody else has it
        assert (await anext(events))[0] == 0
        assert await asyncio.to_thread(second.is_read.wait, 10) and not third.is_read.is_set()
        more.release()
        second.go_on.set()
        assert (await anext(events))[0] == 1
        for answer in (third, fourth):
            assert await asyncio.to_thread(answer.is_read.wait, 10), "one reader had both"
        await events.aclose()

    asyncio.run(read())
    assert more.acquire(timeout=10), "a reader that ended was not given back"


def test_a_system_that_gives_no_more_threads_has_all_answers_read_by_the_first(monkeypatch):
    class Reader(threading.Thread):
        def start(self):
            if self.name != "reader-0":
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(streams.threading, "Thread", Reader)
    monkeypatch.setattr(streams, "_more", more := threading.BoundedSemaphore(1))
    answers = [Held() for _ in range(3)]

    async def read() -> list[int]:
        for answer in answers:
            answer.go_on.set()
        return [index async for index, _ in streams.events_of(answers)]

    assert asyncio.run(read()) == [0, 1, 2] and more.acquire(blocking=False)
