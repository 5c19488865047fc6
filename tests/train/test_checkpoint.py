"""Checkpoints: what is written comes back bit by bit, and what is damaged, foreign or unfinished is named."""

import json
import logging
import os
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from internjax.train import checkpoint, checkpoint_orbax
from internjax.train.checkpoint import (
    CheckpointConfig,
    committed_steps,
    fingerprint,
    latest,
    open_checkpoints,
    problem,
    restore_params,
)
from internjax.train.checkpoint_files import ABOUT, CHECKSUMS, COMMITTED
from internjax.train.losses import LossOutput
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import init_state, make_step

OPTIMIZER = make_optimizer(AdamW(peak_lr=0.05), Constant(), num_steps=100)


def squared(trainable, frozen, batch, rng):
    size = sum(jnp.sum((leaf.astype(jnp.float32) - batch["x"]) ** 2) for leaf in jax.tree.leaves(trainable))
    return LossOutput(size + jax.random.uniform(rng), jnp.asarray(1.0), {})


def new_state(width: int = 4, *, frozen=None, seed: int = 3, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    trainable = {
        "layers": {"ffn": {"up": {"kernel": rng.normal(size=(2, 3, width)).astype(np.float32)}}},
        "norm": {"scale": jnp.asarray(rng.normal(size=(width,)), dtype)},
    }
    return init_state(trainable, OPTIMIZER, frozen=frozen, seed=seed)


def advance(state, num_steps: int, step=None):
    step = step or make_step(squared, OPTIMIZER)
    for _ in range(num_steps):
        state, _ = step(state, {"x": np.float32(1.0)})
    return state


def host(state):
    return jax.device_get((state.trainable, state.opt_state, jax.random.key_data(state.rng), state.data_position))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def written(folder, steps=(1, 2, 3), max_to_keep=3):
    """Writes a checkpoint after each of `steps` and returns what each state was."""
    state, step, seen = new_state(), make_step(squared, OPTIMIZER), {}
    with open_checkpoints(folder, CheckpointConfig(max_to_keep=max_to_keep)) as checkpoints:
        for index in range(1, max(steps) + 1):
            state = advance(state, 1, step)
            if index in steps:
                seen[index] = host(state)
                checkpoints.save(state)
    return seen


def an_array_file(folder, step):
    """The largest data file under `trainable`: where the weights are."""
    return max((folder / str(step) / "trainable").rglob("d/*"), key=lambda path: path.stat().st_size)


def restored(folder, target=None):
    with open_checkpoints(folder) as checkpoints:
        return checkpoints.restore(target or new_state(seed=9))


def test_a_state_comes_back_bit_by_bit(tmp_path):
    seen = written(tmp_path)
    state = restored(tmp_path)
    assert_same(host(state), seen[3])
    assert int(state.step) == 3 and state.trainable["norm"]["scale"].dtype == jnp.bfloat16
    # And it trains on as the state that was never away.
    assert_same(host(advance(state, 2)), host(advance(new_state(), 5)))


def test_saving_goes_on_while_the_arrays_are_donated(tmp_path):
    state, step = new_state(width=200_000), make_step(squared, OPTIMIZER)
    with open_checkpoints(tmp_path) as checkpoints:
        state = advance(state, 1, step)
        wanted = host(state)
        checkpoints.save(state)
        state = advance(state, 3, step)  # overwrites the very buffers that are being saved
    assert_same(host(restored(tmp_path, new_state(width=200_000))), wanted)


def test_arrays_are_written_as_they_are_to_several_files_and_the_compressed_ones_of_before_load(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_orbax, "FILE_BYTES", 100_000)
    state = new_state(width=100_000)
    parts = {"trainable": checkpoint._named(state.trainable), "optimizer": checkpoint._named(state.opt_state)}
    with open_checkpoints(tmp_path / "new") as checkpoints:
        checkpoints.save(state)
    about = json.loads((tmp_path / "new" / "0" / "about.json").read_text())
    with ocp.CheckpointManager(tmp_path / "old") as manager:  # as it was written until arrays were no longer compressed
        manager.save(0, args=ocp.args.Composite(**{name: ocp.args.StandardSave(part) for name, part in parts.items()}))
    before = tmp_path / "old" / "0"
    checkpoint.Checkpoints._commit(None, before, about, checkpoint.checksums(before, checkpoint.own_files(before)))
    for folder in ("old", "new"):
        assert_same(host(restored(tmp_path / folder, new_state(seed=9, width=100_000))), host(state))
        assert_same(jax.device_get(restore_params(tmp_path / folder).params), host(state)[0])
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))  # zeros at the start
    old, new = (
        [path.stat().st_size for path in (tmp_path / folder / "0" / "optimizer").rglob("d/*")]
        for folder in ("old", "new")
    )
    assert sum(old) < 0.1 * moments and sum(new) >= moments and len([size for size in new if size > 50_000]) > 2


def test_old_checkpoints_go_when_newer_ones_are_committed(tmp_path):
    written(tmp_path, steps=(1, 2, 3, 4, 5), max_to_keep=2)
    assert committed_steps(tmp_path) == [4, 5] and latest(tmp_path) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_nothing_committed_is_nothing(tmp_path):
    assert latest(tmp_path / "absent") is None and restored(tmp_path) is None
    with pytest.raises(ValueError, match="there is no checkpoint"):
        restore_params(tmp_path)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove])
def test_the_newest_good_checkpoint_is_used_and_the_skipped_one_named(tmp_path, damage, capsys):
    seen = written(tmp_path)
    victim = an_array_file(tmp_path, 3)
    damage(victim)
    assert_same(host(restored(tmp_path)), seen[2])
    said = capsys.readouterr().err
    assert "step 3 is skipped" in said and victim.name in said and "using the checkpoint of step 2" in said
    assert restore_params(tmp_path).step == 2


def append(path):
    with open(path, "ab") as file:
        file.write(b"\0")


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return folder, written(folder)


def files_of(folder, step):
    return sorted(
        str(path.relative_to(folder / str(step))) for path in (folder / str(step)).rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove, append])
def test_damage_to_any_file_is_found_and_named(three_steps, tmp_path, damage):
    """Every file of a checkpoint in turn, in every way; steps beside it stay good."""
    folder, _ = three_steps
    names = files_of(folder, 3)
    assert len(names) > 15
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in names:
        damage(copy / "3" / name)
        if name == COMMITTED and damage is os.remove:
            assert committed_steps(copy) == [1, 2]
        else:
            wrong = problem(copy, 3)
            assert wrong is not None, name
            assert name in wrong or (name == COMMITTED and CHECKSUMS in wrong), (name, wrong)
        assert problem(copy, 2) is None
        shutil.copy(folder / "3" / name, copy / "3" / name)
    assert problem(copy, 3) is None


def test_several_processes_find_the_same_damage_as_one(three_steps, tmp_path):
    folder, _ = three_steps
    shutil.copytree(folder, tmp_path / "copy")
    flip_a_bit(an_array_file(tmp_path / "copy", 3))
    shares = [problem(tmp_path / "copy", 3, share=(index, 3)) for index in range(3)]
    assert [wrong for wrong in shares if wrong] == [problem(tmp_path / "copy", 3)]
    assert all(problem(folder, 3, share=(index, 3)) is None for index in range(3))


def test_a_file_that_was_put_there_does_no_harm(three_steps, tmp_path):
    folder, seen = three_steps
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "3" / "notes.txt").write_text("the good one")
    assert_same(host(restored(tmp_path / "copy")), seen[3])


def half_copied(folder):
    for name in files_of(folder, 3)[::2]:
        os.remove(folder / "3" / name)
    (folder / "3" / COMMITTED).write_text((folder / "2" / COMMITTED).read_text())


def renamed(folder):
    shutil.rmtree(folder / "3")
    shutil.copytree(folder / "1", folder / "3")


def marked_by_another_step(folder):
    shutil.copy(folder / "2" / COMMITTED, folder / "3" / COMMITTED)


def another_model(folder):
    shutil.rmtree(folder / "3")
    with open_checkpoints(folder.parent / "other") as checkpoints:
        checkpoints.save(advance(new_state(width=7), 3))
    shutil.copytree(folder.parent / "other" / "3", folder / "3")


def another_run(folder):
    """The same architecture, trained under another config."""
    (folder.parent / "experiment.json").write_text("{}")
    (folder.parent / "b").mkdir()
    (folder.parent / "b" / "experiment.json").write_text('{"seed": 8}')
    shutil.rmtree(folder / "3")
    with open_checkpoints(folder.parent / "b" / "checkpoints") as checkpoints:
        checkpoints.save(advance(new_state(seed=8), 3))
    shutil.copytree(folder.parent / "b" / "checkpoints" / "3", folder / "3")


@pytest.mark.parametrize(
    "damage, said",
    [
        (half_copied, "COMMITTED|checksums.json|missing"),
        (renamed, "it was written as step 1, and its folder was renamed"),
        (marked_by_another_step, "checksums.json is not the one that was committed"),
        (another_model, r"up.kernel is float32\[2, 3, 7\] there, float32\[2, 3, 4\] here"),
        (another_run, "it was written by another run"),
    ],
)
def test_a_step_that_is_not_of_this_run_is_skipped_named_and_moved_aside(three_steps, tmp_path, capsys, damage, said):
    folder = tmp_path / "a" / "checkpoints"
    shutil.copytree(three_steps[0], folder)
    damage(folder)
    with open_checkpoints(folder, CheckpointConfig(max_to_keep=3)) as checkpoints:
        state = checkpoints.restore(new_state(seed=9))
        assert_same(host(state), three_steps[1][2])
        told = capsys.readouterr().err
        assert re.search(f"step 3 is skipped: .*{said}", told) and "using the checkpoint of step 2" in told
        checkpoints.save(advance(state, 1))
    assert problem(folder, 3) is None and (folder / "3.damaged").is_dir()
    assert_same(host(restored(folder)), three_steps[1][3])


def without_marks(folder):
    for path in folder.glob(f"*/{COMMITTED}"):
        path.unlink()


def gone(folder):
    shutil.rmtree(folder)
    (folder.parent / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)))


@pytest.mark.parametrize(
    "loss, said",
    [
        (without_marks, r"has the steps \[1, 2, 3\], but none of them has the file COMMITTED"),
        (gone, "no checkpoint, but metrics.jsonl beside it says that 7 steps were done"),
    ],
)
def test_lost_checkpoints_are_an_error_and_not_a_start_at_step_0(three_steps, tmp_path, loss, said):
    folder = tmp_path / "a" / "checkpoints"
    shutil.copytree(three_steps[0], folder)
    loss(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=f"{said}.*Nothing was removed"):
        open_checkpoints(folder, CheckpointConfig(every=3))
    assert sorted(folder.rglob("*")) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(three_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps[0] / "3", folder / "3")
    (folder / "3" / COMMITTED).unlink()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    with open_checkpoints(folder, CheckpointConfig(every=3)) as checkpoints:
        assert checkpoints.restore(new_state()) is None
    assert list(folder.iterdir()) == []


def test_checkpoints_that_do_not_load_are_an_error_not_a_fresh_start(tmp_path):
    written(tmp_path, steps=(1, 2))
    for step in (1, 2):
        flip_a_bit(an_array_file(tmp_path, step))
    with pytest.raises(ValueError, match=r"none loads \(step 2: .*; step 1: "):
        restored(tmp_path)
    assert committed_steps(tmp_path) == [1, 2]  # nothing was removed


def test_a_damaged_step_is_moved_aside_when_it_is_written_again(tmp_path):
    seen = written(tmp_path)
    flip_a_bit(an_array_file(tmp_path, 3))
    with open_checkpoints(tmp_path, CheckpointConfig(max_to_keep=3)) as checkpoints:
        state = advance(checkpoints.restore(new_state()), 1)
        checkpoints.save(state)
    assert_same(host(restored(tmp_path)), seen[3])
    assert (tmp_path / "3.damaged").is_dir() and problem(tmp_path, 3) is None


def test_a_good_step_is_never_overwritten(tmp_path):
    written(tmp_path, steps=(1,))
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="exists already"):
        checkpoints.save(advance(new_state(), 1))
    assert problem(tmp_path, 1) is None


def test_a_step_without_its_mark_does_not_exist_and_is_cleared_away(tmp_path):
    seen = written(tmp_path, steps=(1, 2))
    (tmp_path / "2" / COMMITTED).unlink()
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) == 1
    assert_same(host(restored(tmp_path)), seen[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "notes"]


@pytest.mark.parametrize(
    "target, said",
    [
        (lambda: new_state(width=5), r"layers.ffn.up.kernel is float32\[2, 3, 4\] there, float32\[2, 3, 5\] here"),
        (lambda: new_state(dtype=jnp.float32), r"norm.scale is bfloat16\[4\] there, float32\[4\] here"),
        (
            lambda: init_state({"other": np.ones(2, np.float32)}, OPTIMIZER),
            r"up.kernel is float32\[2, 3, 4\] there, absent here \(2 more",
        ),
        (lambda: init_state(new_state().trainable, optax.sgd(0.1)), "optimizer .* absent here"),
    ],
)
def test_a_checkpoint_of_another_shape_names_the_array(tmp_path, target, said):
    written(tmp_path, steps=(1,))
    with pytest.raises(ValueError, match=said) as caught:
        restored(tmp_path, target())
    assert "Run with the config that wrote it" in str(caught.value)


def test_adapters_keep_the_fingerprint_of_their_base_and_not_its_weights(tmp_path):
    base = {"kernel": jnp.arange(300_000, dtype=jnp.float32)}
    state = advance(new_state(frozen=base), 1)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 100_000  # the base has 1.2 MB
    assert restore_params(tmp_path).base == fingerprint(base)
    same = restored(tmp_path, new_state(frozen={"kernel": jnp.arange(300_000, dtype=jnp.float32)}))
    assert_same(host(same), host(state))
    other = {"kernel": base["kernel"].at[7].add(1.0)}
    with pytest.raises(ValueError, match="another frozen base"):
        restored(tmp_path, new_state(frozen=other))


def test_the_fingerprint_sees_names_dtypes_shapes_order_and_single_bits():
    x = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    trees = [
        {"a": x},
        {"b": x},
        {"a": x.reshape(6, 4)},
        {"a": x.astype(jnp.bfloat16)},
        {"a": x[::-1]},
        {"a": x.at[2, 3].set(jnp.nextafter(x[2, 3], jnp.inf))},
        {"a": -x},
        {"a": x.astype(jnp.uint8)},
        {"a": x > 3},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint({"a": np.asarray(x)}) == fingerprint({"a": x})


def test_params_alone_come_back_nested(tmp_path):
    seen = written(tmp_path)
    for step in (None, 2):
        given = restore_params(tmp_path, step)
        assert given.step == (step or 3) and given.base is None
        assert_same(jax.device_get(given.params), seen[given.step][0])
    with pytest.raises(ValueError, match=r"no checkpoint of step 9 .* there are: \[1, 2, 3\]"):
        restore_params(tmp_path, 9)


def test_reading_writes_nothing(tmp_path, caplog, monkeypatch):
    written(tmp_path, steps=(1,))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    restore_params(tmp_path)
    assert not caplog.records  # nor is it said that reading does not write
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


class FullDisk:
    """The Orbax manager on a disk that fills up: part of the step lies there when the write fails."""

    def __init__(self, manager, folder):
        self._manager, self._folder = manager, folder

    def __getattr__(self, name):
        return getattr(self._manager, name)

    def wait_until_finished(self):
        self._manager.wait_until_finished()
        if not (self._folder / "2").exists():
            return
        shutil.move(self._folder / "2", self._folder / "2.orbax-checkpoint-tmp")
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 6467584 bytes to file 11: No space left on device")


def test_a_full_disk_is_one_clear_error_that_loses_nothing(tmp_path):
    state, step = advance(new_state(), 1), make_step(squared, OPTIMIZER)
    with open_checkpoints(tmp_path) as checkpoints:
        wanted = host(state)
        checkpoints.save(state)
        checkpoints.wait()
        checkpoints._manager = FullDisk(checkpoints._manager, checkpoints.folder)
        state = advance(state, 1, step)
        checkpoints.save(state)
        with pytest.raises(OSError, match=r"step 2 .* the disk is full .* untouched \(1\)\. Make room"):
            checkpoints.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        # With room again, the same process can go on.
        checkpoints.save(state)
    assert committed_steps(tmp_path) == [1, 2]
    os.remove(an_array_file(tmp_path, 2))
    assert_same(host(restored(tmp_path)), wanted)


def test_a_read_only_folder_is_refused_before_training(tmp_path, monkeypatch):
    def refuse(**how):
        raise PermissionError(30, "Read-only file system", str(how["dir"]))

    # Root may write everywhere, so the file system's answer is given for it.
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="cannot be written: .*Read-only file system"):
        open_checkpoints(tmp_path / "checkpoints")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/checkpoints cannot be written"):
        open_checkpoints(tmp_path / "file" / "checkpoints")


def test_small_facts_of_the_run_travel_along(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.extra["wandb_run_id"] = "4f1c"
        checkpoints.save(advance(new_state(), 1))
        checkpoints.extra["wandb_run_id"] = "changed after the save"
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.extra["stale"] = 1
        checkpoints.restore(new_state())
        assert checkpoints.extra == {"wandb_run_id": "4f1c"}
        checkpoints.extra["array"] = np.ones(2)
        with pytest.raises(ValueError, match="extra must hold JSON values only"):
            checkpoints.save(advance(new_state(), 2))


def test_the_record_is_readable_without_us(tmp_path):
    written(tmp_path, steps=(2,))
    about = json.loads((tmp_path / "2" / ABOUT).read_text())
    assert about["step"] == 2 and about["data_position"] == 2 and about["rng"]["data"] == [0, 3]
    assert about["trainable"] == {"layers.ffn.up.kernel": [[2, 3, 4], "float32"], "norm.scale": [[4], "bfloat16"]}
    listed = json.loads((tmp_path / "2" / CHECKSUMS).read_text())
    there = {str(path.relative_to(tmp_path / "2")) for path in (tmp_path / "2").rglob("*") if path.is_file()}
    assert there - set(listed) == {CHECKSUMS, COMMITTED}


@pytest.mark.parametrize("config", [{"every": 0}, {"max_to_keep": 0}])
def test_a_config_that_cannot_be_meant_is_refused(config):
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointConfig(**config)
