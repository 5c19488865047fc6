"""The chains from raw documents to clean ones, as lists of stages (WanJuan; InternLM2's report, section 3.1).

    python -m data_pipelines.wanjuan --input PATH [PATH ...] --output DIR [--chain mixed|web|reference|code]

DIR/documents.parquet  what was kept, code files in the order of their dependencies
DIR/repositories.jsonl each repository's kept files as one markdown text (where there is code)
DIR/ledger.json        documents and bytes in and kept, dropped by stage and reason; it sums, or the run fails
DIR/dropped.parquet    every dropped document: id, path, stage, reason, measured values
"""

import argparse
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from data_pipelines.code import markdown, order_documents
from data_pipelines.dedup import NearDuplicates, exact_duplicates, near_duplicates
from data_pipelines.document import (
    Document,
    Outcome,
    Stage,
    concat_batches,
    to_batch,
    to_documents,
)
from data_pipelines.ledger import Ledger, check, dropped_by_reason, merge_last, record, remember_kept, save, summary
from data_pipelines.rules import (
    REFERENCE,
    WEB,
    CodeRules,
    clean_lines,
    code_rules,
    edit,
    normalise_code,
    normalise_text,
    text_rules,
)

BATCH_ROWS = 1024
CODE = ("code",)


def only(
    domains: Sequence[str], apply: Callable[[pa.RecordBatch], Outcome], *, others: bool = False
) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that acts on rows of these domains (others=True: of all but these) and passes the rest on."""

    def selected(batch: pa.RecordBatch) -> Outcome:
        chosen = [(domain in domains) != others for domain in batch.column("domain").to_pylist()]
        if all(chosen):
            return apply(batch)
        reasons: list[str | None] = [None] * batch.num_rows
        details: list[str | None] = [None] * batch.num_rows
        rows = [row for row, is_chosen in enumerate(chosen) if is_chosen]
        if not rows:
            return Outcome(batch, reasons, details)
        outcome = apply(batch.take(pa.array(rows)))
        for row, reason, detail in zip(rows, outcome.reasons, outcome.details, strict=True):
            reasons[row], details[row] = reason, detail
        # Old and new rows end to end, then every row from where it now lies.
        both = concat_batches([batch, outcome.batch])
        where = list(range(batch.num_rows))
        for new, row in enumerate(rows):
            where[row] = batch.num_rows + new
        return Outcome(both.take(pa.array(where)), reasons, details)

    return selected


WEB_TEXT = (
    Stage("normalise", "batch", edit(normalise_text)),
    Stage("clean_lines", "batch", edit(clean_lines)),
    Stage("rules", "batch", text_rules(WEB)),
    Stage("exact_duplicates", "corpus", exact_duplicates),
    Stage("near_duplicates", "corpus", near_duplicates(NearDuplicates())),
)
REFERENCE_TEXT = (
    Stage("normalise", "batch", edit(normalise_text)),
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
CHAIN = (
    *(Stage(f"code_{stage.name}", stage.scope, only(CODE, stage.apply)) for stage in CODE_FILES),
    *(Stage(f"text_{stage.name}", stage.scope, only(CODE, stage.apply, others=True)) for stage in REFERENCE_TEXT),
)
"""Code by the rules of code, everything else by those of documentation: what a mixed folder or a user's file gets."""
CHAINS = {"mixed": CHAIN, "web": WEB_TEXT, "reference": REFERENCE_TEXT, "code": CODE_FILES}


def run_chain(documents: Iterable[Document], stages: Sequence[Stage], ledger: Ledger) -> list[Document]:
    """Returns what the stages keep, code files of a repository in dependency order. Fills the ledger and checks it.

    Raises ValueError where nothing comes in or nothing is kept, RuntimeError where the ledger does not sum.
    """
    batch = to_batch(documents)
    if batch.num_rows == 0:
        raise ValueError("the corpus is empty: there is no document to run the chain on; give files with text")
    for stage in stages:
        batch = _run_stage(batch, stage, ledger)
    check(ledger)
    if batch.num_rows == 0:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in list(dropped_by_reason(ledger).items())[:5])
        raise ValueError(
            f"all {summary(ledger)['documents_in']} documents were dropped: {reasons}; give other documents or a chain "
            f"whose thresholds fit them (chains: {', '.join(CHAINS)})"
        )
    kept = order_documents(to_documents(batch))
    remember_kept(ledger, kept)
    return kept


def _run_stage(batch: pa.RecordBatch, stage: Stage, ledger: Ledger) -> pa.RecordBatch:
    if stage.scope == "corpus":
        return record(ledger, stage.name, batch, stage.apply(batch))
    parts = [batch.slice(start, BATCH_ROWS) for start in range(0, max(batch.num_rows, 1), BATCH_ROWS)]
    kept = [record(ledger, stage.name, part, stage.apply(part)) for part in parts]
    merge_last(ledger, len(parts))
    return concat_batches(kept)


def write_folder(documents: Sequence[Document], ledger: Ledger, folder: str | Path) -> None:
    """Writes the output folder named at the top of this file, all of it or nothing."""
    import pyarrow.parquet as pq

    folder = Path(folder)
    if folder.exists() and not (folder / "ledger.json").is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and was not written by this command (no ledger.json); give another --output")
    new = folder.with_name(f".{folder.name}.new-{uuid.uuid4().hex[:8]}")
    new.mkdir(parents=True)
    try:
        pq.write_table(pa.Table.from_batches([to_batch(documents)]), new / "documents.parquet")
        with (new / "repositories.jsonl").open("w", encoding="utf-8") as lines:
            for document in repositories(documents):
                row = {"id": document.id, "repository": document.path, "text": document.text}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        save(ledger, new)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def repositories(documents: Sequence[Document]) -> list[Document]:
    """Returns one markdown document per repository that holds code, its files in the order they have here."""
    files: dict[str, list[Document]] = {}
    for document in documents:
        if document.meta.get("repository"):
            files.setdefault(str(document.meta["repository"]), []).append(document)
    with_code = {name: held for name, held in sorted(files.items()) if any(d.domain == "code" for d in held)}
    return [text for name, held in with_code.items() for text in markdown(held, title=name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a chain on files and returns the exit status."""
    from data_pipelines import sources

    parser = argparse.ArgumentParser(prog="python -m data_pipelines.wanjuan", description=__doc__.partition("\n")[0])
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="JSONL, parquet, text files, folders")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write; one of this command is replaced"
    )
    parser.add_argument("--chain", choices=sorted(CHAINS), default="mixed", help="list of stages (default: mixed)")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be read")
    given = parser.parse_args(arguments)
    ledger = Ledger()
    bad: list[str] = []
    try:
        documents = sources.read(given.input, on_bad_row=None if given.strict else bad.append)
        ledger.unreadable.update(message.partition(":")[0] for message in bad)
        kept = run_chain(documents, CHAINS[given.chain], ledger)
        write_folder(kept, ledger, given.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for message in bad[:5]:
        print(f"left out: {message}", file=sys.stderr)
    counts = summary(ledger)
    print(f"{counts['documents_in']} documents in, {counts['documents_kept']} kept, {len(bad)} rows could not be read")
    for reason, count in dropped_by_reason(ledger).items():
        print(f"  {count:8d} {reason}")
    print(f"written to {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
