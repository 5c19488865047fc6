"""The benchmarks of the training step, of attention and of meshes measure what they say, at sizes for a test."""

import json

import numpy as np
import pytest

from experiments.benchmarks import attention, contest, decode, decode_kernels, finetune_step, scaling, train_step
from internjax.decode import sample
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B, ModelConfig
from internjax.train import flops

SMALL = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32, dtype="float32"
)


# --- the training step -----------------------------------------------------------------------------------------------


def test_contenders_get_equal_batches_of_equal_documents():
    setting = train_step.Setting(SMALL, batch_size=3, seq_len=12, num_segments=4)
    one, again, next_one = (train_step.batch_at(setting, position) for position in (5, 5, 6))
    for leaf, other in zip(one, again, strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert (one.tokens != next_one.tokens).any()
    assert flops.segment_lengths(one.segments).tolist() == [3] * 4 * 3
    np.testing.assert_array_equal(one.positions[0], [0, 1, 2] * 4)
    np.testing.assert_array_equal(one.loss_mask[0], [1, 1, 0] * 4)  # no document predicts the next one's first token
    np.testing.assert_array_equal(one.targets[:, :-1], one.tokens[:, 1:])
    whole = train_step.batch_at(setting._replace(num_segments=1), 5)
    assert whole.loss_mask.all() and (whole.segments == 1).all()


def test_scanned_and_unrolled_layers_train_alike(tmp_path):
    setting = train_step.Setting(SMALL, batch_size=2, seq_len=16, num_segments=2)
    train_step.write_model(setting.model, tmp_path)
    answers = {}
    for name, unroll in (("scanned", False), ("unrolled", True)):
        contender = train_step._internjax(setting, tmp_path, unroll=unroll)
        answers[name] = {"losses": [contender.step(position) for position in range(2)]}
        assert contender.peak_bytes() > 0
    contest.require_equal({name: each["losses"] for name, each in answers.items()}, tolerance=1e-3)
    first, second = answers["scanned"]["losses"]
    assert abs(first - np.log(64)) < 0.3 and first != second
    np.testing.assert_allclose(answers["scanned"]["losses"], answers["unrolled"]["losses"], rtol=1e-5)


def test_contenders_that_train_different_models_are_refused():
    losses = {"scanned": [4.1, 4.0], "torch-eager": [4.1, 4.002]}
    with pytest.raises(SystemExit, match="do not train the same model.*4.002"):
        contest.require_equal(losses, tolerance=1e-3)
    contest.require_equal(losses, tolerance=3e-2)
    adapters = {"lora": [4.1], "peft-lora": [4.1], "qlora": [4.3], "peft-qlora": [4.33]}
    finetune_step.require_equal(adapters)  # a base in four bits is another base
    with pytest.raises(SystemExit, match="do not train the same model.*peft-lora"):
        finetune_step.require_equal(adapters | {"peft-lora": [4.15]})


def test_loop_and_engine_decode_alike_and_others_are_refused(tmp_path):
    setting = decode.Setting(SMALL, prompt=4, new_tokens=5)
    train_step.write_model(SMALL, tmp_path)
    loop, engine = (decode.contender(name, setting, tmp_path, 3) for name in decode.EXACT)
    tokens = {"generate": [loop.step(0), loop.step(1)], "engine": [engine.step(0), engine.step(1)]}
    assert np.shape(tokens["generate"]) == (2, 3, 5) and tokens["generate"][0] != tokens["generate"][1]
    decode.require_equal_tokens(tokens)
    other = np.array(tokens["generate"])
    other[1, 2, 3] += 1
    decode.require_equal_tokens(tokens | {"int4": other.tolist()})  # fewer bits draw what they draw
    with pytest.raises(SystemExit, match="hf-static and generate draw different.*step 1, row 2, from token 3"):
        decode.require_equal_tokens(tokens | {"hf-static": other.tolist()})
    answers = contest.Answers({"seconds": [9.0], "results": []}, [{"seconds": [0.5, 0.1, 0.5], "peak_bytes": 7}])
    found = decode.figures(answers, setting, 3)
    assert (found["tokens_per_second"], found["median_seconds"], found["peak_bytes"]) == (30, 0.5, 7)


def test_what_guarantees_cost_is_measured_on_equal_work(tmp_path, monkeypatch):
    setting = decode.Setting(SMALL, prompt=4, new_tokens=5)
    train_step.write_model(SMALL, tmp_path)
    monkeypatch.setattr(decode, "STEM", 7)
    monkeypatch.setattr(sample, "uniforms", sample.uniforms)  # one-key replaces it
    tokens = {}
    for name in decode.GUARANTEES:
        # A shape of its own for one-key: what is compiled with it would be found again.
        own = setting._replace(new_tokens=6) if name == "one-key" else setting
        tokens[name] = decode.contender(name, own, tmp_path, 3).step(0)
    assert np.shape(tokens["drawn"]) == (3, 5) and np.shape(tokens["one-key"]) == (3, 6)
    assert tokens["drawn"] != np.array(tokens["one-key"])[:, :5].tolist()
    assert len(tokens["traffic-fast"]) == 9 and len({*map(len, tokens["traffic-fast"])}) > 1
    assert tokens["traffic-fast"] == tokens["traffic-exact"]
    seconds = dict(zip(decode.GUARANTEES, (1.5, 1.0, 2.0, 2.2, 3.0, 0.5)))
    assert decode.costs({who: {"median_seconds": each} for who, each in seconds.items()}) == {
        "L0: drawn / one-key": 1.5,
        "L1: traffic-exact / traffic-fast": 1.1,
        "replay / drawn": 2.0,
        "replay / score": 6.0,
    }
    assert decode.costs({}) == {}


def test_the_engines_log_probabilities_are_held_against_the_trainers(monkeypatch, capsys):
    monkeypatch.setattr(decode, "STEM", 7)
    found = decode.mismatch(decode.Setting(SMALL, prompt=4, new_tokens=5), 3, dtypes=("bfloat16",))
    for mode in ("fast", "exact"):
        each = found["bfloat16"][mode]
        assert 9 <= each["tokens"] <= 45 and 0 < each["mean"] < each["max"] < 0.1
    decode.show_mismatch(found)
    assert capsys.readouterr().out.count(" tokens\n") == 2


CHILD = """
import sys
from experiments.benchmarks import contest
def step(position):
    if sys.argv[1] == "ends" and position == 4:
        sys.exit(3)
    return position / 2
def build():
    print("a library talks")
    return contest.Contender(step, lambda: 7)
contest.work(build)
"""


def test_contenders_take_turns_and_one_that_ends_is_told(tmp_path):
    checked = []
    entries = {who: contest.Entry(["-c", CHILD, who], {"PYTHONPATH": "."}) for who in ("stays", "ends")}
    found = contest.measure(entries, num_blocks=2, block=2, check=checked.append)
    assert checked == [{"stays": [0.0, 0.5, 1.0], "ends": [0.0, 0.5, 1.0]}]
    stays, ends = (contest.figures(found[who], tokens=100, flops=1.0) for who in entries)
    assert [block["results"] for block in found["stays"].blocks] == [[2.5, 3.0], [3.5, 4.0]]
    assert stays["peak_bytes"] == 7 and len(stays["first_losses"]) == 3 and stays["mfu"] is None
    assert ends == {"failed": "ended with code 3; its message stands in the log"}
    assert contest.ratio({"stays": stays, "ends": ends}, ours="stays", peers=["ends"]) == {}


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_over_a_whole_and_a_quantised_base_are_trained(tmp_path):
    setting = finetune_step.Setting(train_step.Setting(SMALL, batch_size=2, seq_len=16), ("lora", "qlora"))
    finetune_step.write_inputs(setting, tmp_path)
    losses = {}
    for name, quantised in finetune_step.OURS.items():
        contender = finetune_step._internjax(setting, tmp_path / "base", tmp_path / "adapter", quantised=quantised)
        losses[name] = [contender.step(position) for position in range(2)]
    finetune_step.require_equal(losses)
    assert losses["lora"][0] != losses["qlora"][0] and abs(losses["lora"][0] - losses["qlora"][0]) < 0.1


def test_a_limit_is_a_share_of_the_card(monkeypatch):
    monkeypatch.setattr(finetune_step, "device_memory", lambda: 160 * 10**9)
    variables = finetune_step.environment(finetune_step.SETTINGS["7b-qlora"])
    assert variables == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.050000", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    assert finetune_step.environment(finetune_step.SETTINGS["7b-lora"]) == {}
    with pytest.raises(SystemExit, match="the device gave more than the limit of 1000 bytes"):
        finetune_step.prove_limit(1000)


# --- kernels of decoding ---------------------------------------------------------------------------------------------


def test_kernels_of_decoding_are_measured_and_what_was_not_run_is_said(tmp_path, monkeypatch):
    cells = {
        "cache": decode_kernels.Paged(2, 8, 2, 1, 8, 4, "int4", 2),
        "weights": decode_kernels.Product(1, 128, 8, 1),
    }
    monkeypatch.setattr(decode_kernels, "CPU_CELLS", cells)
    output = tmp_path / "kernels.json"
    decode_kernels.main(["--turns", "1", "--calls", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    # Two layers of keys and values, two rows of eight tokens, 4 bytes and a scale and an offset; the matrix in 4 bits,
    # with a scale and a zero for each column, beside that of 16.
    by_hand = {
        ("cache", "xla"): 2 * 2 * 2 * 8 * (4 + 4),
        ("weights", "xla"): 8 * 64 + 8 * 3,
        ("weights", "bfloat16"): 2048,
    }
    for (name, backend), wanted in by_hand.items():
        assert decode_kernels.num_bytes(cells[name], backend) == wanted
        figures = result["cells"][name]["back_ends"][backend]
        assert figures["error"] < decode_kernels.TOLERANCE and figures["share_of_bandwidth"] is None
        assert figures["gigabytes_per_second"] == pytest.approx(wanted / figures["median_seconds"] / 1e9, abs=0.01)
    refused = sorted(name for names in result["not_run"].values() for name in names)
    assert refused == ["cache: mosaic", "weights: mosaic"]
    assert all("the cpu platform (NVIDIA GPUs only)" in reason for reason in result["not_run"])


# --- attention -------------------------------------------------------------------------------------------------------


def test_attention_is_measured_and_refusals_are_written(tmp_path, capsys, monkeypatch):
    cell = attention.Cell(2, 12, 4, 2, 8, 3, "float32")
    monkeypatch.setattr(attention, "CPU_CELLS", {"one": cell, "other": cell})
    output = tmp_path / "attention.json"
    attention.main(["--cells", "one", "--turns", "1", "--calls", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    assert list(result["cells"]) == ["one"] and result["peak_flops"] is None
    found = result["cells"]["one"]["back_ends"]
    assert list(found) == ["xla", "chunked", "ring", "cudnn", "cudnn_packed"]
    for backend in ("xla", "chunked", "ring"):
        assert max(found[backend]["error"].values()) < 1e-5
        by_hand = 4 * 8 * 4 * (2 * 3 * (4 * 5 // 2))  # 4 H N pairs: two rows of three documents of four tokens
        for what, times in (("forward", 1), ("forward_backward", 3)):
            figures = found[backend][what]
            rate = times * by_hand / figures["median_seconds"] / 1e12
            assert figures["tflops_per_second"] == pytest.approx(rate, abs=1e-4)
            assert figures["temporary_bytes"] > 0 and figures["share_of_peak"] is None
    for backend in ("cudnn", "cudnn_packed"):
        assert "cpu platform" in found[backend]["refused"] and "forward" not in found[backend]
    assert "cudnn_packed   refused: attention back end" in capsys.readouterr().out


def test_a_back_end_that_computes_something_else_is_not_timed(monkeypatch):
    real = attention._both
    monkeypatch.setattr(
        attention,
        "_both",
        lambda backend: lambda x: real(backend)(x if backend == "xla" else x._replace(segments=x.segments * 0 + 1)),
    )
    cell = attention.Cell(1, 8, 2, 1, 8, 2, "float32")
    found = attention.measure(cell, ["xla", "chunked"], num_turns=1, calls=1)
    assert "forward" in found["xla"] and found["chunked"]["failed"].startswith("differs from xla")
    assert list(found["chunked"]) == ["failed"]


def test_cells_of_a_gpu_have_the_heads_of_the_published_models():
    assert len(attention.GPU_CELLS) == 8
    for name, cell in attention.GPU_CELLS.items():
        model = INTERNLM2_1_8B if name.startswith("1.8b") else INTERNLM2_7B
        assert (cell.num_heads, cell.num_kv_heads, cell.head_dim) == (model.num_heads, model.num_kv_heads, 128)
        assert cell.seq_len in (4096, 32768) and cell.num_documents == (4 if "packed" in name else 1)


# --- meshes ----------------------------------------------------------------------------------------------------------


def test_every_mesh_fills_its_devices():
    for count in scaling.COUNTS:
        for name, layout in scaling.layouts(count).items():
            assert np.prod(layout.mesh.shape(count)) == count, name
            assert (layout.attention == "ring") == ("ring" in name)
    assert list(scaling.layouts(1, "fsdp 4")) == ["one device"] and list(scaling.layouts(4, "fsdp")) == ["fsdp 4"]


def test_meshes_that_lose_differently_are_refused():
    scaling.require_equal({"one device": [3.0, 2.0], "fsdp 2": [3.0001, 2.0]})
    for wrong in (2.001, float("nan")):
        with pytest.raises(SystemExit, match="losses differ from those of one device.*'tensor 2'"):
            scaling.require_equal({"one device": [3.0, 2.0], "tensor 2": [3.0, wrong]})


def test_one_and_two_devices_are_compared(tmp_path):
    output = tmp_path / "scaling.json"
    sizes = ["--counts", "2", "--meshes", "fsdp 2", "--rows", "2", "--seq-len", "8", "--blocks", "1", "--steps", "1"]
    scaling.main([*sizes, "--output", str(output)])
    result = json.loads(output.read_text())
    one, two = result["meshes"]["one device"], result["meshes"]["fsdp 2"]
    assert list(result["meshes"]) == ["one device", "fsdp 2"] and "no speed-up" in result["what"]
    assert (one["devices"], two["devices"], one["overhead"]) == (1, 2, 1.0)
    assert two["overhead"] == pytest.approx(two["median_seconds"] / one["median_seconds"], rel=1e-2)
    assert len(one["first_losses"]) == scaling.NUM_CHECKED
    np.testing.assert_allclose(two["first_losses"], one["first_losses"], atol=scaling.TOLERANCE)
