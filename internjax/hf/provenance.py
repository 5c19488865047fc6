"""How a model was made: what a run's own records say, for internjax.json and the model card of what is exported."""

import json
from pathlib import Path
from typing import Any

from internjax.hf.resolve import ABOUT, EXPERIMENT, Source, read_json

METRICS, VERSIONS = "metrics.jsonl", "versions.json"
# Parts of a run's config that say where and how it ran, and nothing about the model.
_ELSEWHERE = "run tracking checkpoint mesh fresh preflight dry_run profile prompts push".split()


def provenance_of(source: Source) -> dict[str, Any]:
    """Returns what an opened source says about how it was made: its internjax.json's record, and its run's facts."""
    facts: dict[str, Any] = {}
    if (source.folder / ABOUT).is_file():
        found = read_json(source.folder / ABOUT).get("provenance")
        facts |= found if isinstance(found, dict) else {}
    if source.checkpoints is not None:
        facts |= run_facts(source.checkpoints.parent, step=source.step)
    return facts


def run_facts(run: Path, *, step: int | None = None) -> dict[str, Any]:
    """Returns the training facts of a run at a step (by default its last): config, metrics, the code's commit.

    A record that is not there is left out; no facts at all is an empty dict.
    """
    facts: dict[str, Any] = {"run": run.resolve().name}
    if (run / EXPERIMENT).is_file():
        config = read_json(run / EXPERIMENT)
        facts |= {name: value for name, value in config.items() if name not in _ELSEWHERE and value is not None}
    row = _metrics_at(run / METRICS, step)
    if step is not None or row:
        facts["step"] = step if step is not None else row["step"]
    if row:
        facts[f"metrics at step {row['step']}"] = {k: v for k, v in row.items() if k != "step"}
    if (run / VERSIONS).is_file():
        commit = read_json(run / VERSIONS).get("git_commit")
        facts |= {"git commit": commit} if commit else {}
    return facts if len(facts) > 1 else {}


def _metrics_at(file: Path, step: int | None) -> dict[str, Any]:
    """Returns the last whole row up to a step; a run that is going on may be writing the one after it."""
    last: dict[str, Any] = {}
    if file.is_file():
        with open(file, encoding="utf-8") as stream:
            for line in stream:
                if not line.endswith("\n"):
                    break
                row = json.loads(line)
                if step is None or row.get("step", 0) <= step:
                    last = row
    return last if "step" in last else {}
