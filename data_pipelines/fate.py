"""The whole way of one document: its file, what stages measured, what became of it, where its tokens lie."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.ledger import explain_run, read_summary
from data_pipelines.measures import Bound, named
from internjax.figures import format_number

MOST_DOCUMENTS = 20
"""Documents of one path that are told of."""
SEARCHED_PATHS = 100_000
"""Paths that are looked through for one near a path that is not there."""
SHOWN_CHARACTERS = 300
_NEAR = 3
_ID = re.compile(r"\b[0-9a-f]{32}\b")


def tell(
    folder: str | Path, *, document: str | None = None, path: str | None = None, tokens: str | Path | None = None
) -> str:
    """Returns the fate of a document by its id (or the beginning of one), or of all documents of a path.

    tokens: a token folder made from the run. Raises ValueError where nothing is found, naming what is near.
    """
    folder = Path(folder)
    counts = read_summary(folder)
    ids = [_by_id(folder, document)] if document is not None else _by_path(folder, path or "")
    told = [_tell_one(folder, counts, name, tokens) for name in ids[:MOST_DOCUMENTS]]
    if len(ids) > MOST_DOCUMENTS:
        told.append(f"{len(ids) - MOST_DOCUMENTS} further documents have this path; give --document ID")
    return "\n\n".join(told)


# --- which -----------------------------------------------------------------------------------------------------------


def _named(folder: Path) -> Iterator[pa.RecordBatch]:
    """Ids and paths of all documents of a run, those that were kept and those that were dropped."""
    import pyarrow.dataset as ds

    for place in (folder / "documents", folder / "dropped.parquet"):
        yield from ds.dataset(place, format="parquet").to_batches(columns=["id", "path"])


def _matching(folder: Path, matches: Callable[[pa.RecordBatch], pa.Array]) -> list[str]:
    """Ids of the documents that match, each once."""
    found = (batch.column("id").filter(matches(batch)).to_pylist() for batch in _named(folder))
    return list(dict.fromkeys(name for names in found for name in names))


def _by_id(folder: Path, wanted: str) -> str:
    import pyarrow.compute as pc

    found = _matching(folder, lambda batch: pc.starts_with(batch.column("id"), wanted)) if wanted else []
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{len(found):,} ids of this run begin with {wanted!r}, among them {', '.join(sorted(found)[:_NEAR])}; "
            "give more of it"
        )
    near = ", ".join(_near_ids(folder, wanted))
    raise ValueError(
        f"no document of this run has an id that begins with {wanted!r}; "
        + (f"near it: {near}" if near else "none is near it; --path finds documents by their file")
    )


def _near_ids(folder: Path, wanted: str) -> list[str]:
    """Ids that agree with `wanted` in more than half of its places, or in its beginning, with their paths."""
    length = min(len(wanted.encode()), 32)
    given = np.frombuffer(wanted.encode()[:length], np.uint8)
    best: dict[str, tuple[int, str]] = {}
    for batch in _named(folder) if length else ():
        names = np.array(batch.column("id").to_pylist(), "S32").reshape(-1, 1)
        equal = names.view(np.uint8)[:, :length] == given
        # A character too few or too many moves all that is behind it.
        score_D = np.maximum(equal.sum(axis=1), 2 * np.cumprod(equal, axis=1).sum(axis=1))
        for row in np.flatnonzero(2 * score_D > length).tolist():
            best[batch.column("id")[row].as_py()] = (-int(score_D[row]), batch.column("path")[row].as_py())
        best = dict(sorted(best.items(), key=lambda item: (item[1], item[0]))[:_NEAR])
    return [f"{name} ({path})" for name, (_, path) in best.items()]


def _by_path(folder: Path, wanted: str) -> list[str]:
    """The documents of this path, else those whose path ends in it."""
    import pyarrow.compute as pc

    for matches in (
        lambda batch: pc.equal(batch.column("path"), wanted),
        lambda batch: pc.ends_with(batch.column("path"), f"/{wanted}"),
    ):
        if found := _matching(folder, matches):
            return found
    paths: dict[str, None] = {}
    for batch in _named(folder):
        paths |= dict.fromkeys(batch.column("path").to_pylist())
        if len(paths) > SEARCHED_PATHS:
            break
    near = [path for path in paths if wanted.lower() in path.lower()][:_NEAR] if wanted else []
    near = near or difflib.get_close_matches(wanted, paths, n=_NEAR, cutoff=0.5)
    raise ValueError(
        f"no document of this run has the path {wanted!r}; "
        + (f"near it: {', '.join(near)}" if near else f"its paths are such as {next(iter(paths))}")
    )


# --- one -------------------------------------------------------------------------------------------------------------


def _tell_one(folder: Path, counts: dict[str, Any], name: str, tokens: str | Path | None) -> str:
    dropped = rows_of([folder / "dropped.parquet"], {name})
    places = _kept_places(folder, name)
    kept = rows_of(documents_of(folder), {name}) if places else []
    one = [*kept, *dropped][0]
    lines = [explain_run(folder, name), "", f"file      {one['path']}"]
    licence = f", licence {one['licence'] or 'unknown'}" if kept else ""
    lines.append(f"kind      source {one['source']}, domain {one['domain']}, language {one['language']}{licence}")
    size = one["num_bytes"] if "num_bytes" in one else len(one["text"].encode())
    lines.append(f"size      {size:,} bytes {'as kept' if kept else 'where it was dropped'}")
    lines += ["", *_stages(folder, counts, name, dropped, bool(kept)), *([""] if kept else [])]
    for place in places:
        lines.append(f"kept      {place}")
    if kept and kept[0]["meta"] != "{}":
        lines.append(f"meta      {kept[0]['meta']}")
    if tokens is not None and kept:
        lines.append(f"tokens    {_tokens(Path(tokens), name)}")
    if one["text"]:
        text = one["text"]
        lines += ["", text[:SHOWN_CHARACTERS] + (" …" if len(text) > SHOWN_CHARACTERS else "")]
    return "\n".join(lines)


def rows_of(paths: Iterable[Path], ids: Collection[str], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows of parquet files that have one of these ids; texts are read only where such a row is."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted, found = pa.array(sorted(ids), pa.string()), []
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                is_one = pc.is_in(file.read_row_group(group, columns=["id"]).column("id"), value_set=wanted)
                if pc.any(is_one).as_py():
                    found += file.read_row_group(group, columns=columns).filter(is_one).to_pylist()
    return found


def documents_of(folder: Path) -> list[Path]:
    """The files of the kept documents of a run."""
    return sorted((folder / "documents").glob("*.parquet"))


def _kept_places(folder: Path, name: str) -> list[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found = []
    for path in documents_of(folder):
        row = pc.index(pq.read_table(path, columns=["id"]).column("id"), name).as_py()
        if row >= 0:
            found.append(f"documents/{path.name}, row {row:,}")
    return found


def _paths_of(folder: Path, names: Sequence[str]) -> list[str]:
    files = [folder / "dropped.parquet", *documents_of(folder)]
    found = {row["id"]: row["path"] for row in rows_of(files, names, ["id", "path"])} if names else {}
    return [f"{name} is {found.get(name, 'not in this run')}" for name in names]


def _stages(
    folder: Path, counts: dict[str, Any], name: str, dropped: Sequence[dict[str, Any]], is_kept: bool
) -> list[str]:
    """A line for every stage that the document came to, with what was measured where that was stored."""
    order = [stage["stage"] for stage in counts["stages"]]
    gone = {row["stage"]: row for row in dropped}
    last = max((order.index(stage) for stage in gone), default=-1) if not is_kept else len(order) - 1
    measured = {row["stage"]: row for row in rows_of([folder / "measures.parquet"], {name})}
    lines = []
    for stage in order[: last + 1]:
        row = gone.get(stage)
        lines.append(f"{stage:24} {'passed' if row is None else 'dropped: ' + row['reason']}")
        if row is not None and row["detail"]:
            lines.append(f"    {row['detail']}")
            lines += [f"    {said}" for said in _paths_of(folder, list(dict.fromkeys(_ID.findall(row["detail"]))))]
        if stage in measured:
            bounds = [Bound(**bound) for bound in counts["measured"][stage]["bounds"]]
            lines += _values(bounds, measured[stage])
    return lines


def _values(bounds: Sequence[Bound], row: dict[str, Any]) -> list[str]:
    return [
        f"    {'✗' if number in row['failed'] else ' '} {named(bound):24} {value:<12.5g} goes {bound.side} "
        + format_number(bound.value)
        for number, (bound, value) in enumerate(zip(bounds, row["values"], strict=True))
        if np.isfinite(value)
    ]


def _tokens(folder: Path, name: str) -> str:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from data_pipelines.tokens import DOCUMENTS, open_tokens

    opened = open_tokens(folder, verify=False)
    index = pc.index(pq.read_table(folder / DOCUMENTS, columns=["id"]).column("id"), name).as_py()
    if index < 0:
        return f"{folder} holds no document with this id; was it made from this run?"
    shard = int(np.searchsorted(opened.first_D, index, side="right")) - 1
    start, stop = opened.offsets[shard][index - int(opened.first_D[shard]) :][:2].tolist()
    shard_name = opened.manifest["shards"][shard]["name"]
    return f"{folder / shard_name}.bin, tokens {start:,} to {stop:,} ({stop - start:,} of them), document {index:,}"
