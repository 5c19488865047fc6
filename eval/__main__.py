"""Scores a model on your own files.

    python -m eval MODEL --choices exam.jsonl --questions facts.jsonl --text held_out.txt --out runs/NAME/eval
    python -m eval MODEL --questions facts.jsonl --ask chat

Prints a table; `--out` keeps every sample. Formats stand in eval/README.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Evaluate:
    """Scores a model on multiple-choice files, question files and texts."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face folder, a run, an adapter folder: whatever the other commands take."""
    allow_unknown: tuple[str, ...] = ()
    """Fields of the model's config.json that are read as if they were absent."""
    choices: tuple[Path, ...] = ()
    """JSONL files with question, choices, answer."""
    questions: tuple[Path, ...] = ()
    """JSONL files with question, answer; the first line that the model writes is compared."""
    text: tuple[Path, ...] = ()
    """UTF-8 texts for bits per byte."""
    out: Path | None = None
    """Folder for one JSONL of samples per task, and results.json."""
    ask: Literal["text", "chat"] = "text"
    """As plain text, or as the user's turn in the model's chat template."""
    batch_size: int = 16
    """Inputs scored or answered at once."""
    max_length: int | None = None
    """Longest input in tokens; the model's own if not given."""


def run(config: Evaluate) -> str:
    """Returns the table of scores as Markdown."""
    from eval.model import as_chat, as_text, local
    from eval.report import markdown
    from eval.run import evaluate
    from eval.tasks import files
    from internjax.hf.open import open_model

    tasks = [files.choices(path) for path in config.choices] + [files.questions(path) for path in config.questions]
    if config.text:
        tasks.append(files.text(config.text))
    if not tasks:
        raise ValueError("nothing to score: give --choices, --questions or --text with at least one file")
    model = local(
        open_model(config.model, allow_unknown=config.allow_unknown),
        batch_size=config.batch_size,
        max_length=config.max_length,
        encode=as_chat if config.ask == "chat" else as_text,
    )
    return markdown(evaluate(model, tasks, log_folder=config.out))


def main() -> None:
    config = tyro.cli(Evaluate, prog="python -m eval", description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    from internjax.compile_cache import keep_programs

    keep_programs()
    try:
        print(run(config), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
