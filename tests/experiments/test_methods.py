"""Methods of fine-tuning are compared at equal steps, on text that none of them was trained on."""

import dataclasses

import pytest

from experiments.benchmarks import methods


def test_methods_are_compared_on_text_that_none_of_them_saw(monkeypatch):
    monkeypatch.setattr(methods, "BATCH_SIZE", 2)
    monkeypatch.setattr(methods, "SEQ_LEN", 16)
    texts = methods.read_texts()
    assert not set(texts.held_out[:2000].tobytes().split(b"\n\n")) & set(texts.learned.tobytes().split(b"\n\n"))
    assert len(texts.learned) > 8 * len(texts.held_out) > 10**5 and texts.code.max() < 256
    config = dataclasses.replace(
        methods.MODEL, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32
    )
    texts = texts._replace(held_out=texts.held_out[:600])
    base = methods.pretrain(config, texts.code, num_steps=2)
    found = {
        name: methods.train(config, methods.METHODS[name], base, texts, rate=1e-2, num_steps=3)
        for name in ("full", "pissa")
    }
    assert all(run.loss < run.first_loss for run in found.values())
    # PiSSA starts from the model itself.
    assert found["pissa"].first_loss == pytest.approx(found["full"].first_loss, abs=1e-4)
    assert 0 < found["pissa"].num_trained < found["full"].num_trained
    best = {name: {"best": run._asdict()} for name, run in found.items()}
    assert [line.split()[0] for line in methods.table(best).splitlines()[1:]] == sorted(
        found, key=lambda name: found[name].loss
    )
