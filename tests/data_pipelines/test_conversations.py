"""Files of conversations as packed rows: several files, weights, caps, validation, long rows, the cache, bad rows."""

import json

import numpy as np
import pytest

from data_pipelines import preview
from data_pipelines.conversations import Reading, conversation_rows, tokenise
from data_pipelines.loading import row_batch
from data_pipelines.mixing import Mixture
from data_pipelines.tokens import open_tokens
from internjax.text import chat
from internjax.text.chat import Message
from internjax.text.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user assistant question answer number of the day"] * 4, vocab_size=320)


@pytest.fixture
def reading(tmp_path):
    def make(**how):
        return Reading(cache=str(tmp_path / "cache"), **how)

    return make


def pairs(path, numbers, name="q"):
    rows = [{"prompt": f"{name}{number}", "completion": f"a{number}"} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def documents(folder):
    opened = open_tokens(folder)
    return [(opened.document(i).tolist(), opened.mask(i).tolist()) for i in range(len(opened.lengths_D))]


def said(folder, tokenizer):
    """The learned text of every document."""
    return [
        tokenizer.decode([token for token, on in zip(ids, mask) if on], skip_special=False)
        for ids, mask in documents(folder)
    ]


def test_a_file_becomes_rows_whose_mask_is_that_of_its_conversations(tmp_path, tokenizer, reading):
    path = pairs(tmp_path / "a.jsonl", range(5))
    found = conversation_rows([path], tokenizer, reading=reading(), seq_len=64, seed=0)
    rendered = [chat.render([Message("user", f"q{n}"), Message("assistant", f"a{n}")], tokenizer) for n in range(5)]
    assert documents(found.rows.folder.path) == [(each.ids, each.mask) for each in rendered]
    batch = row_batch(found.rows, range(found.rows.num_rows))
    assert batch.loss_mask.sum() == sum(sum(each.mask) for each in rendered)
    assert found.is_chat and found.validation == "" and found.summary["num_left_out"] == 0
    assert found.summary["files"][path]["num_trained"] == 5


def test_tokens_are_kept_until_anything_that_matters_changes(tmp_path, tokenizer, reading, capsys):
    path = pairs(tmp_path / "a.jsonl", range(5))

    def folder(**how):
        (name,) = tokenise([path], tokenizer, reading=reading(**how), seq_len=64)["folders"]
        return name

    save_tokenizer(tokenizer, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content + '</s>' }}{% endfor %}"
        "{{ '<|im_start|>assistant ' if add_generation_prompt }}"
    )
    other_tokenizers = [train_tokenizer(["abc"] * 4, vocab_size=320), load_tokenizer(tmp_path / "model")]
    first = folder()
    written = open_tokens(first).path.stat().st_mtime_ns
    assert folder() == first and open_tokens(first).path.stat().st_mtime_ns == written
    assert folder(validation=()) == first
    others = [folder(bad_rows="skip"), folder(too_long="split"), folder(max_samples=(2,)), folder(validation_share=0.3)]
    others += [tokenise([path], each, reading=reading(), seq_len=64)["folders"][0] for each in other_tokenizers]
    pairs(tmp_path / "a.jsonl", range(6))
    assert len({first, folder(), *others}) == 8
    assert "a.jsonl: completion (detected), 5 conversations; tokens in" in capsys.readouterr().out


def test_a_template_that_writes_the_date_gives_equal_tokens_on_every_day(tmp_path, tokenizer, reading, capsys):
    path = pairs(tmp_path / "a.jsonl", range(2))
    save_tokenizer(tokenizer, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content + '</s>' }}"
        "{% endfor %}{{ '<|im_start|>assistant ' if add_generation_prompt }}"
    )
    dated = load_tokenizer(tmp_path / "model")

    def folder(each=dated, **how):
        return tokenise([path], each, reading=reading(**how), seq_len=64)["folders"][0]

    first = folder()
    assert "the chat template writes the date: conversations have 2024-07-26 (reading.date)" in capsys.readouterr().out
    assert tokenizer.decode(documents(first)[0][0]).startswith("26 Jul 2024user q0")
    later = folder(date="2025-01-02")
    assert later != first and tokenizer.decode(documents(later)[0][0]).startswith("02 Jan 2025user q0")
    assert folder(tokenizer) == folder(tokenizer, date="2025-01-02")  # no date in it, no other tokens
    assert preview.main(["--data", path, "--model", str(tmp_path / "model"), "--date", "2025-01-02"]) == 0
    shown = capsys.readouterr().out
    assert "the chat template writes the date: 2025-01-02 (--date)" in shown and "02 Jan 2025<|im_start|>user" in shown
    with pytest.raises(ValueError, match="date is a day as 2024-07-26, given 'today'"):
        Reading(date="today")


def test_several_files_by_weight_and_cap(tmp_path, tokenizer, reading):
    a, b = pairs(tmp_path / "a.jsonl", range(40)), pairs(tmp_path / "b.jsonl", range(40), "other ")
    how = reading(weight=(3, 1), max_samples=(0, 10))
    found = conversation_rows([a, b], tokenizer, reading=how, seq_len=32, seed=0)
    assert isinstance(found.rows, Mixture)
    assert found.summary["files"][b] | {"num_trained": 10, "num_over_max_samples": 30} == found.summary["files"][b]
    assert [share.num_rows for share in found.rows.shares(2048)] == [1536, 512]
    again = conversation_rows([a, b], tokenizer, reading=how, seq_len=32, seed=0)
    assert found.rows.documents(100, 8) == again.rows.documents(100, 8)
    # The cap does not depend on the order of the rows.
    folder = tokenise([a, b], tokenizer, reading=how, seq_len=32)["folders"][1]
    kept = sorted(said(folder, tokenizer))
    b = pairs(tmp_path / "b.jsonl", reversed(range(40)), "other ")
    turned = tokenise([a, b], tokenizer, reading=how, seq_len=32)["folders"][1]
    assert sorted(said(turned, tokenizer)) == kept and turned != folder


def test_columns_of_one_of_several_files(tmp_path, tokenizer, reading):
    a, b = pairs(tmp_path / "a.jsonl", range(2)), str(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"ask": "q", "answer": "b0", "other": "b1"}\n')
    how = reading(
        columns=(f"{b}:prompt=ask", "completion=answer", f"{b}:completion=other", f"{a}:completion=completion")
    )
    assert [said(folder, tokenizer) for folder in tokenise([a, b], tokenizer, reading=how, seq_len=64)["folders"]] == [
        ["a0<|im_end|>", "a1<|im_end|>"],
        ["b1<|im_end|>"],
    ]
    with pytest.raises(ValueError, match=r"columns has 'c.jsonl:prompt=ask', which is for none of the files .*a.jsonl"):
        tokenise([a], tokenizer, reading=reading(columns=("c.jsonl:prompt=ask",)), seq_len=64)


def test_validation_never_shares_a_conversation_with_training(tmp_path, tokenizer, reading):
    a = pairs(tmp_path / "a.jsonl", [*range(60), *range(60)])  # every conversation twice
    b = pairs(tmp_path / "b.jsonl", range(30, 90))
    found = tokenise([a, b], tokenizer, reading=reading(validation_share=0.3), seq_len=64)
    trained = {text for folder in found["folders"] for text in said(folder, tokenizer)}
    measured = set(said(found["validation"], tokenizer))
    assert not trained & measured and len(trained) + len(measured) == 90
    assert 15 <= len(measured) <= 39
    assert sum(each["num_validation"] for each in found["files"].values()) == len(said(found["validation"], tokenizer))
    # A file of its own, beside the share.
    c = pairs(tmp_path / "c.jsonl", range(200, 205))
    with_file = tokenise([b], tokenizer, reading=reading(validation=(c,), validation_share=0.3), seq_len=64)
    assert {f"a{n}<|im_end|>" for n in range(200, 205)} < set(said(with_file["validation"], tokenizer))
    assert len(with_file["folders"]) == 1


def test_paths_of_a_tree_stay_on_one_side(tmp_path, tokenizer, reading):
    def node(text, role, *replies):
        return {"text": text, "role": role, "replies": list(replies)}

    rows = [
        {"prompt": node(f"q{n}", "prompter", node(f"a{n}", "assistant"), node(f"b{n}", "assistant"))} for n in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tokenise([str(tmp_path / "a.jsonl")], tokenizer, reading=reading(validation_share=0.4), seq_len=64)
    sides = [{text[1:] for text in said(folder, tokenizer)} for folder in (*found["folders"], found["validation"])]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 20


def test_conversations_longer_than_a_row(tmp_path, tokenizer, reading, capsys):
    rows = [{"prompt": "q", "completion": "x" * 20}, {"prompt": "q", "completion": "y" * 150}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, window = str(tmp_path / "a.jsonl"), 48
    long = chat.render([Message("user", "q"), Message("assistant", "y" * 150)], tokenizer)

    def found(too_long):
        return conversation_rows([path], tokenizer, reading=reading(too_long=too_long), seq_len=window, seed=0)

    dropped = found("drop")
    assert dropped.rows.num_left_out == dropped.summary["num_left_out"] == 1
    assert "1 conversations are longer than 48 tokens and were left out" in capsys.readouterr().err
    cut = found("truncate")
    assert cut.rows.num_left_out == 0 and cut.summary["files"][path]["num_longer_than_a_row"] == 1
    assert documents(cut.rows.folder.path)[1] == (long.ids[: window + 1], long.mask[: window + 1])
    split = found("split")  # a single turn that is too long has no border to be split at
    assert documents(split.rows.folder.path) == documents(cut.rows.folder.path)
    assert split.summary["files"][path]["num_turns_cut"] == 1
    assert "1 turns of them longer than that alone, cut at the row's end" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"every conversation of .*a.jsonl is longer than a row of 8 .* too_long=trunc"
    ):
        conversation_rows([path], tokenizer, reading=reading(), seq_len=8, seed=0)
    with pytest.raises(ValueError, match=r"holds nothing to learn from; no completion row has an answer within 4 tok"):
        conversation_rows([path], tokenizer, reading=reading(too_long="truncate"), seq_len=4, seed=0)


def test_long_conversations_are_split_where_a_user_speaks(tmp_path, tokenizer, reading, capsys):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def turn(role, content, **fields):
        return {"role": role, "content": content} | fields

    turns = [turn("system", "Be short.")]
    turns += [part for n in range(4) for part in (turn("user", f"q{n}"), turn("assistant", f"a{n}"))]
    turns += [turn("user", "qf"), turn("assistant", "", tool_calls=[call]), turn("tool", "r"), turn("assistant", "af")]
    turns += [turn("user", "q5"), turn("assistant", "long " * 50), turn("user", "long " * 50), turn("assistant", "a6")]
    turns += [turn("user", "q7"), turn("assistant", "a7", weight=0), turn("user", "q8"), turn("assistant", "a8")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    path, window = str(tmp_path / "a.jsonl"), 112
    found = conversation_rows([path], tokenizer, reading=reading(too_long="split"), seq_len=window, seed=0)
    folder = found.rows.folder.path
    text = [tokenizer.decode(ids, skip_special=False) for ids, _ in documents(folder)]
    start = "<s><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nq"
    assert all(piece.startswith(start) for piece in text)
    firsts = [piece.removeprefix(start).partition("<")[0] for piece in text]
    assert firsts == ["0", "f", "5", "7"]
    assert said(folder, tokenizer) == [
        "a0<|im_end|>a1<|im_end|>a2<|im_end|>a3<|im_end|>",
        '<|action_start|><|plugin|>\n{"name": "f", "parameters": {}}<|action_end|><|im_end|>af<|im_end|>',
        said(folder, tokenizer)[2],  # the answer that is too long, up to the row's end
        "a8<|im_end|>",
    ]
    lengths = [len(ids) for ids, _ in documents(folder)]
    assert lengths[2] == window + 1 and "long long " in said(folder, tokenizer)[2] and max(lengths) == window + 1
    counts = found.summary["files"][path]
    assert counts["num_longer_than_a_row"] == counts["num_turns_cut"] == counts["num_turns_lost"] == 1
    assert counts["num_samples"] == 4 and counts["num_conversations"] == 1
    told = capsys.readouterr().out
    assert "1 turns of them with nothing learned before the row's end, left out" in told


def test_plain_text_is_learned_whole_and_split(tmp_path, tokenizer, reading):
    (tmp_path / "a.txt").write_text("the day " * 100)
    found = conversation_rows([str(tmp_path / "a.txt")], tokenizer, reading=reading(), seq_len=32, seed=0)
    ids = [tokenizer.bos_id, *tokenizer.encode("the day " * 100), tokenizer.eos_id]
    batch = row_batch(found.rows, range(found.rows.num_rows))
    assert not found.is_chat and batch.loss_mask.sum() == len(ids) - 1
    assert sorted(batch.targets[batch.loss_mask > 0].tolist()) == sorted(ids[1:])


def test_bad_rows_stop_or_are_left_out_and_counted(tmp_path, tokenizer, reading, capsys):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q"}, {"prompt": "q", "completion": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"a.jsonl:2: .*'completion' is missing \(and 1 more rows\)\. Mend the file"):
        tokenise([str(path)], tokenizer, reading=reading(), seq_len=64)
    assert not (tmp_path / "cache").exists()
    for _ in range(2):  # what was left out is told again when the tokens come from the cache
        counts = tokenise([str(path)], tokenizer, reading=reading(bad_rows="skip"), seq_len=64)["files"][str(path)]
        assert counts["num_bad_rows"] == 2 and counts["bad_rows"][0].startswith(f"{path}:2: ")
        told = capsys.readouterr()
        assert f"left out: {path}:3: " in told.err and "2 rows left out" in told.out
        assert "holds a single conversation to train on" in told.err


def test_what_cannot_be_read_is_refused_before_anything_is_written(tmp_path, tokenizer, reading):
    a, b = pairs(tmp_path / "a.jsonl", range(1)), pairs(tmp_path / "b.jsonl", range(2))
    pair = tmp_path / "pair.jsonl"
    pair.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    cases = {
        "no data given": ([], {}),
        "is empty: it has no row": ([str(tmp_path / "empty.jsonl")], {}),
        "no assistant turn": ([str(tmp_path / "asked.jsonl")], {}),
        "holds nothing to learn from; the first reason": ([str(tmp_path / "asked.jsonl")], {"bad_rows": "skip"}),
        "holds 1 conversation, so no share of it": ([a], {"validation_share": 0.5}),
        "is given twice": ([a, a], {}),
        r"2 files and 1 values of weight; give one for each, or none \(--reading.weight with nothing": (
            [a, b],
            {"weight": (1.0,)},
        ),
        "2 files and 3 formats": ([a, b], {"format": ("auto", "auto", "auto")}),
        "holds preference pairs, which a fine-tuning does not learn from": ([str(pair)], {}),
        "not a valid moss row": ([a], {"format": ("moss",)}),
    }
    for message, (files, how) in cases.items():
        with pytest.raises(ValueError, match=message):
            tokenise(files, tokenizer, reading=reading(**how), seq_len=64)
    assert not (tmp_path / "cache").exists()
    for wrong in ({"validation_share": 1.0}, {"max_samples": (-1,)}, {"columns": ("ask",)}):
        with pytest.raises(ValueError, match="validation_share is|max_samples are|give FIELD=COLUMN"):
            Reading(**wrong)


def test_the_preview_shows_format_masks_lengths_and_bad_rows(tmp_path, tokenizer, capsys):
    save_tokenizer(tokenizer, tmp_path / "model")
    rows = [{"ask": "q1", "reply": "a1", "code": "x"}, {"ask": "q2", "reply": "a" * 80}, {"ask": "q3"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "a.jsonl")
    how = ["--data", path, "--model", str(tmp_path / "model"), "--seq-len", "64"]
    assert preview.main([*how, "--columns", "prompt=ask", "completion=reply", "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"{path}: completion (detected), 2 conversations, 1 bad rows\n  columns not read: code\n" in shown
    lengths = np.array(
        [
            len(chat.render([Message("user", q), Message("assistant", a)], tokenizer).ids)
            for q, a in (("q1", "a1"), ("q2", "a" * 80))
        ]
    )
    assert f"tokens: least {lengths[0]}, " in shown and "1 of 2 longer than a row of 64" in shown
    assert f"bad row: {path}:3: it has no column 'reply'" in shown
    assert "user\nq1<|im_end|>\n<|im_start|>assistant\n⟦a1<|im_end|>⟧\n" in shown and "q2" not in shown
    pair = tmp_path / "pair.jsonl"
    pair.write_text('{"prompt": "q", "chosen": "good", "rejected": "bad"}\n')
    assert preview.main(["--data", str(pair), "--model", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    assert "preference (detected), 1 pairs" in shown and "⟦good<|im_end|>⟧" in shown and "⟦bad<|im_end|>⟧" in shown
    assert preview.main(how) == 1
    assert "fields ask, code, reply fit no known format" in capsys.readouterr().err
    found = preview.look(path, tokenizer, columns=("prompt=ask", "completion=reply"))
    coloured = preview.describe(found, tokenizer, seq_len=64, colour=True)
    assert "\x1b[32ma1<|im_end|>\x1b[0m" in coloured
