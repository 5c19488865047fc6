"""Long text (InternLM2's report, section 3.1.3): documents of more than 32 KB that are one text from end to end.

    python -m data_pipelines.long_text train --input PATH [PATH ...] --output ngrams
    python -m data_pipelines.long_text fit --input PATH [PATH ...] --scorer ngrams --keep 0.9 --output thresholds.json

Three filters, each a stage: length, measures of the text (`discourse.py`), and whether the beginning of a document
helps to predict what follows (`coherence.py`), which wants a scorer: a folder that `train` wrote, or a MODEL. `fit`
scores a validation sample and writes the thresholds, and beside them thresholds.html with the documents next to them.

Of a window of tokens the last ones (S2, --scored) are predicted from all before them (S1), and from the nearest of
these alone (--short-context). A MODEL is a Hugging Face folder, a run or its name, BASE+ADAPTER or hf:ORG/NAME. In what
is printed and written, * stands for all domains, or all languages.

What stays is a subset of the normal corpus: it is learned there as well.
"""

import argparse
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pyarrow as pa

from data_pipelines import chain, ngram_scorer
from data_pipelines.classifier import ANY
from data_pipelines.coherence import (
    NOT_HURT,
    Filter,
    Measure,
    Scorer,
    Windows,
    coherence,
    coherent,
)
from data_pipelines.coherence_thresholds import (
    LEAST_SAMPLES,
    Sample,
    excerpt,
    fit_thresholds,
    read_thresholds,
    write_page,
    write_thresholds,
)
from data_pipelines.discourse import statistics
from data_pipelines.document import Check, Document, Outcome, Stage, only, text_buffer, to_documents
from data_pipelines.ledger import Ledger, dropped_by_reason, record
from data_pipelines.natural_languages import identify_languages
from data_pipelines.rules import edit, normalise_rows, normalise_text

CODE = ("code",)
LONG_BYTES = 32 * 1024
"""A document of more UTF-8 bytes is long."""
_opening = threading.Lock()


def longer_than(num_bytes: int = LONG_BYTES) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops documents of at most `num_bytes` bytes of UTF-8 ("not_long")."""

    def apply(batch: pa.RecordBatch) -> Outcome:
        sizes_D = np.diff(text_buffer(batch).offsets)
        details = [f"{n} bytes are not above {num_bytes}" if n <= num_bytes else None for n in sizes_D.tolist()]
        checks = [Check("not_long", sizes_D.astype(np.float64), "below", num_bytes + 1)]
        return Outcome(batch, [detail and "not_long" for detail in details], details, checks)

    return apply


LONG_TEXT = (
    Stage("normalise", "batch", only(CODE, edit(normalise_text, normalise_rows), others=True)),
    Stage("language", "batch", only(CODE, identify_languages, others=True)),
    Stage("length", "batch", longer_than(LONG_BYTES)),
    Stage("statistics", "batch", statistics(passed=CODE)),
)
"""What needs no scorer; code passes all but the length untouched. `long_text_stages` adds the perplexity filter, and
`fit` scores what these leave: bounds and thresholds are by the language that is entered here."""


def long_text_stages(
    scorer: str | Path,
    *,
    thresholds: str | Path | None = None,
    cut: Windows | None = None,
    settings: Filter = Filter(),
    batch_size: int = 4,
) -> tuple[Stage, ...]:
    """Returns `LONG_TEXT` and the perplexity filter by a scorer (a folder of n-grams, or a MODEL).

    thresholds: a file that `fit` wrote, whose windows hold then; None drops what S1 hurts (a ppl_ratio below 0).
    batch_size: windows that a model scores at once. Raises ValueError where the file was fitted with another scorer.
    """
    held = read_thresholds(thresholds) if thresholds else NOT_HURT
    cut = cut or held.windows or Windows()
    # Absolute, because the workers of a cluster run in folders of their own.
    scorer = str(Path(scorer).absolute() if Path(scorer).exists() else scorer)
    version = scorer_version(scorer)
    if held.scorer not in ("", version):
        raise ValueError(
            f"{thresholds} was fitted with another scorer than {scorer} ({held.scorer[:12]}, this is {version[:12]}); "
            "perplexities of two scorers do not compare: fit anew, or give that scorer"
        )
    load = functools.partial(open_scorer, scorer, cut.window, batch_size)
    judged = Stage("coherence", "batch", coherent(load, held, cut=cut, settings=settings), version=version)
    return (*LONG_TEXT, judged)


def is_ngrams(scorer: str) -> bool:
    return (Path(scorer) / ngram_scorer.MANIFEST).is_file()


def scorer_version(scorer: str) -> str:
    """Returns a digest of what a scorer is made of, without opening it."""
    if is_ngrams(scorer):
        return ngram_scorer.version_of(scorer)
    from data_pipelines import checkpoint_scorer

    return checkpoint_scorer.version_of(scorer)


def open_scorer(scorer: str, window: int, batch_size: int = 4) -> Scorer:
    """Returns the scorer of a folder of n-grams or of a MODEL; opened once per process."""
    with _opening:  # threads of one process ask at the same time
        return _opened(scorer, window, batch_size)


@functools.lru_cache(maxsize=2)
def _opened(scorer: str, window: int, batch_size: int) -> Scorer:
    if is_ngrams(scorer):
        return ngram_scorer.open_counts(scorer)
    from data_pipelines import checkpoint_scorer
    from internjax.hf.open import open_model

    version = scorer_version(scorer)
    return checkpoint_scorer.checkpoint_scorer(
        open_model(scorer), window=window, batch_size=batch_size, version=version
    )


# --- commands --------------------------------------------------------------------------------------------------------


class _Input(NamedTuple):
    """Parts of the files to read; `bad` grows with what cannot be read."""

    parts: list[chain.Unit]
    bad: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts n-grams or fits thresholds, and returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        print(_train(given) if given.command == "train" else _fit(given))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    windows, counted = Windows(), ngram_scorer.NgramSettings()
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.long_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="text -> a scorer of counted words")
    fit = commands.add_parser("fit", help="a validation sample -> thresholds, and the page to judge them by")
    for command in (train, fit):
        command.add_argument(
            "--input", nargs="+", required=True, metavar="PATH", help="as data_pipelines.wanjuan reads"
        )
    train.add_argument("--output", required=True, metavar="DIR", help="folder to write; one of these is replaced")
    train.add_argument(
        "--cache-share", type=float, default=counted.cache_share, metavar="P",
        help="of a probability, what comes from the words of the same document so far (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--max-ngrams", type=int, default=counted.max_ngrams, metavar="N",
        help="pairs of words that are held, and triples; the rarest are forgotten (default: %(default)s)",
    )  # fmt: skip
    fit.add_argument("--scorer", required=True, metavar="SCORER", help="folder that train wrote, or MODEL")
    fit.add_argument("--output", required=True, metavar="FILE.json", help="the page goes beside it, as FILE.html")
    fit.add_argument(
        "--keep", nargs="+", default=["0.9"], metavar="[DOMAIN=]SHARE", help="share that is to stay (default: 0.9)"
    )
    fit.add_argument(
        "--measure", choices=get_args(Measure), default="ppl_ratio",
        help="how much less perplexing S2 is behind all of S1: as a share, or the difference (default: ppl_ratio)",
    )  # fmt: skip
    fit.add_argument("--window", type=int, default=windows.window, metavar="N", help="tokens (default: %(default)s)")
    fit.add_argument(
        "--scored", type=int, default=windows.scored, metavar="N", help="tokens of S2 (default: %(default)s)"
    )
    fit.add_argument(
        "--short-context", type=int, default=windows.short_context, metavar="N",
        help="tokens of S1 that are nearest to S2, 0: none (default: %(default)s)",
    )  # fmt: skip
    fit.add_argument("--least-samples", type=int, default=LEAST_SAMPLES, help="for a threshold (default: %(default)s)")
    fit.add_argument("--borderline", type=int, default=5, help="documents shown on either side (default: %(default)s)")
    fit.add_argument("--batch-size", type=int, default=4, help="windows a model scores at once (default: %(default)s)")
    return parser


def _read(paths: Sequence[str]) -> _Input:
    from data_pipelines import sources

    bad: list[str] = []
    size = chain.Sizes().unit_bytes // 16
    found = sources.cut(sources.find_files(paths, on_bad_row=bad.append), size=size)
    units = [sources.unit(group) for group in sources.groups(found.slices, size=size)]
    return _Input(units, [*bad, *found.bad])


def _documents(given: _Input, label: str) -> Iterator[Document]:
    """The documents of all parts, a batch in memory at a time, with a progress bar."""
    from data_pipelines.executors import shown_progress

    with shown_progress() as progress:
        for done, part in enumerate(given.parts):
            progress(label, done, len(given.parts))
            for batch in chain.batches(part.read(given.bad.append), chain.Sizes()):
                yield from to_documents(batch)
        progress(label, len(given.parts), len(given.parts))


def _train(given: argparse.Namespace) -> str:
    from internjax.hf.folder import new_folder

    settings = ngram_scorer.NgramSettings(cache_share=given.cache_share, max_ngrams=given.max_ngrams)
    read = _read(given.input)
    counts = ngram_scorer.count((document.text for document in _documents(read, "count words")), settings)
    with new_folder(given.output, overwrite=True, marker=ngram_scorer.MANIFEST) as folder:
        ngram_scorer.write_counts(folder, counts, settings)
    numbers = f"{int(counts.words.sum())} words, {len(counts.pair_keys)} pairs, {len(counts.triple_keys)} triples"
    return "\n".join([*_left_out(read), f"{given.output}: {numbers}"])


def _left_out(read: _Input) -> list[str]:
    return [*(f"left out: {message}" for message in read.bad[:5]), f"{len(read.bad)} rows could not be read"]


def _fit(given: argparse.Namespace) -> str:
    output = Path(given.output)
    if output.suffix != ".json":
        raise ValueError(f"--output is {output}; give a name that ends in .json")
    cut = Windows(given.window, given.scored, given.short_context)
    target = _shares(given.keep)
    scorer = open_scorer(given.scorer, cut.window, given.batch_size)
    read, ledger = _read(given.input), Ledger()
    samples = list(score_documents(_documents(read, "score documents"), scorer, cut, given.measure, ledger))
    if not samples:
        reasons = (
            ", ".join(f"{reason} ({number})" for reason, number in dropped_by_reason(ledger).items()) or "none came"
        )
        raise ValueError(f"no document is left to score: {reasons}; give long documents of the corpus to be filtered")
    fit = fit_thresholds(samples, target, least_samples=given.least_samples, num_borderline=given.borderline)
    write_thresholds(output, fit, measure=given.measure, scorer=scorer, cut=cut)
    page = output.with_suffix(".html")
    write_page(page, fit, samples, measure=given.measure, scorer=scorer)
    lines = [*_left_out(read), f"{len(samples)} documents scored"]
    lines += [f"  {number:6d} {reason}" for reason, number in dropped_by_reason(ledger).items()]
    lines += [
        f"{item.domain}, {item.language}: {given.measure} below {item.value:.4f} goes; {item.kept_share:.3f} of "
        f"{item.num_samples} stay"
        for item in fit.thresholds
    ]
    return "\n".join([*lines, *fit.notes, f"written to {output}; look at {page}"])


def _shares(texts: Sequence[str]) -> dict[str, float]:
    """Domain -> share of "SHARE" and "DOMAIN=SHARE" texts."""
    found = {}
    for text in texts:
        domain, _, share = text.rpartition("=")
        try:
            found[domain or ANY] = float(share)
        except ValueError:
            raise ValueError(f"--keep has {text!r}; give a share such as 0.9, or DOMAIN=0.9") from None
    return {ANY: 0.9} | found


def score_documents(
    documents: Iterator[Document], scorer: Scorer, cut: Windows, measure: Measure, ledger: Ledger
) -> Iterator[Sample]:
    """Yields a sample per document that `LONG_TEXT` leaves; the ledger counts the others."""
    for batch in chain.batches(documents, chain.Sizes()):
        for stage in LONG_TEXT:
            batch = record(ledger, stage.name, batch, stage.apply(batch))
        names = ("id", "path", "domain", "language", "text")
        columns = {name: batch.column(name).to_pylist() for name in names}
        scores_D = coherence(columns["text"], scorer, cut).scores[measure].tolist()
        head = (columns[name] for name in names[:4])
        yield from itertools.starmap(Sample, zip(*head, scores_D, map(excerpt, columns["text"]), strict=True))


if __name__ == "__main__":
    sys.exit(main())
