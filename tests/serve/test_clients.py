"""Clients that others wrote, against the server.

`openai` with its helpers always; litellm, langchain-openai and lm-eval with `make parity`. What the model says is a
script, so that texts, calls and objects are exact; lm-eval asks a real one.
"""

import asyncio
import json

import openai
import pytest
from pydantic import BaseModel

from eval import model as eval_model
from eval.run import evaluate
from eval.task import ChoiceItem, ChoiceTask, GenerateItem, GenerateTask, total
from internjax.hf.save import save_model
from serve.pipeline import Pipeline
from serve.server import start_server
from tests.serve.test_openai import ADD, PLUGIN_CALL, TEXT, USER

SUM = '{"a": 1, "b": 2}'


class Sum(BaseModel):
    """Adds."""

    a: int
    b: int


def test_the_helper_for_streams_gives_texts_and_calls_as_they_come(serve):
    client, _ = serve(chunks=(2,))
    with client.chat.completions.stream(model="tiny", messages=USER, logprobs=True) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "".join(event.delta for event in events if event.type == "content.delta") == TEXT
    assert final.choices[0].message.content == TEXT and final.choices[0].finish_reason == "stop"
    assert "".join(entry.token for entry in final.choices[0].logprobs.content) == TEXT
    client, _ = serve(PLUGIN_CALL, chunks=(3,))
    with client.chat.completions.stream(
        model="tiny", messages=USER, tools=[openai.pydantic_function_tool(Sum, name="add")]
    ) as stream:
        (done,) = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert (done.name, done.parsed_arguments) == ("add", Sum(a=1, b=2))


def test_parsed_answers_and_calls_are_objects(serve):
    client, _ = serve(SUM)
    parsed = client.chat.completions.parse(model="tiny", messages=USER, response_format=Sum)
    assert parsed.choices[0].message.parsed == Sum(a=1, b=2)
    client, _ = serve(PLUGIN_CALL)
    tools = [openai.pydantic_function_tool(Sum, name="add")]
    (call,) = client.chat.completions.parse(model="tiny", messages=USER, tools=tools).choices[0].message.tool_calls
    assert call.function.parsed_arguments == Sum(a=1, b=2)


def test_the_asynchronous_client(serve):
    client, _ = serve(chunks=(2,))

    async def ask() -> tuple[list[str], str, str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0, timeout=20) as own:
            chats = [own.chat.completions.create(model="tiny", messages=USER, seed=seed) for seed in range(3)]
            whole = [answer.choices[0].message.content for answer in await asyncio.gather(*chats)]
            chunks = await own.completions.create(model="tiny", prompt="x", max_tokens=99, stream=True)
            streamed = "".join([chunk.choices[0].text async for chunk in chunks])
            async with own.chat.completions.stream(model="tiny", messages=USER) as stream:
                final = await stream.get_final_completion()
            return whole, streamed, final.choices[0].message.content

    assert asyncio.run(ask()) == ([TEXT] * 3, TEXT, TEXT)


# Live, with the clients that `make parity` installs.


@pytest.fixture(scope="module")
def litellm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it looks for prices on the network
        module = pytest.importorskip("litellm")
    module.telemetry = False
    return module


@pytest.mark.parity
def test_litellm_chats_streams_and_calls(serve, litellm):
    client, pipeline = serve(chunks=(2,))

    def asked(client) -> dict:
        return {"model": "openai/tiny", "api_base": str(client.base_url), "api_key": "none"}

    answer = litellm.completion(messages=USER, **asked(client), temperature=0.5, max_tokens=50, stop=["zzz"], seed=3)
    assert answer.choices[0].message.content == TEXT and answer.choices[0].finish_reason == "stop"
    request = pipeline.engine.requests[-1]
    assert (request.sampling.temperature, request.sampling.seed, request.max_new_tokens) == (0.5, 3, 50)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chunks = list(
        litellm.completion(messages=USER, **asked(client), stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == answer.usage.completion_tokens
    with pytest.raises(litellm.BadRequestError, match="logit_bias"):
        litellm.completion(messages=USER, **asked(client), logit_bias={"5": 101})
    with pytest.raises(litellm.NotFoundError, match="'other' is not served here"):
        litellm.completion(messages=USER, **asked(client) | {"model": "openai/other"})
    text = litellm.text_completion(
        prompt="x", max_tokens=99, **asked(client) | {"model": "text-completion-openai/tiny"}
    )
    assert text.choices[0].text == TEXT
    client, _ = serve(PLUGIN_CALL, chunks=(3,))
    (call,) = litellm.completion(messages=USER, **asked(client), tools=[ADD]).choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": 2})
    built = litellm.stream_chunk_builder(
        list(litellm.completion(messages=USER, **asked(client), tools=[ADD], stream=True))
    )
    (streamed,) = built.choices[0].message.tool_calls
    assert (
        json.loads(streamed.function.arguments) == {"a": 1, "b": 2} and built.choices[0].finish_reason == "tool_calls"
    )


@pytest.mark.parity
def test_langchain_invokes_streams_binds_tools_and_gets_objects(serve):
    chat_models = pytest.importorskip("langchain_openai")
    messages = pytest.importorskip("langchain_core.messages")

    def chat(client, **how):
        where = {"base_url": str(client.base_url), "api_key": "none", "max_retries": 0, "timeout": 20}
        return chat_models.ChatOpenAI(model="tiny", **where, **how)

    client, pipeline = serve(chunks=(2,))
    answer = chat(client, temperature=0.5, max_tokens=50).invoke([messages.SystemMessage("Be kind."), ("user", "hi")])
    assert answer.content == TEXT and answer.response_metadata["finish_reason"] == "stop"
    request = pipeline.engine.requests[-1]
    assert (request.sampling.temperature, request.max_new_tokens) == (0.5, 50)
    assert answer.usage_metadata["input_tokens"] == len(request.tokens)
    parts = list(chat(client, stream_usage=True).stream("hi"))
    assert "".join(part.content for part in parts) == TEXT
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) > 1
    assert asyncio.run(chat(client).ainvoke("hi")).content == TEXT
    (once,) = chat(client, use_responses_api=True).invoke("hi").content
    assert once["text"] == TEXT

    client, pipeline = serve(PLUGIN_CALL, chunks=(3,))
    bound = chat(client).bind_tools([_add_tool()])
    turn = bound.invoke("hi")
    (call,) = turn.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 1, "b": 2})
    pipeline.engine.script = lambda request: [*pipeline.tokenizer.encode("3"), pipeline.tokenizer.eos_id]
    back = [("user", "hi"), turn, messages.ToolMessage("3", tool_call_id=call["id"])]
    assert bound.invoke(back).content == "3"

    client, _ = serve(SUM)
    for method in ("json_schema", "json_mode"):
        assert chat(client).with_structured_output(Sum, method=method).invoke("hi") == Sum(a=1, b=2)
    client, _ = serve(PLUGIN_CALL.replace("add", "Sum"))
    assert chat(client).with_structured_output(Sum, method="function_calling").invoke("hi") == Sum(a=1, b=2)


def _add_tool():
    tools = pytest.importorskip("langchain_core.tools")

    @tools.tool
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    return add


CHOICES = [
    (f"number {i} is", (f" {a}", f" the {b}", f" {c} of two"), i % 3)
    for i, (a, b, c) in enumerate(zip("abcdefgh", "ijklmnop", "qrstuvwx", strict=True))
]
NUM_NEW = 5  # before the random model says a special token, which is text to one of the two


@pytest.fixture(scope="module")
def real(tiny_model, tmp_path_factory):
    """A server of the random model, the same model asked in this process, and its tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, config=tiny_model.config, params=tiny_model.params, tokenizer=tiny_model.tokenizer)
    with Pipeline(tiny_model, num_slots=4, max_context=128) as pipeline:
        with start_server(pipeline, model_name="tiny", drain_seconds=1) as server:
            yield server.url, tiny_model, str(folder)


def lm_eval_task(name: str, rows: list[dict], **how):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = {"test": Dataset.from_list(rows)}
    shared = {"task": name, "custom_dataset": lambda **_: data, "test_split": "test"}
    shared |= {"doc_to_text": "{{context}}", "target_delimiter": ""}
    return ConfigurableTask(config=shared | how)


def without_first(context, continuation, tokenizer):
    """The ids as a text's, but for the token that begins every text: lm-eval sends none of its own."""
    ids = eval_model.as_text(context, continuation, tokenizer)
    return ids._replace(context=ids.context[1:])


@pytest.mark.parity
@pytest.mark.parametrize("asked_as", ["text", "ids", "text, split by the server"])
def test_lm_eval_over_the_server_scores_as_in_this_process(real, asked_as):
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    url, model, folder = real
    items = tuple(ChoiceItem(f"{i}", *rest) for i, rest in enumerate(CHOICES))
    local = eval_model.local(model, max_length=128, encode=without_first if asked_as == "ids" else eval_model.as_text)
    (ours,) = evaluate(local, [ChoiceTask("choices", 1, items, rank=total)])
    how = {
        "text": {"tokenizer_backend": "huggingface", "tokenizer": folder, "tokenized_requests": False},
        "ids": {"tokenizer_backend": "huggingface", "tokenizer": folder},
        "text, split by the server": {"tokenizer_backend": "auto", "tokenized_requests": False},
    }[asked_as]
    client = LocalCompletionsAPI(f"{url}/v1/completions", model="tiny", max_length=128, batch_size=4, **how)
    rows = [{"context": context, "choices": list(choices), "answer": answer} for context, choices, answer in CHOICES]
    task = lm_eval_task("choices", rows, output_type="multiple_choice", doc_to_choice="choices", doc_to_target="answer")
    theirs = simple_evaluate(
        model=client, tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
    )
    assert len(theirs["samples"]["choices"]) == ours.num_items == len(CHOICES)
    assert theirs["results"]["choices"]["acc,none"] == pytest.approx(ours.interval.value)
    assert 0 < ours.interval.value < 1
    pairs = [(context, choice) for context, choices, _ in CHOICES for choice in choices]
    scores = local.loglikelihood(pairs)
    found = [each for sample in theirs["samples"]["choices"] for each in sample["filtered_resps"]]
    for (logprob, is_greedy), score in zip(found, scores, strict=True):
        assert logprob == pytest.approx(score.logprob, abs=1e-3) and is_greedy == score.is_greedy


@pytest.mark.parity
def test_lm_eval_over_chats_generates_as_in_this_process(real):
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.openai_completions import LocalChatCompletion
    from lm_eval.tasks import TaskManager

    url, model, _ = real
    local = eval_model.local(model, max_length=128, encode=eval_model.as_chat)
    prompts = [context for context, _, _ in CHOICES]
    said = [each.text for each in local.generate(prompts, max_new_tokens=NUM_NEW, stop=("\n\n",))]
    answers = [text if i % 2 else "something else" for i, text in enumerate(said)]
    items = tuple(GenerateItem(f"{i}", *pair) for i, pair in enumerate(zip(prompts, answers, strict=True)))
    (ours,) = evaluate(local, [GenerateTask("writes", 1, items, max_new_tokens=NUM_NEW, stop=("\n\n",), extract=str)])
    client = LocalChatCompletion(f"{url}/v1/chat/completions", model="tiny", max_length=128)
    rows = [{"context": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    task = lm_eval_task(
        "writes", rows, output_type="generate_until", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": NUM_NEW, "temperature": 0},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    theirs = simple_evaluate(
        model=client,
        tasks=[task],
        apply_chat_template=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert [sample["resps"][0][0] for sample in theirs["samples"]["writes"]] == said
    assert theirs["results"]["writes"]["exact_match,none"] == ours.interval.value == 0.5
