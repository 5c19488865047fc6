"""How Orbax is asked: how arrays are written, where its processes meet, and what it may say."""

import logging
import os
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

from internjax.train import processes

FILE_BYTES = 64 * 2**20
"""Roughly what a file of arrays grows to before the next one is begun: their checksums are taken side by side."""

PART_BYTES = 2**20
"""An array that several devices hold whole is written in parts, one by each, where a part has at least so many bytes:
every part is a program to compile."""


def multiprocessing(name: Any) -> ocp.options.MultiprocessingOptions:
    """Returns options by which Orbax's processes meet in the key-value store, with timeouts, and not on the devices.

    Its default is a collective of all devices, which its background thread would run in the midst of a training step.
    """
    if processes.count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        active_processes=set(range(processes.count())), barrier_sync_key_prefix=str(name).replace("/", "_")
    )


def handlers(together: ocp.options.MultiprocessingOptions) -> dict[str, ocp.PyTreeCheckpointHandler]:
    """Returns what writes and reads the two parts of a checkpoint. Parts that are compressed are read as well."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=PART_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {
        part: ocp.PyTreeCheckpointHandler(
            use_compression=False, multiprocessing_options=together, type_handler_registry=registry
        )
        for part in ("trainable", "optimizer")
    }


def save_args(leaves: dict[str, jax.Array]) -> ocp.args.PyTreeSave:
    """Returns the arguments that write one part."""
    return ocp.args.PyTreeSave(leaves, ocdbt_target_data_file_size=FILE_BYTES)


def restore_args(abstract: dict[str, jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
    """Returns the arguments that read one part back, each leaf onto its sharding."""
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def mute() -> None:
    """Keeps Orbax from telling a failed write dozens of times with full tracebacks (it is raised here, once), and from
    warning that what is opened for reading is not written."""
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
