"""Token folders: the form in which text reaches training.

    python -m data_pipelines.tokens --input PATH [PATH ...] --tokenizer MODEL --output FOLDER
                                    [--where FIELD=VALUE] [--times FIELD]
                                    [--fill-in-the-middle PREFIX MIDDLE SUFFIX]

FOLDER/manifest.json       tokenizer sha256, dtype, counts, and the sha256 of every file
FOLDER/00000.bin           token ids, little-endian uint16 where the vocabulary fits, else uint32
FOLDER/00000.idx           int64 offsets of its documents in tokens, one more than there are documents
FOLDER/00000.mask          optional: uint8 per token, 1 where the token is to be learned
FOLDER/documents.parquet   id, shard and number of tokens of every document, in order; and, where some are to be read
                           more than once in an epoch, how often (times)

A folder appears by an atomic rename: a reader never sees half of one.
"""

import argparse
import hashlib
import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.fill_in_the_middle import FillInTheMiddle, Part, fill_in_the_middle
from internjax.hf.folder import new_folder
from internjax.text.tokenizer import Tokenizer, save_tokenizer

MANIFEST, DOCUMENTS = "manifest.json", "documents.parquet"
FORMAT = 1
SHARD_TOKENS = 1 << 27
# Encoded at once, on all cores: at most so many documents, and no further one from so many characters on.
_ENCODE_DOCUMENTS, _ENCODE_CHARACTERS = 512, 1 << 22


class TokenDocument(NamedTuple):
    """One document's ids; mask is 1 on ids that are to be learned (None: all of them)."""

    id: str
    ids: list[int]
    mask: list[int] | None = None
    times: int = 1
    """How often an epoch reads it."""


class TokenFolder(NamedTuple):
    """An open token folder; arrays are memory-mapped."""

    path: Path
    manifest: dict[str, Any]
    tokens: tuple[np.ndarray, ...]
    """Per shard."""
    masks: tuple[np.ndarray, ...] | None
    offsets: tuple[np.ndarray, ...]
    lengths_D: np.ndarray
    """Tokens of every document, over all shards."""
    first_D: np.ndarray
    """Index of the first document of every shard, and the total."""
    times_D: np.ndarray | None = None
    """How often an epoch reads every document; None where it reads all once."""

    def document(self, index: int) -> np.ndarray:
        """Returns the ids of a document."""
        shard, start, stop = self._place(index)
        return self.tokens[shard][start:stop]

    def mask(self, index: int) -> np.ndarray | None:
        """Returns the loss mask of a document, or None where the folder has none."""
        if self.masks is None:
            return None
        shard, start, stop = self._place(index)
        return self.masks[shard][start:stop]

    def _place(self, index: int) -> tuple[int, int, int]:
        shard = int(np.searchsorted(self.first_D, index, side="right")) - 1
        local = index - int(self.first_D[shard])
        return shard, int(self.offsets[shard][local]), int(self.offsets[shard][local + 1])


class Text(NamedTuple):
    """A text that is to become tokens, and how often an epoch reads it."""

    id: str
    text: str
    times: int = 1


def _whole(document_id: str, text: str) -> list[Part]:
    return [Part((), text)]


def text_documents(
    texts: Iterable[Text | tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    parts: Callable[[str, str], Sequence[Part]] = _whole,
) -> Iterator[TokenDocument]:
    """Yields texts, or (id, text), as ids between the tokenizer's first and last token of texts (BOS where it has one,
    EOS).

    parts: (id, text) -> the pieces of which it is made (`fill_in_the_middle.py`). Markers that a text spells out are
    plain text.
    """
    batch: list[Text] = []
    num_characters = 0
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def encoded():
        made = [parts(each.id, each.text) for each in batch]
        rows = iter(tokenizer.encode_batch([part.text for of_text in made for part in of_text]))
        ids = [[token for part in of_text for token in (*part.before, *next(rows))] for of_text in made]
        return [
            TokenDocument(each.id, [*first, *own, tokenizer.eos_id], times=each.times)
            for each, own in zip(batch, ids, strict=True)
        ]

    for each in texts:
        batch.append(Text(*each))
        num_characters += len(batch[-1].text)
        if len(batch) == _ENCODE_DOCUMENTS or num_characters >= _ENCODE_CHARACTERS:
            yield from encoded()
            batch, num_characters = [], 0
    yield from encoded()


def write_tokens(
    folder: str | os.PathLike,
    documents: Iterable[TokenDocument],
    *,
    tokenizer: Tokenizer,
    shard_tokens: int = SHARD_TOKENS,
    about: dict[str, Any] | None = None,
    keep_tokenizer: bool = False,
) -> dict[str, Any]:
    """Writes a token folder and returns its manifest; `about` (JSON values) is kept in it.

    keep_tokenizer: the folder `tokenizer` in it holds the tokenizer as well.

    Raises ValueError where there is no document to write, or the folder exists and is no token folder.
    """
    with new_folder(folder, overwrite=True, marker=MANIFEST) as new:
        manifest = _write(new, documents, tokenizer, shard_tokens, about or {})
        if keep_tokenizer:
            save_tokenizer(tokenizer, new / "tokenizer")
        return manifest


def _write(new: Path, documents, tokenizer: Tokenizer, shard_tokens: int, about: dict[str, Any]) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    shards, names, sizes, places, times = [], [], [], [], []
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    pending, has_mask = 0, None

    def flush():
        nonlocal pending
        number = f"{len(shards):05d}"
        np.concatenate(ids).tofile(new / f"{number}.bin")
        np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype("<i8").tofile(new / f"{number}.idx")
        if has_mask:
            np.concatenate(masks).tofile(new / f"{number}.mask")
        shards.append({"name": number, "num_documents": len(ids), "num_tokens": pending})
        ids.clear()
        masks.clear()
        pending = 0

    for document in documents:
        if has_mask is None:
            has_mask = document.mask is not None
        assert has_mask == (document.mask is not None), "all documents of a folder have a mask, or none has"
        ids.append(np.asarray(document.ids, dtype))
        if document.mask is not None:
            assert len(document.mask) == len(document.ids), document.id
            masks.append(np.asarray(document.mask, np.uint8))
        names.append(document.id)
        sizes.append(len(document.ids))
        places.append(len(shards))
        times.append(document.times)
        pending += len(document.ids)
        if pending >= shard_tokens:
            flush()
    if not names:
        raise ValueError("there is no document to write tokens of; the corpus or the data file is empty")
    if ids:
        flush()
    has_times = any(each != 1 for each in times)
    _write_documents(new / DOCUMENTS, names, sizes, places, times if has_times else None)
    files = {path.name: file_entry(path) for path in sorted(new.iterdir())}
    manifest = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "has_mask": bool(has_mask),
        # There where some documents are read more than once in an epoch.
        **({"epoch_tokens": sum(map(operator.mul, sizes, times))} if has_times else {}),
        "num_documents": len(names),
        "num_tokens": sum(sizes),
        "shards": shards,
        "files": files,
        "about": about,
    }
    (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _write_documents(
    path: Path, names: list[str], sizes: list[int], shards: list[int], times: list[int] | None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"id": pa.array(names), "shard": pa.array(shards, pa.int32()), "num_tokens": pa.array(sizes, pa.int64())}
    if times is not None:
        columns["times"] = pa.array(times, pa.int32())
    pq.write_table(pa.table(columns), path)


def file_entry(path: Path) -> dict[str, Any]:
    """Returns what a manifest says of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_files(folder: Path, files: dict[str, Any], *, verify: bool) -> None:
    """Raises ValueError naming a file of a manifest that is missing or short, or, with verify, altered."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks {name}, which its manifest lists; restore it or write the folder anew")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, {entry['bytes']} were written; it was cut short")
        if verify and file_entry(path)["sha256"] != entry["sha256"]:
            raise ValueError(f"{path} was altered after it was written (its sha256 differs); write the folder anew")


def open_tokens(folder: str | os.PathLike, *, tokenizer_sha256: str | None = None, verify: bool = True) -> TokenFolder:
    """Returns the folder, memory-mapped. Raises ValueError naming a file that is missing, short or altered.

    With `tokenizer_sha256` a folder that another tokenizer wrote is refused. verify=False checks sizes alone and does
    not read the tokens through.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder} is no token folder: it has no {MANIFEST} (found: {found})")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found = manifest.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read ({error}); write the folder anew") from error
    if found != FORMAT:
        raise ValueError(f"{folder} has format {found!r}, this version reads {FORMAT}; write it anew")
    if tokenizer_sha256 is not None and manifest["tokenizer_sha256"] != tokenizer_sha256:
        raise ValueError(
            f"{folder} was written by the tokenizer {manifest['tokenizer_sha256'][:12]}, the one given is "
            f"{tokenizer_sha256[:12]}: its ids mean other text. Give the tokenizer that wrote it, or write it anew"
        )
    check_files(folder, manifest["files"], verify=verify)
    names = [shard["name"] for shard in manifest["shards"]]
    tokens = tuple(_mapped(folder / f"{name}.bin", np.dtype(manifest["dtype"]).newbyteorder("<")) for name in names)
    masks = None
    if manifest["has_mask"]:
        masks = tuple(_mapped(folder / f"{name}.mask", np.dtype(np.uint8)) for name in names)
    offsets = tuple(np.fromfile(folder / f"{name}.idx", "<i8") for name in names)
    lengths = np.concatenate([np.diff(row) for row in offsets])
    first = np.cumsum([0, *(len(row) - 1 for row in offsets)])
    times = _read_times(folder, manifest, lengths) if "epoch_tokens" in manifest else None
    return TokenFolder(folder, manifest, tokens, masks, offsets, lengths, first, times)


def _read_times(folder: Path, manifest: dict[str, Any], lengths_D: np.ndarray) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        times = pq.read_table(folder / DOCUMENTS, columns=["times"]).column("times").to_numpy()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{folder / DOCUMENTS} cannot be read ({error}); write the folder anew") from error
    if len(times) != len(lengths_D) or times.min() < 1 or int(times @ lengths_D) != manifest["epoch_tokens"]:
        raise ValueError(f"{folder / DOCUMENTS} was altered after it was written; write the folder anew")
    return times


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _field(document: Any, name: str) -> str:
    """A field of a document, or of its meta, as text; "" where it has none."""
    value = getattr(document, name) if name in ("domain", "language", "source", "licence") else document.meta.get(name)
    return "" if value is None else str(value)


def _times(document: Any, field: str) -> int:
    """How often a document is to be read, by a field of its meta: once where it has none, or none is named."""
    value = document.meta.get(field, 1) if field else 1
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1 <= value < 1 << 31 or value != int(value):
        raise ValueError(
            f"{document.path} has {field} {value!r} in meta, and --times {field} takes from it how often an epoch "
            "reads the document: a whole number from 1 on; give another field, or leave such documents out"
        )
    return int(value)


def _chosen(documents: Iterable[Any], field: str, value: str) -> Iterator[Any]:
    """The documents whose field has this value. Raises ValueError where none has, naming some it has."""
    found, others = False, set()
    for document in documents:
        if (held := _field(document, field)) == value:
            found = True
            yield document
        elif len(others) < 5:
            others.add(held[:60])
    if not found:
        named = ", ".join(repr(each) for each in sorted(others)) or "nothing: no document came"
        raise ValueError(f"--where {field}={value} fits no document; {field} is {named}")


def main(arguments: list[str] | None = None) -> int:
    """The command line: `python -m data_pipelines.tokens --input FILE... --tokenizer MODEL --output DIR`."""
    from data_pipelines import sources
    from data_pipelines.executors import shown_progress
    from internjax.hf.resolve import resolve
    from internjax.text.tokenizer import load_tokenizer

    parser = _parser()
    args = parser.parse_args(arguments)
    field, _, value = (args.where or "").partition("=")
    if args.where and not (field and value):
        parser.error(f"--where is {args.where!r}; wanted FIELD=VALUE, such as tier=high")
    fill = {"rate": args.fill_rate, "spm_rate": args.spm_rate, "seed": args.fill_seed}
    fill = {name: given for name, given in fill.items() if given is not None}
    if fill and not args.fill_in_the_middle:
        parser.error("--fill-rate, --spm-rate and --fill-seed are for --fill-in-the-middle, which is not given")
    try:
        own = Path(args.tokenizer)
        tokenizer = load_tokenizer(own if (own / "tokenizer.json").is_file() else resolve(args.tokenizer).folder)
        parts = _whole
        about = ({"where": args.where} if field else {}) | ({"times": args.times} if args.times else {})
        if args.fill_in_the_middle:
            settings = FillInTheMiddle(*args.fill_in_the_middle, **fill)
            parts = fill_in_the_middle(settings, tokenizer)
            about["fill_in_the_middle"] = asdict(settings)
        bad: list[str] = []
        with shown_progress() as progress:
            documents = sources.stream(args.input, on_bad_row=bad.append, progress=progress)
            chosen = _chosen(documents, field, value) if field else documents
            texts = (Text(each.id, each.text, _times(each, args.times)) for each in chosen)
            documents = text_documents(texts, tokenizer, parts=parts)
            manifest = write_tokens(args.output, documents, tokenizer=tokenizer, about=about, keep_tokenizer=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for message in bad[:10]:
        print(f"left out: {message}", file=sys.stderr)
    of_epoch = f" ({manifest['epoch_tokens']:,} in an epoch)" if "epoch_tokens" in manifest else ""
    print(
        f"{args.output}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens{of_epoch}, "
        f"{len(bad)} rows left out"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    from data_pipelines import sources

    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=sources.WHAT_IS_READ)
    parser.add_argument(
        "--tokenizer", required=True, metavar="MODEL",
        help="a folder with tokenizer.json, or a model: a Hugging Face folder, a run or its name, hf:ORG/NAME",
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="token folder to write; the tokenizer is kept in it as well"
    )
    parser.add_argument(
        "--where", metavar="FIELD=VALUE",
        help="only documents whose field (domain, language, source, licence, or one of meta, such as tier) is this",
    )  # fmt: skip
    parser.add_argument(
        "--times", default="", metavar="FIELD",
        help="how often an epoch of the folder reads a document: a whole number in this field of meta, such as weight, "
        "which wanjuan --tiers enters (default, and for documents without the field: once)",
    )  # fmt: skip
    parser.add_argument(
        "--fill-in-the-middle", nargs=3, metavar=("PREFIX", "MIDDLE", "SUFFIX"),
        help="rearrange documents so that a model learns to fill gaps, between these special tokens of the tokenizer",
    )  # fmt: skip
    parser.add_argument("--fill-rate", type=float, metavar="R", help="share of documents rearranged (default: 0.5)")
    parser.add_argument("--spm-rate", type=float, metavar="R", help="share of these with suffix first (default: 0.5)")
    parser.add_argument("--fill-seed", type=int, metavar="N", help="by which they are drawn and cut (default: 0)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
