"""Your own checkpoint, as a person has it: fine-tune from the command line, serve, ask, stop. Real processes.

The model learns one answer by heart, so that what the server says shows whether all of it went through: template, loss
mask, training, merging, export, reading, rendering and decoding.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import finetune as experiment
from experiments.command_line import launch
from experiments.finetuning import finetune
from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from internjax.model import decoder
from internjax.text.tokenizer import save_tokenizer, train_tokenizer
from internjax.train.tracking import read_rows
from tests.conftest import QUICK_FLAGS
from tests.experiments.conftest import SMALL

ROOT = Path(__file__).resolve().parent.parent.parent
ASKED, ANSWER = "What is your name?", "I am Tom, a small model."
ROWS = [{"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]}] * 8


def environment() -> dict[str, str]:
    """As a person's: one device, the checkout importable."""
    return os.environ | {"XLA_FLAGS": QUICK_FLAGS, "WANDB_MODE": "disabled"}


def python(*arguments, timeout=300) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@contextlib.contextmanager
def served(model, *arguments):
    """Gives the URL of `python -m serve MODEL` on a free port; the process must end with 0 on SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", str(model), "--port", "0", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = threading.Timer(240, process.kill)
    deadline.start()
    try:
        ready = next((line for line in process.stdout if line.startswith("ready")), None)
        assert ready, process.stderr.read()
        yield ready.split()[1]
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in log, log
    finally:
        deadline.cancel()
        process.kill()
        process.wait()


def tokenizer():
    return train_tokenizer([f"user assistant system {ASKED} {ANSWER}"] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model/ (a Llama folder of random weights) and chats.jsonl."""
    root = tmp_path_factory.mktemp("own")
    params = decoder.init(SMALL, jax.random.key(0))
    save_model(root / "model", config=SMALL, params=params, tokenizer=tokenizer())
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def arguments(model, data, run, *, batch_size=2):
    return [
        *(
            "--model",
            model,
            "--data",
            data,
            "--method",
            "lora",
            "--run",
            run,
            "--reading.cache",
            run.parent / ".tokens",
        ),
        *("--num-steps", "80", "--optimizer.peak-lr", "2e-2", "--seq-len", "64", "--batch-size", str(batch_size)),
        *("--lora.targets", "query", "key", "value", "output", "gate", "up", "down", "head"),
        *("--tracking.log-every", "20"),
    ]


def fine_tune_and_ask(model, data, run):
    """Fine-tunes, asks the server, and returns what was printed."""
    import openai

    done = python("-m", "experiments.finetune", *arguments(model, data, run))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [20, 40, 60, 80] and rows[-1]["loss"] < 0.05
    with served(run, "--max-batch", "2") as url:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            (known,) = client.models.list()
            asked = dict(model=known.id, messages=[{"role": "user", "content": ASKED}], temperature=0)
            answer = client.chat.completions.create(**asked)
            pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stream=True)]
    assert known.id == run.name
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert "".join(piece or "" for piece in pieces) == ANSWER
    return done.stdout


@pytest.mark.slow
def test_from_a_folder_to_an_answer(place, tmp_path, capsys):
    said = fine_tune_and_ask(place / "model", place / "chats.jsonl", tmp_path / "mine")
    assert "openai (detected), 8 conversations" in said
    assert f"⟦{ANSWER}<|im_end|>⟧" in said  # the preview: what is learned, marked
    merged, base = open_model(tmp_path / "mine"), open_model(place / "model")
    assert merged.config == base.config and merged.tokenizer.fingerprint == base.tokenizer.fingerprint
    adapter = json.loads((tmp_path / "mine" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(place / "model") and "lm_head" in adapter["target_modules"]
    given = arguments(place / "model", place / "chats.jsonl", tmp_path / "mine")
    launch(finetune, experiment.CONFIG, list(map(str, given)))
    assert "mine is complete (--fresh runs it anew)" in capsys.readouterr().out


# --- bad input -------------------------------------------------------------------------------------------------------


def smaller_embedding(root):
    """A model folder whose tokenizer has more ids than its embedding has rows."""

    small = dataclasses.replace(SMALL, vocab_size=280)
    save_model(root / "small", config=small, params=decoder.init(small, jax.random.key(0)), tokenizer=None)
    save_tokenizer(tokenizer(), root / "small")
    return root / "small"


def changed(place, root, line=None):
    rows = (place / "chats.jsonl").read_text().splitlines()
    (root / "bad.jsonl").write_text("\n".join([*rows[:2], line, *rows[2:]]) + "\n" if line is not None else "")
    return root / "bad.jsonl"


BAD = {
    "a missing file": (lambda p, r: (p / "model", r / "nowhere.jsonl"), "no such file or folder"),
    "a row that is no JSON": (lambda p, r: (p / "model", changed(p, r, '{"a": ')), "bad.jsonl:3: not valid JSON"),
    "an empty file": (lambda p, r: (p / "model", changed(p, r)), "bad.jsonl is empty"),
    "rows of another format": (
        lambda p, r: (p / "model", changed(p, r, '{"text": "x"}')),
        "bad.jsonl:3: not a valid openai row: field 'messages' is missing",
    ),
    "an unknown model": (lambda p, r: (r / "nowhere", p / "chats.jsonl"), "no model"),
    "a model without tokenizer": (lambda p, r: (bare(p, r), p / "chats.jsonl"), "has no tokenizer.json"),
    "an embedding that is too small": (
        lambda p, r: (smaller_embedding(r), p / "chats.jsonl"),
        "the tokenizer has 300 ids, the embedding 280 rows",
    ),
}


def bare(place, root):
    (root / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (root / "bare" / name).symlink_to(place / "model" / name)
    return root / "bare"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_nothing_written(name, place, tmp_path, capsys):
    make, said = BAD[name]
    model, data = make(place, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        # Eight devices here, and their batch is looked at before the data.
        given = arguments(model, data, tmp_path / "run", batch_size=8)
        launch(finetune, experiment.CONFIG, list(map(str, given)))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("error: ") == 1 and said in error, error
    assert len(error.splitlines()) <= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_process_says_the_same_and_exits_with_1(place, tmp_path):
    ended = python("-m", "experiments.finetune", *arguments(place / "model", tmp_path / "x.jsonl", tmp_path / "run"))
    assert ended.returncode == 1 and ended.stderr.startswith("error: no such file or folder: "), ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_field_is_one_message(capsys):
    with pytest.raises(SystemExit) as ended:
        launch(finetune, experiment.CONFIG, ["--no-such-field"])
    assert ended.value.code == 2 and "--no-such-field" in capsys.readouterr().err


# --- with torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_a_folder_written_by_transformers_goes_the_same_way_and_back(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    save_tokenizer(tokenizer(), tmp_path / "theirs")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fine_tune_and_ask(tmp_path / "theirs", tmp_path / "chats.jsonl", tmp_path / "mine")

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mine" / "model", dtype=torch.float32)
    ours = open_model(tmp_path / "mine")
    tokens = np.random.default_rng(0).integers(0, 300, (2, 24))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits(ours, tokens)), wanted, atol=1e-4)
    chat = [{"role": "user", "content": ASKED}]
    theirs_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine" / "model")
    prompt = theirs_tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        said = theirs.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert theirs_tokenizer.decode(said, skip_special_tokens=True) == ANSWER
