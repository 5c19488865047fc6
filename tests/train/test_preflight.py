"""Preflight: a healthy run passes, and every planted fault is caught with its message."""

import dataclasses
import functools
import json
import shutil
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

from internjax import sharding
from internjax.kernels.attention import attention
from internjax.model import decoder
from internjax.model.config import TINY
from internjax.model.lora import LoraConfig, initialise
from internjax.model.quantize import Quantised
from internjax.sharding import MeshConfig
from internjax.text.tokenizer import train_tokenizer
from internjax.train import attention_probe, preflight, preview
from internjax.train.batch import Batch
from internjax.train.memory import Job
from internjax.train.preflight import Subject
from tests.weights import random_params

SMALL = dataclasses.replace(
    TINY, vocab_size=300, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is it? it is a tree <in> the park\n"] * 20, vocab_size=300)


@pytest.fixture(autouse=True)
def one_device_again():
    yield
    sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def packed(tokenizer, num_rows=4, T=32):
    """Rows of a question that is read and an answer that is learned, and padding."""
    question, answer = tokenizer.encode("what is it?\n"), tokenizer.encode("a tree <in> it")
    ids = question + answer
    n = len(ids) - 1
    tokens, targets, segments, positions = (np.zeros((num_rows, T), np.int32) for _ in range(4))
    mask = np.zeros((num_rows, T), np.float32)
    tokens[:, :n], targets[:, :n], segments[:, :n], positions[:, :n] = ids[:-1], ids[1:], 1, np.arange(n)
    mask[:, len(question) - 1 : n] = 1
    return Batch(tokens, targets, mask, positions, segments)


@pytest.fixture
def subject(tokenizer, tmp_path):
    job = Job(SMALL, batch_size=4, seq_len=32, mesh=MeshConfig(fsdp=1))
    manifests = {"tokens/a": {"tokenizer_sha256": tokenizer.fingerprint, "vocab_size": 300}}
    return Subject(
        job,
        packed(tokenizer),
        tokenizer=tokenizer,
        manifests=manifests,
        conversations=True,
        checkpoints=tmp_path / "run" / "checkpoints",
    )


def changed(subject, **changes):
    names = ("attention", "dtype", "num_heads", "window", "positions")
    model = {name: changes.pop(name) for name in names if name in changes}
    job = {name: changes.pop(name) for name in ("lora", "quantised", "batch_size", "accumulate") if name in changes}
    job = dataclasses.replace(subject.job, model=dataclasses.replace(subject.job.model, **model), **job)
    return dataclasses.replace(subject, job=job, **changes)


# All but the one that takes a second; the tests of attention and of the whole list run that as well.
QUICK = tuple(check for check in preflight.CHECKS if check.name != "attention")


def quick(subject):
    return preflight.run(subject, show=lambda text: None, checks=QUICK)


def fault(subject, name):
    """The message of the one check that fails."""
    checks = preflight.CHECKS if name == "attention" else QUICK
    with pytest.raises(ValueError, match="preflight found 1 problem:") as found:
        preflight.run(subject, show=lambda text: None, checks=checks)
    line = str(found.value).splitlines()[1]
    assert line.startswith(f"  1. {name}: "), line
    return line


def status(report):
    return {each.name: each.status for each in report.results}


@functools.cache
def params_of(config):
    return random_params(config, seed=1)


def test_a_healthy_run_passes_and_says_what_it_saw(subject, tmp_path):
    shown = []
    report = preflight.run(changed(subject, attention="chunked"), show=shown.append)
    assert status(report) == {
        "mesh": "passed",
        "memory": "skipped",
        "dtype": "passed",
        "attention": "passed",
        "adapters": "skipped",
        "tokens": "passed",
        "loss mask": "passed",
        "checkpoints": "passed",
    }
    (text,) = shown
    assert "chunked equals the reference on packed rows" in text and "cpu states no memory limit" in text
    assert "what is it?\n⟦a tree <in> it⟧" in text and len(report.preview) == 2
    assert not (tmp_path / "run").exists()  # nothing is written before the run has its folder
    (tmp_path / "run").mkdir()
    preview.keep(report, tmp_path / "run")
    assert (tmp_path / "run" / "preflight.txt").read_text() == text + "\n"
    page = (tmp_path / "run" / "preflight.html").read_text()
    assert "<mark>a tree &lt;in&gt; it</mark>" in page and "<in>" not in page and "http" not in page
    assert json.loads((tmp_path / "run" / "preflight.json").read_text())[0]["status"] == "passed"


def test_learned_text_is_coloured_in_a_terminal(subject):
    report = preflight.run(subject, show=lambda text: None, checks=())
    assert "\x1b[2mwhat is it?\n\x1b[0m\x1b[32ma tree <in> it\x1b[0m" in preview.text(report, colour=True)


def test_data_cannot_steer_the_terminal(subject, tokenizer):
    batch = packed(tokenizer)
    batch.targets[:, 2] = tokenizer.encode("\x1b")[0]
    report = preflight.run(dataclasses.replace(subject, batch=batch), show=lambda text: None, checks=())
    assert "\x1b" not in preview.text(report) and "\ufffd" in preview.text(report)


def planted(q, k, v, *, q_segments_BT, k_segments_BS, backend, **how):
    """A back end that ignores where documents end."""
    if backend != "xla":
        q_segments_BT, k_segments_BS, backend = None, None, "xla"
    return attention(q, k, v, q_segments_BT=q_segments_BT, k_segments_BS=k_segments_BS, backend=backend, **how)


def forward_only(q, k, v, *, backend, **how):
    """A back end whose backward pass forgets a factor."""
    out = attention(q, k, v, backend="xla", **how)
    return out if backend == "xla" else 0.5 * out + jax.lax.stop_gradient(0.5 * out)


def without(name):
    """A back end that ignores one of its arguments."""

    def wrong(q, k, v, *, backend, **how):
        return attention(q, k, v, backend="xla", **how | ({} if backend == "xla" else {name: None}))

    return wrong


@pytest.mark.parametrize(
    ("wrong", "said", "model"),
    [
        (planted, "other documents by", {}),
        (forward_only, "dq by 0.5", {}),
        # Longer than the rows that it is tried on.
        (without("window"), "output by", {"window": 4096}),
        (without("alibi_slopes_N"), "output by", {"positions": "alibi"}),
    ],
    ids=["documents", "gradient", "window", "alibi"],
)
def test_a_wrong_attention_back_end(subject, monkeypatch, wrong, said, model):
    monkeypatch.setattr(attention_probe, "attention", wrong)
    message = fault(changed(subject, attention="chunked", **model), "attention")
    assert said in message and "attention=chunked differs from the reference" in message and "Use attention=" in message


def test_the_reference_itself_is_held_to_documents(subject, monkeypatch):
    def blind(q, k, v, *, q_segments_BT, k_segments_BS, **how):
        return attention(q, k, v, q_segments_BT=None, k_segments_BS=None, **how)

    monkeypatch.setattr(attention_probe, "attention", blind)
    assert "(other documents by" in fault(subject, "attention")


def test_a_back_end_that_this_device_lacks(subject, monkeypatch):
    assert "cannot do" in fault(changed(subject, attention="cudnn"), "attention")
    monkeypatch.setattr(preflight.devices, "compute_capability", lambda device: (7, 5))
    message = fault(changed(subject, attention="cudnn_packed"), "attention")
    assert "attention=cudnn_packed needs compute capability 8.0 (Ampere or newer), and cpu has 7.5" in message


def test_a_dtype_that_this_device_lacks(subject, monkeypatch):
    quick(changed(subject, dtype="bfloat16"))
    monkeypatch.setattr(preflight.devices, "compute_capability", lambda device: (7, 5))
    quick(changed(subject, dtype="float16"))
    message = fault(changed(subject, dtype="bfloat16"), "dtype")
    assert "cpu (compute capability 7.5) has no bfloat16" in message and "float16 with a loss scale" in message


@pytest.mark.parametrize(
    ("mesh", "backend", "dtype", "model", "said"),
    [
        (MeshConfig(sequence=4, fsdp=2), "ring", "float32", {"window": 30}, " with a window of 30"),
        (MeshConfig(fsdp=4, tensor=2), "chunked", "bfloat16", {"positions": "alibi"}, " with ALiBi"),
    ],
    ids=["ring", "bfloat16"],
)
def test_attention_and_adapters_on_a_mesh(subject, mesh, backend, dtype, model, said):
    mesh = sharding.make_mesh(mesh)
    subject = changed(subject, attention=backend, dtype=dtype, mesh=mesh, lora=LoraConfig(rank=2), **model)
    params = jax.device_put(
        params_of(SMALL), sharding.shardings(decoder.logical_axes(SMALL), decoder.abstract_params(SMALL), subject.mesh)
    )
    report = preflight.run(dataclasses.replace(subject, params=params), show=lambda text: None)
    assert status(report)["attention"] == status(report)["adapters"] == "passed"
    (message,) = (each.message for each in report.results if each.name == "attention")
    assert f"equals the reference on packed rows{said}, within" in message


def test_adapters_that_change_something(subject, monkeypatch):
    params = params_of(SMALL)
    for kind in ({"kind": "dora"}, {"initialisation": "pissa"}, {}):
        subject = changed(subject, lora=LoraConfig(rank=2, **kind), params=params)
        report = quick(subject)
    assert "fresh adapters change no logit" in next(each.message for each in report.results if each.name == "adapters")

    def moved(config, params, rng):
        start = initialise(config, params, rng)
        return start._replace(weights=jax.tree.map(lambda x: x + 0.1, start.weights))

    monkeypatch.setattr(preflight, "initialise", moved)
    assert "the run would not start from its base" in fault(subject, "adapters")


def test_a_mask_that_learns_nothing(subject):
    nothing = subject.batch._replace(loss_mask=np.zeros_like(subject.batch.loss_mask))
    assert "nothing would be learned" in fault(dataclasses.replace(subject, batch=nothing), "loss mask")


def test_a_mask_that_learns_prompts_is_refused_for_conversations_only(subject):
    batch = subject.batch._replace(loss_mask=(subject.batch.segments > 0).astype(np.float32))
    everything = dataclasses.replace(subject, batch=batch)
    assert "prompts included" in fault(everything, "loss mask")
    quick(dataclasses.replace(everything, conversations=False))


def test_a_mask_on_padding(subject):
    batch = subject.batch._replace(loss_mask=np.ones_like(subject.batch.loss_mask))
    assert "padded positions" in fault(dataclasses.replace(subject, batch=batch), "loss mask")


def test_a_foreign_token_folder(subject):
    manifests = {"tokens/b": {"tokenizer_sha256": "f" * 64, "vocab_size": 300}}
    message = fault(dataclasses.replace(subject, manifests=manifests), "tokens")
    assert "tokens/b was written by the tokenizer ffffffffffff" in message and "write the folder anew" in message


def test_ids_beyond_the_model(subject):
    tokens = subject.batch.tokens.copy()
    tokens[1, 2] = 300
    beyond = dataclasses.replace(subject, batch=subject.batch._replace(tokens=tokens))
    assert "lie in 0..300, allowed are 0..299" in fault(beyond, "tokens")
    small = dataclasses.replace(subject.job, model=dataclasses.replace(SMALL, vocab_size=280))
    message = fault(dataclasses.replace(subject, job=small), "tokens")
    assert "the tokenizer has 300 ids, the model's embedding 280 rows" in message and "at least 300" in message


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small(subject, monkeypatch):
    one = preflight.checkpoint_bytes(subject.job)
    assert 3 * 4 * 20_000 < one < 3 * 4 * 60_000  # parameters and two moments in float32
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 2 * one - 1))
    assert "Free some space, or choose another --run folder" in fault(subject, "checkpoints")
    # A run that is resumed has its checkpoints already: one more must fit.
    for step in (10, 20):
        (subject.checkpoints / str(step)).mkdir(parents=True)
        (subject.checkpoints / str(step) / "COMMITTED").write_text("x")
    quick(subject)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, one - 1))
    fault(subject, "checkpoints")


def test_a_folder_that_cannot_be_written(subject, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", refuse)
    assert "(Permission denied), where checkpoints go" in fault(subject, "checkpoints")


def test_a_mesh_that_does_not_divide_names_all_of_it(subject):
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4))
    wide = changed(subject, mesh=mesh, batch_size=6, accumulate=2)
    with pytest.raises(ValueError) as found:
        preflight.run(wide, show=lambda text: None, checks=preflight.CHECKS[:1])
    message = str(found.value)
    assert "batch size 6 is not divided by data 1 x fsdp 2 x accumulate 2 = 4; take 4 or 8, or another mesh" in message
    assert "key/value heads 2 is not divided by tensor 4; take a mesh with 2 or another divisor of 2 there" in message
    assert "query heads" not in message and "vocabulary" not in message


def test_memory_is_held_against_the_device(subject, monkeypatch):
    monkeypatch.setattr(preflight, "memory_limit", lambda: 10**9)
    report = quick(subject)
    assert status(report)["memory"] == "passed"
    monkeypatch.setattr(preflight, "memory_limit", lambda: 300_000)
    assert "GiB given to jax per device. Recompute more (remat full)" in fault(subject, "memory")


def test_all_failures_come_together(subject, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10))
    nothing = subject.batch._replace(loss_mask=np.zeros_like(subject.batch.loss_mask))
    with pytest.raises(ValueError, match=r"preflight found 2 problems:\n  1\. loss mask: .*\n  2\. checkpoints: "):
        quick(dataclasses.replace(subject, batch=nothing))


def test_what_passed_is_remembered_and_what_failed_is_not(subject, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    chunked = changed(subject, attention="chunked")
    monkeypatch.setattr(attention_probe, "attention", planted)
    for _ in range(2):
        with pytest.raises(ValueError, match="attention: "):
            preflight.run(chunked, cache=cache, show=lambda text: None)
    monkeypatch.setattr(attention_probe, "attention", attention)
    first = preflight.run(chunked, cache=cache, show=lambda text: None)
    started = time.perf_counter()
    again = preflight.run(chunked, cache=cache, show=lambda text: None)
    assert time.perf_counter() - started < 2
    assert [each.name for each in first.results if each.cached] == ["mesh"]
    assert [each.name for each in again.results if each.cached] == ["mesh", "attention"]
    assert [each.message for each in first.results[:4]] == [each.message for each in again.results[:4]]
    # Another head size, another mask, and changed sources, are looked at anew.
    other = preflight.run(changed(chunked, num_heads=2), cache=cache, show=lambda text: None)
    assert not any(each.cached for each in other.results)
    masked = [preflight._attention_key(changed(chunked, **how)) for how in ({"window": 8}, {"positions": "alibi"})]
    assert len({preflight._attention_key(chunked), *masked}) == 3
    adapted = changed(chunked, lora=LoraConfig(rank=2))
    assert preflight._adapters_key(adapted) != preflight._adapters_key(changed(adapted, quantised=Quantised(group=16)))
    monkeypatch.setattr(preflight, "_sources", lambda: "changed")
    assert not any(each.cached for each in preflight.run(chunked, cache=cache, show=lambda text: None).results)


def test_half_a_cache_file_is_no_finding(subject, tmp_path):
    preflight.run(subject, cache=tmp_path, show=lambda text: None)
    for path in tmp_path.glob("*.json"):
        path.write_text("{")
    assert not any(each.cached for each in preflight.run(subject, cache=tmp_path, show=lambda text: None).results)
