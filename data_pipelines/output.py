"""The output folder of a chain: documents in the order in which they are to be learned, repositories, the ledger."""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines import chain
from data_pipelines.code import markdown, order_documents
from data_pipelines.document import SCHEMA, to_documents
from data_pipelines.ledger import regroup, save, summary, write_parquet
from data_pipelines.measures import counted
from internjax.hf.folder import new_folder

FILE_BYTES = 256 << 20
"""Text in a file of documents."""


def ordered_batches(shards: Sequence[chain.Shard], *, rows: int = 1024) -> Iterator[pa.RecordBatch]:
    """The documents that are left, each repository's code files in dependency order, a repository in memory at a time.

    A repository's files move among the places of that repository; other documents stay where they are.
    """
    whole, order = dependency_rows(shards)
    for start in range(0, len(order), rows):
        yield chain.fetch(whole, order[start : start + rows])


def dependency_rows(shards: Sequence[chain.Shard]) -> tuple[chain.Places, np.ndarray]:
    """The batches of all shards, and the numbers of the documents that are left in the order they are to have."""
    whole = chain.places([shard.documents for shard in shards])
    order = np.concatenate([np.zeros(0, np.int64), *chain.kept_rows(shards)])
    for places in code_repositories(whole, order).values():
        held = to_documents(chain.fetch(whole, order[places]))
        place_of = {id(document): place for document, place in zip(held, places.tolist(), strict=True)}
        order[places] = order[[place_of[id(document)] for document in order_documents(held)]]
    return whole, order


def code_repositories(whole: chain.Places, order: np.ndarray) -> dict[str, np.ndarray]:
    """Repository (field `repository` of meta) with code -> the places in `order` of its documents; sorted by name."""
    found: dict[str, list[int]] = defaultdict(list)
    with_code = set()
    for start in range(0, len(order), 1024):
        batch = chain.fetch(whole, order[start : start + 1024], columns=["domain", "meta"])
        for row, (domain, meta) in enumerate(zip(batch.column("domain").to_pylist(), batch.column("meta").to_pylist())):
            repository = json.loads(meta).get("repository") if '"repository"' in meta else None
            if repository:
                found[str(repository)].append(start + row)
                if domain == "code":
                    with_code.add(str(repository))
    return {name: np.array(found[name]) for name in sorted(with_code)}


def write_folder(
    found: chain.Run, folder: Path, *, progress: Callable[[str, int, int], None] = lambda label, done, total: None
) -> None:
    """Writes the output folder that `wanjuan.py` describes, all of it or nothing, in place of an earlier one."""
    total, done = summary(found.ledger)["documents_kept"], 0
    with new_folder(folder, overwrite=True, marker="ledger.json") as new:
        (new / "documents").mkdir()
        whole, order = dependency_rows(found.shards)
        groups = counted(regroup(_in_order(whole, order), SCHEMA), found.ledger.stayed)
        for number, of_file in enumerate(_files(groups)):
            counts: list[int] = []
            counting = (counts.append(group.num_rows) or group for group in of_file)
            write_parquet(counting, new / "documents" / f"{number:05d}.parquet", SCHEMA)
            done += sum(counts)
            progress("write documents", done, total)
        with (new / "repositories.jsonl").open("w", encoding="utf-8") as lines:
            for name, places in code_repositories(whole, order).items():
                for document in markdown(to_documents(chain.fetch(whole, order[places])), title=name):
                    row = {"id": document.id, "repository": document.path, "text": document.text}
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        with (new / "set_aside.txt").open("wb") as together:
            for path in found.set_aside:
                together.write(path.read_bytes())
        save(found.ledger, new)


def _in_order(whole: chain.Places, order: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The documents with these numbers, in that order; where it is that of the input they are not copied."""
    for start in range(0, len(order), 1024):
        rows = order[start : start + 1024]
        if (np.diff(rows) > 0).all():
            yield from chain.runs(whole, rows)
        else:
            yield chain.fetch(whole, rows)


def _files(groups: Iterable[pa.RecordBatch]) -> Iterator[Iterator[pa.RecordBatch]]:
    """Row groups by file, about FILE_BYTES of text each; each file is to be read to its end before the next."""
    groups = iter(groups)
    for first in groups:
        yield _of_file(itertools.chain([first], groups))


def _of_file(groups: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    size = 0
    for group in groups:
        yield group
        size += group.column("text").nbytes
        if size >= FILE_BYTES:
            return
