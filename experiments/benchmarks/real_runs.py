"""What the chains kept and dropped of real data: the ledgers of finished runs in one file, without a path of a machine.

    python -m data_pipelines.wanjuan web --input WEB SHAKESPEARE --output clean-web
    python -m data_pipelines.wanjuan code --input TREE [TREE ...] --output clean-code
    python -m experiments.benchmarks.real_runs \\
        --run web clean-web "samples of C4 and Wikipedia; the plays of Shakespeare" \\
        --run code clean-code "the Python trees of a machine"

Hardware: CPU
Time: seconds; a run of `code` takes a second and core for about 7 MB

Of every run: documents and bytes in and kept; in and kept by stage, dropped by reason; rows that could not be read by
reason; near duplicates in figures; the most frequent languages, kinds of text and licences of what was kept. Figures of
the ledger are copied, and its sums are checked again.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.ledger import file_of, read_summary
from experiments.benchmarks import record

MOST_KINDS = 12
"""Languages and licences that are named, the most frequent ones."""
DETAIL = re.compile(r"[(:;].*|\d[\d,]*", re.DOTALL)
"""Of a reason why a row could not be read: what is of that row alone."""


def summarised(folder: Path, what: str) -> dict[str, Any]:
    """The ledger of an output folder of `data_pipelines.wanjuan`, without names of files. what: it was given, in words.

    Raises RuntimeError where documents or bytes of a stage do not sum.
    """
    counts = read_summary(folder)
    stages = {}
    for count in counts["stages"]:
        dropped = {
            reason: {"documents": number, "bytes": count["dropped_bytes"][reason]}
            for reason, number in sorted(count["dropped"].items(), key=lambda item: (-item[1], item[0]))
        }
        if count["documents_in"] != count["documents_kept"] + sum(each["documents"] for each in dropped.values()):
            raise RuntimeError(f"{folder}: the stage {count['stage']} does not sum; run the chain again")
        sizes = {name: count[name] for name in ("documents_in", "bytes_in", "documents_kept", "bytes_kept")}
        stages[count["stage"]] = sizes | {"dropped": dropped}
    lines = (folder / "set_aside.txt").read_text("utf-8").splitlines()
    kept = counts["profiles"]["kept"]
    return {
        "given": what,
        **{name: counts[name] for name in ("documents_in", "bytes_in", "documents_kept", "bytes_kept")},
        "stages": stages,
        "rows_set_aside": dict(Counter(map(_reason, lines)).most_common()),
        "repeated_ids": counts.get("repeated_ids", {}).get("rows", 0),
        "near_duplicates": {
            stage: {name: value for name, value in report.items() if isinstance(value, int)}
            for stage, report in counts["reports"].items()
            if "groups" in report
        },
        "kept_documents": {name: _most_frequent(kept.get(name, {})) for name in ("language", "domain", "licence")},
    }


def _reason(message: str) -> str:
    """Why a row could not be read, without its place and what is of it alone."""
    rest = message.removeprefix(file_of(message)).partition(": ")[2]
    return " ".join(DETAIL.sub("", rest if not rest.startswith("not text: ") else rest.replace(": ", ", ", 1)).split())


def _most_frequent(kinds: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Documents of the most frequent kinds, and of all others together."""
    numbers = Counter({name: documents for name, (documents, _) in kinds.items()})
    shown = dict(numbers.most_common(MOST_KINDS))
    others = numbers.total() - sum(shown.values())
    return shown | ({"(others)": others} if others else {})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=3, action="append", required=True, metavar=("CHAIN", "DIR", "WHAT"))
    parser.add_argument("--output", type=Path, default=record.RESULTS / "real_runs.json")
    given = parser.parse_args(arguments)
    runs = {chain: summarised(Path(folder), what) for chain, folder, what in given.run}
    record.write(given.output, {"runs": runs, "machine": record.environment()})
    for chain, run in runs.items():
        print(f"{chain}: {json.dumps({name: run[name] for name in run if name.startswith(('documents', 'bytes'))})}")


if __name__ == "__main__":
    main()
