"""The loop: rows, order of the data, callbacks, the guard, traces, what ends a run early."""

import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.train.batch import Batch
from internjax.train.checkpoint import CheckpointConfig, committed_steps, open_checkpoints
from internjax.train.guard import Guard
from internjax.train.loop import Every, train
from internjax.train.losses import LossOutput
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.profile import ProfileConfig
from internjax.train.step import init_state, make_step
from internjax.train.tracking import Run, TrackingConfig, open_run, read_rows
from internjax.train.watch import Fed, Watch

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


def timing(folder):
    """The rows of the starts, events by name, and the rows of steps."""
    rows = read_rows(folder / "timing.jsonl")
    assert all(row.pop("at") > 1.7e9 for row in rows)
    events = {row["event"]: row for row in rows if "event" in row}
    return events, [row for row in rows if "event" not in row]


def test_times_leave_compilation_out_and_count_real_tokens(tmp_path):
    with quiet(tmp_path / "run") as run:
        train(new_state(), data, make_step(loss, OPTIMIZER), num_steps=6, tracker=run)
    events, steps = timing(tmp_path / "run")
    assert list(events) == ["start", "compile", "end"] and events["end"]["reason"] == "complete"
    assert events["compile"]["step"] == 1 and "tokens_per_second" not in events["compile"]
    assert [row["step"] for row in steps] == [2, 3, 4, 5, 6]
    assert {row["tokens"] for row in steps} == {4 * 6}  # padding is not throughput
    assert all(0 <= row["input_wait"] <= row["seconds"] < events["compile"]["seconds"] for row in steps)
    assert all(row["host_memory_bytes"] > 1e7 and "mfu" not in row for row in steps)


def test_a_row_of_times_covers_the_steps_since_the_last_one(tmp_path):
    with quiet(tmp_path / "run", log_every=4) as run:
        train(new_state(), data, make_step(loss, OPTIMIZER), num_steps=10, tracker=run)
    _, steps = timing(tmp_path / "run")
    assert [(row["step"], row["steps"], row["tokens"]) for row in steps] == [(4, 3, 72), (8, 4, 96), (10, 2, 48)]


def test_a_step_that_ended_before_a_busy_host_looked_has_no_speed(tmp_path):
    """Else it would have taken microseconds: millions of tokens per second, and an MFU beyond 100 %."""
    batch, busy = batch_at(0), threading.Event()
    metrics = {"loss": jnp.ones(()), "grad_norm": jnp.ones(()), "weight": jnp.ones(()), "finite": jnp.array(True)}
    with quiet(tmp_path / "run") as run:
        watch = Watch(run, 4, peak_flops=1e6)
        watch.start(0, restore_seconds=None)
        watch._clock.submit(busy.wait)
        flights = [
            watch.launched(
                step, step - 1, metrics, Fed(batch, 24, 1e3, 0.0, 0.0), started=time.perf_counter(), compiles=False
            )
            for step in (1, 2, 3)
        ]
        busy.set()
        for flight in flights:
            watch.write(flight, watch.read(flight))
        watch.end()
    _, steps = timing(tmp_path / "run")
    assert [row["step"] for row in steps] == [1, 2, 3] and {row["tokens"] for row in steps} == {24}
    assert ["tokens_per_second" in row for row in steps] == ["mfu" in row for row in steps] == [True, False, False]


def test_waiting_for_data_is_told_from_computing(tmp_path):
    def slow(position):
        for batch in data(position):
            time.sleep(0.1)  # much longer than a step takes on a busy machine too
            yield batch

    with quiet(tmp_path / "run") as run:
        train(new_state(), slow, make_step(loss, OPTIMIZER), num_steps=4, tracker=run)
    _, steps = timing(tmp_path / "run")
    waited, seconds = (sum(row[name] for row in steps) for name in ("input_wait", "seconds"))
    assert waited > 0.5 * seconds and seconds > 3 * 0.09


def test_a_wait_while_the_device_worked_is_not_counted_beside_what_came_after(tmp_path):
    """The batch of step 2 came before the device was done with step 1; then a callback ran. That row has the time."""
    metrics = {"loss": jnp.ones(()), "grad_norm": jnp.ones(()), "weight": jnp.ones(()), "finite": jnp.array(True)}
    with quiet(tmp_path / "run") as run:
        watch = Watch(run, 3)
        watch.start(0, restore_seconds=None)
        came = time.perf_counter()
        for step in (1, 2, 3):
            came = came if step < 3 else time.perf_counter()
            started = time.perf_counter()
            fed = Fed(batch_at(0), 24, 0.0, wait=0.5, came=came)
            flight = watch.launched(step, step - 1, metrics, fed, started=started, compiles=False)
            watch.write(flight, watch.read(flight))
        watch.end()
    _, (_, second, third) = timing(tmp_path / "run")
    assert second["input_wait"] == 0 and 0 < third["input_wait"] < 0.5


def test_mfu_is_flops_over_time_and_peak(tmp_path, capsys):
    def flops(batch):
        assert isinstance(batch.tokens, np.ndarray)  # of what this process reads
        return 1e6

    with quiet(tmp_path / "run", log_every=4) as run:
        step = make_step(loss, OPTIMIZER)
        train(new_state(), data, step, num_steps=8, tracker=run, flops=flops, peak_flops=1e12)
    _, steps = timing(tmp_path / "run")
    assert [row["steps"] for row in steps] == [3, 4]
    for row in steps:
        assert row["mfu"] == pytest.approx(row["steps"] * 1e6 / row["seconds"] / 1e12, rel=0.05, abs=1e-5)


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
    assert seen == [(3, 3), (6, 6), (7, 7)]  # the last step is looked at as well
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "norm" in row] == [3, 6, 7] and len(rows) == 7
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
    incident = read_rows(tmp_path / "run" / "incidents.jsonl")[0]
    assert (incident["step"], incident["position"], incident["incident"]) == (6, 5, "not_finite")


def test_skipped_batches_are_reported_with_their_documents_and_change_nothing(tmp_path, capsys):
    bad = {4, 5, 9}

    def poisoned(position):
        for batch in data(position):
            yield batch._replace(loss_mask=np.full_like(batch.loss_mask, np.inf)) if position in bad else batch
            position += 1

    seen = []

    def watch(state, step):
        seen.append(jax.device_get(state.trainable["kernel"]))

    def run_to(folder, *stops, max_skipped=2):
        for stop in stops:
            with quiet(folder) as run, open_checkpoints(run.checkpoints, CheckpointConfig(every=5)) as checkpoints:
                state = train(
                    new_state(),
                    poisoned,
                    make_step(loss, OPTIMIZER),
                    num_steps=stop,
                    checkpoints=checkpoints,
                    tracker=run,
                    callbacks=[Every(1, watch)],
                    guard=Guard(not_finite="skip", max_skipped=max_skipped),
                    describe=lambda position: [f"tokens document {position}"],
                )
        return jax.device_get((state.trainable, state.opt_state))

    whole = run_to(tmp_path / "whole", 12)
    np.testing.assert_array_equal(seen[4], seen[3])
    np.testing.assert_array_equal(seen[5], seen[3])
    assert (seen[6] != seen[5]).any() and all(np.isfinite(kernel).all() for kernel in seen)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["loss"] is None] == [5, 6, 10] and len(rows) == 12
    incidents = read_rows(tmp_path / "whole" / "incidents.jsonl")
    assert [row["position"] for row in incidents] == [4, 5, 9]
    assert incidents[0]["documents"] == ["tokens document 4"] and incidents[0]["loss"] == "nan"
    assert capsys.readouterr().err.count("The batch is skipped") == 3
    # Cut in the middle of the two bad batches, and behind the third.
    jax.tree.map(np.testing.assert_array_equal, run_to(tmp_path / "cut", 5, 8, 10, 12), whole)
    for name in ("metrics.jsonl", "incidents.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for folder, stops in (("strict", [12]), ("strict_cut", [5, 12])):
        with pytest.raises(
            FloatingPointError, match="step 6 .* data position 5: tokens document 5.* 2th step in a row"
        ):
            run_to(tmp_path / folder, *stops, max_skipped=1)


def test_a_spike_is_reported_the_same_after_a_resume(tmp_path, capsys):
    def spiky(position):
        for batch in data(position):
            far = batch.targets + 100 if position in (15, 18) else batch.targets
            yield batch._replace(targets=far)
            position += 1

    calm = make_optimizer(AdamW(peak_lr=1e-4), Cosine(warmup_steps=2), num_steps=20)

    def run_to(folder, *stops):
        for stop in stops:
            with (
                quiet(folder, log_every=2) as run,
                open_checkpoints(run.checkpoints, CheckpointConfig(every=7)) as checkpoints,
            ):
                state = init_state({"kernel": np.zeros(16, np.float32)}, calm, seed=0)
                train(
                    state,
                    spiky,
                    make_step(loss, calm),
                    num_steps=stop,
                    checkpoints=checkpoints,
                    tracker=run,
                    guard=Guard(spike_window=8),
                    describe=lambda position: [f"tokens document {position}"],
                )

    run_to(tmp_path / "whole", 20)
    run_to(tmp_path / "cut", 14, 16, 20)
    incidents = (tmp_path / "whole" / "incidents.jsonl").read_bytes()
    assert (tmp_path / "cut" / "incidents.jsonl").read_bytes() == incidents
    rows = [json.loads(line) for line in incidents.splitlines()]
    # Step 16 is even and logged; step 19 is not logged, and higher, so that it is told although it follows closely.
    assert (rows[0]["step"], rows[0]["position"], rows[0]["incident"]) == (16, 15, "spike")
    assert {row["position"] for row in rows} <= {15, 18} and rows[0]["documents"] == ["tokens document 15"]
    assert rows[0]["z"] > 8 and rows[0]["loss"] > 100 * rows[0]["median"]
    assert "step 16 has a loss spike" in capsys.readouterr().err


def test_chosen_steps_are_traced(tmp_path, capsys):
    with open_run(tmp_path / "run", {}, tracking=TrackingConfig(wandb="disabled", progress="lines")) as run:
        step, profile = make_step(loss, OPTIMIZER), ProfileConfig(start=3, steps=2)
        train(new_state(), data, step, num_steps=6, tracker=run, profile=profile)
    traces = [path.name for path in (tmp_path / "run" / "profile").rglob("*") if path.is_file()]
    assert any(name.endswith(".xplane.pb") for name in traces) and "perfetto_trace.json.gz" in traces
    assert "steps 3 to 4 are traced" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the run has 6"):
        train(new_state(), data, step, num_steps=6, tracker=run, profile=ProfileConfig(start=5, steps=3))
    with pytest.raises(ValueError, match="needs a run folder"):
        train(new_state(), data, step, num_steps=6, profile=ProfileConfig(start=2))
    with pytest.raises(ValueError, match="steps=3 traces nothing without profile.start"):
        ProfileConfig(steps=3)


def test_the_id_of_wandb_survives_the_loss_of_its_file(tmp_path, monkeypatch):
    """With the real wandb, offline: the run folder loses wandb_id.txt, the checkpoint still knows the id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids, summed = [], []
    monkeypatch.setattr(Run, "summarise", lambda self, numbers: summed.append(numbers))
    for stop in (4, 8):
        with (
            open_run(tmp_path / "run", {}, tracking=TrackingConfig(progress="none")) as run,
            open_checkpoints(run.checkpoints, CheckpointConfig(every=2)) as checkpoints,
        ):
            samples = [Every(4, lambda state, step: run.sample(step, [{"prompt": "a", "text": "b"}]))]
            step = make_step(loss, OPTIMIZER)
            train(
                new_state(),
                data,
                step,
                num_steps=stop,
                checkpoints=checkpoints,
                tracker=run,
                callbacks=samples,
            )
            ids.append(run.wandb_id)
        (tmp_path / "run" / "wandb_id.txt").unlink()
        # Folders are named by the second, and two lives can be over within one.
        (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-2*")
        kept.rename(kept.with_name(f"offline-run-{stop}-{ids[-1]}"))
    assert ids[0] is not None and ids[0] == ids[1]
    kept = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert len(kept) == 2 and all(list(path.parent.glob("files/media/table/samples_*")) for path in kept)
    assert [0 < numbers["goodput"] < 1 and "goodput/compile" in numbers for numbers in summed] == [True, True]


def test_what_is_shown_of_a_start_and_of_a_resumption(tmp_path, capsys):
    shown = []
    for stop in (2, 4):
        with (
            open_run(tmp_path / "run", {}, tracking=TrackingConfig(wandb="disabled", progress="lines")) as run,
            open_checkpoints(run.checkpoints) as checkpoints,
        ):
            step = make_step(loss, OPTIMIZER)
            train(new_state(), data, step, num_steps=stop, checkpoints=checkpoints, tracker=run)
        shown.append([line for line in capsys.readouterr().err.splitlines()])
    for lines in shown:
        compiling = lines.index("compiling the training step ...")
        assert any(line.startswith("compiled and took the first step in") for line in lines[compiling:])
    assert shown[1][0].startswith("resumed from step 2") and shown[1][-1].startswith("step 4/4  loss ")
    assert " tokens/s " in shown[1][-1] and " host memory " in shown[1][-1] and shown[1][-1].endswith(" 0:00 left")


def test_an_error_in_the_middle_leaves_its_name_and_the_times_so_far(tmp_path):
    def five(position):
        return iter([batch_at(p) for p in range(position, 5)])

    with quiet(tmp_path / "run", log_every=10) as run:
        with pytest.raises(ValueError, match="no batch at position 5"):
            train(new_state(), five, make_step(loss, OPTIMIZER), num_steps=20, tracker=run)
    events, steps = timing(tmp_path / "run")
    assert events["end"]["reason"] == "ValueError" and [(row["step"], row["steps"]) for row in steps] == [(3, 2)]


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
