"""The whole way of one document: its file, what stages measured, what became of it, where its tokens lie."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.ledger import explain_run, read_summary
from data_pipelines.measures import Bound

MOST_DOCUMENTS = 20
"""Documents of one path that are told of."""
SHOWN_CHARACTERS = 300
_NEAR = 3
_COLUMNS = ("id", "path")
_ID = re.compile(r"\b[0-9a-f]{32}\b")


class Named(NamedTuple):
    """The documents of a run, those that were kept and those that were dropped."""

    ids: pa.ChunkedArray
    paths: pa.ChunkedArray


def tell(
    folder: str | Path, *, document: str | None = None, path: str | None = None, tokens: str | Path | None = None
) -> str:
    """Returns the fate of a document by its id (or the beginning of one), or of all documents of a path.

    tokens: a token folder made from the run. Raises ValueError where nothing is found, naming what is near.
    """
    folder = Path(folder)
    counts = read_summary(folder)
    named = _named(folder)
    ids = [_by_id(named, document)] if document is not None else _by_path(named, path or "")
    told = [_tell_one(folder, counts, named, name, tokens) for name in ids[:MOST_DOCUMENTS]]
    if len(ids) > MOST_DOCUMENTS:
        told.append(f"{len(ids) - MOST_DOCUMENTS} further documents have this path; give --document ID")
    return "\n\n".join(told)


# --- which -----------------------------------------------------------------------------------------------------------


def _named(folder: Path) -> Named:
    import pyarrow.dataset as ds

    places = (folder / "documents", folder / "dropped.parquet")
    tables = [ds.dataset(place, format="parquet").to_table(list(_COLUMNS)) for place in places]
    columns = ([chunk for table in tables for chunk in table.column(name).chunks] for name in _COLUMNS)
    return Named(*(pa.chunked_array(chunks, pa.string()) for chunks in columns))


def _by_id(named: Named, wanted: str) -> str:
    import pyarrow.compute as pc

    found = pc.unique(named.ids.filter(pc.starts_with(named.ids, wanted))).to_pylist() if wanted else []
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{len(found):,} ids of this run begin with {wanted!r}, among them {', '.join(sorted(found)[:_NEAR])}; "
            "give more of it"
        )
    near = ", ".join(_near_ids(named, wanted))
    raise ValueError(
        f"no document of this run has an id that begins with {wanted!r}; "
        + (f"near it: {near}" if near else "none is near it; --path finds documents by their file")
    )


def _near_ids(named: Named, wanted: str) -> list[str]:
    """Ids that agree with `wanted` in most places, or in its beginning, with their paths."""
    ids = np.array(named.ids.to_pylist(), "S32")
    if not wanted or not len(ids):
        return []
    given = np.frombuffer(wanted.encode()[:32].ljust(32, b"\0"), np.uint8)
    equal = ids.view(np.uint8).reshape(len(ids), 32)[:, : len(wanted)] == given[: len(wanted)]
    prefix_D = np.cumprod(equal, axis=1).sum(axis=1)
    score_D = np.maximum(equal.sum(axis=1), 2 * prefix_D)  # a character too few or too many moves all behind it
    near = [place for place in np.argsort(-score_D, kind="stable").tolist() if 2 * score_D[place] > len(wanted)]
    found = dict.fromkeys(f"{named.ids[place].as_py()} ({named.paths[place].as_py()})" for place in near[: 4 * _NEAR])
    return list(found)[:_NEAR]


def _by_path(named: Named, wanted: str) -> list[str]:
    """The documents of this path, else those whose path ends in it."""
    import pyarrow.compute as pc

    for matches in (pc.equal(named.paths, wanted), pc.ends_with(named.paths, f"/{wanted}")):
        if found := pc.unique(named.ids.filter(matches)).to_pylist():
            return found
    paths = pc.unique(named.paths)
    near = paths.filter(pc.match_substring(paths, wanted, ignore_case=True)).slice(0, _NEAR).to_pylist()
    near = near or difflib.get_close_matches(wanted, paths.slice(0, 50_000).to_pylist(), n=_NEAR, cutoff=0.5)
    raise ValueError(
        f"no document of this run has the path {wanted!r}; "
        + (f"near it: {', '.join(near)}" if near else f"its paths are such as {paths[0].as_py()}")
    )


# --- one -------------------------------------------------------------------------------------------------------------


def _tell_one(folder: Path, counts: dict[str, Any], named: Named, name: str, tokens: str | Path | None) -> str:
    dropped = _rows(folder / "dropped.parquet", name)
    places = _kept_places(folder, name)
    kept = _rows(folder / "documents", name) if places else []
    one = [*kept, *dropped][0]
    lines = [explain_run(folder, name), "", f"file      {one['path']}"]
    licence = f", licence {one['licence'] or 'unknown'}" if kept else ""
    lines.append(f"kind      source {one['source']}, domain {one['domain']}, language {one['language']}{licence}")
    size = one["num_bytes"] if "num_bytes" in one else len(one["text"].encode())
    lines.append(f"size      {size:,} bytes {'as kept' if kept else 'where it was dropped'}")
    lines += ["", *_stages(folder, counts, named, dropped, name, bool(kept))]
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


def _rows(path: Path, name: str) -> list[dict[str, Any]]:
    import pyarrow.dataset as ds

    return ds.dataset(path, format="parquet").to_table(filter=ds.field("id") == name).to_pylist()


def _kept_places(folder: Path, name: str) -> list[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found = []
    for path in sorted((folder / "documents").glob("*.parquet")):
        row = pc.index(pq.read_table(path, columns=["id"]).column("id"), name).as_py()
        if row >= 0:
            found.append(f"documents/{path.name}, row {row:,}")
    return found


def _path_of(named: Named, name: str) -> str:
    import pyarrow.compute as pc

    place = pc.index(named.ids, name).as_py()
    return named.paths[place].as_py() if place >= 0 else "not in this run"


def _stages(
    folder: Path, counts: dict[str, Any], named: Named, dropped: Sequence[dict[str, Any]], name: str, is_kept: bool
) -> list[str]:
    """A line for every stage that the document came to, with what was measured where that was stored."""
    order = [stage["stage"] for stage in counts["stages"]]
    gone = {row["stage"]: row for row in dropped}
    last = max((order.index(stage) for stage in gone), default=-1) if not is_kept else len(order) - 1
    measured = {row["stage"]: row for row in _rows(folder / "measures.parquet", name)}
    lines = []
    for stage in order[: last + 1]:
        row = gone.get(stage)
        lines.append(f"{stage:24} {'passed' if row is None else 'dropped: ' + row['reason']}")
        if row is not None and row["detail"]:
            lines.append(f"    {row['detail']}")
            lines += [f"    {other} is {_path_of(named, other)}" for other in dict.fromkeys(_ID.findall(row["detail"]))]
        if stage in measured:
            bounds = [Bound(**bound) for bound in counts["measured"][stage]["bounds"]]
            lines += _values(bounds, measured[stage])
    return [*lines, ""]


def _values(bounds: Sequence[Bound], row: dict[str, Any]) -> list[str]:
    return [
        f"    {'✗' if number in row['failed'] else ' '} {bound.reason:24} {value:<12.5g} goes {bound.side} "
        + " to ".join(f"{limit:g}" for limit in (bound.values[0], *bound.values[1:][-1:]))
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
