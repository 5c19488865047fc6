"""The chains from raw documents to clean ones, as lists of stages (WanJuan; InternLM2's report, section 3.1).

    python -m data_pipelines.wanjuan web|code|mixed|reference --input PATH [PATH ...] --output DIR

DIR/documents/NNNNN.parquet  what was kept, code files in the order of their dependencies
DIR/repositories.jsonl       each repository's kept files as one markdown text (where there is code)
DIR/ledger.json              documents and bytes in and kept, dropped by stage and reason; it sums, or the run fails
DIR/dropped.parquet          every dropped document: id, path, stage, reason, measured values (its text: --keep-dropped)
DIR/measures.parquet         what stages measured of a sample of the documents (`python -m data_pipelines.inspect DIR`)
DIR/set_aside.txt            every row and file that could not be read: file:line: reason

The corpus need not fit into memory; a repository with code must. A run that was killed goes on where it was: what it
had finished lies in the hidden folder .DIR.work beside DIR, which is removed at the end.
"""

import argparse
import contextlib
import functools
import json
import shutil
import sys
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines import chain, executors
from data_pipelines.code import markdown, order_documents
from data_pipelines.dedup import NearDuplicates, exact_duplicates, near_duplicates
from data_pipelines.document import (
    SCHEMA,
    Corpus,
    Document,
    Outcome,
    Stage,
    concat_batches,
    to_documents,
)
from data_pipelines.ledger import (
    Ledger,
    dropped_by_reason,
    file_of,
    merge,
    regroup,
    remember_kept,
    save,
    summary,
    write_parquet,
)
from data_pipelines.measures import counted
from data_pipelines.rules import (
    REFERENCE,
    WEB,
    CodeRules,
    clean_lines,
    clean_rows,
    code_rules,
    edit,
    normalise_code,
    normalise_rows,
    normalise_text,
    text_rules,
)

CODE = ("code",)
FILE_BYTES = 256 << 20
"""Text in a file of documents."""

Apply = Callable[[pa.RecordBatch], Outcome]


def only(domains: Sequence[str], apply: Apply | Corpus, *, others: bool = False) -> Apply | Corpus:
    """Returns the stage that acts on rows of these domains (others=True: of all but these) and passes the rest on."""

    def chosen(batch: pa.RecordBatch) -> list[int]:
        return [row for row, d in enumerate(batch.column("domain").to_pylist()) if (d in domains) != others]

    def sketched(batch: pa.RecordBatch) -> pa.RecordBatch:
        rows = np.array(chosen(batch), np.int64)
        sketch = apply.sketch(batch.take(pa.array(rows)))
        place = sketch.schema.get_field_index("row")
        return sketch.set_column(place, "row", pa.array(rows[sketch.column("row").to_numpy()]))

    def selected(batch: pa.RecordBatch) -> Outcome:
        rows = chosen(batch)
        if len(rows) == batch.num_rows:
            return apply(batch)
        reasons: list[str | None] = [None] * batch.num_rows
        details: list[str | None] = [None] * batch.num_rows
        if not rows:
            return Outcome(batch, reasons, details)
        outcome = apply(batch.take(pa.array(rows)))
        for row, reason, detail in zip(rows, outcome.reasons, outcome.details, strict=True):
            reasons[row], details[row] = reason, detail
        checks = [check.spread(rows, batch.num_rows) for check in outcome.checks]
        # Old and new rows end to end, then every row from where it now lies.
        both = concat_batches([batch, outcome.batch])
        where = list(range(batch.num_rows))
        for new, row in enumerate(rows):
            where[row] = batch.num_rows + new
        return Outcome(both.take(pa.array(where)), reasons, details, checks)

    return Corpus(sketched, apply.resolve) if isinstance(apply, Corpus) else selected


def _mixed(code: Sequence[Stage], text: Sequence[Stage]) -> tuple[Stage, ...]:
    """Code by one list, all else by the other; batch stages first, so that documents are written once."""
    stages = [
        *(stage._replace(name=f"code_{stage.name}", apply=only(CODE, stage.apply)) for stage in code),
        *(stage._replace(name=f"text_{stage.name}", apply=only(CODE, stage.apply, others=True)) for stage in text),
    ]
    return tuple(sorted(stages, key=lambda stage: stage.scope == "corpus"))


WEB_TEXT = (
    Stage("normalise", "batch", edit(normalise_text, normalise_rows)),
    Stage("clean_lines", "batch", edit(clean_lines, clean_rows)),
    Stage("rules", "batch", text_rules(WEB)),
    Stage("exact_duplicates", "corpus", exact_duplicates),
    Stage("near_duplicates", "corpus", near_duplicates(NearDuplicates())),
)
REFERENCE_TEXT = (
    Stage("normalise", "batch", edit(normalise_text, normalise_rows)),
    Stage("rules", "batch", text_rules(REFERENCE)),
    Stage("exact_duplicates", "corpus", exact_duplicates),
    Stage("near_duplicates", "corpus", near_duplicates(NearDuplicates())),
)
CODE_FILES = (
    Stage("normalise", "batch", edit(normalise_code)),
    Stage("rules", "batch", code_rules(CodeRules())),
    Stage("exact_duplicates", "corpus", exact_duplicates),
    Stage("near_duplicates", "corpus", near_duplicates(NearDuplicates())),
)
CHAIN = _mixed(CODE_FILES, REFERENCE_TEXT)
"""Code by the rules of code, everything else by those of documentation: what a mixed folder or a user's file gets."""
CHAINS = {"web": WEB_TEXT, "code": CODE_FILES, "mixed": CHAIN, "reference": REFERENCE_TEXT}
"""By the name that the command takes. A further chain is a further list of stages and a line here."""


# --- in memory -------------------------------------------------------------------------------------------------------


def run_chain(
    documents: Iterable[Document], stages: Sequence[Stage], ledger: Ledger, *, sizes: chain.Sizes = chain.Sizes()
) -> list[Document]:
    """Returns what the stages keep, code files of a repository in dependency order. Fills the ledger and checks it.

    Raises ValueError where nothing comes in or nothing is kept, RuntimeError where the ledger does not sum.
    """
    documents = list(documents)
    units, start, size = [], 0, 0
    for number, document in enumerate(documents, 1):
        size += len(document.text)
        if size >= sizes.unit_bytes or number == len(documents):
            units.append(chain.Unit(str(len(units)), functools.partial(_given, documents[start:number])))
            start, size = number, 0
    with tempfile.TemporaryDirectory(prefix="chain-") as work, executors.local(1) as run_tasks:
        found = chain.run(units, stages, chain.Settings(Path(work), sizes, keep_dropped=ledger.keeps_text), run_tasks)
        merge(ledger, found.ledger)
        check_kept(ledger)
        batches = counted(ordered_batches(found.shards), ledger.stayed)
        kept = [document for batch in batches for document in to_documents(batch)]
    remember_kept(ledger, kept)
    return kept


def _given(documents: list[Document], on_bad_row: Callable[[str], None] | None) -> list[Document]:
    return documents


def check_kept(ledger: Ledger) -> None:
    """Raises ValueError where nothing came in, or everything was dropped."""
    counts = summary(ledger)
    if not counts["documents_in"]:
        raise ValueError("the corpus is empty: there is no document to run the chain on; give files with text")
    if not counts["documents_kept"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in list(dropped_by_reason(ledger).items())[:5])
        raise ValueError(
            f"all {counts['documents_in']} documents were dropped: {reasons}; give other documents or a chain "
            f"whose thresholds fit them (chains: {', '.join(CHAINS)})"
        )


# --- order and files -------------------------------------------------------------------------------------------------


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
    """Writes the output folder named at the top of this file, all of it or nothing."""
    new = folder.with_name(f".{folder.name}.new-{uuid.uuid4().hex[:8]}")
    (new / "documents").mkdir(parents=True)
    total = summary(found.ledger)["documents_kept"]
    try:
        whole, order = dependency_rows(found.shards)
        batches = (chain.fetch(whole, order[start : start + 1024]) for start in range(0, len(order), 1024))
        done = 0
        batches = counted(batches, found.ledger.stayed)
        for number, batches_of_file in enumerate(_files(regroup(batches, SCHEMA))):
            write_parquet(batches_of_file, new / "documents" / f"{number:05d}.parquet", SCHEMA)
            done += sum(batch.num_rows for batch in batches_of_file)
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
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _files(groups: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Row groups by file: about FILE_BYTES of text each."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for group in groups:
        waiting.append(group)
        size += group.column("text").nbytes
        if size >= FILE_BYTES:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


# --- the command -----------------------------------------------------------------------------------------------------


def run_files(
    paths: Sequence[str | Path],
    stages: Sequence[Stage],
    folder: Path,
    run_tasks: executors.Map,
    *,
    sizes: chain.Sizes = chain.Sizes(),
    strict: bool = False,
    keep_dropped: bool = False,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Ledger:
    """Runs the stages over files and writes the output folder; returns the ledger.

    Raises ValueError where a path is missing, nothing is read or nothing kept; the folder is then as it was.
    """
    from data_pipelines import sources

    if folder.exists() and not (folder / "ledger.json").is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and was not written by this command (no ledger.json); give another --output")
    bad: list[str] = []
    # Absolute, because the workers of a cluster run in folders of their own.
    files = sources.find_files([Path(path).absolute() for path in paths], on_bad_row=None if strict else bad.append)
    lists = [files[start : start + 64] for start in range(0, len(files), 64)]
    slices = []
    for number, found in enumerate(run_tasks(functools.partial(sources.cut, size=sizes.unit_bytes), lists), 1):
        if strict and found.bad:
            raise ValueError(found.bad[0])
        slices += found.slices
        bad += found.bad
        progress("look at the files", min(64 * number, len(files)), len(files))
    work = folder.with_name(f".{folder.name}.work")
    with chain.locked(work):
        settings = chain.Settings(work.resolve(), sizes, strict, keep_dropped)
        units = [sources.unit(group) for group in sources.groups(slices, size=sizes.unit_bytes)]
        found = chain.run(units, stages, settings, run_tasks, progress=progress)
        found.ledger.unreadable.update(file_of(message) for message in bad)
        (work / "set_aside.txt").write_text("".join(f"{message}\n" for message in bad), "utf-8", "replace")
        check_kept(found.ledger)
        write_folder(found._replace(set_aside=[work / "set_aside.txt", *found.set_aside]), folder, progress=progress)
        shutil.rmtree(work)
    return found.ledger


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Gives what shows (what, done, of how many): a bar on a terminal, a line per step of the chain elsewhere."""
    tqdm: Any = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm
    bar: Any = None
    label_now = ""

    def show(label: str, done: int, total: int) -> None:
        nonlocal bar, label_now
        if tqdm is None:
            if done == total:
                print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
            return
        if label != label_now or bar is None:
            if bar is not None:
                bar.close()
            bar, label_now = tqdm(total=total, desc=label, dynamic_ncols=True), label
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a chain on files and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.wanjuan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "chain", choices=list(CHAINS), help="list of stages; mixed: code as code, the rest as reference"
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="JSONL, parquet, text files, folders")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write; one of this command is replaced"
    )
    parser.add_argument("--executor", choices=["local", "ray"], default="local", help="threads, or a Ray cluster")
    parser.add_argument("--address", metavar="ADDR", help="of the Ray cluster (default: one is started here)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the local executor (default: one per core)")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be read")
    parser.add_argument(
        "--keep-dropped", action="store_true", help="keep the text of what is dropped, beside its reason"
    )
    given = parser.parse_args(arguments)
    if given.address and given.executor != "ray":
        parser.error("--address is for --executor ray")
    if given.threads is not None and (given.executor == "ray" or given.threads < 1):
        parser.error("--threads is for --executor local, 1 or more")
    executor = executors.ray(given.address) if given.executor == "ray" else executors.local(given.threads)
    folder = Path(given.output)
    try:
        with executor as run_tasks, shown_progress() as progress:
            ledger = run_files(
                given.input, CHAINS[given.chain], folder, run_tasks,
                strict=given.strict, keep_dropped=given.keep_dropped, progress=progress,
            )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = summary(ledger)
    num_bad = sum(counts["rows_set_aside"].values())
    with (folder / "set_aside.txt").open(encoding="utf-8") as lines:
        for _, message in zip(range(5), lines):
            print(f"left out: {message.rstrip()}", file=sys.stderr)
    print(f"{counts['documents_in']} documents in, {counts['documents_kept']} kept, {num_bad} rows could not be read")
    for reason, count in dropped_by_reason(ledger).items():
        print(f"  {count:8d} {reason}")
    print(f"written to {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
