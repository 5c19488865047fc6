"""What a fine-tuning would read of a file, without reading any weights.

    python -m data_pipelines.preview --data FILE [FILE ...] --model MODEL [--format alpaca] [--seq-len 2048]

Shows the detected format, counts, the lengths against the row, bad rows with their reasons, and rendered samples with
what is learned of them in green (between ⟦ and ⟧ where the output is no terminal). MODEL needs tokenizer and chat
template only.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from data_pipelines import formats
from data_pipelines.conversations import Reading, read_items
from data_pipelines.formats import Format
from data_pipelines.rows import columns_of
from data_pipelines.tokens import TokenDocument
from internjax.text import chat, marked
from internjax.text.tokenizer import Tokenizer, load_tokenizer

_SHOWN_BAD = 10
_MAX_CHARS = 800
_BAR = 40


class Found(NamedTuple):
    """What a file holds."""

    name: str
    format: Format
    is_detected: bool
    num_rows: int
    """Conversations, texts or pairs."""
    samples: list[TokenDocument]
    """The first ones."""
    lengths: np.ndarray
    """Tokens of every sample."""
    num_learned: int
    """Tokens of all of them that are learned."""
    bad: list[str]
    unread: list[str]
    """Columns that the format does not read."""


def look(
    name: str,
    tokenizer: Tokenizer,
    *,
    format: Format | None = None,
    columns: Sequence[str] = (),
    num_samples: int = 2,
    date: datetime | None = None,
) -> Found:
    """Returns what a file holds, rendered by the tokenizer's template; raises ValueError where it has no known form.

    date: what a template that writes the date is told; None: what a fine-tuning tells it.
    """
    date = date or Reading().day()
    bad: list[str] = []
    read = format or formats.detect_file(name, columns=columns)
    num_rows, lengths, samples, num_learned = 0, [], [], 0
    if read == "preference":
        rows = _pairs(name, tokenizer, columns, date, bad)
    else:
        items = read_items(name, tokenizer, format=read, columns=columns, date=date, bad=bad.append)
        rows = (item.documents for item in items)
    for documents in rows:
        num_rows += 1
        samples += documents[: max(0, num_samples - len(samples))]
        lengths += [len(document.ids) for document in documents]
        num_learned += sum(int(np.sum(document.mask)) for document in documents)
    unread = formats.unread_columns(name, format=read, columns=columns)
    return Found(str(name), read, format is None, num_rows, samples, np.array(lengths, int), num_learned, bad, unread)


def _pairs(
    name: str, tokenizer: Tokenizer, columns: Sequence[str], date: datetime, bad: list[str]
) -> Iterator[list[TokenDocument]]:
    """Both conversations of every preference pair; what is compared, the last answer, counts as learned."""
    for pair in formats.preferences(name, columns=columns, on_bad_row=bad.append):
        learned = [False] * len(pair.prompt) + [True]
        try:
            yield [
                TokenDocument(f"{pair.place} {which}", *sample)
                for which, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
                for sample in chat.render_samples([*pair.prompt, answer], tokenizer, learned=learned, date=date)
            ]
        except ValueError as error:
            bad.append(f"{pair.place}: {error}")


def describe(found: Found, tokenizer: Tokenizer, *, seq_len: int, colour: bool) -> str:
    """Returns what was found as lines for a terminal."""
    kind = {"text": "texts", "preference": "pairs"}.get(found.format, "conversations")
    how = "detected" if found.is_detected else "as told"
    lines = [f"{found.name}: {found.format} ({how}), {found.num_rows:,} {kind}, {len(found.bad):,} bad rows"]
    lines += [f"  columns not read: {', '.join(found.unread)}"] if found.unread else []
    if found.lengths.size > found.num_rows and kind == "conversations":
        lines.append(
            f"  {found.lengths.size:,} samples: the chat template rewrites history, so a conversation becomes one "
            "sample per assistant turn"
        )
    if found.lengths.size:
        lines += _lengths(found, seq_len)
    lines += [f"  bad row: {message}" for message in found.bad[:_SHOWN_BAD]]
    if len(found.bad) > _SHOWN_BAD:
        lines.append(f"  … and {len(found.bad) - _SHOWN_BAD:,} more")
    for number, sample in enumerate(found.samples, 1):
        text = marked.shortened(marked.marked(sample.ids, sample.mask, tokenizer), max_chars=_MAX_CHARS)
        marks = "green" if colour else "between ⟦ and ⟧"
        lines += [f"sample {number}, {sample.id} ({marks}: learned)", marked.terminal(text, colour=colour)]
    return "\n".join(lines)


def _lengths(found: Found, seq_len: int) -> list[str]:
    """Percentiles of the lengths, what is longer than a row, and how they are spread over powers of two."""
    lengths = found.lengths
    low, middle, high, most = np.percentile(lengths, [0, 50, 90, 99], method="higher")
    over = int((lengths > seq_len + 1).sum())  # a row has an input and a target at each of its positions
    lines = [
        f"  tokens: least {low:,}, median {middle:,}, 90 % {high:,}, 99 % {most:,}, most {lengths.max():,}; "
        f"{over:,} of {lengths.size:,} longer than a row of {seq_len:,}",
        f"  learned: {found.num_learned:,} of {lengths.sum():,} tokens ({found.num_learned / lengths.sum():.0%})",
    ]
    exponents = np.maximum(4, np.ceil(np.log2(np.maximum(lengths, 1)))).astype(int)
    counts = {exponent: int((exponents == exponent).sum()) for exponent in range(exponents.min(), exponents.max() + 1)}
    widest = max(counts.values())
    for exponent, count in counts.items():
        bar = "#" * (-(-count * _BAR // widest))
        lines.append(f"  {f'<= {1 << exponent:,}':>12} {bar} {count:,}")
    return lines


def tokenizer_of(model: str) -> Tokenizer:
    """Returns the tokenizer of MODEL; a folder with nothing but a tokenizer will do."""
    folder = Path(model)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        from internjax.hf.resolve import resolve

        folder = resolve(model).folder
    return load_tokenizer(folder)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 where every file holds something to learn from."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.preview", description="Shows what a fine-tuning would read and learn of files."
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="files, or hf:, modelscope:, datasets:NAME"
    )
    parser.add_argument("--model", required=True, help="MODEL whose tokenizer and chat template are used")
    parser.add_argument("--format", choices=("auto", *get_args(Format)), default="auto", help="format of all files")
    parser.add_argument("--columns", nargs="*", default=(), metavar="FIELD=COLUMN", help="instruction=question ...")
    parser.add_argument("--samples", type=int, default=2, help="rendered samples of each file")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--date", default=Reading.date, help="told to a chat template that writes today's date")
    args = parser.parse_args(arguments)
    failed = False
    try:
        date, tokenizer = Reading(date=args.date).day(), tokenizer_of(args.model)
        if chat.depends_on_date(tokenizer):
            print(f"the chat template writes the date: {args.date} (--date)")
        for name in args.data:
            format = None if args.format == "auto" else args.format
            columns = columns_of(args.columns, name, args.data)
            found = look(name, tokenizer, format=format, columns=columns, num_samples=args.samples, date=date)
            print(describe(found, tokenizer, seq_len=args.seq_len, colour=sys.stdout.isatty()))
            failed |= not found.num_rows
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
