"""Text around the engine: stop strings and ids, incremental text, tokens with log-probabilities, calls, limits."""

import dataclasses

import pytest

from internjax.text.chat import CallEnd, render
from internjax.text.message import INTERPRETER_PROMPT, Message, ToolCall
from serve.answering.session import Answering, Session
from serve.pipeline import ContextTooLong, Delta, Params, Pipeline, Prompt, Result, chat_callable, with_sampling

TEXT = "The answer is 6, héllo 你好."
CALL = (
    "Let me see.<|action_start|><|interpreter|>\n```python\nimport math\nmath.gcd(12, 18)\n```<|action_end|><|im_end|>"
)
USER = [Message("user", "hi")]
PYTHON = {"name": "interpreter", "description": "", "parameters": {}}


@pytest.mark.parametrize("chunks", [(1,), (2,), (3, 1), (100,)])
def test_deltas_join_to_the_text(scripted, tokenizer, chunks):
    pipeline = scripted(TEXT, chunks=chunks)
    *deltas, result = pipeline.complete("say it", Params(logprobs=0))
    said = tokenizer.encode(TEXT)
    assert "".join(delta.text for delta in deltas) == result.text == TEXT
    assert (result.finish, result.call, result.stop) == ("stop", None, None)
    assert result.ids == (*said, tokenizer.eos_id)
    assert result.num_prompt_tokens == 1 + len(tokenizer.encode("say it"))  # with BOS
    assert tuple(token for delta in deltas for token in delta.tokens) == result.tokens
    assert [token.id for token in result.tokens] == said
    assert "".join(token.text for token in result.tokens) == TEXT
    assert all(TEXT[token.offset :].startswith(token.text) for token in result.tokens)
    assert [token.logprob for token in result.tokens] == [-token_id / 1000 for token_id in said]


def test_what_is_drawn_together_comes_in_one_delta(scripted):
    *deltas, _ = scripted(TEXT, chunks=(100,)).complete("x")
    assert [delta.text for delta in deltas] == [TEXT]
    said, *_, called, result = scripted(CALL, chunks=(100,)).chat(USER, tools=[PYTHON])
    assert said.text == "Let me see." and called.call == result.call and result.finish == "tool_calls"


def test_tokens_come_only_when_asked_for(scripted):
    assert scripted(TEXT).complete("x").result().tokens == ()


@pytest.mark.parametrize("stop", [TEXT[i:j] for i in range(0, len(TEXT), 3) for j in (i + 1, i + 7, len(TEXT))])
@pytest.mark.parametrize("chunks", [(1,), (4,)])
def test_stop_strings_across_token_borders(scripted, tokenizer, stop, chunks):
    pipeline = scripted(TEXT, chunks=chunks)
    *deltas, result = pipeline.complete("x", Params(stop=(stop,), logprobs=0))
    cut = TEXT.index(stop)
    assert "".join(delta.text for delta in deltas) == result.text == TEXT[:cut]
    assert (result.finish, result.stop) == ("stop", stop)
    # The tokens up to the one that completes the stop string were needed, and no more are counted.
    needed = next(n for n in range(1, 999) if stop in tokenizer.decode(result.ids[:n]))
    assert len(result.ids) == needed
    assert "".join(token.text for token in result.tokens) == result.text
    assert not pipeline.engine.active


def test_max_tokens_ends_the_answer(scripted):
    result = scripted(TEXT).complete("x", Params(max_tokens=3)).result()
    assert (result.finish, len(result.ids)) == ("length", 3)
    assert TEXT.startswith(result.text)


def test_max_tokens_defaults_to_the_room_that_is_left(scripted):
    pipeline = scripted(TEXT)
    pipeline.complete([1, 2, 3])
    assert pipeline.engine.requests[-1].max_new_tokens == pipeline.max_context - 3


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(968, 57), (1024, None), (1100, 1)])
def test_what_does_not_fit_is_refused_with_the_numbers(scripted, num_prompt, max_tokens):
    pipeline = scripted(TEXT)
    with pytest.raises(ContextTooLong, match=f"holds 1024 tokens; the prompt has {num_prompt}"):
        pipeline.complete([5] * num_prompt, Params(max_tokens=max_tokens))
    assert pipeline.engine.requests == []
    pipeline.complete([5] * 968, Params(max_tokens=56))  # exactly full


@pytest.mark.parametrize(("ids", "reason"), [([], "no tokens"), ([-1], "-1 does not exist"), ([340], "ids are 0..339")])
def test_wrong_token_ids_are_refused(scripted, ids, reason):
    with pytest.raises(ValueError, match=reason):
        scripted(TEXT).complete(ids)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("min_tokens", -1),
        ("typical_p", 0),
        ("presence_penalty", 3),
        ("logit_bias", {5: 101}),
        ("logit_bias", {"five": 1}),
        ("bad_words", ("",)),
        ("logprobs", True),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("stop", "text"),
        ("stop", ("",)),
    ],
)
def test_params_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Params(**{field: value})


def test_sampling_options_reach_the_engine(scripted):
    pipeline = scripted(TEXT)
    same = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.2}
    same |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 11}
    pipeline.complete("x", Params(**same, logit_bias={5: 1.5, "6": -2}, min_tokens=3, stop_token_ids=(9, 2)))
    request = pipeline.engine.requests[-1]
    assert {name: getattr(request.sampling, name) for name in same} == same
    assert (request.sampling.logit_bias, request.sampling.min_new_tokens) == (((5, 1.5), (6, -2)), 3)
    assert request.stop_ids == (*pipeline.stop_ids, 9) and 2 in pipeline.stop_ids
    pipeline.complete("x", Params(ignore_eos=True, stop_token_ids=(9,)))
    assert pipeline.engine.requests[-1].stop_ids == (9,)
    seeds = set()
    for _ in range(3):
        pipeline.complete("x")
        seeds.add(pipeline.engine.requests[-1].sampling.seed)
    assert len(seeds) == 3  # without a seed every answer is drawn anew


def test_an_engine_failure_is_raised_not_taken_for_an_end(scripted):
    with pytest.raises(RuntimeError, match="the script ran out"):
        scripted(lambda request: [70, 71]).complete("x", Params(max_tokens=50)).result()


def test_abort_ends_the_answer_where_it_stands(scripted):
    pipeline = scripted(TEXT, seconds_per_event=0.01)
    answer = pipeline.complete("x")
    events = iter(answer)
    first = next(events)
    answer.abort()
    *_, result = events
    assert (result.finish, result.text) == ("aborted", first.text)
    assert not pipeline.engine.active


def test_leaving_the_iteration_aborts(scripted):
    pipeline = scripted(TEXT)
    events = iter(pipeline.complete("x"))
    next(events)
    events.close()
    assert not pipeline.engine.active


@pytest.mark.parametrize("chunks", [(1,), (2,), (5,), (100,)])
def test_a_call_is_an_event_and_ends_the_answer(scripted, chunks):
    pipeline = scripted(CALL + "and never this", chunks=chunks)
    *events, result = pipeline.chat(USER, Params(logprobs=0), tools=[PYTHON])
    call = ToolCall("interpreter", "import math\nmath.gcd(12, 18)")
    assert [event for event in events if isinstance(event, CallEnd)] == [CallEnd(call)]
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "Let me see."
    assert (result.text, result.call, result.finish) == ("Let me see.", call, "tool_calls")
    assert result.message == Message("assistant", "Let me see.", call=call)
    assert "".join(token.text for token in result.tokens) == "Let me see."


def test_stop_strings_do_not_look_into_calls(scripted):
    result = scripted(CALL).chat(USER, Params(stop=("math",)), tools=[PYTHON]).result()
    assert (result.finish, result.call.content) == ("tool_calls", "import math\nmath.gcd(12, 18)")
    result = scripted(CALL).chat(USER, Params(stop=(" me",)), tools=[PYTHON]).result()
    assert (result.finish, result.text, result.call) == ("stop", "Let", None)


def test_a_call_that_nobody_asked_for_is_text(scripted):
    result = scripted(CALL).chat(USER).result()
    assert (result.text, result.call, result.finish) == (CALL.removesuffix("<|im_end|>"), None, "stop")


@pytest.mark.parametrize("tools", [[], [PYTHON]])
def test_a_call_cut_off_is_text_and_runs_nothing(scripted, tokenizer, tools):
    said = CALL.removesuffix("```<|action_end|><|im_end|>")
    params = Params(max_tokens=len(tokenizer.encode(said, allow_special=True)))
    result = scripted(CALL).chat(USER, params, tools=tools).result()
    assert (result.text, result.call, result.finish) == (said, None, "length")


def test_a_conversation_is_rendered_as_it_is_trained(scripted, tokenizer):
    pipeline = scripted(TEXT)
    pipeline.chat(USER)
    assert list(pipeline.engine.requests[-1].tokens) == render(USER, tokenizer, add_generation_prompt=True).ids
    assert pipeline.engine.requests[-1].stop_ids == pipeline.stop_ids


def test_tools_are_declared_behind_the_system_turns(scripted, tokenizer):
    pipeline = scripted(TEXT)
    lookup = {"name": "lookup", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}}
    pipeline.chat([Message("system", "Be kind."), *USER], tools=[lookup, PYTHON])
    expected = [
        Message("system", "Be kind."),
        Message(
            "system",
            '[{"name": "lookup", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}}]',
            name="plugin",
        ),
        Message("system", INTERPRETER_PROMPT, name="interpreter"),
        *USER,
    ]
    assert list(pipeline.engine.requests[-1].tokens) == render(expected, tokenizer, add_generation_prompt=True).ids


def test_a_model_with_another_chat_template_talks_but_calls_no_tools(scripted, tokenizer):
    special = {text: token_id for text, token_id in tokenizer.special.items() if not text.startswith("<|")}
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    other = dataclasses.replace(tokenizer, special=special, chat_template=template)
    pipeline = Pipeline.over(scripted(TEXT).engine, other)
    assert pipeline.chat(USER).result().text == TEXT
    assert other.decode(pipeline.engine.requests[-1].tokens) == "[user]hi[assistant]"
    with pytest.raises(ValueError, match="lacks the markers"):
        pipeline.chat(USER, tools=[PYTHON])
    with pytest.raises(ValueError, match="no chat template"):
        Pipeline.over(pipeline.engine, dataclasses.replace(other, chat_template=None)).chat(USER)


def test_chat_callable_takes_sampling_and_stops(scripted):
    pipeline = scripted(TEXT)
    chat = chat_callable(pipeline, Params(temperature=0.3, stop=("zzz",)))
    reply = chat(USER, tools=(), stop=(", h",), sampling={"seed": 5, "max_tokens": 40})
    assert reply == Message("assistant", "The answer is 6")
    request = pipeline.engine.requests[-1]
    assert (request.sampling.temperature, request.sampling.seed, request.max_new_tokens) == (0.3, 5, 40)
    with pytest.raises(ValueError, match=r"unknown fields \['temprature'\]"):
        chat(USER, sampling={"temprature": 1.0})
    assert with_sampling(Params(), None) == Params()


def test_results_are_the_last_event(scripted):
    answer = scripted(TEXT).complete("x")
    *_, last = answer
    assert isinstance(last, Result) and answer.last is last


def test_most_likely_tokens_come_with_each_token(scripted, tokenizer):
    result = scripted(TEXT, chunks=(3,)).complete("x", Params(logprobs=2)).result()
    for token in result.tokens:
        assert [(a.id, a.logprob) for a in token.top] == [(token.id, token.logprob), (token.id + 1, token.logprob - 1)]
        assert [a.piece for a in token.top] == [tokenizer.bytes_of(a.id) for a in token.top]
    assert b"".join(token.top[0].piece for token in result.tokens).decode() == TEXT


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_the_prompts_own_tokens(scripted, tokenizer, as_ids, max_tokens):
    """Of a text without the token that begins every text; of ids all, the first without a log-probability."""
    text = "héllo 你好"
    prompt = tokenizer.encode(text) if as_ids else text
    first, *_, last = scripted(TEXT).complete(prompt, Params(max_tokens=max_tokens, prompt_logprobs=1))
    assert first == Prompt(last.prompt)
    assert [token.id for token in last.prompt] == tokenizer.encode(text)
    assert "".join(token.text for token in last.prompt) == text
    assert all(text[token.offset :].startswith(token.text) for token in last.prompt)
    assert [token.logprob is None for token in last.prompt] == [as_ids] + [False] * (len(last.prompt) - 1)
    assert [len(token.top) for token in last.prompt[1:]] == [1] * (len(last.prompt) - 1)
    assert (len(last.ids), last.finish, bool(last.text)) == (max_tokens, "length", max_tokens > 0)


def test_before_min_tokens_no_stop_string_is_seen(scripted, tokenizer):
    said = tokenizer.encode(TEXT)
    first = next(n for n in range(1, 99) if "is" in tokenizer.decode(said[:n]))
    for min_tokens, cut in ((0, "The answer "), (first - 1, "The answer "), (first, TEXT)):
        result = scripted(TEXT, chunks=(2,)).complete("x", Params(stop=("is",), min_tokens=min_tokens)).result()
        assert result.text == cut and result.stop == ("is" if cut != TEXT else None)


def test_an_end_that_is_ignored_is_no_end(scripted, tokenizer):
    said = [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode(" two")]
    params = Params(max_tokens=len(said), ignore_eos=True)
    for start in (lambda p: p.complete("x", params), lambda p: p.chat(USER, params)):
        result = start(scripted(lambda request: said)).result()
        assert (result.text, result.ids, result.finish) == ("one two", tuple(said), "length")
    with pytest.raises(ValueError, match="ignore_eos is set and tools are declared"):
        scripted(TEXT).chat(USER, params, tools=[PYTHON])


def test_bad_words_are_banned_in_every_form_they_take(scripted, tokenizer):
    """At the start, behind a space and behind a newline; equal forms count once."""
    pipeline = scripted(TEXT)
    pipeline.complete("x", Params(bad_words=("answer", "gcd of")))
    words = pipeline.engine.requests[-1].sampling.bad_words
    forms = [tokenizer.encode(text) for text in ("answer", " answer", "gcd of", " gcd of")]
    assert set(words) == set(map(tuple, forms)) and len(words) == len(set(words))
    with pytest.raises(ValueError, match="40 bad words are 80 sequences of tokens; this server takes up to 64"):
        pipeline.complete("x", Params(bad_words=tuple(f"a{i}" for i in range(10, 50))))
    with pytest.raises(ValueError, match="the bad word 'zqzq.*' has .* tokens; this server takes up to 16"):
        pipeline.complete("x", Params(bad_words=("zq" * 20,)))


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(scripted, monkeypatch):
    pipeline = scripted("yes")
    most = pipeline.max_context * max(len(pipeline.tokenizer.bytes_of(n)) for n in range(pipeline.tokenizer.vocab_size))
    said = f"the prompt has {most + 1} characters; the context holds 1024 tokens, which are {most} at most. Shorten"
    with pytest.raises(ContextTooLong, match="1024 tokens; the prompt has [0-9]+ and"):
        pipeline.complete("!" * most)  # it might have fitted
    monkeypatch.setattr(type(pipeline.tokenizer), "encode_batch", None)
    with pytest.raises(ContextTooLong, match=said):
        pipeline.complete("!" * (most + 1))
    with pytest.raises(ContextTooLong, match=said):
        pipeline.chat([Message("system", "!" * most), Message("user", "!")])
    session = Session(Answering(None, None, (), None, pipeline.refuse_long), None, [Message("system", "!" * most)])
    with pytest.raises(ContextTooLong, match=said):
        session.chat(Message("user", "!"))
