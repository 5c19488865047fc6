"""Files of conversations -> token folders with loss masks -> packed rows: what a fine-tuning reads.

Each file becomes a token folder of its own, kept in a cache under the hash of all that decides its bytes: the file, the
tokenizer with its template, and how it is read. Several files are mixed by weight (`mixing`). Plain texts are learned
whole; of a conversation only what the assistant says is learned.

Validation is cut off by the hash of a conversation: the same conversation is on the same side in every file, epoch and
run, and all paths of a tree are together.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipelines import formats
from data_pipelines.formats import Format, Sample
from data_pipelines.loading import Rows, open_rows
from data_pipelines.mixing import Mixture, make_sources, open_mixture
from data_pipelines.rows import columns_of, digest, parse_columns
from data_pipelines.tokens import MANIFEST, TokenDocument, open_tokens, write_tokens
from data_pipelines.turns import split_at_turns
from internjax.text import chat
from internjax.text.tokenizer import Tokenizer
from internjax.train import processes

_VERSION = 2
"""Of the folders' content: it changes when the same file gives other bytes."""
_SHOWN = 5
"""Bad rows whose reasons are printed and kept."""
_WORDS = {
    "num_longer_than_a_row": "longer than {window} tokens ({how})",
    "num_turns_cut": "turns of them longer than that alone, cut at the row's end",
    "num_turns_lost": "turns of them with nothing learned before the row's end, left out",
    "num_nothing_learned_in_a_row": "of them with nothing learned in a row, left out",
    "num_rewritten_by_template": "became a sample per assistant turn, because the chat template rewrites history",
}
"""What is counted of a file where it is not zero, as it is said."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files of conversations are read. format, weight and max_samples are empty or have one value for each file."""

    format: tuple[Literal["auto"] | Format, ...] = ()
    """Format of each file, or one for all; auto (or none): what its first row shows."""
    columns: tuple[str, ...] = ()
    """Fields of the format under other names in the files: instruction=question output=answer; for one of several
    files FILE:instruction=question."""
    weight: tuple[float, ...] = ()
    """Shares of the rows, relative to each other; without them each file has its share of all tokens."""
    max_samples: tuple[int, ...] = ()
    """Conversations of a file that are used at most, chosen by their hash; 0 is no limit."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """A row that is no conversation ends the run before it begins, or is left out and counted."""
    too_long: Literal["drop", "truncate", "split"] = "drop"
    """A conversation longer than a row is left out, loses its end, or becomes several, each from a user's turn on and
    with the system prompt. Texts are split."""
    validation: tuple[str, ...] = ()
    """Files that are not learned but measured."""
    validation_share: float = 0.0
    """Share of the conversations that is kept from training and measured."""
    date: str = "2024-07-26"
    """What a chat template that writes today's date is told, so that equal runs have equal tokens on every day."""
    cache: str = "runs/.tokens"
    """Where tokenised files are kept, by the hash of file, tokenizer, template and these settings."""

    def __post_init__(self):
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is a share from 0 to below 1, given {self.validation_share}")
        if any(number < 0 for number in self.max_samples):
            raise ValueError(f"max_samples are 0 (no limit) or more, given {self.max_samples}")
        parse_columns(self.columns)
        self.day()

    def day(self) -> datetime:
        """Returns `date`."""
        try:
            return datetime.fromisoformat(self.date)
        except ValueError:
            raise ValueError(f"date is a day as 2024-07-26, given {self.date!r}") from None


class Conversations(NamedTuple):
    """What a fine-tuning reads."""

    rows: Rows | Mixture
    validation: str
    """Token folder of the conversations that are kept from training; empty without any."""
    is_chat: bool
    """Whether there are conversations at all: plain texts alone are learned whole."""
    summary: dict[str, Any]
    """Counts, for the run's summary."""


def conversation_rows(
    files: Sequence[str], tokenizer: Tokenizer, *, reading: Reading, seq_len: int, seed: int
) -> Conversations:
    """Returns the packed rows of conversation files (`rows.num_rows` make an epoch), written now or found in the cache.

    Prints what each file is and what was left out. In a job of several processes the first one writes. Raises
    ValueError with file, line and reason for a bad row (bad_rows="stop"), for files that hold no conversation, and
    where nothing fits into a row.
    """
    written = processes.first("conversations", lambda: tokenise(files, tokenizer, reading=reading, seq_len=seq_len))
    how = {"seq_len": seq_len, "packing": "whole", "seed": seed, "tokenizer_sha256": tokenizer.fingerprint}
    folders = written["folders"]
    for name, folder in zip(files, folders):
        _check_one_fits(name, folder, written["files"][str(name)]["format"], seq_len)
    if len(folders) == 1:
        rows = open_rows(folders[0], **how)
    else:
        rows = open_mixture(make_sources(folders, weights=reading.weight), **how)
    if rows.num_left_out and processes.index() == 0:
        print(
            f"{rows.num_left_out} conversations are longer than {seq_len} tokens and were left out "
            "(too_long may be truncate or split)",
            file=sys.stderr,
        )
    summary = {"files": written["files"], "num_left_out": rows.num_left_out, "num_rows": rows.num_rows}
    is_chat = any(found["format"] != "text" for found in written["files"].values())
    return Conversations(rows, written["validation"], is_chat, summary)


def _check_one_fits(name: str, folder: str, format: Format, seq_len: int) -> None:
    shortest = int(open_tokens(folder, verify=False).lengths_D.min())
    if format != "text" and shortest > seq_len + 1:
        raise ValueError(
            f"every conversation of {name} is longer than a row of {seq_len} tokens (the shortest has {shortest}); "
            "give a longer seq_len, or too_long=truncate or split"
        )


def tokenise(files: Sequence[str], tokenizer: Tokenizer, *, reading: Reading, seq_len: int) -> dict[str, Any]:
    """Returns {"folders", "validation", "files"} (JSON values): the token folder of each file, and what was counted."""
    jobs = _jobs(files, tokenizer, reading=reading, seq_len=seq_len)
    found = {job.name: _kept(job, tokenizer) for job in jobs}
    for job in jobs:
        _tell(job, found[job.name])
    if chat.depends_on_date(tokenizer) and any(job.format != "text" for job in jobs):
        print(f"the chat template writes the date: conversations have {reading.date} (reading.date), whatever the day")
    measured = [
        str(folder)
        for job in jobs
        if (folder := job.folder if job.is_validation else job.validation_folder) is not None
    ]
    return {
        "folders": [str(job.folder) for job in jobs if not job.is_validation],
        "validation": _merged(measured, tokenizer, cache=Path(reading.cache)),
        "files": found,
    }


class _Job(NamedTuple):
    """One file, how it is read, and where its tokens lie."""

    name: str
    format: Format
    is_detected: bool
    max_samples: int
    columns: tuple[str, ...]
    """Of the reading's, those that hold for this file."""
    reading: Reading
    window: int
    """Positions of a row."""
    is_validation: bool
    folder: Path
    validation_folder: Path | None


def _jobs(files: Sequence[str], tokenizer: Tokenizer, *, reading: Reading, seq_len: int) -> list[_Job]:
    if not files:
        raise ValueError("no data given; name at least one file of conversations: --data my.jsonl")
    if twice := [name for name in files if list(files).count(name) + list(reading.validation).count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice; name each file once, in data or in validation")
    for name, values in (("weight", reading.weight), ("max_samples", reading.max_samples)):
        if values and len(values) != len(files):
            raise ValueError(
                f"{len(files)} files and {len(values)} values of {name}; give one for each, or none "
                f"(--reading.{name.replace('_', '-')} with nothing behind it)"
            )
    if len(reading.format) not in (0, 1, len(files)):
        raise ValueError(
            f"{len(files)} files and {len(reading.format)} formats; give one for each, one for all, or none"
        )
    named = reading.format * len(files) if len(reading.format) == 1 else reading.format or ("auto",) * len(files)
    # A single format is that of the validation files as well.
    others = reading.format[0] if len(reading.format) == 1 else "auto"
    asked = [*zip(files, named), *((name, others) for name in reading.validation)]
    jobs = []
    for number, (name, asked_format) in enumerate(asked):
        is_validation = number >= len(files)
        columns = columns_of(reading.columns, name, [name for name, _ in asked])
        format = formats.detect_file(name, columns=columns) if asked_format == "auto" else asked_format
        if format == "preference":
            raise ValueError(
                f"{name} holds preference pairs, which a fine-tuning does not learn from; they train a reward model "
                "or DPO. Give conversations"
            )
        share = 0.0 if is_validation else reading.validation_share
        most = reading.max_samples[number] if reading.max_samples and not is_validation else 0
        # All that decides what is written.
        key = {
            "version": _VERSION,
            "name": str(name),
            "file": digest(name),
            "tokenizer": tokenizer.fingerprint,
            "template": tokenizer.chat_template,
            "specials": [tokenizer.bos_id, tokenizer.eos_id],
            "date": reading.date if format != "text" and chat.depends_on_date(tokenizer) else "",
            "format": format,
            "columns": columns,
            "bad_rows": reading.bad_rows,
            "max_samples": most,
            "too_long": reading.too_long,
            "window": 0 if reading.too_long == "drop" and format != "text" else seq_len,
            "share": share,
        }
        folder = Path(reading.cache) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        apart = folder.with_name(f"{folder.name}-validation") if share else None
        is_detected = asked_format == "auto"
        jobs.append(_Job(str(name), format, is_detected, most, columns, reading, seq_len, is_validation, folder, apart))
    return jobs


class _Item(NamedTuple):
    """The samples of one conversation, and the hashes that decide where they go."""

    key: str
    """Of its content."""
    group: str
    """Of what must stay on one side of the split."""
    documents: list[TokenDocument]
    sample: Sample | None = None
    """The conversation; None for a text."""


def _kept(job: _Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what was counted of a file whose token folders exist, written now if they do not."""
    wanted = [folder for folder in (job.folder, job.validation_folder) if folder is not None]
    if all((folder / MANIFEST).is_file() for folder in wanted):
        return json.loads((job.folder / MANIFEST).read_text())["about"]
    unread = formats.unread_columns(job.name, format=job.format, columns=job.columns)
    counts: dict[str, Any] = {"format": job.format, "columns_not_read": unread}
    items = _items(job, tokenizer, counts)
    trained, measured = _split(items, job.reading.validation_share if job.validation_folder else 0.0, job.name)
    if job.max_samples and len(trained) > job.max_samples:
        chosen = set(sorted(item.key for item in trained)[: job.max_samples])
        counts["num_over_max_samples"] = len(trained)
        trained = [item for item in trained if item.key in chosen][: job.max_samples]
        counts["num_over_max_samples"] -= len(trained)
    counts |= {"num_trained": len(trained), "num_validation": len(measured)}
    counts["num_samples"] = sum(len(item.documents) for item in trained)
    # The folder that is looked for first is written last: both are there, or neither counts.
    if job.validation_folder is not None:
        write_tokens(job.validation_folder, _documents(measured), tokenizer=tokenizer, about=counts)
    write_tokens(job.folder, _documents(trained), tokenizer=tokenizer, about=counts)
    return counts


def _documents(items: Iterable[_Item]) -> Iterator[TokenDocument]:
    return (document for item in items for document in item.documents)


def _items(job: _Job, tokenizer: Tokenizer, counts: dict[str, Any]) -> list[_Item]:
    """Returns the conversations of a file as ids and masks; raises ValueError where there is none."""
    bad: list[str] = []
    items = []
    is_cut = job.format == "text" or job.reading.too_long != "drop"
    optional = dict.fromkeys(_WORDS, 0)
    how = {"columns": job.columns, "date": job.reading.day()}
    for item in read_items(job.name, tokenizer, format=job.format, bad=bad.append, **how):
        optional["num_rewritten_by_template"] += len(item.documents) > 1
        if is_cut and any(len(document.ids) > job.window + 1 for document in item.documents):
            try:
                item = item._replace(documents=_fitted(item, job, tokenizer, optional))
            except ValueError as error:  # the template refuses a piece
                bad.append(f"{item.documents[0].id}: {error}")
                continue
            optional["num_longer_than_a_row"] += 1
        if item.documents:
            items.append(item)
        else:
            optional["num_nothing_learned_in_a_row"] += 1
    counts |= {"num_conversations": len(items), "num_bad_rows": len(bad), "bad_rows": bad[:_SHOWN]}
    counts |= {name: number for name, number in optional.items() if number}
    if bad and job.reading.bad_rows == "stop":
        others = f" (and {len(bad) - 1} more rows)" if bad[1:] else ""
        raise ValueError(f"{bad[0]}{others}. Mend the file, or leave such rows out with bad_rows=skip")
    if not items:
        raise ValueError(
            f"{job.name} holds nothing to learn from; "
            + (
                f"the first reason: {bad[0]}"
                if bad
                else f"no {job.format} row has an answer within {job.window} tokens"
            )
        )
    return items


def read_items(
    name: str, tokenizer: Tokenizer, *, format: Format, columns: Sequence[str], date: datetime, bad
) -> Iterator[_Item]:
    """Yields the conversations (or texts) of a file as ids and masks; `bad` is given what cannot be read, and why."""
    if format == "text":
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        for place, text in formats.texts(name, columns=columns, on_bad_row=bad):
            ids = [*first, *tokenizer.encode(text), tokenizer.eos_id]
            key = _hash(text)
            yield _Item(key, key, [_document(place, ids, [0] * len(first) + [1] * (len(ids) - len(first)))])
        return
    for sample in formats.conversations(name, format=format, columns=columns, on_bad_row=bad):
        try:
            rendered = chat.render_samples(sample.messages, tokenizer, learned=sample.learned, date=date)
        except ValueError as error:
            bad(f"{sample.place}: {error}")
            continue
        key = _hash(repr(sample.messages))
        group = key if sample.group is None else _hash(sample.group)
        several = len(rendered) > 1
        places = [
            f"{sample.place} turn {number}" if several else sample.place for number in range(1, len(rendered) + 1)
        ]
        yield _Item(key, group, [_document(place, *each) for place, each in zip(places, rendered)], sample)


def _document(place: str, ids: Sequence[int], mask: Sequence[int]) -> TokenDocument:
    return TokenDocument(place, np.asarray(ids, np.uint32), np.asarray(mask, np.uint8))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _fitted(item: _Item, job: _Job, tokenizer: Tokenizer, counts: dict[str, int]) -> list[TokenDocument]:
    """What of an item that is too long fits rows: its beginning, or pieces; those without anything to learn are not."""
    if item.sample is not None and job.reading.too_long == "split":
        sample = item.sample
        pieces = split_at_turns(
            sample.messages, tokenizer, window=job.window, learned=sample.learned, date=job.reading.day()
        )
        counts["num_turns_cut"] += pieces.num_cut - pieces.num_lost
        counts["num_turns_lost"] += pieces.num_lost
        return [_document(f"{sample.place} piece {number}", *each) for number, each in enumerate(pieces.samples, 1)]
    is_text = item.sample is None
    return [part for document in item.documents for part in _parts(document, job.window, is_split=is_text)]


def _parts(document: TokenDocument, window: int, *, is_split: bool) -> list[TokenDocument]:
    """The first, or all, pieces of a document that fit a row.

    A piece begins with the last token of the one before it, so that no target is lost.
    """
    starts = range(0, max(1, len(document.ids) - 1), window)
    pieces = [slice(start, start + window + 1) for start in (starts if is_split else starts[:1])]
    names = [
        document.id if len(pieces) == 1 else f"{document.id} piece {number}" for number in range(1, len(pieces) + 1)
    ]
    found = [TokenDocument(name, document.ids[at], document.mask[at]) for name, at in zip(names, pieces)]
    return [piece for piece in found if piece.mask[1:].any()]


class _Parts(NamedTuple):
    trained: list[_Item]
    measured: list[_Item]


def _split(items: list[_Item], share: float, name: str) -> _Parts:
    """Returns what is trained on and what is measured; with a share above 0 neither is empty."""
    if not share:
        return _Parts(items, [])
    groups = sorted({item.group for item in items})
    if len(groups) < 2:
        raise ValueError(
            f"{name} holds {len(items)} conversation{'s of one tree' if items[1:] else ''}, so no share of it can be "
            "kept for validation; give more data, a validation file, or validation_share=0"
        )
    held = {group for group in groups if int(group[:16], 16) < share * 2**64} or {groups[0]}
    if len(held) == len(groups):
        held.discard(groups[-1])
    return _Parts([x for x in items if x.group not in held], [x for x in items if x.group in held])


def _tell(job: _Job, counts: dict[str, Any]) -> None:
    """Prints what a file is and what was left out of it."""
    for message in counts["bad_rows"]:
        print(f"left out: {message}", file=sys.stderr)
    parts = [f"{counts['num_conversations']:,} {'texts' if job.format == 'text' else 'conversations'}"]
    parts += [f"{counts['num_validation']:,} of them for validation"] if counts["num_validation"] else []
    parts += [f"{counts['num_bad_rows']:,} rows left out"] if counts["num_bad_rows"] else []
    how = "split" if job.format == "text" else job.reading.too_long
    words = {"num_over_max_samples": "beyond max_samples left out"} | _WORDS
    parts += [
        f"{counts[name]:,} {said.format(window=job.window, how=how)}"
        for name, said in words.items()
        if counts.get(name)
    ]
    parts += [f"columns not read: {', '.join(counts['columns_not_read'])}"] if counts["columns_not_read"] else []
    how = "detected" if job.is_detected else "as told"
    print(f"{job.name}: {job.format} ({how}), {', '.join(parts)}; tokens in {job.folder}")
    if counts["num_trained"] == 1 and job.format != "text":
        print(f"{job.name} holds a single conversation to train on: every epoch is that one again", file=sys.stderr)


def _merged(folders: Sequence[str], tokenizer: Tokenizer, *, cache: Path) -> str:
    """Returns one token folder of all; empty text for none."""
    if len(folders) < 2:
        return "".join(folders)
    merged = cache / f"{_hash(' '.join(Path(folder).name for folder in folders))[:16]}-validation"
    if not (merged / MANIFEST).is_file():
        write_tokens(merged, _read_back(folders), tokenizer=tokenizer, about={"folders": list(folders)})
    return str(merged)


def _read_back(folders: Sequence[str]) -> Iterator[TokenDocument]:
    from data_pipelines.shards import document_ids

    for name in folders:
        folder = open_tokens(name)
        numbers = range(len(folder.lengths_D))
        names = document_ids(folder, numbers)
        for number in numbers:
            yield TokenDocument(names[number], folder.document(number), folder.mask(number))
