"""Megabytes per second and core of the data chain, stage by stage and whole, with its peak memory, on files found here.

    python -m experiments.benchmarks.data                       # 50 MB
    python -m experiments.benchmarks.data --megabytes 50 400    # how it grows
    python -m experiments.benchmarks.data --root DIR [DIR ...]  # other files than those of the installed packages

Hardware: CPU
Time: under a minute at 50 MB on an idle core

The corpus is Python sources, documentation and package metadata below the roots, in sorted order, as JSONL; where it is
smaller than asked, copies follow whose words are changed so that they are no duplicates. MB/s per core = bytes of text
that went in / seconds of CPU of the process (10^6 bytes); wall time is beside it. Stages are timed alone on batches as
the chain cuts them, after one small call that compiles. `minhash` is words, shingles and signatures. The whole chain
is `data_pipelines.wanjuan reference` without its rules of decision on code: normalise, rules, exact and verified near
duplicates, from JSONL to parquet and ledger; it runs in a process of its own, on one thread, compiled beforehand, and
the peak is that process's largest resident set, files it has mapped included.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines import chain, dedup, executors, ledger, rules, sources, wanjuan
from data_pipelines.document import num_text_bytes
from experiments.benchmarks import record

SUFFIXES = {".py", ".rst", ".md", ".txt"}
WANTED = {"minhash": 125.0, "whole": 40.0}
"""MB/s per core that this project is designed for."""


def texts(roots: Sequence[Path], size: int) -> Iterator[tuple[str, str]]:
    """(path, text) of files below the roots until there are `size` bytes; then the same again with other words."""
    found, total, round_number = [], 0, 0
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and total < size:
                text = path.read_bytes().decode("utf-8", "replace")
                total += len(text.encode())
                found.append((str(path.relative_to(root)), text))
                yield found[-1]
    if not found:
        raise ValueError(f"no {', '.join(sorted(SUFFIXES))} file below {', '.join(map(str, roots))}; give --root")
    while total < size:
        round_number += 1
        for path, text in found:
            changed = text.replace("e", f"e{round_number}")
            total += len(changed.encode())
            yield f"{round_number}/{path}", changed
            if total >= size:
                return


def write_corpus(path: Path, roots: Sequence[Path], size: int) -> int:
    """Writes the JSONL; returns its documents."""
    count = 0
    with path.open("w", encoding="utf-8") as lines:
        for name, text in texts(roots, size):
            lines.write(json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n")
            count += 1
    return count


def stages() -> dict[str, Callable[[pa.RecordBatch], Any]]:
    near = dedup.NearDuplicates()
    return {
        "normalise": rules.edit(rules.normalise_text, rules.normalise_rows),
        "clean_lines": rules.edit(rules.clean_lines, rules.clean_rows),
        "rules_reference": rules.text_rules(rules.REFERENCE),
        "rules_web": rules.text_rules(rules.WEB),
        "exact": dedup.sketch_exact,
        "minhash": lambda batch: dedup.sign(rules.find_words(batch), seed=near.seed),
        "near_sketch": lambda batch: dedup.sketch_near(batch, settings=near),
    }


def time_stages(path: Path, repetitions: int) -> dict[str, Any]:
    """MB/s per core of reading and of every stage: the best of the repetitions, and all of them."""
    (file,) = sources.find_files([path])
    unit = sources.unit(sources.cut([file], size=1 << 62).slices)
    started = time.process_time()
    batches = list(chain.batches(unit.read(None), chain.Sizes()))
    reading = time.process_time() - started
    size = sum(map(num_text_bytes, batches)) / 1e6
    result = {"read": {"mb_per_s_core": round(size / reading, 1), "runs": [round(size / reading, 1)]}}
    for name, apply in stages().items():
        apply(batches[0].slice(0, 2))
        runs = []
        for _ in range(repetitions):
            started = time.process_time()
            for batch in batches:
                apply(batch)
            runs.append(round(size / (time.process_time() - started), 1))
        result[name] = {"mb_per_s_core": max(runs), "runs": runs}
    return result


def peak_bytes() -> int:
    """The largest resident set so far. (getrusage's would begin with that of the process that started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def whole(path: Path, output: Path) -> dict[str, Any]:
    """Runs the chain on one thread of this process."""
    with executors.local(1) as run_tasks:
        warm = path.with_name("warm.jsonl")
        warm.write_text("".join(line for _, line in zip(range(50), path.open(encoding="utf-8"))), encoding="utf-8")
        wanjuan.run_files([warm], wanjuan.REFERENCE_TEXT, output / "warm", run_tasks)
        before, cpu, wall = peak_bytes(), time.process_time(), time.monotonic()
        books = wanjuan.run_files([path], wanjuan.REFERENCE_TEXT, output / "out", run_tasks)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    counts = ledger.summary(books)
    return {
        "documents": counts["documents_in"],
        "megabytes": round(counts["bytes_in"] / 1e6, 1),
        "kept": counts["documents_kept"],
        "dropped": {name: sum(reasons.values()) for name, reasons in counts["dropped"].items()},
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "mb_per_s_core": round(counts["bytes_in"] / 1e6 / cpu, 1),
        "peak_mb": round(peak_bytes() / 1e6),
        "peak_before_mb": round(before / 1e6),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes results/data.json."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.data", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[50], help="sizes of the corpus; the first is cut up"
    )
    parser.add_argument("--root", type=Path, nargs="+", help="folders to take files from (default: installed packages)")
    parser.add_argument("--repetitions", type=int, default=3, help="of every stage")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "data.json", help="JSON to write")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the process that runs the whole chain
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(whole(given.one, given.one.parent)))
        return
    roots = given.root or [Path(sysconfig.get_path("purelib"))]
    result: dict[str, Any] = {"wanted_mb_per_s_core": WANTED, "whole": []}
    for number, megabytes in enumerate(given.megabytes):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "corpus.jsonl"
            write_corpus(path, roots, megabytes * 10**6)
            if number == 0:
                result["stages"] = time_stages(path, given.repetitions)
                for name, row in result["stages"].items():
                    print(f"{name:16s} {row['mb_per_s_core']:8.1f} MB/s per core")
            command = [sys.executable, "-m", "experiments.benchmarks.data", "--one", str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            result["whole"].append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(result["whole"][-1]))
    record.write(given.output, result | {"machine": record.environment()})


if __name__ == "__main__":
    main()
