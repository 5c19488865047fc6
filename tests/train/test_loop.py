"""The loop: rows, order of the data, callbacks, the guard, what ends a run early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.train.batch import Batch
from internjax.train.checkpoint import CheckpointConfig, committed_steps, open_checkpoints
from internjax.train.loop import Every, train
from internjax.train.losses import LossOutput
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import init_state, make_step
from internjax.train.tracking import TrackingConfig, open_run, read_rows

OPTIMIZER = make_optimizer(AdamW(peak_lr=0.1), Cosine(warmup_steps=2), num_steps=20)


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def loss(trainable, frozen, batch, rng):
    error = (trainable["kernel"][batch.tokens] - batch.targets) * batch.loss_mask
    return LossOutput(jnp.sum(error**2), jnp.sum(batch.loss_mask), {"error": jnp.sum(error)})


def batch_at(position: int, rows: int = 4, seq_len: int = 8) -> Batch:
    rng = np.random.default_rng([1, position])
    tokens = rng.integers(0, 16, size=(rows, seq_len)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, -2:] = 0
    return Batch(tokens, (tokens * 3) % 7, (segments > 0).astype(np.float32), segments, segments)


def data(position: int):
    while True:
        yield batch_at(position)
        position += 1


def new_state():
    return init_state({"kernel": np.zeros(16, np.float32)}, OPTIMIZER, seed=0)


def quiet(path, **how):
    return open_run(path, {}, tracking=TrackingConfig(wandb="disabled", progress="none", **how))


def test_the_loop_is_the_step_in_a_loop(tmp_path):
    wanted, step, rows = new_state(), make_step(loss, OPTIMIZER), []
    for position in range(10):
        wanted, metrics = step(wanted, batch_at(position))
        rows.append({"step": position + 1} | {name: value.item() for name, value in metrics.items()})
    with quiet(tmp_path / "run") as run:
        step = make_step(loss, OPTIMIZER)
        state = train(new_state(), data, step, num_steps=10, tracker=run)
    assert step.num_traces == 1 and int(state.step) == int(state.data_position) == 10
    jax.tree.map(np.testing.assert_array_equal, state.trainable, wanted.trainable)
    written = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert list(written[0]) == ["step", "loss", "grad_norm", "learning_rate", "weight", "error"]
    assert written == [{name: value for name, value in row.items() if name != "finite"} for row in rows]


def test_times_leave_compilation_out_and_count_real_tokens(tmp_path):
    with quiet(tmp_path / "run") as run:
        train(new_state(), data, make_step(loss, OPTIMIZER), num_steps=6, tracker=run)
    compiled, *steps = read_rows(tmp_path / "run" / "timing.jsonl")
    assert compiled["event"] == "compile" and compiled["step"] == 1 and "tokens_per_second" not in compiled
    assert [row["step"] for row in steps] == [2, 3, 4, 5, 6]
    assert {row["tokens"] for row in steps} == {4 * 6}  # padding is not throughput
    assert all(row["seconds"] < compiled["seconds"] for row in steps)


def test_rows_every_n_steps_and_at_the_end(tmp_path):
    with quiet(tmp_path / "run", log_every=4) as run:
        train(new_state(), data, make_step(loss, OPTIMIZER), num_steps=10, tracker=run)
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [4, 8, 10]


def test_callbacks_see_the_state_of_their_step_and_add_to_its_row(tmp_path):
    seen = []

    def watch(state, step):
        seen.append((step, int(state.step)))
        return {"norm": float(jnp.linalg.norm(state.trainable["kernel"]))}

    with quiet(tmp_path / "run") as run:
        callbacks = [Every(3, watch), Every(4, lambda state, step: None)]
        train(new_state(), data, make_step(loss, OPTIMIZER), num_steps=7, tracker=run, callbacks=callbacks)
    assert seen == [(3, 3), (6, 6)]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "norm" in row] == [3, 6] and len(rows) == 7
    with pytest.raises(ValueError, match="every 1 or more steps"):
        train(new_state(), data, make_step(loss, OPTIMIZER), num_steps=7, callbacks=[Every(0, watch)])


def poisoned(at: int, what: str):
    def batches(position):
        for batch in data(position):
            if position == at:
                mask = np.zeros_like(batch.loss_mask) if what == "mask" else np.full_like(batch.loss_mask, np.inf)
                batch = batch._replace(loss_mask=mask)
            yield batch
            position += 1

    return batches


@pytest.mark.parametrize("what, said", [("inf", "lower the learning rate"), ("mask", "nothing to learn")])
def test_a_step_that_is_not_finite_stops_the_run_and_names_step_and_batch(tmp_path, what, said):
    with quiet(tmp_path / "run") as run, open_checkpoints(run.checkpoints, CheckpointConfig(every=1)) as checkpoints:
        with pytest.raises(FloatingPointError, match="step 6 .* data position 5") as caught:
            train(
                new_state(),
                poisoned(5, what),
                make_step(loss, OPTIMIZER),
                num_steps=10,
                checkpoints=checkpoints,
                tracker=run,
            )
    assert said in str(caught.value)
    assert committed_steps(run.checkpoints)[-1] == 5  # the bad step was never saved
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_data_that_ends_early_is_an_error():
    def three(position):
        return iter([batch_at(p) for p in range(position, 3)])

    with pytest.raises(ValueError, match="no batch at position 3"):
        train(new_state(), three, make_step(loss, OPTIMIZER), num_steps=4)
    assert int(train(new_state(), three, make_step(loss, OPTIMIZER), num_steps=3).step) == 3


def test_a_batch_of_another_shape_is_refused_before_it_compiles_again():
    def growing(position):
        while True:
            yield batch_at(position, rows=4 if position < 2 else 5)
            position += 1

    step = make_step(loss, OPTIMIZER)
    with pytest.raises(ValueError, match="position 2 has the shapes"):
        train(new_state(), growing, step, num_steps=4)
    assert step.num_traces == 1


def test_a_resumed_run_ends_as_the_run_that_was_not_stopped(tmp_path):
    ends = {}
    for name, stops in (("whole", [12]), ("cut", [5, 8, 12])):
        for stop in stops:
            with (
                quiet(tmp_path / name) as run,
                open_checkpoints(run.checkpoints, CheckpointConfig(every=4)) as checkpoints,
            ):
                step = make_step(loss, OPTIMIZER)
                state = train(new_state(), data, step, num_steps=stop, checkpoints=checkpoints, tracker=run)
        ends[name] = jax.device_get((state.trainable, state.opt_state, state.step, state.data_position))
    jax.tree.map(np.testing.assert_array_equal, ends["cut"], ends["whole"])
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_a_run_that_is_at_its_end_does_nothing(tmp_path):
    def train_to(num_steps, batches):
        with quiet(tmp_path / "run") as run, open_checkpoints(run.checkpoints) as checkpoints:
            step = make_step(loss, OPTIMIZER)
            return train(new_state(), batches, step, num_steps=num_steps, checkpoints=checkpoints, tracker=run), step

    train_to(3, data)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    state, step = train_to(3, lambda position: iter([]))
    assert int(state.step) == 3 and step.num_traces == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
