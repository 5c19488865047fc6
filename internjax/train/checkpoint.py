"""Checkpoints that either load as they were written or say why not.

    FOLDER/STEP/                written by Orbax in the background: every array of `trainable` and of the optimizer
    FOLDER/STEP/about.json      step, data position, rng key, shape and dtype of every array, fingerprint of the base,
                                and the small facts of the run in `Checkpoints.extra`
    FOLDER/STEP/checksums.json  sha256 of every file above
    FOLDER/STEP/COMMITTED       sha256 of checksums.json, written last: a step without it does not exist

The frozen part of a state is not stored, only its fingerprint. A process that is killed at any moment leaves the
checkpoints that were committed, and nothing else that counts.

Arrays are written as they are: to compress them took two thirds of a commit's processor time and saved 8 % of the bytes
of float32 numbers. They go to files of limited size, whose checksums are then taken side by side. (Compressed
checkpoints, and those with one file for all arrays, were written before and load as well.)

In a job of several processes (one folder that all of them see) each writes its shards and takes the checksums of the
files it wrote; process 0 writes the records once all have told it theirs. Reading, each verifies a share of the files
and all use the step that all found good. A process that fails tells the others, and one that does not come is named
after `processes.TIMEOUT`: nobody waits for ever.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from internjax.train import processes
from internjax.train.checkpoint_files import (
    ABOUT,
    CHECKSUMS,
    COMMITTED,
    EXPERIMENT,
    checksums,
    clear_unfinished,
    committed_steps,
    experiment_of,
    own_files,
    problem,
    require_history,
    write_durably,
)
from internjax.train.checkpoint_orbax import handlers, multiprocessing, mute, restore_args, save_args
from internjax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often a run is saved, and how much of it is kept."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    max_to_keep: int = 2
    """Newest checkpoints that stay on disk; an older one is removed only after a newer one is committed."""

    def __post_init__(self):
        if self.every < 1 or self.max_to_keep < 1:
            raise ValueError(f"checkpoint.every and checkpoint.max_to_keep must be at least 1; given {self}")


class RestoredParams(NamedTuple):
    """The trained parameters of a checkpoint, its step, and the fingerprint of the frozen base (None without one)."""

    params: dict
    step: int
    base: str | None


def latest(folder: str | Path) -> int | None:
    """Returns the newest committed step under `folder`, or None."""
    return max(committed_steps(folder), default=None)


def _verified(folder: Path, step: int) -> str | None:
    """Returns what is wrong with a step, found by all processes together; the same on each."""
    wrong = problem(folder, step, share=(processes.index(), processes.count()))
    found = processes.gather("verify", json.dumps(wrong))
    return next((reason for reason in map(json.loads, found) if reason), None)


def _agreed_steps(folder: Path) -> list[int]:
    """Returns the committed steps as process 0 sees them: file systems show news to each machine at another time."""
    return processes.first("steps", lambda: committed_steps(folder))


def restore_params(folder: str | Path, step: int | None = None, *, shardings: Any = None) -> RestoredParams:
    """Returns the trained parameters of `step`, by default of the newest step whose files are as they were written.

    `shardings` is a tree of shardings like the parameters; without it they land whole on the first device. Raises
    ValueError when the step is not there, is damaged, or when no step is good.
    """
    folder = Path(folder).resolve()
    steps = _agreed_steps(folder)
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {folder}; there are: {steps or 'none'}")
    skipped = {}
    for candidate in [step] if step is not None else reversed(steps):
        wrong = _verified(folder, candidate)
        if wrong:
            skipped[candidate] = wrong
            continue
        _print_skipped(folder, candidate, skipped)
        about = json.loads((folder / str(candidate) / ABOUT).read_text())
        placed = {} if shardings is None else _named(shardings)
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=placed.get(name, first_device))
            for name, (shape, dtype) in about["trainable"].items()
        }
        together = multiprocessing(folder)
        mute()
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=together)
        with ocp.CheckpointManager(folder, options=options, item_handlers=handlers(together)) as manager:
            args = ocp.args.Composite(trainable=restore_args(abstract))
            leaves = manager.restore(candidate, args=args)["trainable"]
        return RestoredParams(_nested(leaves), candidate, about["base"])
    raise ValueError(_none_loads(folder, skipped))


class Checkpoints:
    """The checkpoints of one run, open for writing. Close it (or use `with`): saving goes on in the background.

    `extra` is a dict of JSON values that travels along: every `save` writes what it holds at that moment (W&B run id,
    tokens seen), and `restore` replaces its content by what the restored checkpoint holds.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig):
        self.folder = Path(folder).resolve()
        self.config = config
        self.extra: dict[str, Any] = {}
        self._damaged: set[int] = set()
        self._pending: concurrent.futures.Future | None = None
        self._base: tuple[Any, str | None] = (None, None)
        self._opened, self._save = 0, 0
        mute()
        processes.first("open checkpoints", self._make_folder)
        self._experiment = experiment_of(self.folder)
        self._manager = self._open_manager()
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def save(self, state: TrainState) -> None:
        """Starts to write `state`; returns when its arrays may be donated. A failure of the save before is raised."""
        self.wait()
        step = int(state.step)
        processes.first("make way", lambda: self._make_way(step))
        if step in self._damaged:
            self._damaged.remove(step)
            self._manager.reload()
        about = {
            "format": 1,
            "experiment": self._experiment,
            "step": step,
            "data_position": int(state.data_position),
            "rng": {
                "impl": str(jax.random.key_impl(state.rng)),
                "data": jax.device_get(jax.random.key_data(state.rng)).tolist(),
            },
            "base": self._base_of(state),
            "trainable": _shapes(_named(state.trainable)),
            "optimizer": _shapes(_named(state.opt_state)),
            "extra": _json_copy(self.extra),
        }
        args = ocp.args.Composite(
            trainable=save_args(_named(state.trainable)), optimizer=save_args(_named(state.opt_state))
        )
        self._save += 1
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._abandoned(step, error) from error
        self._pending = self._executor.submit(self._seal, step, about)

    def check(self) -> None:
        """Raises the failure of the save in the background, if it has ended with one; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed; raises OSError when it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, target: TrainState) -> TrainState | None:
        """Returns the newest good checkpoint on the shardings of `target`, or None when nothing was committed yet.

        `target` may be abstract; its frozen part is used as it is. Damaged steps are skipped and named. Raises
        ValueError when there are checkpoints but none loads, or when one has other shapes or another base than
        `target`.
        """
        self.wait()
        skipped, misfits = {}, []
        for step in reversed(_agreed_steps(self.folder)):
            wrong = _verified(self.folder, step)
            if not wrong:
                about = json.loads((self.folder / str(step) / ABOUT).read_text())
                wrong = self._misfit(about, target)
                misfits += [(step, wrong)] if wrong else []
            if wrong:
                skipped[step] = wrong
                self._damaged.add(step)
                continue
            _print_skipped(self.folder, step, skipped)
            state = self._load(step, about, target)
            self.extra.clear()
            self.extra.update(about.get("extra", {}))
            return state
        if misfits:
            step, wrong = misfits[0]
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} does not fit this run: {wrong}. Run with the config "
                "that wrote it, or start anew in another run folder (or with --fresh)."
            )
        if skipped:
            raise ValueError(_none_loads(self.folder, skipped))
        return None

    def close(self) -> None:
        """Waits for the last save and releases the threads; raises what that save raised."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._manager.close()

    def _seal(self, step: int, about: dict) -> None:
        """Waits for Orbax, then writes about, checksums and COMMITTED in this order, then removes what is too old."""
        path = self.folder / str(step)
        told, failure = {}, None
        try:
            self._manager.wait_until_finished()
            told["files"] = checksums(path, own_files(path))
        except Exception as error:
            told["error"], failure = f"{type(error).__name__}: {error}", error
        try:
            everyone = list(map(json.loads, processes.gather(f"save {self.folder}", json.dumps(told))))
            errors = [f"process {i}: {one['error']}" for i, one in enumerate(everyone) if "error" in one]
            if errors:
                raise failure or OSError("; ".join(errors))
            sums = {name: digest for one in everyone for name, digest in one["files"].items()}
            processes.first("commit", lambda: self._commit(path, about, sums))
        except Exception as error:
            raise self._abandoned(step, error) from error
        if processes.index() == 0:
            self._remove_old()

    def _commit(self, path: Path, about: dict, sums: dict[str, str]) -> None:
        write_durably(path / ABOUT, json.dumps(about, indent=1))
        sums = sums | checksums(path, [ABOUT])
        unknown = [
            str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and str(f.relative_to(path)) not in sums
        ]
        if unknown:
            raise OSError(f"{unknown[0]} in {path} was written by no process of this job")
        listing = json.dumps(sums, indent=1, sort_keys=True)
        write_durably(path / CHECKSUMS, listing)
        write_durably(path / COMMITTED, hashlib.sha256(listing.encode()).hexdigest())

    def _remove_old(self) -> None:
        good = [kept for kept in committed_steps(self.folder) if kept not in self._damaged]
        for old in good[: -self.config.max_to_keep]:
            # Without COMMITTED first, a kill half-way would leave a step that counts and does not load.
            (self.folder / str(old) / COMMITTED).unlink()
            shutil.rmtree(self.folder / str(old))

    def _abandoned(self, step: int, error: Exception) -> OSError:
        """Removes what was written of `step`; returns the error that tells a person about it."""
        # A manager whose save failed raises that failure for ever after.
        with contextlib.suppress(Exception):
            self._manager.close()
        if processes.index() == 0:
            clear_unfinished(self.folder)
        for tries_left in reversed(range(10)):
            try:
                self._manager = self._open_manager()
                break
            except FileNotFoundError:  # process 0 removes what is unfinished while this one looks through the folder
                if not tries_left:
                    raise
        kept = [kept for kept in committed_steps(self.folder) if kept not in self._damaged]
        full = any(sign in str(error) for sign in ("No space left", "RESOURCE_EXHAUSTED", "File too large", "quota"))
        free = shutil.disk_usage(self.folder).free / 2**20
        reason = f"the disk is full ({free:.0f} MiB free now)" if full else f"{type(error).__name__}: {error}"
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {reason}. Nothing of it is left; "
            f"the checkpoints before it are untouched ({', '.join(map(str, kept)) or 'none'}). "
            "Make room there (or make it writable) and run the same command again: it resumes from the newest one."
        )

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            require_history(self.folder, self.config.every)
            clear_unfinished(self.folder)
            # Saves come much later; a folder that cannot be written is an error now.
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(f"the checkpoint folder {self.folder} cannot be written: {error}") from error

    def _make_way(self, step: int) -> None:
        """Moves a damaged step aside; refuses to overwrite a good one."""
        path = self.folder / str(step)
        if (path / COMMITTED).exists() and step in self._damaged:
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        elif path.exists():
            raise ValueError(
                f"{path} exists already, and the run at step {step} would overwrite it. "
                "Move it away, or use another run folder."
            )

    def _open_manager(self) -> ocp.CheckpointManager:
        self._opened += 1
        together = multiprocessing(f"{self.folder} {self._opened}")
        # No step is deleted by Orbax: it counts steps, here only committed ones count.
        options = ocp.CheckpointManagerOptions(
            create=False,
            enable_async_checkpointing=True,
            save_root_metadata=False,
            multiprocessing_options=together,
            async_options=ocp.AsyncOptions(timeout_secs=int(processes.TIMEOUT), barrier_sync_fn=self._meet),
        )
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers(together))

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """The barrier of Orbax's background thread: ends early when another process has failed to write."""
        saves = f"save {self.folder}"

        def failed() -> str | None:
            told = {process: json.loads(text) for process, text in processes.peek(saves).items()}
            return next((f"process {i}: {one['error']}" for i, one in sorted(told.items()) if "error" in one), None)

        processes.gather(f"orbax {self.folder}", key, timeout=timeout_ms / 1000, failed=failed)

    def _base_of(self, state: TrainState) -> str | None:
        # The frozen tree is one object for a whole run, so it is read once.
        if self._base[0] is not state.frozen:
            self._base = (state.frozen, None if state.frozen is None else fingerprint(state.frozen))
        return self._base[1]

    def _misfit(self, about: dict, target: TrainState) -> str | None:
        """Returns how a checkpoint that is as it was written differs from what this run wants, or None."""
        for part, tree in (("trainable", target.trainable), ("optimizer", target.opt_state)):
            given, wanted = about[part], _shapes(_named(tree))
            differing = [name for name in given | wanted if given.get(name) != wanted.get(name)]
            if differing:
                name = differing[0]
                more = f" ({len(differing) - 1} more arrays differ)" if differing[1:] else ""
                return (
                    f"{part} {name} is {_shape_text(given.get(name))} there, {_shape_text(wanted.get(name))} here{more}"
                )
        base = self._base_of(target)
        if base != about["base"]:
            return (
                f"it was trained on another frozen base: its fingerprint is {about['base']}, that of the base given "
                f"now is {base}"
            )
        if self._experiment and about.get("experiment") not in (None, self._experiment):
            return (
                f"it was written by another run: the {EXPERIMENT} of that one was not the one in {self.folder.parent}"
            )
        return None

    def _load(self, step: int, about: dict, target: TrainState) -> TrainState:
        args = ocp.args.Composite(
            trainable=restore_args(_abstract(target.trainable)),
            optimizer=restore_args(_abstract(target.opt_state)),
        )
        loaded = self._manager.restore(step, args=args)

        def scalar(value, like):
            return jax.device_put(np.asarray(value, np.int32), like.sharding)

        # Typed keys cannot be put on the devices of other processes, a program may well make one there.
        data, impl = np.asarray(about["rng"]["data"], np.uint32), about["rng"]["impl"]
        key = jax.jit(lambda: jax.random.wrap_key_data(data, impl=impl), out_shardings=target.rng.sharding)()
        return TrainState(
            step=scalar(about["step"], target.step),
            trainable=_like(target.trainable, loaded["trainable"]),
            frozen=target.frozen,
            opt_state=_like(target.opt_state, loaded["optimizer"]),
            rng=key,
            data_position=scalar(about["data_position"], target.data_position),
        )


def open_checkpoints(folder: str | Path, config: CheckpointConfig = CheckpointConfig()) -> Checkpoints:
    """Returns the checkpoints in `folder`, made if it is not there; folders of steps never committed are removed."""
    return Checkpoints(folder, config)


def fingerprint(tree: Any) -> str:
    """Returns 16 hex digits that change when any bit, shape, dtype or name of a tree of arrays does.

    The bits are hashed on the devices that hold them, by sums that no sharding changes; only the sums are copied.
    """
    digest = hashlib.sha256()
    for name, leaf in _named(tree).items():
        sums = jax.device_get(_hash_bits(jnp.asarray(leaf)))
        digest.update(f"{name} {leaf.shape} {leaf.dtype} {sums.tolist()}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _hash_bits(x: jax.Array) -> jax.Array:
    """Returns two 32-bit sums over the mixed bits of `x` and the place of each element."""
    if x.dtype.itemsize == 8:
        raise ValueError(f"cannot fingerprint {x.dtype}: 64-bit arrays are not used here")
    x = x.astype(jnp.uint8) if x.dtype == bool or "int4" in x.dtype.name else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    # The finaliser of MurmurHash3: every input bit reaches every output bit.
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return jnp.stack([jnp.sum(mixed), jnp.sum(mixed * (2 * place + 1))])


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves by dotted path: layers.attention.query.kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _like(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns `leaves` in the structure of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in _named(tree)])


def _nested(leaves: Mapping[str, Any]) -> dict:
    tree: dict = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _abstract(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in _named(tree).items()}


def _json_copy(extra: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"extra must hold JSON values only (text, numbers, lists, objects); given {extra!r}: {error}"
        ) from error


def _shapes(leaves: Mapping[str, Any]) -> dict[str, list]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def _shape_text(shape: list | None) -> str:
    return "absent" if shape is None else f"{shape[1]}{shape[0]}"


def _print_skipped(folder: Path, used: int, skipped: Mapping[int, str]) -> None:
    for step, wrong in skipped.items():
        print(f"{folder}: the checkpoint of step {step} is skipped: {wrong}", file=sys.stderr)
    if skipped:
        print(f"{folder}: using the checkpoint of step {used}, the newest good one", file=sys.stderr)


def _none_loads(folder: Path, skipped: Mapping[int, str]) -> str:
    if not skipped:
        return f"there is no checkpoint in {folder}. Name a run folder that has one, or train first."
    listed = "; ".join(f"step {step}: {wrong}" for step, wrong in skipped.items())
    return (
        f"there are checkpoints in {folder} but none loads ({listed}). Nothing was started, so that nothing is "
        "overwritten. Put undamaged files there, or start anew in another run folder (or with --fresh)."
    )
