"""The chains from raw documents to clean ones, as lists of stages (WanJuan; InternLM2's report, section 3.1).

    python -m data_pipelines.wanjuan web|code|long|mixed|reference --input PATH [PATH ...] --output DIR

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
import functools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from data_pipelines import ahead, chain, executors
from data_pipelines.classifier import Drop, classified, score_by
from data_pipelines.code_languages import detect_languages
from data_pipelines.code_rules import CodeRules, code_rules
from data_pipelines.decontamination import Benchmark, Decontamination, build_index, decontaminate, parse_benchmark
from data_pipelines.dedup import NearDuplicates, exact_duplicates, near_duplicates
from data_pipelines.document import (
    Document,
    Stage,
    only,
    to_documents,
)
from data_pipelines.ledger import Ledger, dropped_by_reason, file_of, merge, remember_kept, summary
from data_pipelines.licence import PERMISSIVE, licences
from data_pipelines.long_text import LONG_TEXT, long_text_stages
from data_pipelines.measures import counted
from data_pipelines.natural_languages import identify_languages
from data_pipelines.output import ordered_batches, write_folder
from data_pipelines.pii import masked
from data_pipelines.rules import (
    REFERENCE,
    WEB,
    clean_lines,
    clean_rows,
    edit,
    normalise_code,
    normalise_rows,
    normalise_text,
    text_rules,
)
from data_pipelines.safety import blocked_domains, blocked_words
from data_pipelines.tiers import CODE_QUALITY, Tiers, score_of_meta, tiers

CODE = ("code",)
PROSE = ("reference",)


class Given(NamedTuple):
    """What only the user can bring. A stage that wants something which is not given is left out of its chain."""

    domains: tuple[str, ...] = ()
    """Files of blocked domains."""
    words: tuple[str, ...] = ()
    """Files of blocked words."""
    models: str | None = None
    """A folder of classifiers that `data_pipelines.quality` trained, each in a folder named as in MODELS."""
    tiers: Tiers | None = None
    """Tiers of code by models/code_quality, or, without it, by the field `quality` of meta."""
    benchmarks: tuple[Benchmark, ...] = ()
    decontamination: Decontamination = Decontamination()
    scorer: str | None = None
    """Of long text: a folder of n-grams that `data_pipelines.long_text` trained, or a MODEL."""
    thresholds: str | None = None
    """What `data_pipelines.long_text fit` wrote for that scorer; without it only what the beginning hurts goes."""
    licences: frozenset[str] | None = None
    """Of code; None: all are allowed."""
    unknown_licence: Literal["keep", "drop"] = "keep"


class Model(NamedTuple):
    """On which side of its threshold a classifier drops, and the reason that it gives."""

    drop: Drop
    reason: str


MODELS = {
    "toxicity": Model("above", "toxic"),
    "adult_content": Model("above", "adult_content"),
    "advertisement": Model("above", "advertisement"),
    "fluency": Model("below", "not_fluent"),
}


def web_text(given: Given = Given()) -> tuple[Stage, ...]:
    """Web pages: the report's order, clean, deduplicated, safe, of high quality. Personal data is masked last."""
    return (
        Stage("normalise", "batch", edit(normalise_text, normalise_rows)),
        Stage("language", "batch", identify_languages),
        Stage("clean_lines", "batch", edit(clean_lines, clean_rows)),
        Stage("rules", "batch", text_rules(WEB)),
        *_duplicates(),
        *([Stage("blocked_domains", "batch", blocked_domains(given.domains))] if given.domains else []),
        *([Stage("blocked_words", "batch", blocked_words(given.words))] if given.words else []),
        *_classifiers(given),
        *_decontaminated(given),
        Stage("mask_personal_data", "batch", masked()),
    )


def reference_text(given: Given = Given()) -> tuple[Stage, ...]:
    """Documentation: rules that short entries and lists pass; nothing is masked."""
    return (
        Stage("normalise", "batch", edit(normalise_text, normalise_rows)),
        Stage("language", "batch", identify_languages),
        Stage("rules", "batch", text_rules(REFERENCE)),
        *_duplicates(),
        *_decontaminated(given),
    )


def code_files(given: Given = Given()) -> tuple[Stage, ...]:
    """Files of repositories. Their documents (markdown, notebooks) follow the rules of documentation."""
    return (
        *_origin(given),
        Stage("normalise", "batch", only(PROSE, edit(normalise_code), others=True)),
        Stage("rules", "batch", only(PROSE, code_rules(CodeRules()), others=True)),
        Stage("prose_normalise", "batch", only(PROSE, edit(normalise_text, normalise_rows))),
        Stage("prose_rules", "batch", only(PROSE, text_rules(REFERENCE))),
        *_duplicates(),
        *_tiers(given),
        *_decontaminated(given),
    )


def mixed(given: Given = Given()) -> tuple[Stage, ...]:
    """Code by the rules of code, everything else by those of documentation: for a folder of both, or a user's file."""
    return (
        *_origin(given, only_code=True),
        Stage("code_normalise", "batch", only(CODE, edit(normalise_code))),
        Stage("code_rules", "batch", only(CODE, code_rules(CodeRules()))),
        Stage("text_normalise", "batch", only(CODE, edit(normalise_text, normalise_rows), others=True)),
        Stage("text_language", "batch", only(CODE, identify_languages, others=True)),
        Stage("text_rules", "batch", only(CODE, text_rules(REFERENCE), others=True)),
        *(stage._replace(name=f"code_{stage.name}", apply=only(CODE, stage.apply)) for stage in _duplicates()),
        *(
            stage._replace(name=f"text_{stage.name}", apply=only(CODE, stage.apply, others=True))
            for stage in _duplicates()
        ),
        *_tiers(given),
        *_decontaminated(given),
    )


def long_text(given: Given = Given()) -> tuple[Stage, ...]:
    """Long documents, out of what another chain has kept: they are learned there as well."""
    filters = LONG_TEXT
    if given.scorer is not None:
        filters = long_text_stages(given.scorer, thresholds=given.thresholds)
    return (*filters, *_decontaminated(given))


def _duplicates() -> tuple[Stage, ...]:
    return (
        Stage("exact_duplicates", "corpus", exact_duplicates),
        Stage("near_duplicates", "corpus", near_duplicates(NearDuplicates())),
    )


def _origin(given: Given, *, only_code: bool = False) -> tuple[Stage, ...]:
    """Language and licence of every file; both look at whole repositories, before anything of them is gone."""
    return (
        Stage("languages", "batch", only(CODE, detect_languages) if only_code else detect_languages),
        Stage("licences", "corpus", licences(given.licences, unknown=given.unknown_licence)),
    )


def _classifiers(given: Given) -> Iterator[Stage]:
    for name in _models(given):
        if name in MODELS:
            drop, reason = MODELS[name]
            yield Stage(name, "batch", classified(Path(given.models, name), drop=drop, reason=reason))


def _tiers(given: Given) -> Iterator[Stage]:
    if given.tiers is not None:
        if given.models is not None and CODE_QUALITY not in _models(given):
            raise ValueError(
                f"{given.models} holds no {CODE_QUALITY}, which tiers go by; train it, or give no models and have "
                "`quality` in meta"
            )
        score = score_of_meta if given.models is None else score_by(Path(given.models, CODE_QUALITY), drop="below")
        yield Stage("tiers", "batch", only(CODE, tiers(given.tiers, score=score)))


def _models(given: Given) -> list[str]:
    """The names of the classifiers that are given. Raises ValueError for an unknown one, or where there is none."""
    if given.models is None:
        return []
    folder, known = Path(given.models), [*MODELS, CODE_QUALITY]
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found or set(found) - set(known):
        raise ValueError(
            f"{folder} holds {', '.join(found) or 'no folder'}; wanted folders that data_pipelines.quality trained, "
            f"with names of {', '.join(known)}"
        )
    return [name for name in known if name in found]


def _decontaminated(given: Given) -> Iterator[Stage]:
    if given.benchmarks:
        index = build_index(given.benchmarks, given.decontamination)
        yield Stage("decontamination", "batch", decontaminate(index))


CHAINS = {"web": web_text, "code": code_files, "long": long_text, "mixed": mixed, "reference": reference_text}
"""By the name that the command takes. A further chain is a further list of stages and a line here."""
WEB_TEXT, CODE_FILES, CHAIN, REFERENCE_TEXT = web_text(), code_files(), mixed(), reference_text()
"""With nothing given."""


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


def check_kept(ledger: Ledger, set_aside: Sequence[Path] = ()) -> None:
    """Raises ValueError where nothing came in, or everything was dropped. set_aside: files of bad rows."""
    counts = summary(ledger)
    if not counts["documents_in"]:
        number = sum(counts["rows_set_aside"].values())
        unread = f" ({number} rows could not be read: {_first_line(set_aside)})" if number else ""
        raise ValueError(f"the corpus is empty: there is no document to run the chain on{unread}; give files with text")
    if not counts["documents_kept"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in list(dropped_by_reason(ledger).items())[:5])
        raise ValueError(
            f"all {counts['documents_in']} documents were dropped: {reasons}; give other documents or a chain "
            f"whose thresholds fit them (chains: {', '.join(CHAINS)})"
        )


def _first_line(files: Sequence[Path]) -> str:
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                return line.rstrip("\n")
    return ""


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
    files = sources.find_files(paths, on_bad_row=None if strict else bad.append)
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
        units = [sources.unit(group, sizes=sizes) for group in sources.groups(slices, size=sizes.unit_bytes)]
        found = chain.run(units, stages, settings, run_tasks, progress=progress)
        found.ledger.unreadable.update(file_of(message) for message in bad)
        (work / "set_aside.txt").write_text("".join(f"{message}\n" for message in bad), "utf-8", "replace")
        found = found._replace(set_aside=[work / "set_aside.txt", *found.set_aside])
        check_kept(found.ledger, found.set_aside)
        write_folder(found, folder, progress=progress)
        shutil.rmtree(work)
    return found.ledger


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a chain on files and returns the exit status."""
    from data_pipelines import sources

    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.wanjuan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "chain", choices=list(CHAINS),
        help="web: web pages; code: files of repositories; long: documents of more than 32 KB; reference: "
        "documentation; mixed: code as code, the rest as reference",
    )  # fmt: skip
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=sources.WHAT_IS_READ)
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
    _add_given(parser)
    given = parser.parse_args(arguments)
    if given.address and given.executor != "ray":
        parser.error("--address is for --executor ray")
    if given.threads is not None and (given.executor == "ray" or given.threads < 1):
        parser.error("--threads is for --executor local, 1 or more")
    executor = executors.ray(given.address) if given.executor == "ray" else executors.local(given.threads)
    folder = Path(given.output)
    try:
        stages = CHAINS[given.chain](_given_by(given, parser))
        with executor as run_tasks, executors.shown_progress() as progress, ahead.compiling(given.chain):
            ledger = run_files(
                given.input, stages, folder, run_tasks,
                strict=given.strict, keep_dropped=given.keep_dropped, progress=progress,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = summary(ledger)
    num_bad = sum(counts["rows_set_aside"].values())
    with (folder / "set_aside.txt").open(encoding="utf-8") as lines:
        for _, message in zip(range(5), lines):
            print(f"left out: {message.rstrip()}", file=sys.stderr)
    if repeated := counts.get("repeated_ids"):
        print(
            f"{repeated['rows']} rows bear the id of another row of their source, and are read: {repeated['some'][0]}",
            file=sys.stderr,
        )
    print(f"{counts['documents_in']} documents in, {counts['documents_kept']} kept, {num_bad} rows could not be read")
    for reason, count in dropped_by_reason(ledger).items():
        print(f"  {count:8d} {reason}")
    print(f"written to {given.output}")
    return 0


def _add_given(parser: argparse.ArgumentParser) -> None:
    """Options for what only the user can bring, and the chains that take them."""
    web = parser.add_argument_group("web")
    web.add_argument("--domains", nargs="+", default=[], metavar="FILE", help="lists of blocked domains, one per line")
    web.add_argument("--words", nargs="+", default=[], metavar="FILE", help="lists of blocked words, one per line")
    web.add_argument(
        "--models", metavar="DIR",
        help=f"folder of trained classifiers, by name: {', '.join(MODELS)}; for code: {CODE_QUALITY}",
    )  # fmt: skip
    code = parser.add_argument_group("code, mixed")
    code.add_argument(
        "--licences", nargs="+", metavar="NAME",
        help="SPDX names that are allowed, or the word permissive (default: all are)",
    )  # fmt: skip
    code.add_argument("--drop-unknown-licences", action="store_true", help="drop files whose licence is not recognised")
    code.add_argument(
        "--tiers", nargs="*", metavar="LANGUAGE",
        help=f"drop the low tier, by models/{CODE_QUALITY} or (no --models) meta's quality, in these languages or all",
    )  # fmt: skip
    settings = Tiers()
    for name, kind, default, what in (
        ("--tier-high", float, settings.high, "least score, from 0 to 1, of the high tier"),
        ("--tier-low", float, settings.low, "files with a lower score are the low tier, which goes"),
        ("--high-weight", int, settings.high_weight, "weight of the high tier in meta, for tokens --times weight"),
    ):
        code.add_argument(name, type=kind, metavar="N", help=f"of --tiers: {what} (default: {default})")
    long = parser.add_argument_group("long")
    long.add_argument(
        "--scorer", metavar="SCORER",
        help="what judges long text: the folder that data_pipelines.long_text train wrote, or a model (a Hugging Face "
        "folder, a run or its name, hf:ORG/NAME)",
    )  # fmt: skip
    long.add_argument("--thresholds", metavar="FILE", help="what data_pipelines.long_text fit wrote for that scorer")
    every = parser.add_argument_group("all chains")
    every.add_argument(
        "--benchmark", nargs="+", default=[], metavar="NAME=FILE:FIELD[,FIELD]",
        help="evaluation sets (JSONL) whose items may not stand in the documents",
    )  # fmt: skip
    every.add_argument(
        "--contaminated",
        choices=["drop", "cut"],
        default="drop",
        help="drop such a document, or cut out the lines (default: drop)",
    )


def _given_by(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Given:
    of_web, of_code = given.chain == "web", given.chain in ("code", "mixed")
    for name, value, takes in (
        ("--domains", given.domains, of_web),
        ("--words", given.words, of_web),
        ("--models", given.models, of_web or of_code),
        ("--licences", given.licences, of_code),
        ("--drop-unknown-licences", given.drop_unknown_licences, of_code),
        ("--tiers", given.tiers is not None, of_code),
        ("--tier-high", given.tier_high is not None, of_code),
        ("--tier-low", given.tier_low is not None, of_code),
        ("--high-weight", given.high_weight is not None, of_code),
        ("--scorer", given.scorer, given.chain == "long"),
        ("--thresholds", given.thresholds, given.chain == "long"),
    ):
        if value and not takes:
            parser.error(f"{name} is given, and the chain {given.chain} has no stage for it")
    if given.thresholds and not given.scorer:
        parser.error("--thresholds is for a --scorer, which is not given")
    if of_code and given.models and given.tiers is None:
        parser.error(f"--models holds {CODE_QUALITY} for --tiers, which is not given")
    of_tiers = {"high": given.tier_high, "low": given.tier_low, "high_weight": given.high_weight}
    of_tiers = {name: value for name, value in of_tiers.items() if value is not None}
    if of_tiers and given.tiers is None:
        parser.error("--tier-high, --tier-low and --high-weight are for --tiers, which is not given")
    allowed = None
    if given.licences:
        named = [name for name in given.licences if name.lower() != "permissive"]
        allowed = frozenset(named) | (PERMISSIVE if len(named) < len(given.licences) else frozenset())
    return Given(
        domains=tuple(given.domains),
        words=tuple(given.words),
        models=given.models,
        scorer=given.scorer,
        thresholds=given.thresholds,
        tiers=None if given.tiers is None else Tiers(languages=tuple(given.tiers) or None, **of_tiers),
        benchmarks=tuple(parse_benchmark(text) for text in given.benchmark),
        decontamination=Decontamination(action=given.contaminated),
        licences=allowed,
        unknown_licence="drop" if given.drop_unknown_licences else "keep",
    )


if __name__ == "__main__":
    sys.exit(main())
