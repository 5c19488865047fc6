"""`python -m eval` on a folder that was written by save_model, as a person would run it; and the README's code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.__main__ import main
from internjax.hf.save import save_model
from internjax.model.config import ModelConfig
from internjax.text.tokenizer import train_tokenizer
from tests.weights import random_params

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train_tokenizer(["import os\nimport math\n"] * 8, vocab_size=300)
    config = ModelConfig(
        vocab_size=300,
        d_model=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        ffn_dim=32,
        max_position_embeddings=128,
        dtype="float32",
    )
    params = random_params(config)
    folder = tmp_path_factory.mktemp("models") / "tiny model"
    save_model(folder, config=config, params=params, tokenizer=tokenizer)
    return folder


def test_the_command_scores_files_and_keeps_samples(folder, tmp_path, monkeypatch, capsys):
    rows = [{"question": f"{n} is", "choices": ["even", "odd"], "answer": n % 2} for n in range(10)]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "facts.jsonl").write_text('{"question": "import", "answer": "os"}\n')
    (tmp_path / "text.txt").write_text("import os\n" * 30)
    files = ("--choices", "exam.jsonl", "--questions", "facts.jsonl", "--text", "text.txt")
    monkeypatch.chdir(tmp_path)
    options = ("--ask", "text", "--out", "log", "--batch-size", "4")
    monkeypatch.setattr("sys.argv", ["eval", str(folder), *files, *options])
    main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| exam v1", "| facts v1", "| text v1"]
    samples = [json.loads(line) for line in (tmp_path / "log" / "exam.jsonl").read_text().splitlines()]
    share = sum(sample["value"] for sample in samples) / 10
    assert len(samples) == 10 and f"{100 * share:.1f} %" in table[2]
    # An untrained model of 300 tokens says little about any byte.
    (document,) = (json.loads(line) for line in (tmp_path / "log" / "text.jsonl").read_text().splitlines())
    assert document["num_bytes"] == 300 and document["num_tokens"] < 300
    assert document["value"] == pytest.approx(document["num_tokens"] * 8.23 / 300, rel=0.1)  # log2(300) per token


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ((), "nothing to score"),
        (("--choices", "absent.jsonl"), "absent.jsonl: No such file"),
        (("--text", "empty.txt", "--ask", "chat"), "empty documents"),
    ],
)
def test_bad_input_is_said_in_one_line(arguments, wanted, folder, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["eval", str(folder), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code.startswith("error: ") and wanted in ended.value.code and "\n" not in ended.value.code


def test_bad_input_ends_the_process_with_one_line_and_a_non_zero_exit(folder, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "eval", str(folder)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert re.fullmatch("error: nothing to score.*\n", result.stderr)


def test_the_code_in_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "eval" / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "eval/README.md", "exec"), {})


def test_the_rows_in_the_readme_are_read(tmp_path):
    from eval.tasks import files

    (rows,) = re.findall(r"```json\n(.*?)```", (ROOT / "eval" / "README.md").read_text(), re.DOTALL)
    choice, question = rows.splitlines()
    (tmp_path / "a.jsonl").write_text(choice)
    (tmp_path / "b.jsonl").write_text(question)
    assert files.choices(tmp_path / "a.jsonl").items[0].answer == 1
    assert files.questions(tmp_path / "b.jsonl").items[0].answer == "4"
