"""Every notebook runs from its first cell to its last, from any folder, and is committed without outputs."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from internjax.hf.weights import list_tensors, read_tensor
from internjax.train.goodput import goodput
from internjax.train.tracking import read_rows
from tests.conftest import QUICK_FLAGS

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "experiments" / "notebooks"
NAMES = ("00_tour", "01_training", "02_finetuning", "03_data", "04_decoding", "05_serving")
ALL = [FOLDER / f"{name}.ipynb" for name in NAMES]
TOUR, TRAINING, FINETUNING, DATA, DECODING, SERVING = ALL
IDS = [name[3:] for name in NAMES]


def read(path):
    """The notebook, validated."""
    import nbformat  # takes five seconds, which every worker would spend on collecting this file

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def executed(notebook, folder, tmp_path):
    """The code cells of a notebook after they ran in a fresh kernel in `folder`."""
    from nbclient import NotebookClient

    notebook = read(notebook)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    # As a person's: one device, figures in the page; what a notebook writes goes where pytest clears it away.
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "MPLBACKEND")}
    # Compiled like the tests around them: most of the time goes there.
    environment["XLA_FLAGS"] = QUICK_FLAGS
    client.execute(env=environment | {"TMPDIR": str(tmp_path), "WANDB_MODE": "disabled"})
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def numbers(pattern, said):
    """The numbers in the groups of a pattern that must be there."""
    found = re.search(pattern, said)
    assert found, f"{pattern} in {said}"
    return [float(number.replace(",", "")) for number in found.groups()]


def the_tour(said, pages, work):
    for words in ("kept,", "dropped:", "tokens/s", "pairs ranked right", "bits per byte", "int4:", "answer:", "agent:"):
        assert words in said, words
    assert len(pages) >= 2 and (work / "export" / "internjax.json").is_file()


def training(said, pages, work):
    # Shown before anything is trained.
    assert said.index("one device holds") < said.index("ok      attention") < said.index("dry run") < said.index("1/48")
    # Interrupted twice, and the same bytes as without.
    assert "interrupted: the metrics reach step 27; there are checkpoints of steps [12, 24]" in said
    assert "resumed from step 24" in said and "killed by SIGKILL" in said
    straight, interrupted = work / "straight", work / "interrupted"
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (straight / name).read_bytes() == (interrupted / name).read_bytes(), name
    rows = read_rows(interrupted / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 49)) and rows[-1]["loss"] < rows[0]["loss"] - 1
    # Accounted for, and on the page.
    spent, (starts, *_, lost) = goodput(read_rows(interrupted / "timing.jsonl")), numbers(STARTS, said)
    assert spent.num_starts == starts == 3 and spent.num_lost_steps == lost >= 10
    assert (
        spent.down > 0 and 0 < spent.goodput < 1 and goodput(read_rows(straight / "timing.jsonl")).num_lost_steps == 0
    )
    (page,) = pages
    assert "srcdoc=" in page and "Where the time went" in page and "steps done twice" in page
    # What is read out of the model is what it computed, and nothing crosses documents.
    assert re.search(r"attention\.query +\(3, 1, \d+, 64\)\n", said) and re.search(r"stream +\(4, 1, \d+, 64\)\n", said)
    (apart,) = numbers(r"the logits behind the last layer are the decoder's, within (\S+)", said)
    assert apart < 1e-4
    (error,), (across, merged) = numbers(r"the model computed, within (\S+),", said), numbers(ACROSS, said)
    assert error < 1e-5 and across == 0 and merged > 0.05
    assert "not one bit of the second one's logits differs" in said
    # A loss and a callback of one's own.
    without, with_it = numbers(r"(\S+) without the term, (\S+) with it", said)
    own = read_rows(work / "own" / "metrics.jsonl")
    assert with_it < without and all("log_z_squared" in row for row in own)
    assert [row["step"] for row in own if "stream/3" in row] == [*range(5, 49, 5), 48]


STARTS = r"(\d+) starts, from steps \[0, 24, (\d+)\]; (\d+) steps were done twice"
ACROSS = r"largest weight across documents: (\S+); were they one document: (\S+)"


def finetuning(said, pages, work):
    # What is not known or not as written is refused by name.
    assert re.search(r"refused: .*logit_multiplier", said) and "model.safetensors has changed" in said
    assert "layers.ffn.down.kernel" in said and "model.layers.0.mlp.down_proj.weight" in said
    (page,) = pages
    assert re.findall(r"<mark>(In|import) ", page) == ["In", "import"]
    # The adapter begins as nothing, is learned, and has changed each kernel by a matrix of its rank.
    assert numbers(r"largest difference of the logits at step 0: (\S+)", said) == [0]
    name = "model.layers.2.self_attn.v_proj.weight"
    given = read_tensor(list_tensors(work / "tiny-qwen")[name])
    for run, rank in (("lora", 8), ("dora", 32)):
        rows = read_rows(work / run / "metrics.jsonl")
        assert len(rows) == 60 and rows[-1]["loss"] < 0.2 * rows[0]["loss"] and rows[-1]["growth"] > 0.01
        change = read_tensor(list_tensors(work / run / "model")[name]) - given
        # DoRA scales every column besides, which leaves no rank low.
        assert np.linalg.matrix_rank(change, tol=1e-5) == rank
    # One model in every form, and in a batch beside another one.
    (forms,), (moved, coarse) = numbers(r"between the three: (\S+)", said), numbers(FROM_BASE, said)
    (lengths,), (rows,) = numbers(r"stored magnitudes, within (\S+)", said), numbers(r"adapter alone: (\S+)", said)
    assert max(forms, rows) < 1e-3 < coarse < moved and lengths < 1e-5
    assert len(re.findall(r"english: 'In .*code: 'import ", said)) == 3


def data(said, pages, work):
    # Every row is accounted for, and what was asked of the measured values is what the run did.
    (rows,), (came, kept) = numbers(r"([\d,]+) rows, ", said), numbers(r"([\d,]+) documents in, ([\d,]+) kept", said)
    counts = json.loads((work / "clean" / "ledger.json").read_text())
    assert rows == came == kept + counts["documents_dropped"]
    assert "crawl.jsonl:6: not valid JSON" in said and len({each for d in counts["dropped"].values() for each in d}) > 5
    assert counts["profiles"]["kept"]["personal_data_masked"]["email"][0] > 5
    # One document's way, the page, and the same bytes of smaller pieces.
    assert re.search(r"tied to [0-9a-f]{32}, Jaccard 0\.\d", said) and said.count("-byte units") == 4
    (page,) = pages
    assert "srcdoc=" in page and "few_words" in page and "type=&quot;range&quot;" in page
    # Tokens, shares, rows and batches.
    shares = [float(share) for share in re.findall(r": ([\d.]+)% of the rows", said)]
    assert shares == [25, 75] and numbers(r"concat: \d+ rows, ([\d.]+)% full", said)[0] > 99
    assert "begun at step 0 and at step 40" in said and re.search(r"tokens +\S*mirror/00000\.bin, tokens", said)
    assert (work / "records" / "00000.array_record").is_file()


def decoding(said, pages, work):
    # What the table says is what the reports say, and those are about folders that are there.
    for name in ("rtn", "gptq", "awq"):
        report = json.loads((work / name / "quantization_report.json").read_text())
        after, kl = numbers(rf"\n{name} +\d+ +(\S+) +(\S+) ", said)
        assert (after, kl) == (
            round(report["held_out"]["perplexity_after"], 4),
            round(report["held_out"]["kl_mean"], 5),
        )
        assert 0 < kl < 0.1 and report["bytes"]["after"] < 0.6 * report["bytes"]["before"]
    assert "is not written: mean KL" in said and not (work / "refused").exists()
    # A session reads what is new, and answers as the conversation asked at once.
    turns = [tuple(map(int, found)) for found in re.findall(r"\[(\d+) tokens before it, (\d+) of them held", said)]
    (first, _), (_, second), *forked = turns
    assert len(turns) == 4 and second > first and all(held > second for _, held in forked)
    assert re.search(r"> Where is \w+\?\n  It is in \w+\.", said) and ", the same; " in said
    # Every cell of the grid, in the page's files too.
    cells = json.loads((work / "bench" / "bench.json").read_text())["cells"]
    sizes = [(cell["batch"], cell["prompt"], cell["completion"]) for cell in cells]
    assert sizes == [(batch, *size) for size in ((8, 12), (64, 12), (8, 32)) for batch in (1, 2, 4)]
    assert all(cell["throughput"] > 0 for cell in cells)
    assert [page.count("srcdoc=") for page in pages] == [1] and "Prefix hits" in pages[0]


def serving(said, pages, work):
    # Sure of all it says: the answers below are the same on every machine.
    assert numbers(r"loss \S+ at first, (\S+) at the end", said)[0] < 0.02
    # Whole, in pieces and as a turn, of which only what is new is read.
    (median, fastest, slowest), whole = numbers(FIRST_PIECE, said), "It is in statistics. | 13 tokens read, 6 drawn"
    assert whole in said and 0 < fastest <= median <= slowest
    turns = re.findall(r"> (\w+): It is in (\w+)\. \[(\d+) tokens, (\d+) of them held\]", said)
    assert [turn[:2] for turn in turns] == [*zip(SHUFFLE_TO_CHOICE, ("random", "statistics", "heapq", "random"))]
    assert all(int(now[3]) >= int(before[2]) for before, now in zip(turns, turns[1:]))
    # The tool is called as it was declared, and what it returned is what is said.
    assert re.search(r"with them: tool_calls \| call_\w+ find \{'function': 'choice'\}\n", said)
    assert all(f"told '{module}': It is in {module}.\n" in said for module in ("random", "heapq"))
    assert '"function": "heappush"}} | heapq\nanswer | It is in heapq. | None\n' in said
    (form,) = re.findall(r"^'(\{.*\})' -> Place\(", said, flags=re.MULTILINE)
    assert json.loads(form.replace("\\n", "\n")).keys() == {"module", "sure"}
    # All is counted, what was refused as well, and nothing is left.
    assert "400 temprature | unknown field temprature" in said
    assert numbers(r"(\d+)  http_requests_total POST /v1/chat/completions 400\n", said) == [1]
    assert sum(int(number) for number in re.findall(r"(\d+)  answers_total \w+\n", said)) == 44
    assert re.search(r" 0  pages_used\n +0  recompiled_programs_total\n", said) and "Connection refused" in said


FIRST_PIECE = r"the first piece after (\S+) ms \((\S+) to (\S+)\)"
SHUFFLE_TO_CHOICE = ("shuffle", "mean", "heappop", "choice")
FROM_BASE = r"from the base: (\S+); by rounding the merged weights to bfloat16: (\S+)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "folder", "check", "num_figures"),
    [
        (TOUR, ROOT, the_tour, 5),
        (TRAINING, ROOT / "tests" / "golden", training, 4),
        (FINETUNING, FOLDER, finetuning, 5),
        (DATA, FOLDER, data, 5),
        (DECODING, FOLDER, decoding, 4),
        (SERVING, FOLDER, serving, 3),
    ],
    ids=IDS,
)
def test_a_notebook_runs_from_any_folder_and_says_what_it_claims(notebook, folder, check, num_figures, tmp_path):
    cells = executed(notebook, folder, tmp_path)
    said = "".join(map(printed, cells))
    assert f"everything is written below {tmp_path}" in said
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    assert sum("image/png" in data for data in shown) >= num_figures
    (work,) = tmp_path.glob("internjax_*")
    check(said, [data["text/html"] for data in shown if "text/html" in data], work)


def test_all_notebooks_find_it_in_the_same_way():
    notebooks = sorted(FOLDER.glob("*.ipynb"))
    assert notebooks == ALL  # another one is executed too
    assert len({read(path).cells[1].source for path in notebooks}) == 1


@pytest.mark.parametrize("path", ALL, ids=IDS)
def test_it_is_committed_without_outputs(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 12 and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert len([cell for cell in notebook.cells if cell.cell_type == "markdown"]) >= 12
    assert notebook.metadata.kernelspec.name == "python3"
