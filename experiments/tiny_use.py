"""The second half of the tiny chain: the models are evaluated, exported, quantised, served, and used by an agent."""

import contextlib
import shutil
import statistics
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.loading import open_rows
from eval.model import as_text, local
from eval.run import Result
from eval.run import evaluate as run_tasks
from eval.task import TextItem, TextTask
from eval.tasks import library as tasks
from experiments import library, measure, tiny_models
from experiments.tiny_config import Skip, Tiny, opened
from internjax.hf.convert import check
from internjax.hf.open import Model, logits, open_model
from internjax.hf.save import save_model
from internjax.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from serve.server import Server

MODELS = ("pretrain", "sft", "rlhf")
EVALUATED_BYTES = 120_000
"""Held-out text that bits per byte are measured on."""
ANSWER_TOKENS = 32
"""Of what the server is asked for."""


def available(root: Path) -> list[str]:
    """Returns the stages of the chain that left a language model."""
    return [name for name in MODELS if (root / name / "model").is_dir()]


def final_model(root: Path) -> Path:
    """Returns the run whose model goes on to export, server and agent: the last one of the chain."""
    return root / available(root)[-1]


def evaluate(config: Tiny, root: Path) -> dict[str, Any]:
    """Bits per byte beside baselines, tasks made of held-out facts, and the interpreter protocol before and after."""
    folder = root / "evaluate"
    held_out = held_out_texts(root)
    text_task = TextTask("held_out_text", 1, tuple(TextItem(name, text) for name, text in held_out))
    facts = [
        tasks.Fact(fact.module, fact.name.removeprefix(f"{fact.module}."), _arguments(fact.signature), fact.summary)
        for fact in tiny_models.facts(root, config, held_out=True)
        if "." not in fact.name.removeprefix(f"{fact.module}.")  # what can be imported by name: no methods
    ]
    made = _tasks(facts, config)
    results: dict[str, Any] = {}
    for name in available(root):
        model = opened(config, root / name)
        asked = local(model, max_length=config.seq_len, batch_size=8, shortest=64, encode=as_text)
        scores = run_tasks(asked, [text_task, *made], log_folder=folder / name)
        results[name] = {score.task: _row(score) for score in scores}
        for score in scores:
            print(f"{name:9} {score.task:20} {score.interval.value:.3f} ({score.num_items} items)")
    summary = {"tasks": results, "baselines": baselines(config, root, held_out)._asdict()}
    bits = results["pretrain"]["held_out_text"]["value"]
    print(f"bits per byte {bits:.3f}, baselines {summary['baselines']}")
    if config.data is None:
        summary["interpreter"] = _interpreter(config, root)
        summary["prompt"] = _one_prompt(config, root)
    return summary


def held_out_texts(root: Path) -> list[tuple[str, str]]:
    """Returns (id, text) of held-out documents of all kinds: by their ids, which are hashes of what they say."""
    chosen, size = [], 0
    for name, text in sorted(tiny_models.texts(root, "held_out")):
        if size < EVALUATED_BYTES and len(text) < EVALUATED_BYTES // 4:
            chosen.append((name, text))
            size += len(text.encode())
    return chosen or tiny_models.texts(root, "held_out")[:1]


def _arguments(signature: str) -> str:
    return signature[signature.find("(") :] if "(" in signature else "()"


def _tasks(facts: list[tasks.Fact], config: Tiny) -> list:
    """Returns the tasks that there are enough facts for; arithmetic needs none."""
    made = []
    for make in (tasks.module_of, tasks.summary_of, tasks.name_of):
        try:
            made.append(make(facts, num_items=100, seed=config.seed))
        except ValueError as reason:
            print(f"left out: {make.__name__}: {reason}")
    return [*made, tasks.interpreter_session(tiny_models.train_problems(config)[1])]


def _row(score: Result) -> dict[str, Any]:
    return {
        "metric": score.metric,
        "value": score.interval.value,
        "low": score.interval.low,
        "high": score.interval.high,
        "num_items": score.num_items,
        "num_capped": score.num_capped,
        "chance": score.chance,
    }


def baselines(config: Tiny, root: Path, held_out: list[tuple[str, str]]) -> measure.Baselines:
    tokenizer = load_tokenizer(root / "tokenizer" / "hf")
    rows = [
        np.array([tokenizer.bos_id, *ids, tokenizer.eos_id]) for ids in tokenizer.encode_batch([t for _, t in held_out])
    ]
    seen = tiny_models.seen_tokens(config, root)
    return measure.baselines(seen, rows, [text for _, text in held_out], vocab_size=config.model.vocab_size)


def bits_per_byte(config: Tiny, params: dict, root: Path, held_out: list[tuple[str, str]]) -> float:
    """Returns the held-out bits per byte of parameters of the chain's model."""
    tokenizer = load_tokenizer(root / "tokenizer" / "hf")
    model = types.SimpleNamespace(config=config.model, params=params, tokenizer=tokenizer, lora=None)
    task = TextTask("held_out_text", 1, tuple(TextItem(name, text) for name, text in held_out))
    return run_tasks(local(model, max_length=config.seq_len, batch_size=8), [task])[0].interval.value


def _interpreter(config: Tiny, root: Path) -> dict[str, Any]:
    """Returns the shares of held-out problems that end in an executed call and in the right answer, per model."""
    _, held_out = tiny_models.train_problems(config)
    found = {}
    for name in available(root):
        score = measure.interpreter_score(opened(config, root / name), held_out)
        print(f"{name:9} executed calls {score.executed.value:.0%}, right answers {score.right.value:.0%}")
        found[name] = score._asdict() | {"executed": score.executed._asdict(), "right": score.right._asdict()}
    return found


def _one_prompt(config: Tiny, root: Path) -> dict[str, Any]:
    """Returns one held-out prompt and what each model says to it."""
    task = library.body_tasks(tiny_models.facts(root, config, held_out=True))[0]
    chat = library.body_prompt(task)
    said = {}
    for name in available(root):
        reply = measure.replies(opened(config, root / name), [chat], max_new_tokens=config.max_new_tokens)[0]
        said[name] = reply.message.content + ("" if reply.ended else " …")
    return {"prompt": chat[0].content, "library": task.body, "said": said}


def export(config: Tiny, root: Path) -> dict[str, Any]:
    """Writes the final model in both layouts and reads both back."""
    model = open_model(final_model(root))
    rows = open_rows(root / "tokenizer" / "held_out", seq_len=64, packing="concat", seed=0)
    inputs = jnp.asarray(np.stack([rows[i]["tokens"] for i in range(4)]))
    want = np.asarray(logits(model, inputs))
    found = {}
    for layout in ("llama", "internlm2"):
        folder = root / "export" / layout
        shutil.rmtree(folder, ignore_errors=True)
        proof = save_model(
            folder,
            config=model.config,
            params=model.params,
            tokenizer=model.tokenizer,
            generation=model.generation,
            layout=layout,
            provenance={"chain": "experiments.tiny", "from": str(final_model(root))},
        )
        read_back = open_model(folder)
        checked = check(folder)
        found[layout] = {
            "folder": str(folder),
            "max_logit_difference": float(np.abs(np.asarray(logits(read_back, inputs)) - want).max()),
            "proof": proof.max_logit_difference,
            "num_files": checked.num_files,
            "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        }
        print(f"{layout}: largest logit difference after reading back {found[layout]['max_logit_difference']:.2g}")
    return found


def quantize(config: Tiny, root: Path) -> dict[str, Any]:
    """Opens the export with int8 and int4 weights and measures what that costs."""
    folder = root / "export" / "llama"
    held_out = held_out_texts(root)[:20]
    task = TextTask("held_out_text", 1, tuple(TextItem(name, text) for name, text in held_out))
    found = {}
    for scheme in (None, "int8", "int4"):
        model = opened(config, folder, quantize=scheme)
        asked = local(model, max_length=config.seq_len, batch_size=8, shortest=config.seq_len)  # one program each
        score = run_tasks(asked, [task])[0]
        name = scheme or model.config.param_dtype
        found[name] = {"bits_per_byte": score.interval.value, "bytes": _num_bytes(model)}
        print(f"{name}: {score.interval.value:.4f} bits per byte, {found[name]['bytes'] / 1e6:.1f} MB")
    return found


def _num_bytes(model: Model) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.params))


@contextlib.contextmanager
def served(root: Path) -> Iterator["Server"]:
    """Serves the exported model in int8, OpenAI-compatible, as `tiny`."""
    from serve.pipeline import Pipeline
    from serve.server import start_server

    model = open_model(root / "export" / "llama", quantize="int8")
    # One kind of engine, which both stages share, of few programs: asked a few times, it mostly waits for the compiler.
    with Pipeline(model, num_slots=2, max_context=1024, prefill_chunk=16, context_buckets=()) as pipeline:
        with start_server(pipeline, model_name="tiny") as server:
            yield server


def serve(config: Tiny, root: Path) -> dict[str, Any]:
    """Asks the server through the openai client."""
    import openai

    with served(root) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        # Of one length, so that the answers as a whole and in parts compare: a tiny model may end after a word.
        length = {"max_tokens": ANSWER_TOKENS, "extra_body": {"min_tokens": ANSWER_TOKENS}}
        chat = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "What does `gcd(*integers)` of math do?"}],
            "seed": 0,
            **length,
        }

        def completion() -> dict[str, Any]:
            answer = client.completions.create(model="tiny", prompt="import ", seed=0, **length)
            return {"text": answer.choices[0].text, "num_tokens": answer.usage.completion_tokens}

        def whole() -> dict[str, Any]:
            answer = client.chat.completions.create(**chat)
            return {"text": answer.choices[0].message.content, "num_tokens": answer.usage.completion_tokens}

        asked = {"completion": completion, "chat": whole, "stream": lambda: _streamed(client, chat)}
        found: dict[str, Any] = {"url": server.url, "calls": {}}
        for name, ask in asked.items():
            ask()  # the first of a kind also imports
            found["calls"][name] = _medians([_timed(ask) for _ in range(5)])
    for name, call in found["calls"].items():
        print(f"{name}: {call['seconds'] * 1000:.0f} ms: {call['text']!r}")
    return found | {"shut_down": not server.alive}


def _timed(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    answer = ask()
    return answer | {"seconds": time.perf_counter() - started}


def _medians(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one of several equal answers, with the medians of their times."""
    names = [name for name in answers[0] if name.endswith("seconds")]
    return answers[0] | {name: statistics.median(answer[name] for answer in answers) for name in names}


def _streamed(client, chat: dict[str, Any]) -> dict[str, Any]:
    """Returns a streamed chat answer with the time to its first token."""
    started = time.perf_counter()
    first, pieces = None, []
    for chunk in client.chat.completions.create(**chat, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first if first is not None else time.perf_counter() - started
            pieces.append(chunk.choices[0].delta.content)
    # An answer of characters that are cut off has no text before its end.
    return {"text": "".join(pieces), "first_token_seconds": first or time.perf_counter() - started}


def agent(config: Tiny, root: Path) -> dict[str, Any]:
    """Lets the served model answer one question in a ReAct loop with a sandboxed Python tool, and once by protocol."""
    from serve.agents.interpreter import interpret
    from serve.agents.react import react
    from serve.client import remote_chat
    from serve.tools.python import interpreter_tool, python_tool

    if config.data is not None and available(root) == ["pretrain"]:
        raise Skip("the model was not fine-tuned on conversations, so it cannot follow an agent's protocol")
    problem = tiny_models.train_problems(config)[1][0]
    with served(root) as server:
        chat = remote_chat(server.url, "tiny")
        sampling = {"max_tokens": 48, "temperature": 0}
        trace = react(chat, f"What is {problem.call}?", [python_tool()], max_turns=2, sampling=sampling)
        protocol = interpret(chat, f"What is {problem.call}?", [interpreter_tool()], max_turns=2, sampling=sampling)
    found = {}
    for name, result in (("react", trace), ("interpreter", protocol)):
        found[name] = {
            "answer": result.answer,
            "finish": result.finish,
            "steps": [step._asdict() for step in result.steps],
            "messages": [
                {"role": m.role, "content": m.content, "call": m.call and m.call.content} for m in result.messages
            ],
        }
        print(f"{name}: answer {result.answer!r} ({result.finish}, wanted {problem.value})")
    return found | {"question": f"What is {problem.call}?", "wanted": problem.value}
