"""Runs a list of stages over a corpus of any size, in bounded memory, on any executor, from where it was interrupted.

The corpus is cut into units (64 MiB of input). A task takes one unit through all batch stages up to the next corpus
stage, a batch at a time, and writes a part: an Arrow file of documents, the sketches that the corpus stage decides
from, the documents that were dropped, and a ledger. The corpus stage resolves the sketches of all parts to one
decision, and the next tasks begin by leaving out what it drops and entering what it changes. Corpus stages that follow
one another are sketched together, while the batch is at hand.

A part lies in a folder named by the digest of its input and of the stages, and appears by one rename: what a killed run
has finished is taken over, and nothing is counted twice. Nothing in the result depends on how the corpus was cut, on
the executor or on the number of its workers.

    parts/DIGEST/documents.arrow   documents after the batch stages (absent where nothing changed them)
                 N.sketch.arrow    for the corpus stage that follows (0) and those directly after it (1, 2 ...)
                 dropped.arrow     `ledger.FATES`
                 measures.arrow    `measures.MEASURES`: what stages measured of a sample
                 given_ids.arrow   `ids.GIVEN_IDS`: of the rows of a unit that bear an id
                 set_aside.txt     rows that could not be read, one message per line
                 part.json         counts, number of rows, what the documents are like
    decisions/DIGEST/report.json   figures of the corpus stage, beside its decision on every part (`decisions.py`)
"""

import contextlib
import functools
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.decisions import file_batches, outcome_of, read_changes, read_decision, rows_gone, write_decision
from data_pipelines.digests import digest, stage_digest
from data_pipelines.document import SCHEMA, Corpus, Decision, Document, Stage, text_buffer, to_batch
from data_pipelines.executors import Map
from data_pipelines.ids import GIVEN_IDS, given_ids, repeated_ids
from data_pipelines.ledger import (
    FATES,
    Ledger,
    StageCount,
    check,
    enter,
    file_of,
    merge,
    of_part,
    part_record,
    part_samples,
    record,
)
from data_pipelines.measures import MEASURES, count_in
from data_pipelines.words import forget
from internjax.hf.folder import sync_tree


class Sizes(NamedTuple):
    """How the corpus is cut; no result depends on it. A batch, with what stages make of it, is in memory per worker."""

    unit_bytes: int = 64 << 20
    batch_bytes: int = 8 << 20
    batch_rows: int = 4096


class Unit(NamedTuple):
    """A slice of the corpus. read: gives its documents, one by one or in record batches; what cannot be read goes to
    the function it is given, or, where that is None, raises ValueError. digest: of all that `read` depends on. name: of
    the slice, for people.
    """

    digest: str
    read: Callable[[Callable[[str], None] | None], Iterable[Document | pa.RecordBatch]]
    name: str = ""


class Shard(NamedTuple):
    """A file of documents, and the decisions whose rows of it are no longer there. name: that of the unit it is of."""

    documents: Path
    decisions: tuple[Path, ...] = ()
    name: str = ""


class Settings(NamedTuple):
    work: Path
    sizes: Sizes = Sizes()
    strict: bool = False
    """Stop at the first row that cannot be read."""
    keep_dropped: bool = False
    """Keep the text of dropped documents."""


class Task(NamedTuple):
    """A unit or shard to take through batch stages. decided: the corpus stage that the newest decision is of.
    sketched: the part that holds the sketches for the corpus stages as N + 1, of documents before that decision.
    """

    key: str
    given: Unit | Shard
    decided: str | None
    stages: tuple[Stage, ...]
    corpora: tuple[Stage, ...]
    sketched: Path | None
    settings: Settings

    def __str__(self) -> str:
        return f"{_label(self.stages, self.decided, self.corpora)} of {self.given.name or self.key}"


class Segment(NamedTuple):
    """Batch stages, and the corpus stages that follow them: the first one ends the segment."""

    stages: tuple[Stage, ...]
    corpora: tuple[Stage, ...]


class Run(NamedTuple):
    """What is left after all stages, in the order of the input, and the ledger of it."""

    shards: list[Shard]
    ledger: Ledger
    set_aside: list[Path]


def segments(stages: Sequence[Stage]) -> list[Segment]:
    """The stages cut after every corpus stage. After the last of these comes a segment that has none."""
    names = Counter(stage.name for stage in stages)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"stage {twice[0]!r} stands twice in the chain; give each stage a name of its own")
    found, waiting = [], []
    for number, stage in enumerate(stages):
        if stage.scope == "batch":
            waiting.append(stage)
            continue
        if not isinstance(stage.apply, Corpus):
            raise ValueError(f"stage {stage.name!r} has scope corpus and is no Corpus; give Corpus(sketch, resolve)")
        together = itertools.takewhile(lambda stage: stage.scope == "corpus", stages[number:])
        found.append(Segment(tuple(waiting), tuple(together)))
        waiting = []
    return [*found, Segment(tuple(waiting), ())]


def run(
    units: Sequence[Unit],
    stages: Sequence[Stage],
    settings: Settings,
    run_tasks: Map,
    *,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Run:
    """Takes the units through the stages. progress is told (what, done, of how many).

    Raises RuntimeError where the ledger does not sum.
    """
    cleared = settings.work / "new"
    shutil.rmtree(cleared, ignore_errors=True)  # what a killed run had not finished
    for name in ("parts", "decisions", "new"):
        (settings.work / name).mkdir(parents=True, exist_ok=True)
    ledger, set_aside = Ledger(keeps_text=settings.keep_dropped), []
    given: list[Unit | Shard] = list(units)
    keys = [unit.digest for unit in units]
    decided, parts = None, []
    for segment in segments(stages):
        of_stages = digest([stage_digest(stage) for stage in (*segment.stages, *segment.corpora)])
        marks = f"{settings.keep_dropped}{settings.strict}"
        keys = [digest(["part", key, decided or "", of_stages, marks]) for key in keys]
        sketched = parts if decided and segment.corpora and not segment.stages else [None] * len(given)
        tasks = [
            Task(key, each, decided, segment.stages, segment.corpora, part, settings)
            for key, each, part in zip(keys, given, sketched, strict=True)
        ]
        corpus = segment.corpora[0] if segment.corpora else None
        label = _label(segment.stages, decided, segment.corpora)
        progress(label, 0, len(tasks))
        for done, _ in enumerate(run_tasks(run_task, tasks), 1):
            progress(label, done, len(tasks))
        parts = [settings.work / "parts" / key for key in keys]
        if decided is None:  # the segment that reads the units
            ledger.repeated_ids = repeated_ids([part / "given_ids.arrow" for part in parts])
        for part in parts:
            merge(ledger, _part_ledger(part))
        set_aside += [part / "set_aside.txt" for part in parts]
        given = [_shard(part, each) for part, each in zip(parts, given, strict=True)]
        decided = None
        if corpus:
            decided = corpus.name
            place, report = _decide(corpus, parts, given, keys, settings)
            ledger.reports[decided] = report
            given = [
                shard._replace(decisions=(*shard.decisions, place / f"{number}.arrow"))
                for number, shard in enumerate(given)
            ]
            keys = [digest([key, place.name]) for key in keys]
    check(ledger)
    return Run(given, ledger, set_aside)


def _label(stages: Sequence[Stage], decided: str | None, corpora: Sequence[Stage]) -> str:
    """What a step of the chain does."""
    label = ", ".join(stage.name for stage in stages) or f"without {decided}"
    return f"{label} | {corpora[0].name}" if corpora else label


# --- a task ----------------------------------------------------------------------------------------------------------


def run_task(task: Task) -> str:
    """Writes the part of a task, unless it is there, and returns its key."""
    parts = task.settings.work / "parts"
    if (parts / task.key).is_dir():
        return task.key
    new = Path(tempfile.mkdtemp(dir=task.settings.work / "new"))
    ledger = Ledger(keeps_text=task.settings.keep_dropped)
    names = [*filter(None, [task.decided]), *(stage.name for stage in task.stages)]
    ledger.stages.update({name: StageCount(name) for name in names})
    writes = isinstance(task.given, Unit) or bool(task.stages) or _changes_of(task.given) is not None
    sketched = None if writes else task.sketched
    num_rows = 0
    with contextlib.ExitStack() as files:
        documents = _Writer(files, new / "documents.arrow", SCHEMA) if writes else None
        dropped = _Writer(files, new / "dropped.arrow", FATES)
        sketches = [
            (stage.apply.sketch, _Writer(files, _sketch_of(new, number), None))
            for number, stage in enumerate(task.corpora)
        ]
        set_aside = files.enter_context((new / "set_aside.txt").open("w", encoding="utf-8"))
        ids = _Writer(files, new / "given_ids.arrow", GIVEN_IDS) if isinstance(task.given, Unit) else None
        looks = writes or bool(task.stages) or bool(task.corpora) and sketched is None
        for rows, batch in _input(task, ledger, set_aside, looks=looks):
            if ids:
                ids.write(given_ids(batch))
            for stage in task.stages:
                batch = record(ledger, stage.name, batch, stage.apply(batch))
            for fates in ledger.dropped:
                dropped.write(fates)
            ledger.dropped.clear()
            if documents:
                documents.write(batch)
                rows = np.arange(num_rows, num_rows + batch.num_rows)
                num_rows += batch.num_rows
            for sketch, sketches_of in sketches if sketched is None else ():
                sketches_of.write(_numbered(sketch(batch), rows))
        for number, (sketch, sketches_of) in enumerate(sketches):
            for made in _left(_sketch_of(sketched, number + 1), task.given) if sketched else ():
                sketches_of.write(made)
            if sketches_of.writer is None:
                sketches_of.write(sketch(to_batch([])))
    forget()
    with pa.ipc.new_file(str(new / "measures.arrow"), MEASURES) as writer:
        for rows in part_samples(ledger):
            writer.write_batch(rows)
    about = part_record(ledger) | {"num_rows": num_rows}
    (new / "part.json").write_text(json.dumps(about), encoding="utf-8")
    _appear(new, parts / task.key)
    return task.key


def _appear(new: Path, place: Path) -> None:
    """Renames a finished folder to where it belongs; where another worker was faster, its equal is kept.

    It is on disk before it has the name: after a crash of the machine a part is whole, or not there.
    """
    sync_tree(new)
    try:
        new.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(new)


class _Writer:
    """An Arrow file that is opened at its first batch, or, where its schema is known, at once."""

    def __init__(self, files: contextlib.ExitStack, path: Path, schema: pa.Schema | None):
        self._files, self._path = files, path
        self.writer = self._open(schema) if schema is not None else None

    def _open(self, schema: pa.Schema) -> pa.ipc.RecordBatchFileWriter:
        return self._files.enter_context(pa.ipc.new_file(str(self._path), schema))

    def write(self, batch: pa.RecordBatch) -> None:
        self.writer = self.writer or self._open(batch.schema)
        if batch.num_rows:
            self.writer.write_batch(batch)


def _sketch_of(part: Path, number: int) -> Path:
    return part / f"{number}.sketch.arrow"


def _left(path: Path, shard: Shard) -> Iterator[pa.RecordBatch]:
    """Of a shard's sketches what its newest decision leaves."""
    gone = rows_gone(shard.decisions[-1:])
    for batch in file_batches(path):
        yield batch.filter(pa.array(~np.isin(batch.column("row").to_numpy(), gone)))


def _numbered(sketch: pa.RecordBatch, rows: np.ndarray) -> pa.RecordBatch:
    """The sketch with the numbers of its rows in the shard in place of those in the batch."""
    place = sketch.schema.get_field_index("row")
    return sketch.set_column(place, "row", pa.array(rows[sketch.column("row").to_numpy()], pa.int64()))


def _input(task: Task, ledger: Ledger, set_aside: Any, *, looks: bool) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """(rows of the shard, batch): the documents of a unit, or those of a shard that the newest decision leaves.

    Of a shard that nobody looks at, the decision is entered, and empty batches are given.
    """
    if isinstance(task.given, Unit):

        def bad(message: str) -> None:
            ledger.unreadable[file_of(message)] += 1
            set_aside.write(message.replace("\n", " ").encode("utf-8", "replace").decode() + "\n")

        for batch in batches(task.given.read(None if task.settings.strict else bad), task.settings.sizes):
            count_in(ledger.came, batch)
            yield np.arange(batch.num_rows), batch
        return
    before, newest = task.given.decisions[:-1], task.given.decisions[-1:]
    drops, changes = read_decision(newest[0]) if newest else None, _changes_of(task.given)
    if newest and not looks:
        gone = rows_gone(before)
        for rows, batch in _batches_of(task.given._replace(decisions=())):  # whole, so that nothing is copied
            enter(ledger, task.decided, batch, outcome_of(batch, rows, drops, None), came=~np.isin(rows, gone))
            yield rows[:0], batch.slice(0, 0)
        return
    for rows, batch in _batches_of(task.given._replace(decisions=before)):
        if drops is None:
            yield rows, batch
            continue
        outcome = outcome_of(batch, rows, drops, changes)
        kept = record(ledger, task.decided, outcome.batch, outcome)
        yield rows[np.array([reason is None for reason in outcome.reasons], bool)], kept


def _changes_of(given: Unit | Shard) -> pa.Table | None:
    """What the newest decision changes, where documents were not written since."""
    newest = given.decisions[-1:] if isinstance(given, Shard) else ()
    return read_changes(newest[0]) if newest else None


def batches(documents: Iterable[Document | pa.RecordBatch], sizes: Sizes) -> Iterator[pa.RecordBatch]:
    """The documents, which may come in batches, in record batches of at most about `sizes.batch_bytes`."""
    waiting: list[Document] = []
    num_characters = 0
    for document in documents:
        if isinstance(document, pa.RecordBatch):
            if waiting:
                yield to_batch(waiting)
                waiting, num_characters = [], 0
            yield from _cut(document, sizes)
            continue
        waiting.append(document)
        num_characters += len(document.text)
        if len(waiting) >= sizes.batch_rows or num_characters >= sizes.batch_bytes:
            yield to_batch(waiting)
            waiting, num_characters = [], 0
    if waiting:
        yield to_batch(waiting)


def _cut(batch: pa.RecordBatch, sizes: Sizes) -> Iterator[pa.RecordBatch]:
    """The batch in slices, each up to the row that makes it `sizes.batch_bytes` or `sizes.batch_rows` long."""
    offsets, start = text_buffer(batch).offsets, 0
    while start < batch.num_rows:
        stop = int(np.searchsorted(offsets, offsets[start] + sizes.batch_bytes))
        stop = min(max(stop, start + 1), start + sizes.batch_rows, batch.num_rows)
        yield batch.slice(start, stop - start)
        start = stop


# --- parts -----------------------------------------------------------------------------------------------------------


def _shard(part: Path, given: Unit | Shard) -> Shard:
    written = part / "documents.arrow"
    return Shard(written, name=given.name) if written.is_file() else given


def _part_ledger(part: Path) -> Ledger:
    about = json.loads((part / "part.json").read_text(encoding="utf-8"))
    return of_part(about, file_batches(part / "dropped.arrow"), file_batches(part / "measures.arrow"))


def _batches_of(shard: Shard) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """(rows of the file, documents) for what the decisions leave of a shard."""
    gone, start = rows_gone(shard.decisions), 0
    for batch in file_batches(shard.documents):
        rows = np.arange(start, start + batch.num_rows)
        start += batch.num_rows
        stays = ~np.isin(rows, gone, assume_unique=True)
        if not stays.all():
            rows, batch = rows[stays], batch.filter(pa.array(stays))
        if batch.num_rows:
            yield rows, batch


def kept_rows(shards: Sequence[Shard]) -> Iterator[np.ndarray]:
    """The numbers in the corpus of the documents that are left, in order, shard by shard."""
    start = 0
    for shard in shards:
        num_rows = _num_rows(shard.documents)
        yield start + np.setdiff1d(np.arange(num_rows), rows_gone(shard.decisions))
        start += num_rows


class Places(NamedTuple):
    """Every file's batches, and the number of the first row of each in the whole."""

    batches: list[pa.RecordBatch]
    starts: np.ndarray


def places(paths: Sequence[Path]) -> Places:
    found = [batch for path in paths for batch in file_batches(path)]
    return Places(found, np.cumsum([0, *(batch.num_rows for batch in found)]))


def pieces(
    whole: Places, rows: np.ndarray, *, columns: Sequence[str] = tuple(SCHEMA.names)
) -> Iterator[pa.RecordBatch]:
    """The documents with these ascending numbers, or some columns of them, from each batch that has some."""
    batch_of = np.searchsorted(whole.starts, rows, side="right") - 1
    bounds = [0, *(1 + np.flatnonzero(np.diff(batch_of))).tolist(), len(rows)]
    for start, stop in itertools.pairwise(bounds if len(rows) else []):
        number = batch_of[start]
        local = rows[start:stop] - whole.starts[number]
        yield whole.batches[number].select(list(columns)).take(pa.array(local))


def runs(whole: Places, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The documents with these ascending numbers, each run of neighbours as a slice of its batch: nothing is copied."""
    batch_of = np.searchsorted(whole.starts, rows, side="right") - 1
    bounds = [0, *(1 + np.flatnonzero((np.diff(batch_of) != 0) | (np.diff(rows) != 1))).tolist(), len(rows)]
    for start, stop in itertools.pairwise(bounds if len(rows) else []):
        batch = whole.batches[batch_of[start]]
        yield batch.slice(int(rows[start] - whole.starts[batch_of[start]]), stop - start)


def fetch(whole: Places, rows: np.ndarray, *, columns: Sequence[str] = tuple(SCHEMA.names)) -> pa.RecordBatch:
    """The documents with these numbers, or some columns of them, in that order; only their batches are touched."""
    order = np.argsort(rows, kind="stable")
    found = list(pieces(whole, np.asarray(rows)[order], columns=columns))
    if not found:
        return to_batch([]).select(list(columns))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    together = pa.concat_batches(found)
    return together if np.array_equal(order, np.arange(len(order))) else together.take(pa.array(back))


# --- a decision over the corpus --------------------------------------------------------------------------------------


def _decide(
    stage: Stage, parts: Sequence[Path], shards: Sequence[Shard], keys: Sequence[str], settings: Settings
) -> tuple[Path, dict[str, Any]]:
    """The folder with the decision on every part, taken over or made; and its report."""
    place = settings.work / "decisions" / digest(["decision", stage_digest(stage), *keys])
    if not place.is_dir():
        whole = places([shard.documents for shard in shards])
        firsts = np.cumsum([0, *(_num_rows(shard.documents) for shard in shards)])
        sketches = [
            batch.set_column(
                batch.schema.get_field_index("row"), "row", pa.array(batch.column("row").to_numpy() + first, pa.int64())
            )
            for part, first in zip(parts, firsts)
            for batch in file_batches(_sketch_of(part, 0))
        ]
        new = Path(tempfile.mkdtemp(dir=settings.work / "new"))
        (new / "scratch").mkdir()
        # Where all were dropped before, there is nothing to decide.
        decision = Decision(np.zeros(0, np.int64), [], [])
        if sketches:
            decision = stage.apply.resolve(sketches, functools.partial(fetch, whole), new / "scratch")
        shutil.rmtree(new / "scratch")
        write_decision(decision, firsts, new)
        (new / "report.json").write_text(json.dumps(dict(decision.report)), encoding="utf-8")
        _appear(new, place)
    return place, json.loads((place / "report.json").read_text(encoding="utf-8"))


def _num_rows(path: Path) -> int:
    return sum(batch.num_rows for batch in file_batches(path))


# --- one run at a time ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Holds the work folder for this run; ValueError where another one has it."""
    import fcntl

    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing to {work}; wait for it, or give another --output") from None
        yield
