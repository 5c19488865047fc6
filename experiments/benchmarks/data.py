"""Megabytes per second and core of the data chain, stage by stage and whole, with its peak memory, on files found here.

    python -m experiments.benchmarks.data                       # 50 MB
    python -m experiments.benchmarks.data --megabytes 50 400    # how it grows
    python -m experiments.benchmarks.data --root DIR [DIR ...]  # other files than those of the installed packages
    python -m experiments.benchmarks.data --peers datatrove daft --peer-python PYTHON --at-most datatrove=5

Hardware: CPU
Time: two minutes at 50 MB on an idle core; datatrove takes two seconds or more for a megabyte

The corpus is Python sources, documentation and package metadata below the roots, in sorted order, as JSONL; where it is
smaller than asked, copies follow whose words are changed so that they are no duplicates. MB/s per core = bytes of text
that went in / seconds of CPU of the process (10^6 bytes); wall time is beside it. Stages are timed alone on batches as
the chain cuts them, after one small call that compiles. `minhash` is words, shingles and signatures. A whole chain
(`reference`, `web`) is that of `data_pipelines.wanjuan`, from JSONL to parquet and ledger: normalise, language, rules,
exact and verified near duplicates, and in `web` C4's lines and masked personal data. `rules_and_duplicates` is
`reference` without the language, which CLD2 takes as long as it takes: normalise, rules, exact and verified near
duplicates, from JSONL to parquet and ledger as well. The 40 MB/s per core that are wanted are those of this chain. Each
runs in a process of its own, on one thread, compiled beforehand. The peak is that process's largest resident set, files
it has mapped included; beside it the largest of what is its own (seen every 20 ms).

Peers (`data_peers.py`) do the same kind of work on the same file, on one core too. All contenders run in turns, a round
after another, and the figure is the median of the rounds. A peer that is not installed is named and left out.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines import chain, dedup, executors, ledger, natural_languages, rules, sources, wanjuan
from data_pipelines.document import num_text_bytes
from data_pipelines.words import find_spans
from experiments.benchmarks import data_peers, record

SUFFIXES = {".py", ".rst", ".md", ".txt"}
WANTED = {"minhash": 125.0, "rules_and_duplicates": 40.0}
"""MB/s per core that this project is designed for."""
CHAINS = {
    "rules_and_duplicates": tuple(stage for stage in wanjuan.REFERENCE_TEXT if stage.name != "language"),
    "reference": wanjuan.REFERENCE_TEXT,
    "web": wanjuan.WEB_TEXT,
}


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
        "language": natural_languages.identify_languages,
        "clean_lines": rules.edit(rules.clean_lines, rules.clean_rows),
        "rules_reference": rules.text_rules(rules.REFERENCE),
        "rules_web": rules.text_rules(rules.WEB),
        "exact": dedup.sketch_exact,
        "minhash": lambda batch: dedup.sign(find_spans(batch), seed=near.seed),
        "near_sketch": lambda batch: dedup.sketch_near(batch, settings=near),
    }


def time_stages(path: Path, repetitions: int) -> dict[str, Any]:
    """MB/s per core of reading and of every stage: the best of the repetitions, and all of them."""
    (file,) = sources.find_files([path])
    unit = sources.unit(sources.cut([file], size=1 << 62).slices)
    runs, batches = [], []
    for _ in range(repetitions):
        started = time.process_time()
        batches = list(chain.batches(unit.read(None), chain.Sizes()))
        runs.append(time.process_time() - started)
    size = sum(map(num_text_bytes, batches)) / 1e6
    result = {"read": {"mb_per_s_core": round(size / min(runs), 1), "runs": [round(size / each, 1) for each in runs]}}
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


@contextlib.contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Gives a list whose value at the end is the most memory that this process had for itself, in bytes."""
    most, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            most[0] = max(most[0], *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        is_over.set()
        watcher.join()


def whole(chain_name: str, path: Path, output: Path) -> dict[str, Any]:
    """Runs a chain on one thread of this process."""
    stages_of_chain = CHAINS[chain_name]
    with executors.local(1) as run_tasks:
        warm = output / "warm.jsonl"
        with path.open(encoding="utf-8") as lines:
            some = (line for number, line in zip(range(3200), lines) if number % 8 == 0)  # rules leave few in a row
            warm.write_text("".join(some), encoding="utf-8")
        wanjuan.run_files([warm], stages_of_chain, output / "warm", run_tasks)
        before, cpu, wall = data_peers.peak_bytes(), time.process_time(), time.monotonic()
        with watched_memory() as own:
            books = wanjuan.run_files([path], stages_of_chain, output / "out", run_tasks)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    counts = ledger.summary(books)
    return {
        "documents": counts["documents_in"],
        "megabytes": round(counts["bytes_in"] / 1e6, 1),
        "kept": counts["documents_kept"],
        "dropped": {name: sum(reasons.values()) for name, reasons in counts["dropped"].items() if reasons},
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "mb_per_s_core": round(counts["bytes_in"] / 1e6 / cpu, 1),
        "peak_mb": round(data_peers.peak_bytes() / 1e6),
        "peak_before_mb": round(before / 1e6),
        "peak_own_mb": round(own[0] / 1e6),
    }


def contend(who: str, path: Path, python: str) -> dict[str, Any]:
    """Runs a chain or a peer once, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if who in CHAINS:
            command = [sys.executable, "-m", "experiments.benchmarks.data", "--one", who, str(path), folder]
        else:
            command = [python, str(Path(data_peers.__file__)), who, str(path), folder]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}: {done.stderr.strip()[-600:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def contest(paths: Mapping[str, Path], python: str, rounds: int) -> dict[str, Any]:
    """Returns what every contender took on its file: the run of median speed, and the speeds of all rounds."""
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in paths}
    for _ in range(rounds):
        for who, path in paths.items():
            if not runs[who] or "mb_per_s_core" in runs[who][-1]:
                runs[who].append(contend(who, path, python))
                print(who, json.dumps(runs[who][-1]), flush=True)
    found = {}
    for who, each in runs.items():
        each = sorted((run for run in each if "mb_per_s_core" in run), key=lambda run: run["mb_per_s_core"]) or each
        speeds = [run.get("mb_per_s_core") for run in each]
        found[who] = each[(len(each) - 1) // 2] | {"runs": speeds}
        if len(each) % 2 == 0:
            found[who]["mb_per_s_core"] = round(statistics.median(speeds), 2)
    return found


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
    parser.add_argument(
        "--rounds",
        type=int,
        nargs="+",
        default=[1],
        help="of every whole chain and peer, by size; the last for the rest",
    )
    parser.add_argument("--chains", nargs="+", choices=list(CHAINS), default=list(CHAINS), help="to run whole")
    parser.add_argument("--peers", nargs="+", choices=list(data_peers.PEERS), default=[], help="to run beside them")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that the peers are installed for")
    parser.add_argument("--at-most", nargs="+", default=[], metavar="WHO=MEGABYTES", help="of a slow contender")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "data.json", help="JSON to write")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # the process that runs a whole chain
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(whole(given.one[0], Path(given.one[1]), Path(given.one[2]))))
        return
    roots = given.root or [Path(sysconfig.get_path("purelib"))]
    most = {who: int(megabytes) for who, _, megabytes in (text.partition("=") for text in given.at_most)}
    if unknown := set(most) - {*given.chains, *given.peers}:
        parser.error(f"--at-most names {sorted(unknown)}, which are not run; known: {[*given.chains, *given.peers]}")
    result: dict[str, Any] = {"wanted_mb_per_s_core": WANTED, "whole": {}}
    with tempfile.TemporaryDirectory() as folder:
        made: dict[int, Path] = {}
        for number, megabytes in enumerate(given.megabytes):
            paths = {}
            for who in (*given.chains, *given.peers):
                size = min(megabytes, most.get(who, megabytes))
                if size < megabytes and number and size in made:
                    continue  # it has met a corpus of this size before
                if size not in made:
                    made[size] = Path(folder) / str(size) / "corpus.jsonl"
                    made[size].parent.mkdir()
                    write_corpus(made[size], roots, size * 10**6)
                paths[who] = made[size]
            if number == 0:
                result["stages"] = time_stages(next(iter(paths.values())), given.repetitions)
                for name, row in result["stages"].items():
                    print(f"{name:16s} {row['mb_per_s_core']:8.1f} MB/s per core")
            result["whole"][f"{megabytes} MB"] = contest(
                paths, given.peer_python, given.rounds[min(number, len(given.rounds) - 1)]
            )
            record.write(given.output, result | {"machine": record.environment()})


if __name__ == "__main__":
    main()
