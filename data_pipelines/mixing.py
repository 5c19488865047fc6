"""Several token folders as one: documents chosen by length, rows mixed by weight.

    python -m data_pipelines.mixing --tokens web code --weights 3 1 --num-tokens 1e9 --documents clean --by language

prints what each folder gives to a run of that many tokens, and, of the runs of `data_pipelines.wanjuan` that the
folders were made from, what each source, domain or language does.

Which source each row comes from is a function of the weights, the seed and the row's absolute number alone. Rows come
in blocks of BLOCK_ROWS. After any number of blocks every source has had its share to within about a row (rounded by
Webster's method, in whole numbers, so that nothing is taken back and no error adds up), and within a block the sources
are shuffled. Nothing is walked through: the block that holds a row is computed from its number.

S sources, R rows of a block, T tokens of a row.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.loading import ENDLESS, Piece, Rows, described, open_folder, row_batch
from data_pipelines.packing import Packing
from data_pipelines.tokens import DOCUMENTS, TokenFolder
from internjax.train.batch import Batch

BLOCK_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Source:
    """A token folder in a mixture. 0 means no limit."""

    folder: str
    weight: float | None = None
    """Share of the rows, relative to the other sources' weights; None for all: in proportion to their positions."""
    min_tokens: int = 0
    """A document with fewer tokens (first and last token of the text included) is left out."""
    max_tokens: int = 0
    """A document with more tokens is left out."""
    max_epochs: float = 0.0
    """How often its rows may be read; a run that would read them more often is refused before it begins."""


def make_sources(
    folders: Sequence[str],
    *,
    weights: Sequence[float] = (),
    min_tokens: Sequence[int] = (),
    max_tokens: Sequence[int] = (),
    max_epochs: Sequence[float] = (),
) -> tuple[Source, ...]:
    """Returns the sources of parallel tuples, each empty or as long as `folders`; 0 means no limit."""
    given = {"weight": weights, "min_tokens": min_tokens, "max_tokens": max_tokens, "max_epochs": max_epochs}
    for name, values in given.items():
        if values and len(values) != len(folders):
            raise ValueError(f"{len(folders)} folders and {len(values)} values of {name}; give one for each, or none")
    columns = {name: values for name, values in given.items() if values}
    return tuple(
        Source(folder, **{name: values[i] for name, values in columns.items()}) for i, folder in enumerate(folders)
    )


class Share(NamedTuple):
    """What a source gives to a run."""

    folder: Path
    num_documents: int
    num_filtered: int
    """Documents outside min_tokens .. max_tokens."""
    num_left_out: int
    """Of the others: those that fit no row, or have no position."""
    num_positions: int
    """Positions that one epoch can use; those of a document as often as an epoch reads it."""
    num_repeated: int
    """Documents that an epoch reads more than once."""
    num_rows: int
    """Rows of it that the run reads."""
    share: float
    """Of all rows of the run."""
    num_epochs: float

    def __str__(self) -> str:
        used = self.num_documents - self.num_filtered - self.num_left_out
        return (
            f"{self.folder}: {self.share:.2%} of the rows, {self.num_epochs:.2f} epochs of {self.num_positions:,} "
            f"positions; {used:,} of {self.num_documents:,} documents ({self.num_filtered:,} outside the limits, "
            f"{self.num_left_out:,} fit no row)"
            + (f"; {self.num_repeated:,} are read more than once in an epoch" if self.num_repeated else "")
        )


class Block(NamedTuple):
    """Of every row of a block: its source, and which of that source's rows it is, counted from the run's beginning."""

    source_R: np.ndarray
    index_R: np.ndarray


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns whole numbers in exactly the proportions of the weights. Raises ValueError unless all are above 0."""
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong or not weights:
        raise ValueError(
            f"weights must be numbers above 0, given {list(weights)}; leave a source out instead of giving it 0"
        )
    exact = [Fraction(weight) for weight in weights]
    unit = math.lcm(*(value.denominator for value in exact))
    return tuple(int(value * unit) for value in exact)


def rows_of_sources(weights: Sequence[int], num_rows: int) -> list[int]:
    """Returns how many of the first `num_rows` rows each source has.

    Webster's method: the k-th row of source s (k = 0, 1, ...) is due at (2 k + 1) / weight_s, and the earliest
    `num_rows` are taken, of equal ones the first source's. So counts never fall as rows are added, and |count -
    share x num_rows| <= 1/2 + share x S / 2.
    """
    total, num_sources = sum(weights), len(weights)
    # What is due S / 2 rows' time before the end: never more than num_rows, and fewer than S rows short of it.
    counts = [max(0, (weight * (2 * num_rows - num_sources) + total) // (2 * total)) for weight in weights]
    while sum(counts) < num_rows:
        nearest = min(range(num_sources), key=lambda s: Fraction(2 * counts[s] + 1, weights[s]))
        counts[nearest] += 1
    return counts


def block_of_rows(weights: Sequence[int], *, seed: int, block: int) -> Block:
    """Returns the rows block * BLOCK_ROWS .. of the mixture."""
    before = rows_of_sources(weights, block * BLOCK_ROWS)
    after = rows_of_sources(weights, (block + 1) * BLOCK_ROWS)
    source = np.repeat(np.arange(len(weights)), np.subtract(after, before))
    source = np.random.default_rng((seed, block, 2)).permutation(source)
    index = np.empty(BLOCK_ROWS, np.int64)
    for s, first in enumerate(before):
        mine = source == s
        index[mine] = first + np.arange(mine.sum())
    return Block(source, index)


class Mixture:
    """Endless rows of several sources by weight, read and named like those of one (`Rows`)."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], *, seed: int):
        assert len(sources) == len(weights) and len({rows.seq_len for rows in sources}) == 1
        self.sources = tuple(sources)
        self.seq_len = sources[0].seq_len
        self.vocab_size = sources[0].vocab_size
        self._weights = whole_weights(weights)
        self._block = functools.lru_cache(maxsize=16)(
            lambda block: block_of_rows(self._weights, seed=seed, block=block)
        )

    @property
    def num_rows(self) -> int:
        """Rows of one epoch of every source."""
        return sum(rows.num_rows for rows in self.sources)

    @property
    def num_left_out(self) -> int:
        """Documents within the limits that fit no row, or have no position."""
        return sum(rows.num_left_out for rows in self.sources)

    def shares(self, num_rows: int) -> list[Share]:
        """Returns what each source gives to the first `num_rows` rows; printed, each is a line."""
        block, rest = divmod(num_rows, BLOCK_ROWS)
        counts = np.array(rows_of_sources(self._weights, block * BLOCK_ROWS))
        counts += np.bincount(self._block(block).source_R[:rest], minlength=len(counts))
        return [
            Share(
                rows.folder.path,
                len(rows.folder.lengths_D),
                rows.num_filtered,
                rows.num_left_out,
                rows.num_positions,
                int((rows.times_D() > 1).sum()),
                count,
                count / max(num_rows, 1),
                count / rows.num_rows,
            )
            for rows, count in zip(self.sources, counts.tolist())
        ]

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: field[0] for name, field in row_batch(self, [index])._asdict().items()}

    def _row(self, index: int) -> tuple[Rows, int]:
        """Returns the source of a row, and its number there."""
        block, row = divmod(index, BLOCK_ROWS)
        found = self._block(block)
        return self.sources[found.source_R[row]], int(found.index_R[row])

    def pieces(self, index: int) -> list[Piece]:
        """Returns what row `index` (counted from the run's beginning) is made of, in order."""
        rows, own = self._row(index)
        return rows.pieces(own)

    def fill(self, index: int, batch: Batch, b: int) -> None:
        """Writes row `index` into row b of a batch of zeros."""
        rows, own = self._row(index)
        rows.fill(own, batch, b)

    def documents(self, step: int, batch_size: int) -> list[str]:
        """Returns what the batch of a step is made of; see `described`."""
        return described(self, range(step * batch_size, (step + 1) * batch_size))


def open_mixture(
    sources: Sequence[Source],
    *,
    seq_len: int,
    packing: Packing,
    seed: int,
    tokenizer_sha256: str | None = None,
    num_rows: int | None = None,
) -> Mixture:
    """Returns the rows of the sources, mixed by weight. One source gives the rows of `open_rows`.

    num_rows: rows that the run will read (steps x batch size); needed where a source has max_epochs. Raises ValueError
    where a source cannot be opened, is of another tokenizer, has nothing left after its limits, shares documents with
    another, or would be read more often than it may.
    """
    if not sources:
        raise ValueError("no token folder given; name at least one")
    weights = [source.weight for source in sources]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(
            f"some sources have a weight and some have none, given {weights}; give all of them one, or none"
        )
    if None not in weights:
        whole_weights(weights)  # refused before a large folder is opened
    folders = [open_folder(source.folder, tokenizer_sha256) for source in sources]
    _check_same_tokenizer(folders)
    _check_disjoint(sources, folders)
    opened = [
        Rows(
            folder,
            seq_len=seq_len,
            packing=packing,
            seed=_own_seed(seed, number),
            min_tokens=source.min_tokens,
            max_tokens=source.max_tokens,
            max_epochs=source.max_epochs,
        )
        for number, (source, folder) in enumerate(zip(sources, folders))
    ]
    for rows in opened:
        rows.plan(0)  # a source that gives no row is refused here, not in the middle of the run
    mixture = Mixture(
        opened, [rows.num_positions if None in weights else weight for rows, weight in zip(opened, weights)], seed=seed
    )
    _check_epochs(mixture, num_rows)
    return mixture


def _own_seed(seed: int, number: int) -> int:
    """Returns the seed of a source's orders: of the first one the run's, so that one source alone has its old order."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} source {number}".encode()).digest()[:8], "big")


def _check_same_tokenizer(folders: Sequence[TokenFolder]) -> None:
    kinds = [(f.manifest["tokenizer_sha256"], f.manifest["vocab_size"], f.manifest["dtype"]) for f in folders]
    for folder, kind in zip(folders, kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"{folder.path} (tokenizer {kind[0][:12]}, {kind[1]} ids, {kind[2]}) and {folders[0].path} (tokenizer "
                f"{kinds[0][0][:12]}, {kinds[0][1]} ids, {kinds[0][2]}) were written by different tokenizers: their "
                "ids mean different text. Write one of them anew with the other's tokenizer"
            )


def _check_disjoint(sources: Sequence[Source], folders: Sequence[TokenFolder]) -> None:
    """Refuses documents that are in two sources: they would silently be repeated."""
    for i, source in enumerate(sources):
        for j in range(i):
            other = sources[j]
            apart = 0 < source.max_tokens < other.min_tokens or 0 < other.max_tokens < source.min_tokens
            if _content(folders[i]) == _content(folders[j]) and not apart:
                raise ValueError(
                    f"{source.folder} and {other.folder} hold the same documents, so these would be read twice as "
                    "often as their weights say. Give one of them with a larger weight, or limits (min_tokens, "
                    "max_tokens) that do not overlap"
                )


def _content(folder: TokenFolder) -> list[str]:
    files = folder.manifest["files"]
    return [files[name]["sha256"] for name in sorted(files) if name.endswith((".bin", ".idx"))]


def _check_epochs(mixture: Mixture, num_rows: int | None) -> None:
    limited = [rows for rows in mixture.sources if rows.max_epochs]
    if not limited:
        return
    if num_rows is None:
        raise ValueError(
            f"{limited[0].folder.path} has max_epochs {limited[0].max_epochs:g}, which is compared with the rows that "
            "the run reads; give num_rows (steps x batch size)"
        )
    T = mixture.seq_len
    over = [
        f"{share.folder} has {rows.num_rows * T:,} tokens in rows ({rows.num_rows:,} rows of {T}), {rows.max_epochs:g} "
        f"epochs of them {int(rows.max_rows) * T:,}, and the run asks for {share.num_rows * T:,} "
        f"({share.num_epochs:.2f} epochs)"
        for rows, share in zip(mixture.sources, mixture.shares(num_rows))
        if share.num_rows > rows.max_rows
    ]
    if over:
        raise ValueError("; ".join(over) + ". Lower its weight, add text, shorten the run or raise max_epochs")


# --- statistics ------------------------------------------------------------------------------------------------------

KINDS = ("source", "domain", "language")
UNKNOWN = "(not in the documents)"


class Kind(NamedTuple):
    """Documents of a token folder that are of one kind and are read."""

    folder: Path
    kind: tuple[str, ...]
    """Values of the columns that were asked for."""
    num_documents: int
    num_bytes: int
    """Of their text, in UTF-8."""
    num_tokens: int
    num_epochs: float
    """How often a run reads them, their tokens on the average: more often than the folder where that repeats some."""
    share: float
    """Of the tokens that the run reads."""


def kinds(mixture: Mixture, runs: Sequence[str | Path], *, by: Sequence[str], num_rows: int) -> list[Kind]:
    """Returns what documents of each kind give to the first `num_rows` rows, those of a folder by their tokens.

    Documents that are not read (outside a source's limits, or fit for no row) count nowhere.
    runs: output folders of `data_pipelines.wanjuan`, where text and kind of the documents are; a document that is in
    none is of the kind `UNKNOWN`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    if wrong := [name for name in by if name not in KINDS]:
        raise ValueError(f"kinds are told by {', '.join(KINDS)}; given {', '.join(wrong)}")
    columns = {name: ds.field(name) for name in ("id", *by)} | {"num_bytes": pc.binary_length(ds.field("text"))}
    known = pa.concat_tables(
        ds.dataset(Path(run) / "documents", format="parquet").to_table(columns=columns) for run in runs
    )
    # A document that is in two runs is one document.
    known = known.group_by("id", use_threads=False).aggregate([(name, "first") for name in columns if name != "id"])
    known = known.rename_columns([name.removesuffix("_first") for name in known.column_names])
    found = []
    for rows, share in zip(mixture.sources, mixture.shares(num_rows), strict=True):
        table = pq.read_table(share.folder / DOCUMENTS, columns=["id", "num_tokens"]).take(pa.array(rows.read_D()))
        read = pc.multiply(table.column("num_tokens"), pa.array(rows.times_D(), pa.int64()))
        table = table.append_column("num_read", read).join(known, "id", join_type="left outer")
        groups = table.group_by(list(by)).aggregate(
            [("num_tokens", "count"), ("num_bytes", "sum"), ("num_tokens", "sum"), ("num_read", "sum")]
        )
        for row in groups.to_pylist():
            kind = tuple(UNKNOWN if row[name] is None else row[name] for name in by)
            counts = row["num_tokens_count"], row["num_bytes_sum"] or 0, row["num_tokens_sum"]
            num_epochs = share.num_epochs * (row["num_read_sum"] / row["num_tokens_sum"])
            found.append(Kind(share.folder, kind, *counts, num_epochs, row["num_tokens_sum"] * num_epochs))
    total = sum(each.share for each in found) or 1.0
    order = {share.folder: place for place, share in enumerate(mixture.shares(num_rows))}
    found.sort(key=lambda each: (order[each.folder], -each.num_tokens, each.kind))
    return [each._replace(share=each.share / total) for each in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the statistics of a mixture and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.mixing", description="What token folders give to a run, by weight."
    )
    parser.add_argument("--tokens", nargs="+", required=True, metavar="FOLDER", help="token folders")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        default=[],
        metavar="W",
        help="shares of the rows, one per folder; need no sum (default: their tokens)",
    )
    parser.add_argument("--num-tokens", type=float, metavar="N", help="of the run (default: one epoch of all folders)")
    parser.add_argument("--seq-len", type=int, default=4096, metavar="N", help="tokens of a row (default: 4096)")
    parser.add_argument(
        "--packing", choices=("concat", "whole"), default="concat",
        help="concat: documents are cut at row ends; whole: none is cut, longer ones are left out (default: concat)",
    )  # fmt: skip
    parser.add_argument(
        "--documents",
        nargs="+",
        default=[],
        metavar="DIR",
        help="--output of data_pipelines.wanjuan: what the tokens are of",
    )
    parser.add_argument(
        "--by",
        nargs="+",
        default=list(KINDS),
        choices=KINDS,
        help="kinds of --documents that are told apart (default: all)",
    )
    given = parser.parse_args(arguments)
    try:
        sources = make_sources(given.tokens, weights=given.weights)
        mixture = open_mixture(sources, seq_len=given.seq_len, packing=given.packing, seed=0)
        num_rows = int(given.num_tokens / given.seq_len) if given.num_tokens else mixture.num_rows
        print(*mixture.shares(num_rows), sep="\n")
        found = kinds(mixture, given.documents, by=given.by, num_rows=num_rows) if given.documents else []
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for each in found:
        print(
            f"{each.folder.name}: {', '.join(each.kind)}: {each.num_documents:,} documents, {each.num_bytes:,} bytes, "
            f"{each.num_tokens:,} tokens, {each.num_epochs:.2f} epochs, {each.share:.2%} of what is read"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
