"""MODEL, the one argument: every form of it, and what a wrong one says."""

import base64
import dataclasses
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import internjax
from internjax import sharding
from internjax.hf import resolve as resolving
from internjax.hf import restore as restoring
from internjax.hf.adapter import save_adapter
from internjax.hf.loading import GROUP
from internjax.hf.open import logits, open_model
from internjax.hf.resolve import adapter_base, resolve
from internjax.hf.save import save_architecture, save_model
from internjax.model import decoder
from internjax.model.lora import LoraConfig, apply_config, init_lora, merge
from internjax.model.quantize import QuantArray, quantize_params
from internjax.train.checkpoint import open_checkpoints
from internjax.train.freezing import join, split
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import init_state

GOLDEN_TEXT = Path(__file__).resolve().parent.parent / "text"
TOKENS = np.arange(40).reshape(2, 20)  # beyond max_position_embeddings = 16: dynamic scaling acts
LORA = LoraConfig(rank=4, alpha=8.0, targets=("query", "value", "down"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, config, params, tokenizer):
    """A folder with a model, an adapter of it, a run with model/, and two runs with checkpoints only."""
    root = tmp_path_factory.mktemp("place")
    save_model(root / "base", config=config, params=params, tokenizer=tokenizer)
    weights = trained_lora(params)
    save_adapter(root / "adapter", LORA, weights, root / "base", model_config=config)
    (root / "runs" / "done").mkdir(parents=True)
    (root / "runs" / "done" / "experiment.json").write_text("{}")
    save_model(root / "runs" / "done" / "model", config=config, params=half(params), tokenizer=tokenizer)
    running = root / "runs" / "running"
    save_architecture(running, config=config, tokenizer=tokenizer)
    save_states(running, {3: half(params), 5: params})
    tuning = root / "runs" / "tuning"
    save_architecture(tuning, config=config, tokenizer=tokenizer, lora_config=LORA, base=root / "base")
    save_states(tuning, {2: weights})
    for run in (running, tuning):
        (run / "experiment.json").write_text("{}")
    return root


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def half(params):
    return jax.device_put(jax.tree.map(lambda leaf: leaf / 2, jax.device_get(params)))


def trained_lora(params):
    fresh, rng = jax.device_get(init_lora(LORA, params, jax.random.key(1))), np.random.default_rng(2)
    trained = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), fresh)
    return jax.device_put(trained)


def save_states(run, states, *, frozen=None):
    optimizer = make_optimizer(AdamW(), Constant(), 10)
    with open_checkpoints(run / "checkpoints") as checkpoints:
        for step, trainable in states.items():
            state = init_state(jax.device_put(jax.tree.map(np.array, trainable)), optimizer, frozen=frozen)
            checkpoints.save(dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)))


def assert_params(model, wanted):
    jax.tree.map(np.testing.assert_array_equal, model.params, wanted)


@pytest.mark.parametrize("name", ["base", "./base", "runs/done/../../base"])
def test_a_hugging_face_folder(name, params, config, tokenizer, capsys):
    model = open_model(name)
    assert_params(model, params)
    assert model.lora is None and model.tokenizer.fingerprint == tokenizer.fingerprint
    assert dataclasses.replace(model.config, param_dtype=config.param_dtype) == config
    printed = capsys.readouterr().out
    assert "base (llama layout" in printed and "parameters in float32, computed in float32" in printed


def test_a_run_by_name_and_by_path_is_its_model_folder(params):
    for name in ("done", "runs/done"):
        assert_params(open_model(name), half(params))


def test_a_run_without_a_model_folder_is_its_newest_checkpoint(params, capsys):
    assert_params(open_model("running"), params)
    assert "checkpoints/5" in capsys.readouterr().out


def test_a_step_of_a_run(params):
    model = open_model("running@3")
    assert_params(model, half(params))
    assert model.tokenizer is not None and model.generation.eos_ids == (2, model.tokenizer.special["<|im_end|>"])


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(params, tmp_path, monkeypatch, capsys):
    shutil.copytree("runs/running", tmp_path / "run")
    largest = max((tmp_path / "run/checkpoints/5").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"broken")
    assert_params(open_model(tmp_path / "run"), half(params))
    assert "step 5 is skipped" in capsys.readouterr().err


def test_a_run_is_only_read_and_a_step_that_it_removes_meanwhile_is_told(tmp_path, params, monkeypatch):
    def state(folder):
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}

    shutil.copytree("runs/running", tmp_path / "run")
    with open_checkpoints(tmp_path / "run" / "checkpoints"):  # as the run has it that is going on
        before = state(tmp_path / "run")
        assert_params(open_model(f"{tmp_path}/run@3"), half(params))
        assert state(tmp_path / "run") == before
    opened = []

    def gone(folder, path):
        opened.append(path)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "3", ignore_errors=True)
        return _open(folder, path)

    _open = restoring._open
    monkeypatch.setattr(restoring, "_open", gone)
    with pytest.raises(ValueError, match=r"checkpoints/3 was removed while it was read .*; take a newer step"):
        open_model(f"{tmp_path}/run@3")
    assert len(opened) == 1


def test_a_checkpoint_is_read_in_blocks_of_layers_as_it_was_written(params, monkeypatch):
    """Written by two shards of layers, and placed layer by layer: more blocks than one, and the same parameters."""
    store = np.arange(7 * 2 * 3).reshape(7, 2, 3)
    reads = []

    class Chunked:
        chunk_layout = types.SimpleNamespace(read_chunk=types.SimpleNamespace(shape=(3, 2, 3)))

        def __getitem__(self, layers):
            reads.append((layers.start, layers.stop))
            return types.SimpleNamespace(read=lambda: types.SimpleNamespace(result=lambda: store[layers]))

    read = restoring._blocks(Chunked(), 7)
    np.testing.assert_array_equal([read(layer)[0] for layer in range(7)], store)
    assert reads == [(0, 3), (3, 6), (6, 9)]
    monkeypatch.setattr("internjax.hf.loading.HOST_STACK_BYTES", 0)
    assert_params(open_model("running"), params)


def test_a_tokenizer_model_is_a_tokenizer(tmp_path, config, make_params):
    """A folder of InternLM2's kind: tokenizer.model alone, with remote code that nobody runs."""
    golden = json.loads((GOLDEN_TEXT / "sentencepiece_golden.json").read_text(encoding="utf-8"))[0]
    large = dataclasses.replace(config, vocab_size=420)
    save_model(tmp_path / "model", config=large, params=make_params(large), tokenizer=None)
    (tmp_path / "model" / "tokenizer.model").write_bytes(base64.b64decode(golden["model"]))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    model = open_model(tmp_path / "model")
    assert model.generation.eos_ids == (2,)
    for text, ids in golden["ids"].items():
        assert model.tokenizer.encode(text) == ids


def test_an_adapter_folder_and_its_base(params, capsys):
    wanted = logits_of(merge(params, apply_config(trained_lora(params), LORA)))
    assert np.abs(wanted - logits_of(params)).max() > 0.1
    for name in ("adapter", "base+adapter", "done+adapter", "tuning", "tuning@2"):
        model = open_model(name)
        assert_params(model, half(params) if name.startswith("done") else params)
        other = "base; here it acts on runs/done/model" in capsys.readouterr().out
        assert other == name.startswith("done")
        assert model.lora.scale == 2.0
        if not name.startswith("done"):
            np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=2e-5)
    model = open_model("base", adapters=["adapter"])
    np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=2e-5)


def logits_of(params):
    from tests.hf.conftest import SMALL

    inv_freq = decoder.rope.inv_freq(SMALL, length=TOKENS.shape[1])[None]
    return np.asarray(decoder.logits(params, TOKENS, config=SMALL, inv_freq_BF=inv_freq))


def test_an_adapter_s_base_must_be_one_folder():
    assert adapter_base(resolve("done")).name == "model"
    for name, what in (("base+adapter", "a model with adapters on it"), ("running", "a checkpoint")):
        with pytest.raises(ValueError, match=f"this base is {what}; write one first with `python -m internjax.hf"):
            adapter_base(resolve(name))


def test_two_adapters_add_up(params):
    lora = apply_config(trained_lora(params), LORA)
    model = open_model("base+adapter+adapter")
    assert model.params["layers"]["attention"]["query"]["kernel"].shape[1:] == (32, 32)
    wanted = logits_of(merge(merge(params, lora), lora))
    np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=5e-5)


def test_a_plus_may_be_part_of_a_name(params, tmp_path, monkeypatch):
    shutil.copytree("base", tmp_path / "a")
    shutil.copytree("base", tmp_path / "a+b")
    shutil.copytree("adapter", tmp_path / "c+d")
    monkeypatch.chdir(tmp_path)
    assert resolve("a+b").adapters == ()
    source = resolve("a+b+c+d")
    assert source.folder.name == "a+b" and [path.name for path in source.adapters] == ["c+d"]


def test_adapter_bases_are_found_from_here_and_from_the_adapter(tmp_path, params, config, monkeypatch):
    shutil.copytree("base", tmp_path / "base")
    save_adapter(tmp_path / "adapter", LORA, trained_lora(params), "../base", model_config=config)
    assert resolve(tmp_path / "adapter").folder.resolve() == tmp_path / "base"
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"adapter of '../base', which does not exist; write BASE\+"):
        resolve(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bsae", r"no model 'bsae': found in .*: adapter/, base/, runs/; runs: done, running, tuning\. Give"),
        ("runs/nope", r"no model 'runs/nope': found in runs: done/, running/, tuning/"),
        ("runs", r"runs is no model: it has neither config.json .* found in runs: done/, running/, tuning/"),
        ("base/config.json", "base/config.json is a file"),
        ("base@3", "'base' in 'base@3' is no run folder"),
        ("running@4", r"no checkpoint of step 4 in .*; there are: \[3, 5\]"),
        (
            "done@1",
            r"run runs/done has no model/ folder and no checkpoints|no checkpoints with an architecture/ folder",
        ),
        ("base+base", "'base' is no adapter: it has no adapter_config.json"),
        ("base+nope", "'nope' is no adapter"),
        ("", "no model ''"),
    ],
)
def test_a_wrong_argument_lists_what_was_found(name, message):
    with pytest.raises(ValueError, match=message):
        open_model(name)


def test_names_of_hubs_are_models_like_others(monkeypatch, params):
    asked = []

    def snapshot_download(name, *, repo_type, revision, allow_patterns, ignore_patterns):
        asked.append((name, repo_type, revision))
        return "base"

    class HubApi:
        def download_repo(self, name, kind, *, revision, allow_patterns, ignore_patterns, local_files_only):
            asked.append((name, kind, revision))
            return "base"

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.setitem(sys.modules, "modelscope_hub", types.SimpleNamespace(HubApi=HubApi))
    assert_params(open_model("hf:internlm/internlm2-7b"), params)
    assert open_model("modelscope:Shanghai/internlm2@v1.0+adapter").lora is not None
    assert asked == [("internlm/internlm2-7b", "model", None), ("Shanghai/internlm2", "model", "v1.0")]


@pytest.mark.parametrize(("hub", "package"), [("hf", "huggingface_hub"), ("modelscope", "modelscope_hub")])
def test_without_the_client_the_manual_way_is_told(monkeypatch, hub, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"need the package {package}.*download the files of a/b"):
        open_model(f"{hub}:a/b")


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_quantised_while_reading_is_quantised_afterwards(params, scheme):
    wanted = quantize_params(params, scheme=scheme)
    for name in ("base", "running"):
        model = open_model(name, quantize=scheme)
        assert isinstance(model.params["head"]["kernel"], QuantArray)
        assert jax.tree.structure(model.params) == jax.tree.structure(wanted)
        assert_params(model, wanted)


@pytest.mark.parametrize(("name", "quantize"), [("base", "int4"), ("running", "int8"), ("adapter", None)])
def test_on_a_mesh_parameters_lie_on_their_shardings(name, quantize, monkeypatch):
    try:
        mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2, data=2))
        monkeypatch.setattr("internjax.hf.loading.GROUP", 8)  # so that two shards have whole groups
        alone = open_model(name, quantize=quantize)
        for host_bytes in (1 << 30, 0):
            monkeypatch.setattr("internjax.hf.loading.HOST_STACK_BYTES", host_bytes)
            model = open_model(name, mesh=mesh, quantize=quantize)
            query = jax.tree.leaves(model.params["layers"]["attention"]["query"]["kernel"])[0]
            assert query.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
            assert sharding.mesh_of(model.params) == mesh
            jax.tree.map(np.testing.assert_array_equal, model.params, alone.params)
            np.testing.assert_allclose(logits(model, TOKENS), logits(alone, TOKENS), atol=2e-5)
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])


def test_a_mesh_that_does_not_fit_is_refused():
    mesh = jax.make_mesh((1, 1, 1, 8), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    with pytest.raises(ValueError, match="does not divide"):
        open_model("base", mesh=mesh)


def test_the_dtype_of_the_computation_is_a_choice():
    model = open_model("base", dtype="bfloat16")
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "float32")
    with pytest.raises(ValueError, match="dtype 'float8' is none to compute in; give one of float32"):
        open_model("base", dtype="float8")
    assert model.params["head"]["kernel"].dtype == jnp.float32


def test_logits_refuse_what_is_no_batch_of_ids(config):
    model = open_model("base")
    with pytest.raises(ValueError, match=r"tokens have shape \(3,\)"):
        logits(model, [1, 2, 3])
    with pytest.raises(ValueError, match=r"1..300; the model has ids 0..299"):
        logits(model, [[1, 300]])
    with pytest.raises(ValueError, match=r"-1..2"):
        logits(model, [[2, -1]])


def test_a_folder_without_tokenizer_opens_and_says_so(tmp_path, config, params, capsys):
    save_model(tmp_path / "bare", config=config, params=params, tokenizer=None)
    assert open_model(tmp_path / "bare").tokenizer is None
    assert "no tokenizer" in capsys.readouterr().out


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, config, params, tokenizer):
    small = dataclasses.replace(config, vocab_size=270)
    cut = params | {
        "embed": {"embedding": params["embed"]["embedding"][:270]},
        "head": {"kernel": params["head"]["kernel"][:, :270]},
    }
    with pytest.raises(ValueError, match="tokenizer has 280 ids, the model 270"):
        save_model(tmp_path / "model", config=small, params=cut, tokenizer=tokenizer)
    assert not (tmp_path / "model").exists()
    save_model(tmp_path / "model", config=small, params=cut, tokenizer=None)
    shutil.copy("base/tokenizer.json", tmp_path / "model")
    shutil.copy("base/tokenizer_config.json", tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer has 280 ids, the embedding 270 rows"):
        open_model(tmp_path / "model")


def test_a_reward_id_that_the_tokenizer_contradicts_is_refused(tmp_path, config, make_params, tokenizer):
    scalar = dataclasses.replace(config, head="scalar")
    folder = tmp_path / "reward"
    save_model(folder, config=scalar, params=make_params(scalar), tokenizer=tokenizer, layout="internlm2")
    values = json.loads((folder / "config.json").read_text())
    assert values["reward_token_id"] == tokenizer.special["[UNUSED_TOKEN_130]"]
    assert open_model(folder).config.head == "scalar"
    (folder / "config.json").write_text(json.dumps(values | {"reward_token_id": 5}))
    with pytest.raises(ValueError, match="reads the reward at id 5"):
        open_model(folder)


def test_a_checkpoint_of_something_else_is_refused(tmp_path, config, params, tokenizer):
    save_architecture(tmp_path, config=dataclasses.replace(config, ffn_dim=64), tokenizer=tokenizer)
    save_states(tmp_path, {1: params})
    with pytest.raises(
        ValueError, match=r"has \(3, 32, 48\) as layers.ffn.gate.kernel, the model .* wants \(3, 32, 64\)"
    ):
        open_model(tmp_path)
    other = tmp_path / "actor_and_critic"
    save_architecture(other, config=config, tokenizer=tokenizer)
    save_states(other, {1: {"actor": params, "critic": params}})
    with pytest.raises(ValueError, match="has nothing as embed.embedding"):
        open_model(other)


def test_a_checkpoint_of_some_parameters_is_joined_with_the_model_that_has_the_others(
    tmp_path, config, params, tokenizer
):
    freeze = ("layers.attention.[qk]*", "layers.ffn.*", "embed.*")
    stored = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax.device_get(params)))
    frozen = jax.tree.map(lambda leaf: leaf.astype(np.float32), split(jax.device_get(stored), freeze).frozen)
    trained = split(half(params), freeze).trainable
    wanted = join(trained, frozen)
    base, run = tmp_path / "start", tmp_path / "run"
    # The layout that fuses query, key and value, of which the last alone was trained.
    how = {"config": config, "tokenizer": tokenizer}
    save_model(base, params=stored, layout="internlm2", **how)
    save_architecture(run, **how, base=base)
    save_states(run, {2: trained}, frozen=frozen)
    model = open_model(f"{run}@2")
    assert_params(model, wanted)
    assert model.config.param_dtype == "float32"
    assert_params(open_model(run, quantize="int8"), quantize_params(wanted, scheme="int8", group=GROUP))

    save_model(base, params=half(stored), layout="internlm2", overwrite=True, **how)
    with pytest.raises(ValueError, match=f"those of {base} have .*the folder has changed since. Put back the model"):
        open_model(run)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=f'{base}, which is not there any more. Put it back, or name .* "frozen" in'):
        open_model(f"{run}@2")
    # A checkpoint that nobody said to be of a part is of something else.
    save_architecture(run, **how)
    with pytest.raises(ValueError, match="has nothing as embed.embedding"):
        open_model(run)


def test_checkpoints_of_a_normalised_head_keep_it(tmp_path, config, params, tokenizer):
    config = dataclasses.replace(config, norm_head=True)
    save_architecture(tmp_path, config=config, tokenizer=tokenizer)
    save_states(tmp_path, {1: params})
    model = open_model(tmp_path)
    assert model.config.norm_head
    wanted = decoder.logits(params, TOKENS[:, :9], config=config)
    np.testing.assert_allclose(logits(model, TOKENS[:, :9]), wanted, atol=1e-5)
    proof = save_model(tmp_path / "model", config=model.config, params=model.params, tokenizer=tokenizer)
    assert proof.max_logit_difference_to_source < 1e-5
    np.testing.assert_allclose(logits(open_model(tmp_path), TOKENS[:, :9]), wanted, atol=1e-5)


def test_the_front_door_is_light_and_knows_its_names():
    assert internjax.open_model is open_model and internjax.logits is logits
    with pytest.raises(AttributeError, match="no attribute 'lgoits'; it offers"):
        internjax.lgoits  # noqa: B018
    program = "import sys, internjax; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)), dir(internjax))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=resolving.__file__.rsplit("/internjax/", 1)[0],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.startswith("[] ") and "open_model" in result.stdout, result.stderr
