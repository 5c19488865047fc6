"""A corpus and a chain that need no compiled code to be seen at work, and a stage that kills its process once.

`python -m tests.data_pipelines.small_chain FOLDER` runs the chain on FOLDER/in.jsonl into FOLDER/out and dies where the
file FOLDER/kill says: in a batch stage, while a corpus stage decides, while the output is written; `... FOLDER memory`
runs exact and near duplicates on FOLDER/big under a limit on memory; `... FOLDER ray` runs the chain `mixed` on real
files on a Ray cluster of two nodes, prints what is said of a task that kills every worker, and exits with NOT_STARTED
where the nodes do not start.
"""

import functools
import gzip
import io
import json
import os
import random
import signal
import socket
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import dedup, executors, output, wanjuan
from data_pipelines.chain import Sizes
from data_pipelines.document import Check, Outcome, Stage
from data_pipelines.ledger import regroup

NOT_STARTED = 3
SIZES = Sizes(unit_bytes=2000, batch_bytes=700, batch_rows=4)


def write_corpus(path: Path, num_documents: int = 60) -> None:
    """JSONL: every third text is a copy of an earlier one, every seventh is short, and one line is broken."""
    rng = random.Random(1)
    texts = []
    for number in range(num_documents):
        if number % 3 == 2:
            texts.append(texts[rng.randrange(len(texts))].upper())
        elif number % 7 == 3:
            texts.append(f"short {number}")
        else:
            texts.append(" ".join(f"w{rng.randrange(500)}" for _ in range(60)))
    lines = [json.dumps({"text": text, "n": number}) for number, text in enumerate(texts)]
    path.write_text("\n".join([*lines[:20], "{broken", *lines[20:]]) + "\n")


def watched(batch: pa.RecordBatch, *, log: str, kill: str) -> Outcome:
    """Drops short texts; writes the documents it sees to the log; dies at row 31 where `kill` says so."""
    texts, paths = batch.column("text").to_pylist(), batch.column("path").to_pylist()
    if any(path.endswith(":31") for path in paths):
        die_where(kill, "batch")
    with open(log, "a") as lines:
        lines.write("".join(path + "\n" for path in paths))
    lengths = Check("short", np.array([len(text) for text in texts], float), "below", 20)
    return Outcome(batch, ["short" if len(text) < 20 else None for text in texts], texts, [lengths])


def die_where(kill: str, place: str) -> None:
    """Kills this process, once, where the file `kill` names the place."""
    if os.path.exists(kill) and Path(kill).read_text() == place:
        os.unlink(kill)
        os.kill(os.getpid(), signal.SIGKILL)


def decided(*given: Any, resolve: Any, log: str, kill: str) -> Any:
    """What `resolve` decides, which is written to the log."""
    with open(log, "a") as lines:
        lines.write("decided\n")
    decision = resolve(*given)
    die_where(kill, "resolve")
    return decision


def stages(folder: Path) -> list[Stage]:
    places = {"log": str(folder / "log"), "kill": str(folder / "kill")}
    near = dedup.near_duplicates(dedup.NearDuplicates())
    return [
        Stage("short", "batch", functools.partial(watched, **places)),
        Stage("exact", "corpus", dedup.exact_duplicates),
        Stage("near", "corpus", near._replace(resolve=functools.partial(decided, resolve=near.resolve, **places))),
    ]


def run(folder: Path, output: Path, run_tasks: executors.Map, *, sizes: Sizes = SIZES, **how) -> None:
    wanjuan.run_files([folder / "in.jsonl"], stages(folder), output, run_tasks, sizes=sizes, **how)


def write_real(folder: Path) -> None:
    """FOLDER/real: modules and documentation of the standard library, near and exact copies of some, a licence."""
    import email
    import json as json_package

    real = folder / "real"
    for package in (json_package, email):
        for path in sorted(Path(package.__file__).parent.glob("[dehps]*.py")):
            text = path.read_text("utf-8")
            place = real / package.__name__ / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
            documentation = "\n\n".join(text.split('"""')[1::2])
            place.with_suffix(".md").write_text(documentation)
            if path.name in ("decoder.py", "header.py", "policy.py"):
                (real / f"twin_of_{path.name}").write_text(text.replace("    ", "\t"))
                (real / f"near_{path.name}").write_text(text.replace("raise", "return", 1))
                place.with_name(f"near_{path.stem}.md").write_text(documentation.replace("the", "this", 1))
                place.with_name(f"twin_{path.stem}.md").write_text(documentation.upper())
    (real / "LICENSE").write_text("Apache License, Version 2.0")
    (real / "broken.py").write_text("def f(:\n" + "    # a comment\n" * 9)
    (real / "rows.jsonl").write_text('{"text": "a row that says little"}\n{broken\n')


def run_real(folder: Path, output: Path, run_tasks: executors.Map) -> None:
    """The chain `mixed` on FOLDER/real and FOLDER/in.jsonl, which is watched."""
    sizes = Sizes(unit_bytes=60_000, batch_bytes=20_000, batch_rows=16)
    chain_of = [stages(folder)[0], *wanjuan.mixed()]
    wanjuan.run_files([folder / "in.jsonl", folder / "real"], chain_of, output, run_tasks, sizes=sizes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def once(folder: Path, run_tasks: executors.Map) -> None:
    """Runs duplicates over a file of each kind: what they need is compiled, kept for other processes, and imported."""
    from tests.data_pipelines.test_web_pages import response

    write_corpus(folder / "in.jsonl")
    (folder / "in.warc").write_bytes(response("http://a.org/", b"<p>one page"))
    pq.write_table(pa.table({"text": ["one row"]}), folder / "in.parquet", compression="zstd")
    files = [folder / f"in.{kind}" for kind in ("jsonl", "warc", "parquet")]
    wanjuan.run_files(files, duplicates(folder), folder / "once", run_tasks)


def duplicates(folder: Path) -> list[Stage]:
    return [Stage("exact", "corpus", dedup.exact_duplicates), stages(folder)[-1]]


def under_a_limit(folder: Path) -> None:
    """Runs duplicates over a corpus of ten times the memory that may be taken beyond what the process has.

    With one thread of Arrow: what each further one would hold does not count.
    """
    from tests.data_pipelines.test_web_pages import response
    from tests.hf.limited_memory import at_most

    # Arrow starts a thread when there is work for one more; its stack alone would break the limit.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    regroup.__kwdefaults__["size"] = 1 << 20  # row groups of the output are held, twice over
    rng, rows = np.random.default_rng(2), []
    limit, num_documents = 8 << 20, 1740
    big, size = folder / "big", 0
    big.mkdir()
    with (
        (big / "a.jsonl").open("w") as lines,
        (big / "b.warc.gz").open("wb") as pages,
        tarfile.open(big / "c.tar.gz", "w:gz", compresslevel=1) as files,
    ):
        for number in range(num_documents):
            letters = rng.integers(97, 123, 50_000, dtype=np.uint8)
            letters[5::6] = 32
            text = letters.tobytes() if number % 10 else b"the same text " * 3500
            size += len(text)
            if number % 3 == 0:
                lines.write(json.dumps({"text": text.decode()}) + "\n")
            elif number % 6 == 2:
                rows.append(text.decode())
            elif number % 3 == 1:
                pages.write(gzip.compress(response(f"http://{number}.org/", b"<p>" + text), 1))
            else:
                member = tarfile.TarInfo(f"{number}.txt")
                member.size = len(text)
                files.addfile(member, io.BytesIO(text))
    # One row group of many pages: what its writer made a page of is decompressed together.
    pq.write_table(pa.table({"text": rows}), big / "d.parquet", compression="zstd", write_batch_size=8)
    assert size > 10 * limit, size
    del rows
    small = Sizes(unit_bytes=4 << 20, batch_bytes=1 << 18)
    with executors.local(1) as run_tasks:
        once(folder, run_tasks)
        with at_most(limit):
            ledger = wanjuan.run_files([big], duplicates(folder), folder / "out", run_tasks, sizes=small)
    print(size // limit, ledger.stages["near"].documents_kept)


AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on just now."""
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def add_node(cluster: Any, **options: Any) -> None:
    """Adds a node that does not wait for its agents.

    A node ends when its agents do not name their ports within 15 seconds, which they do not on a busy machine (Ray's
    issue 65983). It waits for no port that it is given, but Ray does not hand on the one that its dashboard's agent
    listens on.
    """
    from ray._private import services

    ports, start = dict(zip(AGENT_PORTS, free_ports(len(AGENT_PORTS)), strict=True)), services.start_ray_process

    def start_with_port(command: list[str], *rest: Any, **more: Any):
        if command[0] == services.RAYLET_EXECUTABLE:
            command = [*command, f"--dashboard_agent_listen_port={ports['dashboard_agent_listen_port']}"]
        return start(command, *rest, **more)

    services.start_ray_process = start_with_port
    try:
        cluster.add_node(**options, **ports)
    finally:
        services.start_ray_process = start


def on_two_ray_nodes(folder: Path) -> None:
    """Runs the real chain on a cluster of two nodes of this machine, and then a task that kills every worker."""
    from ray.cluster_utils import Cluster

    os.fsync = lambda descriptor: None  # thousands of small parts need not outlive the machine
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster()
    try:
        try:
            add_node(cluster, **small, include_dashboard=False)
            add_node(cluster, **small)
        except Exception as error:  # what Ray raises has no kind of its own
            print(f"the nodes did not start: {error}", file=sys.stderr)
            raise SystemExit(NOT_STARTED) from error
        executors.MOST_RETRIES = 1
        with executors.ray(cluster.address) as run_tasks:
            run_real(folder, folder / "out", run_tasks)
            try:
                list(run_tasks(lambda item: os.kill(os.getpid(), signal.SIGKILL), ["a deadly text"]))
            except ValueError as error:
                print(error)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if sys.argv[2:] == ["memory"]:
        under_a_limit(place)
    elif sys.argv[2:] == ["once"]:
        with executors.local(1) as one_thread:
            once(place, one_thread)
    elif sys.argv[2:] == ["ray"]:
        from tests.data_pipelines import small_chain  # Ray's workers import its functions by this name

        small_chain.on_two_ray_nodes(place)
    else:
        saved = output.save
        output.save = lambda *given: (die_where(str(place / "kill"), "write"), saved(*given))
        with executors.local(1) as one_thread:
            run(place, place / "out", one_thread)
