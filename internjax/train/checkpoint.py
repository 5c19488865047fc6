"""Checkpoints that either load as they were written or say why not.

    FOLDER/STEP/                written by Orbax in the background: every array of `trainable` and of the optimizer
    FOLDER/STEP/about.json      step, data position, rng key, shape and dtype of every array, fingerprint of the base,
                                and the small facts of the run in `Checkpoints.extra`
    FOLDER/STEP/checksums.json  sha256 of every file above
    FOLDER/STEP/COMMITTED       sha256 of checksums.json, written last: a step without it does not exist

The frozen part of a state is not stored, only its fingerprint. A process that is killed at any moment leaves the
checkpoints that were committed, and nothing else that counts.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from internjax.train.step import TrainState

ABOUT, CHECKSUMS, COMMITTED = "about.json", "checksums.json", "COMMITTED"
_UNFINISHED = ".orbax-checkpoint-tmp"


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


def committed_steps(folder: str | Path) -> list[int]:
    """Returns the steps under `folder` that were written to their end, oldest first; nothing is read or verified."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.parent.name) for path in folder.glob(f"*/{COMMITTED}") if path.parent.name.isdigit())


def latest(folder: str | Path) -> int | None:
    """Returns the newest committed step under `folder`, or None."""
    return max(committed_steps(folder), default=None)


def problem(folder: str | Path, step: int) -> str | None:
    """Returns what is wrong with the files of a committed step, or None when each has the checksum it was given."""
    step_folder = Path(folder) / str(step)
    try:
        listing = (step_folder / CHECKSUMS).read_bytes()
        if hashlib.sha256(listing).hexdigest() != (step_folder / COMMITTED).read_text().strip():
            return f"{CHECKSUMS} is not the one that was committed"
        wanted = json.loads(listing)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    missing = [name for name in wanted if not (step_folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing" + (f" with {len(missing) - 1} more files" if missing[1:] else "")
    try:
        given = _checksums(step_folder, list(wanted))
    except OSError as error:
        return f"it cannot be read ({error})"
    changed = [name for name in wanted if given[name] != wanted[name]]
    return f"{changed[0]} has changed since it was written (its sha256 differs)" if changed else None


def restore_params(folder: str | Path, step: int | None = None, *, shardings: Any = None) -> RestoredParams:
    """Returns the trained parameters of `step`, by default of the newest step whose files are as they were written.

    `shardings` is a tree of shardings like the parameters; without it they land whole on the first device. Raises
    ValueError when the step is not there, is damaged, or when no step is good.
    """
    folder, steps = Path(folder).resolve(), committed_steps(folder)
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {folder}; there are: {steps or 'none'}")
    skipped = {}
    for candidate in [step] if step is not None else reversed(steps):
        wrong = problem(folder, candidate)
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
        with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
            args = ocp.args.Composite(trainable=ocp.args.StandardRestore(abstract))
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
        _mute_orbax()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()
        except OSError as error:
            raise OSError(f"the checkpoint folder {self.folder} cannot be written: {error}") from error
        self._manager = _open_manager(self.folder)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def save(self, state: TrainState) -> None:
        """Starts to write `state`; returns when its arrays may be donated. A failure of the save before is raised."""
        self.wait()
        step = int(state.step)
        path = self.folder / str(step)
        if (path / COMMITTED).exists() and step in self._damaged:
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            self._damaged.remove(step)
            self._manager.reload()
        elif path.exists():
            raise ValueError(
                f"{path} exists already, and the run at step {step} would overwrite it. "
                "Move it away, or use another run folder."
            )
        about = {
            "format": 1,
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
            trainable=ocp.args.StandardSave(_named(state.trainable)),
            optimizer=ocp.args.StandardSave(_named(state.opt_state)),
        )
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
        skipped = {}
        for step in reversed(committed_steps(self.folder)):
            wrong = problem(self.folder, step)
            if wrong:
                skipped[step] = wrong
                self._damaged.add(step)
                continue
            _print_skipped(self.folder, step, skipped)
            about = json.loads((self.folder / str(step) / ABOUT).read_text())
            self._require_fit(step, about, target)
            state = self._load(step, about, target)
            self.extra.clear()
            self.extra.update(about.get("extra", {}))
            return state
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
        try:
            self._manager.wait_until_finished()
            if jax.process_index() != 0:
                return
            path = self.folder / str(step)
            _write_durably(path / ABOUT, json.dumps(about, indent=1))
            names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
            listing = json.dumps(_checksums(path, names), indent=1)
            _write_durably(path / CHECKSUMS, listing)
            _write_durably(path / COMMITTED, hashlib.sha256(listing.encode()).hexdigest())
        except Exception as error:
            raise self._abandoned(step, error) from error
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
        self._clear_unfinished()
        self._manager = _open_manager(self.folder)
        kept = [kept for kept in committed_steps(self.folder) if kept not in self._damaged]
        full = any(sign in str(error) for sign in ("No space left", "RESOURCE_EXHAUSTED", "File too large", "quota"))
        free = shutil.disk_usage(self.folder).free / 2**20
        reason = f"the disk is full ({free:.0f} MiB free now)" if full else f"{type(error).__name__}: {error}"
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {reason}. Nothing of it is left; "
            f"the checkpoints before it are untouched ({', '.join(map(str, kept)) or 'none'}). "
            "Make room there (or make it writable) and run the same command again: it resumes from the newest one."
        )

    def _clear_unfinished(self) -> None:
        """Removes the folders of steps that were never committed."""
        for path in list(self.folder.iterdir()) if jax.process_index() == 0 else ():
            is_step = path.name.isdigit() or (_UNFINISHED in path.name and path.name.split(".")[0].isdigit())
            if is_step and not (path / COMMITTED).exists():
                _remove_while_written(path)

    def _base_of(self, state: TrainState) -> str | None:
        # The frozen tree is one object for a whole run, so it is read once.
        if self._base[0] is not state.frozen:
            self._base = (state.frozen, None if state.frozen is None else fingerprint(state.frozen))
        return self._base[1]

    def _require_fit(self, step: int, about: dict, target: TrainState) -> None:
        where = f"the checkpoint of step {step} in {self.folder}"
        remedy = "Run with the config that wrote it, or start anew in another run folder (or with --fresh)."
        for part, tree in (("trainable", target.trainable), ("optimizer", target.opt_state)):
            given, wanted = about[part], _shapes(_named(tree))
            differing = [name for name in given | wanted if given.get(name) != wanted.get(name)]
            if differing:
                name = differing[0]
                more = f" ({len(differing) - 1} more arrays differ)" if differing[1:] else ""
                raise ValueError(
                    f"{where} does not fit this run: {part} {name} is {_shape_text(given.get(name))} there, "
                    f"{_shape_text(wanted.get(name))} here{more}. {remedy}"
                )
        base = self._base_of(target)
        if base != about["base"]:
            raise ValueError(
                f"{where} was trained on another frozen base: its fingerprint is {about['base']}, that of the base "
                f"given now is {base}. {remedy}"
            )

    def _load(self, step: int, about: dict, target: TrainState) -> TrainState:
        args = ocp.args.Composite(
            trainable=ocp.args.StandardRestore(_abstract(target.trainable)),
            optimizer=ocp.args.StandardRestore(_abstract(target.opt_state)),
        )
        loaded = self._manager.restore(step, args=args)

        def scalar(value, like):
            return jax.device_put(value, like.sharding)

        key = jax.random.wrap_key_data(jnp.asarray(about["rng"]["data"], jnp.uint32), impl=about["rng"]["impl"])
        return TrainState(
            step=scalar(jnp.asarray(about["step"], jnp.int32), target.step),
            trainable=_like(target.trainable, loaded["trainable"]),
            frozen=target.frozen,
            opt_state=_like(target.opt_state, loaded["optimizer"]),
            rng=scalar(key, target.rng),
            data_position=scalar(jnp.asarray(about["data_position"], jnp.int32), target.data_position),
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


def _open_manager(folder: Path) -> ocp.CheckpointManager:
    # No step is deleted by Orbax: it counts steps, here only committed ones count.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, save_root_metadata=False)
    return ocp.CheckpointManager(folder, options=options)


def _mute_orbax() -> None:
    """Keeps Orbax from telling a failed write dozens of times with full tracebacks; it is raised here, once."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_from_orbax)  # the same filter is added once only
    if getattr(sys.unraisablehook, "__name__", "") != "_unraisable_but_of_orbax":
        shown = sys.unraisablehook

        def _unraisable_but_of_orbax(unraisable):
            # Writes that end after the first one failed find the event loop of the save gone.
            if "Event loop is closed" not in str(unraisable.exc_value):
                shown(unraisable)

        sys.unraisablehook = _unraisable_but_of_orbax


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname + record.getMessage()


def _remove_while_written(path: Path) -> None:
    """Removes a folder into which threads of a failed save may still be writing."""
    for _ in range(40):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)
    shutil.rmtree(path)


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


def _checksums(folder: Path, names: list[str]) -> dict[str, str]:
    def sha256(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        return dict(zip(names, pool.map(sha256, names)))


def _write_durably(path: Path, text: str) -> None:
    """Writes a whole file or none: a temporary one is synced to disk and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


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
