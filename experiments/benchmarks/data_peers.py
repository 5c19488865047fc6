"""Filters and near-duplicate removal as others have them, on one core, for `experiments.benchmarks.data` to start.

    python experiments/benchmarks/data_peers.py datatrove|daft CORPUS.jsonl FOLDER

Prints a line of JSON: documents in and kept, seconds of CPU, peak memory; or {"missing": ...} where the package is not
installed. It imports nothing of this project, so that each peer may have an environment of its own (Daft wants an
older pyarrow).

Both have the bounds of our chain `reference` (documentation and code), where they know them.
datatrove: its local executor with one task: Gopher's repetition and quality filters, C4's filter, MinHash with 20
buckets of 6 hashes over 5-grams, clusters, filter. There is no exact step, and candidates are not verified. It wants
an xxhash before 4, which takes texts as well as bytes.
daft: native expressions on one thread: the bounds that its functions can tell (words, their length, hash signs, lorem
ipsum; nothing on repetition, lines or characters), distinct texts, MinHash of 120 hashes in 20 bands; in each bucket
the least row stays. Candidates are not verified.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path

# No peer may report to anybody; daft reads these when it is imported.
os.environ |= {"DO_NOT_TRACK": "1", "DAFT_ANALYTICS_ENABLED": "0", "SCARF_NO_ANALYTICS": "true"}
BANDS, ROWS = 20, 6


def datatrove(corpus: Path, folder: Path) -> int:
    """Returns how many documents are kept."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from loguru import logger

    logger.remove()
    settings = minhash.MinhashConfig(n_grams=5, num_buckets=BANDS, hashes_per_bucket=ROWS)
    place = {name: str(folder / name) for name in ("filtered", "signatures", "buckets", "remove", "kept")}
    steps = [
        (
            1,
            [
                JsonlReader(str(corpus.parent), glob_pattern=corpus.name),
                GopherRepetitionFilter(
                    dup_line_frac=0.4,
                    dup_para_frac=0.4,
                    dup_line_char_frac=0.3,
                    dup_para_char_frac=0.3,
                    top_n_grams=((2, 0.4), (3, 0.35), (4, 0.35)),
                    dup_n_grams=((5, 0.5), (6, 0.45), (7, 0.45), (8, 0.4), (9, 0.4), (10, 0.4)),
                ),
                GopherQualityFilter(
                    min_doc_words=12,
                    max_doc_words=10_000_000,
                    min_avg_word_length=2,
                    max_symbol_word_ratio=0.3,
                    max_bullet_lines_ratio=1.0,
                    max_ellipsis_lines_ratio=0.5,
                    max_non_alpha_words_ratio=0.5,
                    min_stop_words=0,
                ),
                C4QualityFilter(
                    filter_no_terminal_punct=False,
                    min_num_sentences=1,
                    min_words_per_line=-1,
                    max_word_length=-1,
                    filter_curly_bracket=False,
                ),
                JsonlWriter(place["filtered"], compression=None),
                minhash.MinhashDedupSignature(place["signatures"], config=settings),
            ],
        ),
        (BANDS, [minhash.MinhashDedupBuckets(place["signatures"], place["buckets"], config=settings)]),
        (1, [minhash.MinhashDedupCluster(place["buckets"], place["remove"], config=settings)]),
        (
            1,
            [
                JsonlReader(place["filtered"]),
                minhash.MinhashDedupFilter(place["remove"]),
                JsonlWriter(place["kept"], compression=None),
            ],
        ),
    ]
    for number, (tasks, pipeline) in enumerate(steps):
        logs = str(folder / "logs" / str(number))
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=logs).run()
    return sum(1 for path in Path(place["kept"]).glob("*.jsonl") for _ in path.open("rb"))


def daft(corpus: Path, folder: Path) -> int:
    """Returns how many documents are kept."""
    import daft
    from daft import functions as f

    daft.set_runner_native(num_threads=1)
    rows = daft.read_json(str(corpus)).select("text").with_column("id", f.monotonically_increasing_id())
    plain = f.regexp_replace(f.lower(daft.col("text")), r"[^a-z0-9_\x{80}-\x{10ffff}]+", " ")
    rows = rows.with_column("plain", plain).with_column("words", f.split(daft.col("plain"), " "))
    words = f.list_count(daft.col("words"))
    length = f.length(daft.col("plain")) / words
    rows = rows.where(
        (words >= 12)
        & (length >= 2)
        & (length <= 10)
        & (f.count_matches(daft.col("text"), ["#"]) / words <= 0.3)
        & ~f.contains(daft.col("plain"), "lorem ipsum")
    )
    rows = rows.with_column("key", f.hash(daft.col("plain")))
    first = rows.groupby("key").agg(daft.col("id").min().alias("id")).select("id")
    rows = rows.join(first, on="id", how="semi").select("id", "text", "plain").collect()
    hashes = f.minhash(daft.col("plain"), num_hashes=BANDS * ROWS, ngram_size=5, hash_function="xxhash")
    signed = rows.select("id", hashes.alias("hashes"))
    keys = [f.hash(f.slice(daft.col("hashes"), band * ROWS, (band + 1) * ROWS)) for band in range(BANDS)]
    signed = signed.select("id", *(key.alias(str(band)) for band, key in enumerate(keys))).collect()
    gone = None
    for band in range(BANDS):
        least = signed.groupby(str(band)).agg(daft.col("id").min().alias("least"))
        later = signed.join(least, on=str(band)).where(daft.col("id") != daft.col("least")).select("id")
        gone = later if gone is None else gone.concat(later)
    kept = rows.select("id", "text").join(gone.distinct(), on="id", how="anti")
    kept.select("text").write_parquet(str(folder / "kept"))
    return daft.read_parquet(str(folder / "kept/*.parquet")).count_rows()


PEERS = {
    "datatrove": (
        datatrove,
        ("datatrove", "spacy", "orjson", "xxhash"),
        ("datatrove.pipeline.dedup.minhash", "spacy"),
    ),
    "daft": (daft, ("daft",), ("daft.functions",)),
}
"""By name: the function, the packages that it needs, and the modules whose import is not timed."""


def peak_bytes() -> int:
    """The largest resident set so far. (getrusage's would begin with that of the process that started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main(name: str, corpus: Path, folder: Path) -> None:
    """Runs a peer once and prints what it took."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    run, packages, modules = PEERS[name]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(json.dumps({"missing": f"{', '.join(missing)} not installed in {sys.prefix}"}), file=out, flush=True)
        return
    with corpus.open(encoding="utf-8") as lines:
        sizes = [len(json.loads(line)["text"].encode()) for line in lines]
    for module in modules:
        importlib.import_module(module)
    cpu, wall = cpu_seconds(), time.monotonic()
    kept = run(corpus, folder)
    cpu, wall = cpu_seconds() - cpu, time.monotonic() - wall
    found = {
        "documents": len(sizes),
        "megabytes": round(sum(sizes) / 1e6, 1),
        "kept": kept,
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "mb_per_s_core": round(sum(sizes) / 1e6 / cpu, 2),
        "peak_mb": round(peak_bytes() / 1e6),
        "version": importlib.metadata.version(name),
    }
    print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
