"""Looking at a run while it trains: the same samples and losses as the finished model gives, resumed or not."""

import dataclasses
import json
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from data_pipelines.tokens import TokenDocument, write_tokens
from eval.model import local
from eval.run import evaluate
from eval.task import ChoiceItem, ChoiceTask, TextItem, TextTask
from experiments import training
from experiments.callbacks import HeldOut, Prompts, evaluate_tasks, held_out_loss, sample_prompts
from experiments.pretraining import pretrain
from internjax import sharding
from internjax.hf.open import open_model
from internjax.model import decoder, lora
from internjax.model.config import ModelConfig
from internjax.model.lora import LoraConfig
from internjax.sharding import MeshConfig
from internjax.text.tokenizer import Tokenizer, load_tokenizer
from internjax.train.loop import Every
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import init_state
from internjax.train.tracking import TrackingConfig, open_run, read_rows
from tests.experiments.conftest import SMALL, TEXTS, pretraining
from tests.weights import random_params


class Opened(NamedTuple):
    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    lora: None = None


PROMPTS = ("def add_1(x):", "assert")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load_tokenizer(corpus / "tokenizer")


@pytest.fixture(scope="module")
def params():
    return jax.device_get(random_params(SMALL, seed=3))


OPTIMIZER = make_optimizer(AdamW(), Constant(), 10)


def state_of(params, **how):
    return init_state(params, OPTIMIZER, **how)


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path / "run", {}, tracking=TrackingConfig(wandb="disabled", progress="none")) as run:
        yield run


def test_prompts_are_continued_shown_and_kept(run, params, tokenizer, capsys):
    every, call = sample_prompts(Prompts(PROMPTS, every=7, max_new_tokens=6), SMALL, tokenizer, run=run)
    assert every == 7 and call(state_of(params), 14) is None
    rows = read_rows(run.samples / "14.jsonl")
    assert [row["prompt"] for row in rows] == list(PROMPTS) and all(row["tokens"] <= 6 for row in rows)
    # The same weights asked through another door.
    model = local(Opened(SMALL, state_of(params).trainable, tokenizer), max_length=64)
    assert [row["text"] for row in rows] == [done.text for done in model.generate(PROMPTS, max_new_tokens=6)]
    shown = capsys.readouterr().err
    assert "samples after step 14" in shown and repr(rows[0]["text"]) in shown


def test_drawn_samples_are_the_same_every_time_and_differ_between_equal_prompts(run, params, tokenizer):
    _, call = sample_prompts(Prompts(("def", "def"), temperature=1.0), SMALL, tokenizer, run=run)
    for step in (1, 2):
        call(state_of(params), step)
    first, second = (read_rows(run.samples / f"{step}.jsonl") for step in (1, 2))
    assert first == second and first[0]["text"] != first[1]["text"]


def test_a_mesh_changes_nothing(params, tokenizer, corpus, run):
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    try:
        places = dict(mesh=mesh, axes=decoder.logical_axes(SMALL))
        held_out = HeldOut(str(corpus / "tokens"), num_batches=2)
        found = []
        for step, (state, on) in enumerate([(state_of(params, **places), mesh), (state_of(params), None)]):
            if on is None:
                sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
            with sharding.use(on) if on is not None else open("/dev/null"):
                sample_prompts(Prompts(PROMPTS, max_new_tokens=6), SMALL, tokenizer, run=run).call(state, step)
                measure = held_out_loss(held_out, SMALL, tokenizer, batch_size=8, seq_len=32, mesh=on)
                found.append(measure.call(state, step))
    finally:
        sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    assert read_rows(run.samples / "0.jsonl") == read_rows(run.samples / "1.jsonl")
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_held_out_loss_is_that_of_the_texts(params, tokenizer, tmp_path):
    """A folder of one text: its loss by hand from log-probabilities, its bytes from the text."""
    text = "".join(TEXTS[:3])
    ids = tokenizer.encode(text)[:33]
    write_tokens(tmp_path / "one", [TokenDocument("one", ids, [1] * 33)], tokenizer=tokenizer)
    config = HeldOut(str(tmp_path / "one"), num_batches=5)
    state = state_of(params)
    found = held_out_loss(config, SMALL, tokenizer, batch_size=1, seq_len=32).call(state, 1)
    tokens = np.array([ids], np.int32)
    logits = decoder.logits(state.trainable, tokens[:, :-1], config=SMALL)
    logits = np.asarray(logits, np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -float(np.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).sum())
    num_bytes = len(tokenizer.decode(ids[1:]).encode())
    assert found == pytest.approx(
        {"eval/loss": nats / 32, "eval/bits_per_byte": nats / math.log(2) / num_bytes}, rel=1e-5
    )
    half = [TokenDocument("one", ids, [1] * 16 + [0] * 17)]
    write_tokens(tmp_path / "half", half, tokenizer=tokenizer)
    masked = held_out_loss(HeldOut(str(tmp_path / "half")), SMALL, tokenizer, batch_size=1, seq_len=32)
    assert list(masked.call(state, 1)) == ["eval/loss"]  # what part of the bytes would it be?
    # One row fills a batch of two as well: what is there twice counts once.
    assert held_out_loss(config, SMALL, tokenizer, batch_size=2, seq_len=32).call(state, 1) == pytest.approx(found)
    with pytest.raises(ValueError, match="one: no row of 33 tokens results from 1 documents"):
        held_out_loss(config, SMALL, tokenizer, batch_size=2, seq_len=33)


def test_adapters_are_part_of_what_is_looked_at(params, tokenizer, corpus, run):
    config = LoraConfig(rank=4)

    @jax.jit
    def made():
        adapters = lora.init_lora(config, params, jax.random.key(0))
        noise = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape, x.dtype), adapters)
        return adapters, noise

    adapters, noise = made()
    base = state_of(params)
    # Copies: a state takes over what it trains.
    plain, changed = (state_of(jax.tree.map(np.array, tree), frozen=base.trainable) for tree in (adapters, noise))
    losses, texts = {}, {}
    for step, (name, state, how) in enumerate(
        [("base", base, None), ("zero", plain, config), ("trained", changed, config)]
    ):
        held_out = HeldOut(str(corpus / "tokens"), num_batches=1)
        measure = held_out_loss(held_out, SMALL, tokenizer, batch_size=8, seq_len=32, lora_config=how)
        losses[name] = measure.call(state, step)["eval/loss"]
        prompts = Prompts(PROMPTS, max_new_tokens=6)
        sample_prompts(prompts, SMALL, tokenizer, run=run, lora_config=how).call(state, step)
        texts[name] = read_rows(run.samples / f"{step}.jsonl")
    assert losses["zero"] == pytest.approx(losses["base"], rel=1e-6) and texts["zero"] == texts["base"]
    assert abs(losses["trained"] - losses["base"]) > 0.01 and texts["trained"] != texts["base"]
    dropped = dataclasses.replace(config, dropout=0.5)  # a part of training alone
    measure = held_out_loss(held_out, SMALL, tokenizer, batch_size=8, seq_len=32, lora_config=dropped)
    assert measure.call(changed, 3)["eval/loss"] == losses["trained"]


def test_tasks_are_scored_as_by_the_evaluation(params, tokenizer):
    tasks = [
        ChoiceTask(
            "pick",
            1,
            tuple(ChoiceItem(str(n), f"{n} == ", ("x", str(n))[:: n % 2 * 2 - 1], 1 - n % 2) for n in range(4)),
        ),
        TextTask("text", 1, (TextItem("a", TEXTS[0]),)),
    ]
    state = state_of(params)
    found = evaluate_tasks(tasks, SMALL, tokenizer, every=5, max_length=64).call(state, 5)
    wanted = evaluate(local(Opened(SMALL, state.trainable, tokenizer), max_length=64), tasks)
    assert found == {f"eval/{result.task}": result.interval.value for result in wanted}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: Prompts(("",)), "no prompt empty"),
        (lambda: Prompts(("a",), every=0), "at least 1"),
        (lambda: HeldOut("x", num_batches=0), "at least 1"),
    ],
)
def test_settings_without_meaning_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        config()


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="together more than the model's 256"):
        sample_prompts(Prompts(("def",), max_new_tokens=256), SMALL, tokenizer)
    with pytest.raises(ValueError, match="no prompt given"):
        sample_prompts(Prompts(), SMALL, tokenizer)


def test_a_resumed_run_writes_the_same_samples_and_measurements(corpus, tokenizer, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def train(name, *, stop_at=None):
        def stop(state, step):
            if step == stop_at:
                raise Stop

        config = pretraining(corpus, tmp_path / name)
        folder = tmp_path / name
        tracked = type("Samples", (), {"sample": lambda self, step, rows: keep(folder, step, rows)})()
        held_out = HeldOut(str(corpus / "tokens"), every=4, num_batches=1)
        with training.mesh_of(config.mesh) as mesh:
            callbacks = [
                sample_prompts(Prompts(PROMPTS, every=4, max_new_tokens=4), SMALL, tokenizer, run=tracked),
                held_out_loss(held_out, SMALL, tokenizer, batch_size=8, seq_len=32, mesh=mesh),
                Every(1, stop),
            ]
        return pretrain(config, callbacks=callbacks)

    def keep(folder, step, rows):
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / f"{step}.jsonl").write_text(json.dumps(rows))

    train("whole")
    with pytest.raises(Stop):
        train("cut", stop_at=9)
    train("cut")
    for file in ("metrics.jsonl", "samples/4.jsonl", "samples/8.jsonl", "samples/12.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    measured = [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    assert [step for step, _ in measured] == [4, 8, 12] and measured[-1][1] < measured[0][1]
    assert open_model(str(tmp_path / "whole")).config.vocab_size == SMALL.vocab_size
