"""Tokens per second from token folders to training batches, beside Grain's own packing of the same documents.

    python -m experiments.benchmarks.input_pipeline

Hardware: 2 CPU cores
Time: about two minutes

Three folders of random ids with log-normal document lengths (medians 600, 1,200 and 8,000 tokens) are mixed 5 : 3 : 2
into rows of 4,096 tokens. Every repetition opens a new stream at another step, so its threads start empty, and counts
the positions that a model would learn from (no padding) until the last batch has come. The peer reads the same folders
with Grain's MapDataset.mix and packs them with its ConcatThenSplit (concat) and BestFit (whole) data sets, which give
tokens, positions and segments, no targets and no loss mask. Planning is timed on a million document lengths.

B rows of a batch.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.loading import batches
from data_pipelines.mixing import make_sources, open_mixture
from data_pipelines.packing import plan_rows
from data_pipelines.tokens import TokenDocument, open_tokens, write_tokens
from internjax.model.config import INTERNLM2_1_8B, num_matmul_params

RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"
SEQ_LEN = 4096
WEIGHTS = (5, 3, 2)
SOURCES = {"web": (600, 1.0), "code": (1200, 1.2), "books": (8000, 1.3)}
"""Median of the documents' lengths, and the spread of their logarithm."""
PEAK, WANTED_MFU, TIMES = 989e12, 0.5, 5
"""Dense bf16 FLOP/s of one H200, the share of it that training is designed for, and how far ahead input should be."""


def wanted_tokens_per_second() -> float:
    """TIMES x what one H200 trains of the 1.8B at WANTED_MFU: PEAK / (6 matmul params + 6 layers d_model seq_len)."""
    model = INTERNLM2_1_8B
    flops = 6 * num_matmul_params(model) + 6 * model.num_layers * model.d_model * SEQ_LEN
    return TIMES * WANTED_MFU * PEAK / flops


def write_sources(root: Path, *, num_tokens: int) -> tuple[str, ...]:
    """Returns token folders of about `num_tokens` in all, in the proportions of WEIGHTS."""
    draw = np.random.default_rng(0)
    vocab_size = INTERNLM2_1_8B.vocab_size
    tokenizer = types.SimpleNamespace(vocab_size=vocab_size, fingerprint="0" * 64)
    for (name, (median, spread)), weight in zip(SOURCES.items(), WEIGHTS):
        count = num_tokens * weight / sum(WEIGHTS) / (median * np.exp(spread**2 / 2))
        lengths = np.maximum(draw.lognormal(np.log(median), spread, int(count)), 2).astype(int)
        documents = (
            TokenDocument(f"{name}-{i}", draw.integers(0, vocab_size, length, dtype=np.uint32))
            for i, length in enumerate(lengths)
        )
        write_tokens(root / name, documents, tokenizer=tokenizer, shard_tokens=1 << 22)
    return tuple(str(root / name) for name in SOURCES)


def ours(folders: Sequence[str], packing: str, batch_size: int) -> Callable[[int], Iterator[int]]:
    """Returns seed -> positions of one batch after another."""
    rows = open_mixture(make_sources(folders, weights=WEIGHTS), seq_len=SEQ_LEN, packing=packing, seed=0)
    data = batches(rows, batch_size=batch_size)
    # Another place of the run each time. Its first epochs are planned beforehand: planning is measured by itself.
    row_batches = rows.num_rows // batch_size
    return lambda seed: (int(np.count_nonzero(batch.segments)) for batch in data(seed * 7 % max(1, row_batches // 2)))


def peer(folders: Sequence[str], packing: str, batch_size: int) -> Callable[[int], Iterator[int]]:
    """Returns seed -> positions of one batch after another, by Grain's data sets."""
    import grain
    from grain import experimental

    class Documents:
        def __init__(self, folder: str):
            self.folder = open_tokens(folder, verify=False)
            # BestFit takes no document longer than a row.
            lengths = self.folder.lengths_D
            self.chosen = np.flatnonzero(lengths <= SEQ_LEN) if packing == "whole" else np.arange(len(lengths))

        def __len__(self) -> int:
            return len(self.chosen)

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return {"tokens": np.asarray(self.folder.document(int(self.chosen[index])), np.int32)}

    def stream(seed: int) -> Iterator[int]:
        sources = [grain.MapDataset.source(Documents(folder)).seed(seed).shuffle().repeat() for folder in folders]
        # It mixes documents, not rows: weights are divided by the mean length, so that tokens are mixed 5 : 3 : 2.
        weights = [w / np.mean(Documents(f).folder.lengths_D) for w, f in zip(WEIGHTS, folders)]
        documents = grain.MapDataset.mix(sources, weights=weights).to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
        )
        if packing == "concat":
            rows = experimental.ConcatThenSplitIterDataset(documents, length_struct={"tokens": SEQ_LEN})
        else:
            rows = experimental.BestFitPackIterDataset(
                documents, length_struct={"tokens": SEQ_LEN}, num_packing_bins=64, seed=seed
            )
        return (int(np.count_nonzero(batch["tokens_segment_ids"])) for batch in rows.batch(batch_size))

    return stream


def tokens_per_second(stream: Iterator[int], num_batches: int) -> float:
    started = time.perf_counter()
    total = sum(itertools.islice(stream, num_batches))
    return total / (time.perf_counter() - started)


def planning(*, num_documents: int, repetitions: int = 5) -> list[dict[str, Any]]:
    """Returns documents per second of planning an epoch, and how full its rows are."""
    found = []
    for name, seq_len in (("web", SEQ_LEN), ("books", 32768)):
        median, spread = SOURCES[name]
        lengths = np.random.default_rng(1).lognormal(np.log(median), spread, num_documents).astype(int)
        for packing in ("concat", "whole"):
            plan_rows(lengths[:100_000], seq_len=seq_len, packing=packing, seed=0, epoch=0)  # compiles
            seconds = []
            for epoch in range(repetitions):
                started = time.perf_counter()
                plan = plan_rows(lengths, seq_len=seq_len, packing=packing, seed=0, epoch=epoch)
                seconds.append(time.perf_counter() - started)
            cell = {"lengths": name, "seq_len": seq_len, "packing": packing, "num_documents": num_documents}
            cell["seconds"] = [round(s, 3) for s in seconds]
            cell["documents_per_second"] = round(num_documents / statistics.median(seconds))
            cell["filled"] = round(float(plan.length_P.sum(dtype=np.int64)) / (plan.num_rows * seq_len), 5)
            found.append(cell)
    return found


def measure(folders: Sequence[str], *, repetitions: int, num_tokens: int) -> list[dict[str, Any]]:
    """Returns the cells packing x batch size, ours and the peer's, measured in turn."""
    cells = [(packing, batch_size) for packing in ("concat", "whole") for batch_size in (8, 256)]
    streams = {cell: {"ours": ours(folders, *cell), "grain": peer(folders, *cell)} for cell in cells}
    raw: dict[tuple, dict[str, list[float]]] = {cell: {"ours": [], "grain": []} for cell in cells}
    for repetition in range(repetitions + 1):
        for cell in cells:
            count = max(2, num_tokens // (cell[1] * SEQ_LEN))
            for name, make in streams[cell].items():
                speed = tokens_per_second(make(repetition), count)
                if repetition:  # the first one warms the page cache and is left out
                    raw[cell][name].append(speed)
    return [
        {"packing": packing, "batch_size": batch_size}
        | {
            f"{name}_tokens_per_second": round(statistics.median(raw[packing, batch_size][name]))
            for name in raw[cells[0]]
        }
        | {f"{name}_raw": [round(value) for value in raw[packing, batch_size][name]] for name in raw[cells[0]]}
        for packing, batch_size in cells
    ]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.input_pipeline", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=24_000_000, help="tokens of the three folders together")
    parser.add_argument("--measured", type=int, default=8_000_000, help="tokens of one repetition")
    parser.add_argument("--documents", type=int, default=1_000_000, help="document lengths that are planned")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        folders = write_sources(Path(folder), num_tokens=args.tokens)
        cells = measure(folders, repetitions=args.repetitions, num_tokens=args.measured)
    result = {
        "what": "positions (padding left out) per second from token folders on disk (in the page cache) to batches",
        "formula": "non-padding positions of the batches / seconds from asking for the first to having the last",
        "wanted_tokens_per_second": round(wanted_tokens_per_second()),
        "wanted_is": f"{TIMES} x {WANTED_MFU:.0%} of {PEAK:.3g} FLOP/s on the 1.8B at {SEQ_LEN} tokens",
        "seq_len": SEQ_LEN,
        "mixture": {name: weight for name, weight in zip(SOURCES, WEIGHTS)},
        "cells": cells,
        "planning": planning(num_documents=args.documents),
        "hardware": f"{os.cpu_count()} cores, {cpu_name()}",
        "load": {"before": [round(x, 2) for x in before], "after": [round(x, 2) for x in os.getloadavg()]},
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "grain", "numba", "jax")},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for cell in cells:
        print({name: value for name, value in cell.items() if not name.endswith("_raw")})
    print(f"wanted {result['wanted_tokens_per_second']:,} tokens/s; written to {args.output}")


if __name__ == "__main__":
    main()
