"""The tiny chain at miniature size: whole, interrupted, in parts, and on other people's files.

The corpus is a few modules of the standard library; every stage is the real one.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import embedded
from data_pipelines.loading import batches, open_rows
from eval import ngram
from experiments import tiny, tiny_config, tiny_models, tiny_rlhf, tiny_use
from experiments.benchmarks import quickstart
from experiments.command_line import parse
from experiments.tiny_config import Tiny
from experiments.training import run_path
from internjax.hf.open import open_model
from internjax.model.lora import LoraConfig
from internjax.text import chat
from internjax.text.tokenizer import load_tokenizer
from internjax.train.optimizer import Cosine
from internjax.train.tracking import python
from tests.experiments.conftest import SMALL, TEXTS, write_chats

MODULES = ("textwrap", "queue", "string", "shlex", "bisect", "heapq", "copy")
CONFIG = Tiny(
    held_out=0.4,
    model=dataclasses.replace(SMALL, num_layers=1, vocab_size=400, max_position_embeddings=512),
    seq_len=128,
    batch_size=8,
    pretrain_steps=40,
    schedule=Cosine(2),
    sft_steps=20,
    sft_lora=LoraConfig(rank=4, targets=("query", "head")),
    max_prompt_tokens=80,
    max_new_tokens=8,
    reward_steps=6,
    num_iterations=1,
    num_prompts=8,
    num_evaluated=12,
)
STAGES = [stage.name for stage in tiny.stages()]


@pytest.fixture(scope="module", autouse=True)
def small_library():
    modules = embedded.stdlib_modules()
    chosen = [module for module in modules if module.path.removeprefix("stdlib/").removesuffix(".py") in MODULES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "stdlib_corpus", lambda: [*chosen, *embedded.docstring_documents(chosen)])
        for name, number in {"NUM_PROBLEMS": 40, "NUM_BODIES": 40, "NUM_DESCRIPTIONS": 40}.items():
            patch.setattr(tiny_models, name, number)
        patch.setattr(tiny_models, "NUM_HELD_OUT_PROBLEMS", 8)
        yield


def run(config) -> str:
    """Runs the chain and returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tiny.run(config)
    return printed.getvalue()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(root, what was printed) of a whole chain, not to be changed."""
    root = tmp_path_factory.mktemp("chain") / "tiny"
    return root, run(dataclasses.replace(CONFIG, run=str(root)))


def results(root):
    return {name: tiny.result(root, name) for name in STAGES}


def times(root):
    return {name: (root / name / "stage.json").stat().st_mtime_ns for name in STAGES if (root / name).is_dir()}


# --- the whole chain -------------------------------------------------------------------------------------------------


def test_every_stage_ran_and_the_report_is_there(chain):
    root, printed = chain
    found = results(root)
    assert all(result is not None and "skipped" not in result for result in found.values())
    assert re.findall(r"^\[(\d+)/11\] (\w+): ", printed, re.M) == [(str(n), name) for n, name in enumerate(STAGES, 1)]
    assert printed.rstrip().splitlines()[-2:] == [
        f"  {python()} -m serve.chat {root / 'rlhf'}",
        f"  {python()} -m experiments.finetune --model YOUR_CHECKPOINT --data YOUR_CHATS.jsonl --run my_run",
    ]
    page = (root / "report.html").read_text()
    assert found["data"]["fingerprint"][:16] in page and 'src="http' not in page


def test_the_report_shows_what_it_must(chain):
    root, _ = chain
    found, text = results(root), (root / "report.md").read_text()
    assert text.startswith("# InternJAX")
    sections = re.findall(r"^## (.+)$", text, re.M)
    assert sections == [
        *("At a glance", "Data", "Pre-training", "Fine-tuning", "Reward model", "COOL RLHF", "Evaluation", "Export"),
        *("Quantised weights", "Server", "Agent", "Times, versions, repetition"),
    ]
    part = dict(zip(sections, re.split(r"^## .+$", text.replace("\\", ""), flags=re.M)[1:], strict=True))
    numbers = [row.strip("| ").split(" | ") for row in part["At a glance"].splitlines() if row.startswith("| ")][2:]
    verdicts = {"better", "not better", "equal", "differs"}
    assert len(numbers) == 7 and all(baseline and verdict[2:] in verdicts for _, _, baseline, verdict in numbers)
    prompt = found["evaluate"]["prompt"]
    for said in (prompt["library"], *(text.strip() for text in prompt["said"].values())):
        assert said.splitlines()[0] in part["At a glance"]
    for reason, count in found["data"]["ledger"]["dropped"]["text_rules"].items():
        assert f"| {reason} | {count} |" in part["Data"]
    assert all(name in part["Pre-training"] for name in ("unigram", "bigram", "zlib", "xz", "Gradient norm"))
    assert f"{found['rlhf']['num_evaluated']} held-out prompts" in part["COOL RLHF"]
    assert all(name in part["COOL RLHF"] for name in ("fine-tuned", "round 1", "round 2", "Reward of the rollouts"))
    assert all(name in part["Export"] for name in ("llama", "internlm2")) and "int4" in part["Quantised weights"]
    assert all(name in part["Server"] for name in found["serve"]["calls"]) and "jax" in part[sections[-1]]
    page = (root / "report.html").read_text()
    assert page.count("<svg") >= 6 and len(found["rlhf"]["curve"]) == 2  # curves of training, reward and RLHF


def test_the_command_to_repeat_is_the_one_that_made_it(chain):
    root, _ = chain
    said = re.search(r"^```\n(.+ -m experiments\.tiny .+)\n```", (root / "report.md").read_text(), re.M)[1]
    program, _, module, *args = shlex.split(said)
    assert (program, module) == (python(), "experiments.tiny")
    again = parse(tiny.CONFIG, args)
    assert again == dataclasses.replace(CONFIG, run=str(root), fresh=True)


def test_held_out_prompts_are_asked_once_and_no_training_file_has_them(chain):
    root, _ = chain
    tokenizer = load_tokenizer(root / "tokenizer" / "hf")
    learned, unseen = (tiny_rlhf.tasks_of(CONFIG, root, tokenizer, held_out=part) for part in (False, True))
    prompts = [task.prompt for task in unseen]
    assert len(set(prompts)) == len(prompts) and {task.prompt for task in learned}.isdisjoint(prompts)
    found = results(root)["rlhf"]
    wanted = min(CONFIG.num_evaluated, len(prompts))
    assert found["num_evaluated"] == wanted and wanted % CONFIG.num_prompts  # the last block is not a whole one
    for row in found["evaluations"]:
        assert row["gold"]["value"] * wanted == pytest.approx(round(row["gold"]["value"] * wanted))


def test_the_quickstart_benchmark_reads_what_the_chain_reached(chain):
    root, _ = chain
    found, said = results(root), quickstart.reached(root)
    assert list(said["stages"]) == STAGES and said["stages"]["data"] == found["data"]["seconds"]
    assert [row["value"] for row in said["gold"]] == [row["gold"]["value"] for row in found["rlhf"]["evaluations"]]
    assert said["bits_per_byte"] == found["evaluate"]["tasks"]["pretrain"]["held_out_text"]["value"]
    assert set(said["executed"]) == {"pretrain", "sft", "rlhf"} and set(said["export"]) == {"llama", "internlm2"}
    assert said["first_token_seconds"] < said["whole_answer_seconds"] + 1


def test_the_quickstart_benchmark_counts_the_memory_of_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "EVERY", 0.02)
    touch = "x = bytearray({} << 20); x[::4096] = bytes([1]) * len(x[::4096])"
    child = f"{touch.format(60)}; import time; time.sleep(0.2)"
    program = f"import subprocess, sys; {touch.format(50)}; subprocess.run([sys.executable, '-c', {child!r}])"
    found = quickstart.watched([sys.executable, "-c", program], cwd=tmp_path, env=os.environ)
    assert 110 << 20 < found.peak_bytes < 160 << 20 and found.seconds > 0.2
    with pytest.raises(subprocess.CalledProcessError):
        quickstart.watched([sys.executable, "-c", "raise SystemExit(3)"], cwd=tmp_path, env=os.environ)


def test_data_is_split_by_file_and_the_ledger_sums(chain):
    root, _ = chain
    found = results(root)["data"]
    assert found["num_documents"] - found["num_kept"] == found["ledger"]["documents_dropped"]
    assert found["num_train"] + found["num_held_out"] == found["num_kept"]
    rows = {
        part: [json.loads(line) for line in (root / "data" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "held_out")
    }
    paths = {part: {row["path"] for row in found} for part, found in rows.items()}
    assert paths["train"].isdisjoint(paths["held_out"]) and len(rows["train"]) == found["num_train"]
    learned, unseen = (tiny_models.facts(root, CONFIG, held_out=part) for part in (False, True))
    assert {fact.path for fact in learned} <= paths["train"] and {fact.path for fact in unseen} <= paths["held_out"]
    assert len(learned) > 10 and len(unseen) > 10


def test_the_baselines_count_exactly_what_pretraining_saw(chain):
    root, _ = chain
    rows = open_rows(root / "tokenizer" / "train", seq_len=CONFIG.seq_len, packing="concat", seed=CONFIG.seed)
    data = batches(rows, batch_size=CONFIG.batch_size)(0)
    trained = np.zeros((400, 400), int)
    for _, batch in zip(range(CONFIG.pretrain_steps), data):
        np.add.at(trained, (batch.tokens, batch.targets), 1)
    seen = ngram.fit(tiny_models.seen_tokens(CONFIG, root), vocab_size=400)
    counted = np.zeros(400 * 400, int)
    counted[seen.bigram_keys] = seen.bigram_counts
    np.testing.assert_array_equal(counted.reshape(400, 400), trained)
    assert trained.sum() == CONFIG.pretrain_steps * CONFIG.batch_size * CONFIG.seq_len


def test_pretraining_learns_and_fine_tuning_ran(chain):
    found = results(chain[0])
    assert found["pretrain"]["loss"] < found["pretrain"]["first_loss"] - 0.2
    assert (found["sft"]["num_steps"], found["sft"]["method"]) == (20, "lora")
    assert found["tokenizer"]["vocab_size"] == 400 and found["tokenizer"]["train_tokens"] > 10_000


def test_the_conversations_are_of_training_files_and_render(chain):
    root, _ = chain
    rows = [json.loads(line) for line in (root / "data" / "chats.jsonl").read_text().splitlines()]
    assert len(rows) > 60 and sum("tool_calls" in turn for row in rows for turn in row["messages"]) == 40
    held_out = [fact.summary for fact in tiny_models.facts(root, CONFIG, held_out=True)]
    learned = {fact.summary for fact in tiny_models.facts(root, CONFIG, held_out=False)}
    text = json.dumps([turn["content"] for row in rows for turn in row["messages"]])
    assert [summary for summary in held_out if summary not in learned and json.dumps(summary)[1:-1] in text] == []
    tokenizer = load_tokenizer(root / "tokenizer" / "hf")
    assert sum(chat.render(chat.from_openai(rows[0]["messages"]), tokenizer).mask) > 0


def test_alignment_reports_what_it_must(chain):
    found = results(chain[0])
    assert found["reward"]["num_pairs"] > 20
    rows = found["rlhf"]["evaluations"]
    assert [row["name"] for row in rows] == ["fine-tuned", "round 1", "round 2"]
    for row in rows:
        assert {"gold", "reward", "length", "distinct", "kl"} <= set(row)
        assert 0 <= row["gold"]["low"] <= row["gold"]["value"] <= row["gold"]["high"] <= 1
    assert abs(rows[0]["kl"]) < 1e-4 and found["rlhf"]["logprob_difference"] < 1e-3


def test_models_are_evaluated_exported_and_quantised(chain):
    root, _ = chain
    found = results(root)
    assert set(found["evaluate"]["tasks"]) == {"pretrain", "sft", "rlhf"}
    for tasks in found["evaluate"]["tasks"].values():
        assert tasks["held_out_text"]["num_items"] > 0 and len(tasks) >= 3
    assert set(found["evaluate"]["baselines"]) == {"unigram", "bigram", "zlib", "xz"}
    assert found["evaluate"]["interpreter"]["sft"]["count"] == 8
    assert set(found["evaluate"]["prompt"]["said"]) == {"pretrain", "sft", "rlhf"}
    for layout in ("llama", "internlm2"):
        assert found["export"][layout]["max_logit_difference"] < 1e-5 and found["export"][layout]["num_files"] > 3
        assert open_model(root / "export" / layout).config.d_model == 32
    assert (
        found["quantize"]["int4"]["bytes"] < found["quantize"]["int8"]["bytes"] < found["quantize"]["float32"]["bytes"]
    )


def test_the_server_answered_and_is_gone(chain):
    found = results(chain[0])
    assert set(found["serve"]["calls"]) == {"completion", "chat", "stream"} and found["serve"]["shut_down"] is True
    assert found["serve"]["calls"]["stream"]["text"] == found["serve"]["calls"]["chat"]["text"]  # one seed
    for trace in (found["agent"]["react"], found["agent"]["interpreter"]):
        assert len(trace["messages"]) >= 2 and trace["finish"]


# --- again, in parts, and refused ------------------------------------------------------------------------------------


@pytest.fixture
def copy(chain, tmp_path):
    """A chain that may be changed."""
    shutil.copytree(chain[0], tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def answered(chain, monkeypatch):
    """Server and agent say again what they said: what is looked at is which stages run, and the real ones have run."""
    for name in ("serve", "agent"):
        said = tiny.result(chain[0], name)
        monkeypatch.setattr(tiny_use, name, lambda config, root, said=said: dict(said))


def changed(config, **fields):
    return dataclasses.replace(config, **fields)


def test_the_second_call_says_that_it_is_complete(copy):
    before = times(copy)
    printed = run(changed(CONFIG, run=str(copy)))
    assert f"The chain in {copy} is complete. Report: {copy / 'report.html'}" in printed
    assert f"{python()} -m experiments.tiny --run={copy} --fresh" in printed and times(copy) == before


def test_one_stage_alone_and_all_from_one_on(copy, answered):
    before = times(copy)
    printed = run(changed(CONFIG, run=str(copy), only="export"))
    assert re.findall(r"\] (\w+):", printed) == ["export"]
    after = times(copy)
    assert {name for name in STAGES if after[name] != before[name]} == {"export"}
    assert "Made before a stage that they stand on was run anew: quantize, serve, agent." in glance(copy)
    run(changed(CONFIG, run=str(copy), from_stage="quantize"))
    assert {name for name in STAGES if times(copy)[name] != after[name]} == {"quantize", "serve", "agent"}
    assert "Made before" not in glance(copy)


def glance(root):
    return (root / "report.md").read_text().partition("## Data")[0]


def test_what_stands_on_a_stage_run_alone_is_made_anew_by_the_next_call(copy, answered):
    run(changed(CONFIG, run=str(copy), only="quantize"))
    before = times(copy)
    printed = run(changed(CONFIG, run=str(copy)))
    assert "was run anew, so run anew: serve, agent." in printed
    assert {name for name in STAGES if times(copy)[name] != before[name]} == {"serve", "agent"}


def test_an_unfinished_chain_goes_on_and_what_stands_on_it_is_made_anew(copy, answered):
    before = times(copy)
    shutil.rmtree(copy / "serve")
    printed = run(changed(CONFIG, run=str(copy)))
    assert "[9/11] quantize: done" in printed and "[10/11] serve: OpenAI" in printed
    assert {name for name in STAGES if times(copy)[name] != before[name]} == {"serve", "agent"}


def test_another_config_is_refused_by_name(copy):
    before = times(copy)
    with pytest.raises(ValueError) as caught:
        tiny.run(changed(CONFIG, run=str(copy), pretrain_steps=41, sft_lora=LoraConfig(rank=8, targets=("query",))))
    said = str(caught.value)
    assert (
        "pretrain_steps: 41 now, 40 in the folder" in said and "sft_lora.rank: 8 now, 4" in said and "--fresh" in said
    )
    assert times(copy) == before


MISTAKES = {
    "an unknown stage": (["--only", "exprot"], "no stage 'exprot'; the stages are data, tokenizer, pretrain"),
    "an unknown stage to start from": (["--from=rl"], "no stage 'rl'"),
    "both": (["--only", "sft", "--from", "data"], "--only and --from exclude each other"),
    "a missing file": (["--data", "nowhere.jsonl"], "no such file or folder: nowhere.jsonl"),
    "a stage that stands on nothing": (["--only", "sft"], "sft stands on data, which has not run in"),
    "prompts that make no two minibatches": (["--num-prompts", "25"], "num_prompts must be even, for two minibatches"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_written(name, tmp_path, monkeypatch, capsys):
    args, said = MISTAKES[name]
    monkeypatch.setattr("sys.argv", ["tiny", "--run", str(tmp_path / "tiny"), *args])
    with pytest.raises(SystemExit) as ended:
        tiny.main()
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert ended.value.code in (1, 2) and said in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_your_own_file_has_a_folder_of_its_own(tmp_path):
    assert tiny_config.folder(Tiny()) == run_path("tiny")
    file = str(tmp_path / "my chats.jsonl")
    assert tiny_config.folder(Tiny(data=file)) == run_path("tiny-my chats")
    assert tiny_config.folder(Tiny(data=str(tmp_path) + "/")) == run_path(f"tiny-{tmp_path.name}")
    assert tiny_config.folder(Tiny(data=file, run="mine")) == run_path("mine")
    assert tiny.repetition(Tiny(data=file, only="sft")).endswith(f"-m experiments.tiny '--data={file}' --fresh")


def test_fresh_removes_a_chain_and_nothing_else(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="is no folder of this chain"):
        tiny.run(changed(CONFIG, run=str(tmp_path / "precious"), fresh=True))
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"


# --- the user's own files --------------------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path):
    """A folder of Python files."""
    (tmp_path / "code").mkdir()
    for module in embedded.stdlib_corpus():
        if module.path.startswith("stdlib/") and module.domain == "code":
            (tmp_path / "code" / module.path.rpartition("/")[2]).write_text(module.text)
    return tmp_path / "code"


def test_text_feeds_what_it_can_and_a_stage_that_broke_off_goes_on(code, tmp_path, monkeypatch):
    config = changed(CONFIG, run=str(tmp_path / "tiny"), data=str(code))
    with monkeypatch.context() as patch:
        patch.setattr(tiny_models, "tokenizer", lambda config, root: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    root = tmp_path / "tiny"
    assert tiny.result(root, "data") is not None and tiny.result(root, "tokenizer") is None
    printed = run(config)
    assert "[1/11] data: done" in printed and f"-m serve.chat {root / 'pretrain'}" in printed
    found = results(root)
    skipped = {name: found[name]["skipped"] for name in STAGES if "skipped" in found[name]}
    assert set(skipped) == {"sft", "reward", "rlhf", "agent"}
    assert "holds text, not conversations" in skipped["sft"] and f"skipped: {skipped['sft']}" in printed
    assert set(found["evaluate"]["tasks"]) == {"pretrain"} and found["data"]["source"] == str(code)
    report = (root / "report.md").read_text()
    assert report.count("Skipped: ") == 4 and "holds text, not conversations; a chat file" in report


def test_conversations_feed_fine_tuning(tmp_path):
    tasks = tiny_models.library.body_tasks(embedded.library_facts(embedded.stdlib_corpus()))
    file = write_chats(tmp_path / "chats.jsonl", [(task.prompt, task.body) for task in tasks])
    with file.open("a") as rows:
        rows.write('{"messages": \n')
    config = changed(CONFIG, run=str(tmp_path / "tiny"), data=str(file))
    with pytest.raises(ValueError, match=rf"chats.jsonl:{len(tasks) + 1}: not valid JSON"):
        tiny.run(config)
    config = changed(config, bad_rows="skip")
    for stage in ("data", "tokenizer", "pretrain", "sft", "reward"):
        printed = run(changed(config, only=stage))
        if stage == "data":
            assert "left out" in printed and f"chats.jsonl:{len(tasks) + 1}: not valid JSON" in printed
    found = results(tmp_path / "tiny")
    assert found["data"]["num_bad_rows"] == 1 and found["sft"]["num_steps"] == CONFIG.sft_steps
    removed, report = (
        found["data"]["num_documents"] - found["data"]["num_kept"],
        (tmp_path / "tiny" / "report.md").read_text(),
    )
    assert ("no document was removed" in report) == (removed == 0) and " kB for training)" in report
    assert "preferences are made for functions of the standard library" in found["reward"]["skipped"]


def test_a_corpus_that_cannot_be_split_is_refused_and_another_may_follow(code, tmp_path):
    for data, said in (("one.txt", "documents were dropped"), ("code/textwrap.py", "both parts need at least one")):
        (tmp_path / "one.txt").write_text(TEXTS[0])
        with pytest.raises(ValueError, match=said):
            run(changed(CONFIG, run=str(tmp_path / "tiny"), data=str(tmp_path / data)))
    run(changed(CONFIG, run=str(tmp_path / "tiny"), data=str(code), only="data"))  # no --fresh is needed
