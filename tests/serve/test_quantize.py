"""python -m serve.quantize: what it writes and measures, and what it refuses before or after the work."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import quantization as benchmark
from internjax.hf.convert import check
from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from internjax.model import awq, decoder, gptq
from internjax.model.quantize import QuantArray, quantize_params
from internjax.text.chat import render
from internjax.text.message import Message
from serve import quality
from serve import quantize as command

SMALL = ("--group", "16", "--calibration-length", "16", "--calibration-samples", "8", "--answers", "2")
SMALL = (*SMALL, "--answer-length", "6", "--batch-size", "4")


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    how = {"tokenizer": tiny_model.tokenizer, "generation": tiny_model.generation}
    save_model(folder, config=tiny_model.config, params=tiny_model.params, **how)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def add(x, y):\n    return x + y\n\n\n" * 60)
    return file


def run(capsys, source, folder, text, *flags):
    code = command.main([str(source), str(folder), "--calibration", str(text), *SMALL, *flags])
    return code, capsys.readouterr()


def parsed(source, text, *flags):
    return command.build_parser().parse_args([str(source), "dst", "--calibration", str(text), *SMALL, *flags])


def test_a_folder_is_written_with_what_the_bits_cost(capsys, source, text, tmp_path):
    code, said = run(capsys, source, tmp_path / "dst", text, "--method", "gptq", "--bits", "8", "--act-order")
    assert code == 0, said.err
    assert "layer 2/2" in said.err and "python -m serve" in said.out
    report = json.loads((tmp_path / "dst" / "quantization_report.json").read_text())
    model, whole = open_model(tmp_path / "dst"), open_model(source)
    assert str(model.quantization) == report["packing"] == "gptq, 8 bits in groups of 16"
    kernel = model.params["layers"]["ffn"]["down"]["kernel"]
    assert (
        isinstance(kernel, QuantArray)
        and kernel.zeros is None
        and not isinstance(model.params["head"]["kernel"], QuantArray)
    )
    # The numbers are those of the folder, by the definition.
    args = parsed(source, text)
    held_out = command.read_text(args, whole).held_out
    before, after = (jax.nn.log_softmax(logits(each, held_out)[:, :-1]) for each in (whole, model))
    kl = np.asarray((jnp.exp(before) * (before - after)).sum(-1))
    told = report["held_out"]
    assert told["rows"] == [*held_out.shape] and told["num_tokens"] == kl.size
    assert (told["kl_mean"], told["kl_p99"]) == pytest.approx((kl.mean(), np.quantile(kl, 0.99)), rel=1e-2, abs=1e-7)
    chosen = np.take_along_axis(np.asarray(after), held_out[:, 1:, None], axis=-1)
    assert told["perplexity_after"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)
    agree = np.mean(np.asarray(before.argmax(-1) == after.argmax(-1)))
    assert told["top1_agreement"] == pytest.approx(agree) and agree > 0.9
    assert len(report["answers"]["lengths"]) == 2 and report["past"] == []
    readable = (tmp_path / "dst" / "quantization_report.md").read_text()
    assert f"| {told['perplexity_before']:.4f}, {told['perplexity_after']:.4f} |" in readable
    assert "Past the limits: nothing." in readable and "### " in readable
    assert check(tmp_path / "dst").num_files == 9
    about = json.loads((tmp_path / "dst" / "internjax.json").read_text())
    assert about["provenance"]["quantised by"] == "gptq, act order"
    # It exists now, and is quantised.
    code, said = run(capsys, source, tmp_path / "dst", text)
    assert code == 1 and "exists already" in said.err
    code, said = run(capsys, tmp_path / "dst", tmp_path / "again", text)
    assert code == 1 and "is quantised already (gptq, 8 bits in groups of 16)" in said.err


def test_past_a_limit_nothing_is_written_unless_it_is_wanted(capsys, source, text, tmp_path):
    flags = ("--method", "rtn", "--max-kl", "0", "--min-agreement", "1.01")
    code, said = run(capsys, source, tmp_path / "dst", text, *flags)
    assert code == 1 and list(tmp_path.iterdir()) == []
    assert "dst is not written: mean KL " in said.err and "on held-out text (limit 0); mean KL" in said.err
    assert "top token agrees at" in said.err and "--bits 8" in said.err and "Past the limits: mean KL" in said.out
    code, said = run(capsys, source, tmp_path / "dst", text, *flags, "--accept-any", "--dtype", "float16")
    assert code == 0 and json.loads((tmp_path / "dst" / "quantization_report.json").read_text())["past"]
    model = open_model(tmp_path / "dst")
    assert model.quantization.packing == "awq" and model.config.param_dtype == "float16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "8"], "AWQ's layout has 4 bits and zero points"),
        (["--symmetric"], "AWQ's layout has 4 bits and zero points"),
        (["--act-order"], "--act-order is a choice of --method gptq"),
        (["--method", "rtn", "--rounding", "gptq"], "--rounding is a choice of --method awq"),
        (["--group", "0"], "--group is 0"),
        (["--group", "24"], "which group_size 24 does not divide"),
        (["--answers", "0"], "--answers is 0"),
        (["--answer-length", "0"], "--answer-length is 0"),
        (["--answer-length", "256"], "--answer-length is 256; an answer and its prompt must fit the 256 tokens"),
        (["--calibration-length", "1"], "--calibration-length is 1"),
        (["--calibration-length", "900"], "rows of 900; at least 5 are needed"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--layout", "gguf"], "layout is 'gguf'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(flags, message, capsys, source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "quantized_params", lambda *_, **__: pytest.fail("the work began"))
    code, said = run(capsys, source, tmp_path / "dst", text, *flags)
    assert code == 1 and message in said.err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "function", "how", "packing"),
    [
        ([], awq.quantize_layer, {"rounding": "gptq"}, "awq"),
        (["--rounding", "nearest", "--group", "-1"], awq.quantize_layer, {"rounding": "nearest", "group": -1}, "awq"),
        (["--method", "gptq"], gptq.quantize_layer, {"symmetric": True, "scheme": "int4"}, "gptq"),
        (["--method", "gptq", "--no-symmetric"], gptq.quantize_layer, {"symmetric": False}, "gptq_v2"),
        (["--method", "rtn", "--bits", "8"], command._round_layer, {"symmetric": True, "scheme": "int8"}, "gptq"),
        (["--method", "rtn"], command._round_layer, {"symmetric": False}, "awq"),
        (["--method", "rtn", "--symmetric"], command._round_layer, {"symmetric": True}, "gptq"),
    ],
)
def test_flags_choose_the_method_and_the_packing(flags, function, how, packing, source, text, tiny_model, monkeypatch):
    called = []
    monkeypatch.setattr(
        "internjax.model.calibrate.quantize_layers", lambda params, rows, **how: called.append((rows, how)) or params
    )
    args = parsed(source, text, *flags)
    command.quantized_params(tiny_model, np.zeros((6, 16), np.int32), args, on_layer=print)
    ((rows, given),) = called
    assert given["quantize_layer"].func is function and how.items() <= given["quantize_layer"].keywords.items()
    assert np.shape(rows) == ((0,) if args.method == "rtn" else (2, 3, 16))
    found = command.quantization_of(args)
    assert found.packing == packing.removesuffix("_v2")
    assert found.zeros_less_one == (packing == "gptq")


def test_the_benchmark_measures_every_method_against_nearest(source, text, tmp_path):
    flags = ["--group", "16", "--samples", "8", "--length", "16", "--methods", "rtn 8 bits"]
    where = ["--model", str(source), "--calibration", str(text), "--output", str(tmp_path / "found.json")]
    benchmark.main([*where, *flags])
    found = json.loads((tmp_path / "found.json").read_text())["methods"]
    assert [*found] == ["rtn", "rtn 8 bits"] and found["rtn"]["kl_over_rtn"] == 1.0
    eight = found["rtn 8 bits"]
    assert 0 < eight["kl_over_rtn"] == eight["kl_mean"] / found["rtn"]["kl_mean"] < 0.1


def test_conversations_are_rendered_and_their_questions_begin_answers(tiny_model, source, tmp_path):
    turns = [{"role": "user", "content": "add 1"}, {"role": "assistant", "content": "x + 1"}]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([json.dumps({"messages": turns}), "", json.dumps({"text": "return x"})] * 40))
    found = command.read_text(parsed(source, file), tiny_model)
    asked = [Message("user", "add 1")]
    whole = render([*asked, Message("assistant", "x + 1")], tiny_model.tokenizer).ids
    stream = [*whole, tiny_model.tokenizer.bos_id, *tiny_model.tokenizer.encode("return x")]
    assert found.calibration.reshape(-1)[: len(stream)].tolist() == stream
    assert found.prompts == [render(asked, tiny_model.tokenizer, add_generation_prompt=True).ids] * 2
    assert found.calibration.shape == (8, 16) and found.held_out.shape[1] == 16
    # A question that leaves no room for an answer begins none.
    left = tiny_model.config.max_position_embeddings - len(found.prompts[0])
    for length, is_asked in ((left, True), (left + 1, False)):
        prompts = command.read_text(parsed(source, file, "--answer-length", str(length)), tiny_model).prompts
        assert (prompts == found.prompts) == is_asked
    file.write_text('{"text": "x"}\n{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r'chats.jsonl, line 2: give JSON objects with "text"'):
        command.read_text(parsed(source, file), tiny_model)


def test_answers_are_compared_token_by_token(tiny_model):
    config, params = tiny_model.config, tiny_model.params
    quantized = quantize_params(params, scheme="int4", group=4, head=False)
    prompts = [[1, 5, 9], [1, 7, 8]]
    found = quality.answers(params, quantized, prompts, config=config, max_new_tokens=12)
    same = quality.answers(params, params, prompts, config=config, max_new_tokens=12)
    assert same.first_differences == [None, None] and same.quality.kl_mean == 0 and same.before == same.after
    assert found.lengths == [12, 12] and found.quality.num_tokens == 24
    # The divergence is along the quantised model's own answers.
    rows = jnp.asarray([prompt + answer for prompt, answer in zip(prompts, found.after, strict=True)])
    logp, logq = (jax.nn.log_softmax(decoder.logits(each, rows, config=config)) for each in (params, quantized))
    wanted = (jnp.exp(logp) * (logp - logq)).sum(-1)[:, 2:-1].mean()
    assert found.quality.kl_mean == pytest.approx(float(wanted), rel=0.05)


def test_where_answers_part():
    part = quality._first_difference
    assert part([1, 2], [1, 2]) is None and part([1, 2], [1, 3]) == 1 and part([1], [1, 2]) == 1 and part([], [1]) == 0
