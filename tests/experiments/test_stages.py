"""Pre-training and fine-tuning as stages: what they leave, how they resume, and what they refuse before they begin."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.conversations import Reading
from data_pipelines.loading import batches, open_rows
from experiments import finetuning as stage
from experiments.callbacks import Prompts
from experiments.finetuning import finetune
from experiments.pretraining import TokenData, initial_params, pretrain
from internjax import sharding
from internjax.hf.adapter import load_adapter
from internjax.hf.families import layout_family
from internjax.hf.open import logits, open_model
from internjax.model import decoder
from internjax.model.lora import LoraConfig, merge
from internjax.text.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.loop import Every, train
from internjax.train.losses import LossOutput
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.profile import ProfileConfig
from internjax.train.step import init_state, make_step
from internjax.train.tracking import open_run, read_rows
from tests.experiments.conftest import QUESTIONS, SMALL, finetuning, pretraining

ROWS = np.arange(3, 67).reshape(4, 16)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A pre-training run of 12 steps, not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return pretrain(pretraining(corpus, folder, preflight=True))


@pytest.fixture(scope="module")
def tuned(corpus, trained, tmp_path_factory):
    """A fine-tuning of it with adapters, not to be changed."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    return finetune(finetuning(corpus, trained.folder, folder, preflight=True))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def weights_of(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def same_params(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


# --- pre-training ----------------------------------------------------------------------------------------------------


def test_what_a_pretraining_leaves(trained):
    left = [
        "architecture",
        "checkpoints",
        "complete.json",
        "experiment.json",
        "goodput.json",
        "metrics.jsonl",
        "model",
        "preflight.html",
        "preflight.json",
        "preflight.txt",
        "report.html",
        "report.md",
        "timing.jsonl",
        "versions.json",
    ]
    assert names(trained.folder) == left
    rows = read_rows(trained.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] == trained.summary["first_loss"] and rows[-1]["loss"] == trained.summary["loss"]
    assert trained.summary["first_loss"] > 5.5 and trained.summary["loss"] < 4.0
    assert trained.summary["num_traces"] == 1 and trained.summary["num_steps"] == 12
    assert json.loads((trained.folder / "complete.json").read_text()) == trained.summary
    experiment = json.loads((trained.folder / "experiment.json").read_text())
    assert experiment["model"]["d_model"] == 32 and experiment["schedule"]["type"] == "Cosine"


def test_its_model_opens_and_so_does_every_checkpoint(trained, corpus):
    model = open_model(trained.folder)
    assert model.tokenizer.fingerprint == load_tokenizer(corpus / "tokenizer").fingerprint
    assert same_params(model.params, open_model(f"{trained.folder}@12").params)
    earlier = open_model(f"{trained.folder}@10")
    assert not same_params(model.params, earlier.params) and earlier.config == model.config
    assert logits(model, ROWS).shape == (4, 16, 320)


def test_the_same_command_again_says_that_it_is_complete(trained, corpus, capsys):
    before = (trained.folder / "versions.json").read_bytes()
    again = pretrain(pretraining(corpus, trained.folder))
    assert again == trained and f"{trained.folder} is complete (--fresh runs it anew)" in capsys.readouterr().out
    assert (trained.folder / "versions.json").read_bytes() == before


def test_a_changed_field_is_refused_by_name(trained, corpus):
    before = names(trained.folder)
    other = pretraining(corpus, trained.folder, optimizer=AdamW(peak_lr=0.5, weight_decay=0.0), num_steps=13)
    with pytest.raises(ValueError) as caught:
        pretrain(other)
    said = str(caught.value)
    assert "optimizer.peak_lr: 0.5 now, 0.01 in the folder" in said and "num_steps: 13 now, 12" in said
    assert "schedule" not in said and names(trained.folder) == before


def test_a_run_that_broke_off_ends_as_if_it_had_not(trained, corpus, tmp_path):
    def breaks(state, step):
        raise KeyboardInterrupt

    config = pretraining(corpus, tmp_path / "run", preflight=True)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, callbacks=[Every(7, breaks)])
    assert "model" not in names(tmp_path / "run") and open_model(tmp_path / "run").config.d_model == 32  # of step 5
    again = pretrain(config)
    for name in ("metrics.jsonl", "experiment.json"):
        here, there = (folder / name for folder in (again.folder, trained.folder))
        assert here.read_text().replace(str(tmp_path), "") == there.read_text().replace(str(trained.folder.parent), "")
    assert weights_of(again.folder) == weights_of(trained.folder)


def test_pretraining_goes_on_from_a_model(trained, corpus, tmp_path):
    half = dataclasses.replace(SMALL, dtype="float16")
    on = pretrain(pretraining(corpus, tmp_path / "run", init=str(trained.folder), model=half, num_steps=2))
    assert abs(on.summary["first_loss"] - trained.summary["loss"]) < 0.5
    assert read_rows(on.folder / "metrics.jsonl")[0]["loss_scale"] == 2**15  # as float16 wants
    wider = pretraining(
        corpus, tmp_path / "wider", init=str(trained.folder), model=dataclasses.replace(SMALL, ffn_dim=96)
    )
    with pytest.raises(ValueError, match="another architecture than this config: ffn_dim 64 there, 96 here"):
        pretrain(wider)


def other_tokenizer(folder, vocab_size):
    save_tokenizer(train_tokenizer(["other words altogether"] * 4, vocab_size=vocab_size), folder)
    return folder


def weightless(folder, tokenizer):
    """A model folder that is read as far as its weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(layout_family("llama").config_to_hf(SMALL)))
    save_tokenizer(tokenizer, folder)
    return str(folder)


LONG = dataclasses.replace(SMALL, max_position_embeddings=1 << 20)


def rows_of(*folders, seq_len=32, **fields):
    return TokenData(*folders, seq_len=seq_len, **fields)


BAD_PRETRAININGS = {
    "no token folder": (lambda c, t: dict(data=rows_of(tokenizer=str(c / "tokenizer"))), "no data.folder given"),
    "a missing one": (
        lambda c, t: dict(data=rows_of((str(t / "x"),), tokenizer=str(c / "tokenizer"))),
        "is no token folder: it has no manifest.json",
    ),
    "no tokenizer": (lambda c, t: dict(data=rows_of((str(c / "tokens"),), tokenizer="")), "no data.tokenizer given"),
    "a missing tokenizer": (
        lambda c, t: dict(data=rows_of((str(c / "tokens"),), tokenizer=str(t))),
        "has no tokenizer.json",
    ),
    "another tokenizer": (
        lambda c, t: dict(data=rows_of((str(c / "tokens"),), tokenizer=str(other_tokenizer(t / "other", 300)))),
        "was written by the tokenizer",
    ),
    "a larger tokenizer": (
        lambda c, t: dict(data=rows_of((str(c / "tokens"),), tokenizer=str(other_tokenizer(t / "other", 400)))),
        "has 400 tokens, the model's embedding 320 rows; set model.vocab_size to at least 400",
    ),
    "rows longer than the text": (
        lambda c, t: dict(
            data=rows_of((str(c / "tokens"),), tokenizer=str(c / "tokenizer"), seq_len=1 << 20), model=LONG
        ),
        "give a shorter seq_len or more text",
    ),
    "no rows in a batch": (
        lambda c, t: dict(data=rows_of((str(c / "tokens"),), tokenizer=str(c / "tokenizer"), batch_size=0)),
        "batch_size must be at least 1",
    ),
    "a warm-up longer than the run": (lambda c, t: dict(num_steps=1), "warms up for 2 of 1 steps"),
    "no steps": (lambda c, t: dict(num_steps=0), "num_steps must be at least 1"),
    "a missing model": (lambda c, t: dict(init=str(t / "nowhere")), "no model"),
    "a model of another tokenizer": (
        lambda c, t: dict(init=weightless(t / "m", load_tokenizer(other_tokenizer(t / "other", 300)))),
        "another tokenizer than .*: id [0-9]+ is '.*' there and '.*' here. Write the token folders with",
    ),
    "a prompt that leaves no room": (lambda c, t: dict(prompts=Prompts(("x = 1\n" * 200,))), "longest prompt has"),
    "a trace beyond the run": (lambda c, t: dict(profile=ProfileConfig(start=11)), "steps 11 to 13, the run has 12"),
    "a mesh that does not fit": (lambda c, t: dict(mesh=sharding.MeshConfig(fsdp=3)), "does not fit 8 devices"),
    "rows longer than the model": (
        lambda c, t: dict(data=rows_of((str(c / "tokens"),), tokenizer=str(c / "tokenizer"), seq_len=4096)),
        "longer than the model's max_position_embeddings 256",
    ),
}


@pytest.mark.parametrize("name", BAD_PRETRAININGS)
def test_a_bad_pretraining_is_refused_before_it_begins(name, corpus, tmp_path):
    fields, said = BAD_PRETRAININGS[name]
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=said):
        pretrain(pretraining(corpus, tmp_path / "run", **fields(corpus, tmp_path / "in")))
    assert names(tmp_path) == ["in"]


def test_fresh_begins_anew_and_a_bad_config_removes_nothing(trained, corpus, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    with pytest.raises(ValueError, match="no data.folder given"):
        pretrain(pretraining(corpus, tmp_path / "run", fresh=True, data=rows_of()))
    assert names(tmp_path / "run") == names(trained.folder)
    again = pretrain(pretraining(corpus, tmp_path / "run", fresh=True, seed=1, num_steps=2)).summary
    assert again["num_steps"] == 2 and again["first_loss"] != trained.summary["first_loss"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="not a run folder"):
            pretrain(pretraining(corpus, tmp_path / "precious", fresh=fresh))
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"


def test_a_loss_of_ones_own(corpus, tmp_path):
    """Next-token cross entropy with the z-loss of PaLM (arXiv 2204.02311, section 5), which keeps logits small."""

    def loss(params, frozen, batch, rng):
        out = decoder.logits(
            params, batch.tokens, config=SMALL, positions_BT=batch.positions, segments_BT=batch.segments
        )
        log_z = jax.nn.logsumexp(out, axis=-1)
        nll = log_z - jnp.take_along_axis(out, batch.targets[..., None], axis=-1)[..., 0]
        z_loss = jnp.sum(batch.loss_mask * log_z**2)
        nll = jnp.sum(batch.loss_mask * nll)
        return LossOutput(nll + 1e-4 * z_loss, jnp.sum(batch.loss_mask), {"nll": nll, "log_z_squared": z_loss})

    mesh = sharding.make_mesh()
    optimizer = make_optimizer(AdamW(peak_lr=1e-2), Constant(), num_steps=8)
    params = decoder.init(SMALL, jax.random.key(0))
    state = init_state(params, optimizer, mesh=mesh, axes=decoder.logical_axes(SMALL))
    data = batches(open_rows(corpus / "tokens", seq_len=32, packing="concat", seed=0), batch_size=8)
    step = make_step(loss, optimizer, mesh=mesh)
    with open_run(tmp_path / "run", {"loss": "z"}) as run:
        train(state, data, step, num_steps=8, tracker=run)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["nll"] < rows[0]["nll"] - 1 and rows[0]["log_z_squared"] > 1
    for row in rows:
        np.testing.assert_allclose(row["loss"], row["nll"] + 1e-4 * row["log_z_squared"], rtol=1e-5)
    assert step.num_traces == 1


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def test_what_a_fine_tuning_leaves(tuned, trained, capsys):
    assert {"adapter", "architecture", "checkpoints", "complete.json", "model"} <= set(names(tuned.folder))
    assert "base" not in names(tuned.folder)
    summary = tuned.summary
    assert summary["loss"] < summary["first_loss"] - 1 and (summary["method"], summary["num_left_out"]) == ("lora", 0)
    assert summary["base"] == str(trained.folder)
    base, adapted = open_model(trained.folder), open_model(tuned.folder / "adapter")
    assert same_params(base.params, adapted.params) and adapted.lora is not None
    merged = open_model(tuned.folder)
    assert merged.lora is None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.params, merge(base.params, adapted.lora)
    )
    both = f"{trained.folder}+{tuned.folder / 'adapter'}"
    np.testing.assert_allclose(logits(merged, ROWS), logits(open_model(both), ROWS), atol=2e-4)
    # A pre-training goes on from both as well.
    further, _ = initial_params(pretraining(tuned.folder, tuned.folder, init=both), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), further, merged.params)
    step = open_model(f"{tuned.folder}@12")
    assert same_params(step.lora.weights, adapted.lora.weights)
    assert not same_params(open_model(f"{tuned.folder}@8").lora.weights, adapted.lora.weights)


def test_it_answers_what_it_was_taught(tuned, trained):
    """The fine-tuned model gives the learned answers more probability than its base does."""
    from internjax.text import chat
    from internjax.text.chat import Message

    def learned_logprob(model):
        total = 0.0
        for asked, answered in QUESTIONS[:4]:
            ids, mask = chat.render([Message("user", asked), Message("assistant", answered)], model.tokenizer)
            logprobs = jax.nn.log_softmax(logits(model, np.array([ids]))[0])
            total += sum(float(logprobs[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t])
        return total

    assert learned_logprob(open_model(tuned.folder)) > learned_logprob(open_model(trained.folder)) + 20


def test_a_fine_tuning_is_complete_or_refused_like_any_run(tuned, trained, corpus, capsys, monkeypatch):
    config = finetuning(corpus, trained.folder, tuned.folder)
    assert finetune(config) == tuned and "is complete (--fresh runs it anew)" in capsys.readouterr().out
    pushed = []
    monkeypatch.setattr(stage, "push", lambda folder, name: pushed.append((folder, name)))
    assert finetune(dataclasses.replace(config, push="lab/mine")) == tuned
    assert pushed == [(tuned.folder / "model", "lab/mine")]
    with pytest.raises(ValueError, match="lora.rank: 4 now, 16 in the folder"):
        finetune(dataclasses.replace(config, lora=LoraConfig(rank=4)))


def test_all_parameters_and_epochs(trained, corpus, tmp_path):
    config = finetuning(corpus, trained.folder, tmp_path / "run", method="full", num_steps=None, num_epochs=4.0)
    done = finetune(config)
    assert done.summary["num_steps"] == round(4 * done.summary["num_rows"] / 8) > 4
    assert done.summary["loss"] < done.summary["first_loss"] - 1
    assert {"adapter", "base"}.isdisjoint(names(done.folder))
    steps = f"{done.folder}@{done.summary['num_steps']}"
    assert same_params(open_model(done.folder).params, open_model(steps).params)


def test_without_merging_the_adapter_is_the_model_and_what_is_too_long_is_left_out(trained, corpus, tmp_path, capsys):
    rows = [GOOD] * 3 + [{"prompt": "1 + 1?", "completion": "2 " * 100}]
    how = {"merge": False, "num_steps": 2} | chats(tmp_path, rows)
    done = finetune(finetuning(corpus, trained.folder, tmp_path / "run", **how))
    assert done.summary["num_left_out"] == 1
    assert "1 conversations are longer than 64 tokens and were left out" in capsys.readouterr().err
    assert "model" not in names(done.folder)
    model = open_model(done.folder)
    adapter = load_adapter(done.folder / "adapter", model_config=model.config)
    assert adapter.config == LoraConfig() and same_params(model.lora.weights, adapter.weights)


@pytest.mark.parametrize("source", ["adapter", "checkpoint"])
def test_an_adapter_on_what_is_no_plain_folder_has_its_base_written(source, tuned, trained, corpus, tmp_path):
    model = {"adapter": f"{trained.folder}+{tuned.folder / 'adapter'}", "checkpoint": f"{trained.folder}@10"}[source]
    done = finetune(finetuning(corpus, model, tmp_path / "run", num_steps=2))
    assert "base" in names(done.folder)
    wanted, base = open_model(tuned.folder if source == "adapter" else model), open_model(done.folder / "base")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), base.params, wanted.params)
    assert same_params(open_model(done.folder / "adapter").params, base.params)
    np.testing.assert_allclose(
        logits(open_model(done.folder / "adapter"), ROWS), logits(open_model(done.folder), ROWS), atol=2e-4
    )


def chats(tmp_path, rows):
    path = tmp_path / "in" / "chats.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return dict(data=(str(path),))


GOOD = {"prompt": "1 + 1?", "completion": "2"}
BAD_FINETUNINGS = {
    "no model": (lambda c, t: dict(model=""), "no model given"),
    "a missing model": (lambda c, t: dict(model=str(t / "nowhere")), "no model"),
    "no data": (lambda c, t: dict(data=()), "no data given; name at least one file"),
    "a missing file": (lambda c, t: dict(data=(str(c / "nowhere.jsonl"),)), "no such file or folder.*nowhere.jsonl"),
    "an empty file": (lambda c, t: chats(t, []), "is empty: it has no row"),
    "rows of no format": (lambda c, t: chats(t, [{"ask": 1}]), "chats.jsonl:1: fields ask fit no known format"),
    "a line that is no JSON": (
        lambda c, t: chats(t, [GOOD, "{", GOOD]),
        "chats.jsonl:2: not valid JSON.*bad_rows=skip",
    ),
    "a row that is no conversation": (
        lambda c, t: chats(t, [GOOD, {"prompt": "q"}, "[]"]),
        r"chats.jsonl:2: not a valid completion row: field 'completion' is missing \(and 1 more rows\)",
    ),
    "only bad rows, skipped": (
        lambda c, t: chats(t, ["{"]) | dict(reading=Reading(bad_rows="skip", cache=str(t / ".tokens"))),
        "chats.jsonl:1: not valid JSON",
    ),
    "rows longer than the model, before its weights are read": (
        lambda c, t: dict(model=weightless(t / "m", load_tokenizer(c / "tokenizer")), seq_len=4096),
        "longer than the model's max_position_embeddings 256",
    ),
    "a name that nothing is pushed to": (lambda c, t: dict(push="mine"), "pushed to hf:ORG/NAME"),
    "conversations longer than a row": (lambda c, t: dict(seq_len=4), "give a longer seq_len"),
    "an unknown target": (
        lambda c, t: dict(lora=LoraConfig(targets=("query", "nose"))),
        "adapter targets must be among",
    ),
}


@pytest.mark.parametrize("name", BAD_FINETUNINGS)
def test_a_bad_fine_tuning_is_refused_before_it_begins(name, trained, corpus, tmp_path):
    fields, said = BAD_FINETUNINGS[name]
    with pytest.raises(ValueError, match=said):
        finetune(finetuning(corpus, trained.folder, tmp_path / "run", **fields(corpus, tmp_path)))
    assert "run" not in names(tmp_path)


def test_a_fine_tuning_that_broke_off_goes_on(tuned, trained, corpus, tmp_path):
    def breaks(state, step):
        raise KeyboardInterrupt

    config = finetuning(corpus, trained.folder, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        finetune(config, callbacks=[Every(9, breaks)])
    assert open_model(f"{tmp_path / 'run'}@8").lora is not None
    assert weights_of(finetune(config).folder) == weights_of(tuned.folder)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tuned.folder / "metrics.jsonl").read_bytes()


def test_checkpoints_that_are_kept(trained):
    assert names(trained.folder / "checkpoints") == ["10", "12"]
    assert CheckpointConfig().max_to_keep == 2
