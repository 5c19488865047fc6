"""What a run tells of its documents beyond counts: what they are like, and what stages measured of a sample of them.

A profile counts documents and bytes by length, source, domain, language and licence. The sample of a stage are the
`SAMPLE` documents with the least ids among those that it measured: an id is a hash, so the sample is a random one, and
the same however the corpus was cut and in whatever order it was read.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import Outcome, text_buffer

SAMPLE = 8192
MEASURES = pa.schema(
    [
        ("stage", pa.string()),
        ("id", pa.string()),
        ("num_bytes", pa.int64()),
        ("values", pa.list_(pa.float64())),
        ("failed", pa.list_(pa.int32())),
    ]
)
"""A document of a stage's sample: its bytes there, what was measured in the order of the stage's bounds (NaN: not
measured), the numbers of the bounds that it failed (-1: the stage dropped it for what is no number)."""
UNMEASURED = -1
PROFILED = ("source", "domain", "language", "licence")
LENGTH = "bytes"
"""Of a profile: documents by the power of two that is their length or the last one before it."""
MOST_VALUES = 200
"""Values of a column that a profile lists by name; the rest is together."""
OTHERS = "(others)"
UNKNOWN = "(unknown)"
COUNTED_META = ("tier", "personal_data_masked", "decontaminated")
"""Fields of meta that a profile of kept documents counts: a text by its value, a mapping by its keys."""


# --- profiles --------------------------------------------------------------------------------------------------------

Profile = dict[str, dict[str, list[int]]]
"""What is counted -> value -> [documents, bytes]."""


def count_in(profile: Profile, batch: pa.RecordBatch) -> None:
    """Adds the documents of a batch to a profile."""
    if batch.num_rows == 0:
        return
    sizes_D = _num_bytes(batch)
    powers_D = np.frexp(sizes_D.astype(np.float64))[1] - 1  # 2**power <= size; -1 for none
    _count(profile.setdefault(LENGTH, {}), np.where(sizes_D > 0, powers_D, -1) + 1, _LENGTHS, sizes_D)
    for name in PROFILED:
        encoded = batch.column(name).dictionary_encode(null_encoding="encode")
        names = [UNKNOWN if value is None else value for value in encoded.dictionary.to_pylist()]
        _count(profile.setdefault(name, {}), encoded.indices.to_numpy(), names, sizes_D)


_LENGTHS = ["0", *(str(1 << power) for power in range(63))]


def _count(column: dict[str, list[int]], number_D: np.ndarray, names: Sequence[str], sizes_D: np.ndarray) -> None:
    documents = np.bincount(number_D, minlength=len(names)).tolist()
    num_bytes = np.bincount(number_D, weights=sizes_D, minlength=len(names)).tolist()
    for name, count, size in zip(names, documents, num_bytes, strict=True):
        if count:
            _add(column, name, count, int(size))


def _add(column: dict[str, list[int]], name: str, documents: int, num_bytes: int) -> None:
    entry = column.setdefault(name, [0, 0])
    entry[0] += documents
    entry[1] += num_bytes


def _count_meta(profile: Profile, batch: pa.RecordBatch) -> None:
    marks = [f'"{name}"' for name in COUNTED_META]
    for text, size in zip(batch.column("meta").to_pylist(), _num_bytes(batch).tolist(), strict=True):
        if not any(mark in text for mark in marks):
            continue
        meta = json.loads(text)
        for name in COUNTED_META:
            found = meta.get(name)
            for value in found if isinstance(found, dict) else [found] if isinstance(found, str) else []:
                _add(profile.setdefault(name, {}), str(value), 1, size)


def counted(batches: Iterable[pa.RecordBatch], profile: Profile) -> Iterator[pa.RecordBatch]:
    """Gives the batches on, and counts the documents of each, and what stages left in `COUNTED_META`."""
    for batch in batches:
        count_in(profile, batch)
        _count_meta(profile, batch)
        yield batch


def add_profile(profile: Profile, other: Profile) -> None:
    """Adds the counts of `other` to those of `profile`."""
    for name, column in other.items():
        own = profile.setdefault(name, {})
        for value, entry in column.items():
            _add(own, value, *entry)


def bounded(profile: Profile) -> Profile:
    """The profile with at most `MOST_VALUES` values of each column by name, the most frequent first."""
    result: Profile = {}
    for name in (LENGTH, *PROFILED, *COUNTED_META):
        if (column := profile.get(name)) is None:
            continue
        key = int if name == LENGTH else lambda value, column=column: (-column[value][0], value)
        order = sorted(column, key=key)
        result[name] = {value: list(column[value]) for value in order[:MOST_VALUES]}
        if rest := [column[value] for value in order[MOST_VALUES:]]:
            _add(result[name], OTHERS, sum(entry[0] for entry in rest), sum(entry[1] for entry in rest))
    return result


# --- samples ---------------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """value: the threshold in use. of: which documents it holds for, where others have another."""

    reason: str
    side: str
    value: float
    of: str = ""


def named(bound: Bound) -> str:
    """The bound in words: reason, and which documents it is for."""
    return f"{bound.reason} ({bound.of})" if bound.of else bound.reason


@dataclass
class Sample:
    """What a stage measured. num_documents, num_bytes: of all that it measured. rows: of `MEASURES`, at least the
    sample's; `settled` leaves just these. limit: no document with this id or a greater one is in the sample.
    """

    bounds: list[Bound] = field(default_factory=list)
    num_documents: int = 0
    num_bytes: int = 0
    rows: list[pa.RecordBatch] = field(default_factory=list)
    limit: str | None = None


def measure(sample: Sample, stage: str, batch: pa.RecordBatch, outcome: Outcome) -> None:
    """Enters what a stage measured of a batch that it was given."""
    for check in outcome.checks:
        if np.ndim(check.bound):
            raise RuntimeError(
                f"stage {stage!r} gave {check.reason!r} a bound of shape {np.shape(check.bound)}. {_ONE_BOUND}"
            )
    checks = [check for check in outcome.checks if np.isfinite(check.bound)]  # others are switched off
    if not checks or batch.num_rows == 0:
        return
    found = [Bound(check.reason, check.side, float(check.bound), check.of) for check in checks]
    sample.bounds = _joined(sample.bounds, found, stage)
    values_DM = np.stack([np.asarray(check.values_D, np.float64) for check in checks], axis=1)
    has_value_D = ~np.isnan(values_DM).all(axis=1)
    sizes_D = _num_bytes(batch)
    sample.num_documents += int(has_value_D.sum())
    sample.num_bytes += int(sizes_D[has_value_D].sum())
    rows = np.flatnonzero(has_value_D)
    if sample.limit is not None:
        import pyarrow.compute as pc

        rows = rows[pc.less(batch.column("id"), sample.limit).to_numpy(zero_copy_only=False)[rows]]
    if not len(rows):
        return
    fails_DM = np.stack([check.fails() for check in checks], axis=1)[rows]
    goes = np.array([outcome.reasons[row] is not None for row in rows.tolist()], bool) & ~fails_DM.any(axis=1)
    fails_DM = np.concatenate([goes[:, None], fails_DM], axis=1)
    values = pa.array(values_DM[rows].ravel())
    failed = pa.array(np.nonzero(fails_DM)[1] + UNMEASURED, pa.int32())
    columns = [
        pa.array([stage] * len(rows), pa.string()),
        batch.column("id").take(pa.array(rows)),
        pa.array(sizes_D[rows]),
        pa.ListArray.from_arrays(pa.array(np.arange(len(rows) + 1) * len(checks), pa.int32()), values),
        pa.ListArray.from_arrays(pa.array(np.cumsum([0, *fails_DM.sum(axis=1)]), pa.int32()), failed),
    ]
    sample.rows.append(pa.record_batch(columns, schema=MEASURES))
    _trim(sample)


def add_sample(sample: Sample, other: Sample, stage: str) -> None:
    """Adds what the stage measured of other documents."""
    sample.bounds = _joined(sample.bounds, other.bounds, stage)
    sample.num_documents += other.num_documents
    sample.num_bytes += other.num_bytes
    sample.rows.extend(other.rows)
    _trim(sample)


_ONE_BOUND = (
    "Return the same checks for every batch, each with one number as its bound; where documents have other bounds, one "
    "Check for each, `of` naming its documents and NaN as the values of the others"
)


def _joined(bounds: Sequence[Bound], others: Sequence[Bound], stage: str) -> list[Bound]:
    if not bounds or not others:
        return list(bounds or others)
    if list(bounds) != list(others):
        shown = [", ".join(f"{named(b)} {b.side} {b.value:g}" for b in each) for each in (bounds, others)]
        raise RuntimeError(
            f"stage {stage!r} measured [{shown[0]}] of some batches and [{shown[1]}] of others. {_ONE_BOUND}"
        )
    return list(bounds)


def _trim(sample: Sample) -> None:
    if sum(batch.num_rows for batch in sample.rows) >= 2 * SAMPLE:
        least = settled(sample)
        sample.rows = [least]
        sample.limit = least.column("id")[-1].as_py() if least.num_rows == SAMPLE else None


def settled(sample: Sample) -> pa.RecordBatch:
    """The sample in order of id, each document once."""
    import pyarrow.compute as pc

    rows = [batch for batch in sample.rows if batch.num_rows]
    if not rows:
        return pa.RecordBatch.from_pylist([], schema=MEASURES)
    together = pa.concat_batches(rows)
    together = together.take(pc.array_sort_indices(together.column("id")))
    ids = together.column("id")
    differs = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
    return together.take(pa.array(np.flatnonzero(np.concatenate([[True], differs]))[:SAMPLE]))


def _num_bytes(batch: pa.RecordBatch) -> np.ndarray:
    return np.diff(text_buffer(batch).offsets)


# --- other thresholds ------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """What of a stage's documents would stay if one of its bounds were another, and the rest as it is.

    points: (threshold, share of the documents, share of the bytes), ascending; now: which of them is in use. The shares
    are of all documents of the stage, also where the bound holds for some of them.
    """

    bound: Bound
    points: list[tuple[float, float, float]]
    now: int


def curves(bounds: Sequence[Bound], sample: pa.RecordBatch | pa.Table, *, num_points: int = 100) -> list[Curve]:
    """Returns a curve for every bound that decides of at least one document of the sample."""
    values_DM = np.array(sample.column("values").to_pylist(), np.float64).reshape(sample.num_rows, len(bounds))
    sizes_D = sample.column("num_bytes").to_numpy().astype(np.float64)
    failed = sample.column("failed").to_pylist()
    return [
        curve
        for number, bound in enumerate(bounds)
        if (
            curve := _curve(
                bound, values_DM[:, number], np.array([set(f) <= {number} for f in failed], bool), sizes_D, num_points
            )
        )
    ]


def _curve(
    bound: Bound, values_D: np.ndarray, others_pass_D: np.ndarray, sizes_D: np.ndarray, num_points: int
) -> Curve | None:
    num_documents, num_bytes = max(len(values_D), 1), max(sizes_D.sum(), 1.0)
    values_D, sizes_D = values_D[others_pass_D], sizes_D[others_pass_D]
    measured_D = np.isfinite(values_D)
    always = (~measured_D).sum(), sizes_D[~measured_D].sum()  # an infinite value is one that no threshold touches
    values, sizes = values_D[measured_D], sizes_D[measured_D]
    if not len(values):
        return None
    distinct = np.unique(values)
    if len(distinct) > num_points:
        distinct = np.quantile(values, np.linspace(0, 1, num_points), method="nearest")
    thresholds = np.unique([*distinct, bound.value])
    order = np.argsort(values, kind="stable")
    values, sums = values[order], np.concatenate([[0.0], np.cumsum(sizes[order])])
    if bound.side == "above":
        counts = np.searchsorted(values, thresholds, side="right")
        kept = counts, sums[counts]
    else:
        counts = np.searchsorted(values, thresholds, side="left")
        kept = len(values) - counts, sums[-1] - sums[counts]
    documents = ((kept[0] + always[0]) / num_documents).tolist()
    volumes = ((kept[1] + always[1]) / num_bytes).tolist()
    now = int(np.searchsorted(thresholds, bound.value))
    return Curve(bound, list(zip(thresholds.tolist(), documents, volumes, strict=True)), now)
