"""Adapters in PEFT's layout: key by key, both ways, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.hf.adapter import CONFIG, WEIGHTS, combine, load_adapter, save_adapter
from internjax.hf.internlm2 import INTERNLM2
from internjax.hf.open import open_model
from internjax.hf.save import save_model
from internjax.hf.weights import Plan, read_header, read_tensor, write_file
from internjax.model import decoder
from internjax.model.lora import LoraConfig, apply_config, init_lora, initialise, merge, of_original_base

ALL = LoraConfig(rank=3, alpha=6.0, targets=("query", "key", "value", "output", "gate", "up", "down", "head"))
TOKENS = jnp.arange(10).reshape(1, 10)


def trained(config, params, seed=0):
    fresh = init_lora(config, params, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(9), leaf.shape), fresh)


def write_peft(folder, tensors, **values):
    """An adapter folder as another library writes it."""
    folder.mkdir()
    arrays = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
    write_file(folder / WEIGHTS, {n: Plan(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()})
    defaults = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "base_model_name_or_path": "base"}
    (folder / CONFIG).write_text(json.dumps(defaults | values))
    return folder


@pytest.mark.parametrize("config_of_lora", [ALL, LoraConfig(rank=2, alpha=5.0, targets=("down",), dropout=0.1)])
def test_what_is_saved_is_loaded(tmp_path, config, params, config_of_lora):
    weights = trained(config_of_lora, params)
    save_adapter(tmp_path / "adapter", config_of_lora, weights, "some/base", model_config=config)
    loaded = load_adapter(tmp_path / "adapter", model_config=config)
    assert loaded.base == "some/base"
    assert (loaded.config.rank, loaded.config.alpha, loaded.config.dropout) == (
        config_of_lora.rank,
        config_of_lora.alpha,
        config_of_lora.dropout,
    )
    assert set(loaded.config.targets) == set(config_of_lora.targets)
    assert jax.tree.structure(loaded.weights) == jax.tree.structure(weights)
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, weights)


def test_keys_shapes_and_config_are_those_of_peft(tmp_path, config, params):
    lora = LoraConfig(rank=3, alpha=6.0, targets=("query", "down", "head"))
    weights = trained(lora, params)
    save_adapter(tmp_path / "adapter", lora, weights, "org/base", model_config=config)
    tensors = read_header(tmp_path / "adapter" / WEIGHTS)
    prefix = "base_model.model."
    modules = [f"model.layers.{i}.{m}" for i in range(3) for m in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]
    assert set(tensors) == {f"{prefix}{m}.lora_{x}.weight" for m in modules for x in "AB"}
    a = read_tensor(tensors[prefix + "model.layers.1.self_attn.q_proj.lora_A.weight"])
    b = read_tensor(tensors[prefix + "model.layers.1.mlp.down_proj.lora_B.weight"])
    np.testing.assert_array_equal(a, weights["layers"]["attention"]["query"]["a"][1].T)
    np.testing.assert_array_equal(b, weights["layers"]["ffn"]["down"]["b"][1].T)
    assert a.shape == (3, 32) and b.shape == (32, 3)
    values = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert values["target_modules"] == ["q_proj", "down_proj", "lm_head"]
    assert (values["peft_type"], values["task_type"], values["r"], values["lora_alpha"]) == (
        "LORA",
        "CAUSAL_LM",
        3,
        6.0,
    )
    assert values["base_model_name_or_path"] == "org/base"


def test_rank_stabilised_adapters_keep_their_scale(tmp_path, config, params):
    weights = trained(ALL, params)
    save_adapter(tmp_path / "plain", ALL, weights, "base", model_config=config)
    values = json.loads((tmp_path / "plain" / CONFIG).read_text())
    (tmp_path / "plain" / CONFIG).write_text(json.dumps(values | {"use_rslora": True}))
    loaded = load_adapter(tmp_path / "plain", model_config=config)
    assert apply_config(loaded.weights, loaded.config).scale == pytest.approx(6.0 / 3**0.5)


def test_one_factor_over_fused_wqkv_is_that_of_query_key_and_value(tmp_path, config, params):
    """W + s B A of the fused matrix, cut into heads, is what the three adapters give."""
    random = np.random.default_rng(0)
    tensors, deltas = {}, []
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    for layer in range(config.num_layers):
        a, b = random.normal(size=(3, 32)), random.normal(size=(rows, 3))
        stem = f"base_model.model.model.layers.{layer}.attention.wqkv."
        tensors |= {stem + "lora_A.weight": a, stem + "lora_B.weight": b}
        deltas.append(2.0 * b @ a)
    loaded = load_adapter(write_peft(tmp_path / "adapter", tensors), model_config=config)
    assert set(loaded.config.targets) == {"query", "key", "value"}
    merged = merge(params, apply_config(loaded.weights, loaded.config))
    fused = next(row for row in INTERNLM2.rows(config) if "wqkv" in row.name)
    for layer, delta in enumerate(deltas):
        before, after = (
            fused.fuse(
                [np.asarray(tree["layers"]["attention"][n]["kernel"][layer]).T for n in ("query", "key", "value")],
                config,
            )
            for tree in (params, merged)
        )
        np.testing.assert_allclose(after - before, delta, atol=1e-4)


DORA = LoraConfig(rank=3, alpha=6.0, targets=ALL.targets, scaling="rslora", kind="dora")
TWO = LoraConfig(rank=2, alpha=3.0, targets=("key", "value", "output"))


@pytest.mark.parametrize("lora", [ALL, DORA, TWO], ids=["all", "dora", "without query"])
def test_adapters_go_through_the_fused_layout(tmp_path, config, params, lora):
    """Query, key and value of their own A are one adapter of wqkv of the summed rank, which computes the same."""
    weights = trained(lora, params)
    save_adapter(tmp_path / "fused", lora, weights, "base", model_config=config, layout="internlm2")
    tensors = read_header(tmp_path / "fused" / WEIGHTS)
    stem = "base_model.model.model.layers.2.attention.wqkv."
    rank = lora.rank * (2 if lora is TWO else 3)
    assert tensors[stem + "lora_A.weight"].shape == (rank, 32)
    assert tensors[stem + "lora_B.weight"].shape == (64, rank)
    values = json.loads((tmp_path / "fused" / CONFIG).read_text())
    assert values["rank_pattern"] == {"wqkv": rank} and "wqkv" in values["target_modules"]
    scale = values["alpha_pattern"]["wqkv"] / (rank**0.5 if lora is DORA else rank)
    assert scale == pytest.approx(lora.scale)
    back = load_adapter(tmp_path / "fused", model_config=config)
    got = merge(params, apply_config(back.weights, back.config))
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=2e-6), got, merge(params, apply_config(weights, lora))
    )
    # What shares its A already (an adapter of wqkv that was read) keeps its rank, and every byte.
    save_adapter(tmp_path / "again", back.config, back.weights, "base", model_config=config, layout="internlm2")
    again = read_header(tmp_path / "again" / WEIGHTS)
    if lora is not TWO:
        for factor in ("lora_A.weight", "lora_B.weight"):
            np.testing.assert_array_equal(read_tensor(again[stem + factor]), read_tensor(tensors[stem + factor]))
    assert again[stem + "lora_A.weight"].shape == (rank, 32)


def test_dora_of_a_part_of_a_fused_module_is_refused(tmp_path, config, params):
    lora = LoraConfig(rank=2, kind="dora", targets=("query", "value"))
    with pytest.raises(ValueError, match=r"but \['key'\] has no adapter; target all of them"):
        save_adapter(tmp_path / "a", lora, trained(lora, params), "base", model_config=config, layout="internlm2")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_has_the_module_names_of_its_base(tmp_path, config, params):
    lora = LoraConfig(rank=2, targets=("query", "key", "value"))
    weights = trained(lora, params)
    for layout, module in (("llama", "q_proj"), ("internlm2", "wqkv")):
        save_model(tmp_path / layout, config=config, params=params, tokenizer=None, layout=layout)
        save_adapter(tmp_path / f"on {layout}", lora, weights, tmp_path / layout, model_config=config)
        values = json.loads((tmp_path / f"on {layout}" / CONFIG).read_text())
        assert module in values["target_modules"]
    got, want = (open_model(tmp_path / f"on {layout}").lora for layout in ("internlm2", "llama"))
    got, want = merge(params, got), merge(params, want)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), got, want)


def test_dora_vectors_are_saved_and_read_under_either_name(tmp_path, config, params):
    lora = LoraConfig(rank=3, alpha=6.0, targets=("up", "head"), kind="dora")
    weights = trained(lora, params)
    save_adapter(tmp_path / "a", lora, weights, "base", model_config=config)
    tensors = {name: read_tensor(info) for name, info in read_header(tmp_path / "a" / WEIGHTS).items()}
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
    np.testing.assert_array_equal(tensors[key], weights["layers"]["ffn"]["up"]["magnitude"][1])
    renamed = {f"{name}.weight" if "magnitude" in name else name: array for name, array in tensors.items()}
    for folder in (tmp_path / "a", write_peft(tmp_path / "b", renamed, use_dora=True)):
        loaded = load_adapter(folder, model_config=config)
        assert loaded.config == lora
        jax.tree.map(np.testing.assert_array_equal, loaded.weights, weights)
    plain = {name: array for name, array in tensors.items() if "magnitude" not in name}
    other = load_adapter(write_peft(tmp_path / "plain", plain), model_config=config)
    with pytest.raises(ValueError, match="DoRA adapters scale what stands below them"):
        combine([loaded, other])


def test_ranks_and_scales_of_single_modules_are_honoured(tmp_path, config, params):
    """rank_pattern and alpha_pattern as PEFT reads them: the first that matches the end of a module's name."""
    random = np.random.default_rng(0)
    ranks, alphas = (
        {"down_proj": 5, r"layers\.1\.mlp\.up_proj": 2},
        {"down_proj": 4.0, "^model.layers.0.mlp.up_proj": 1.5},
    )
    tensors, deltas = {}, {}
    for layer in range(config.num_layers):
        for name, sides in (("down", (48, 32)), ("up", (32, 48))):
            rank = 5 if name == "down" else 2 if layer == 1 else 3
            alpha = 4.0 if name == "down" else 1.5 if layer == 0 else 6.0
            a, b = random.normal(size=(rank, sides[0])), random.normal(size=(sides[1], rank))
            stem = f"base_model.model.model.layers.{layer}.mlp.{name}_proj."
            tensors |= {stem + "lora_A.weight": a, stem + "lora_B.weight": b}
            deltas[name, layer] = alpha / rank * (b @ a).T
    folder = write_peft(tmp_path / "adapter", tensors, rank_pattern=ranks, alpha_pattern=alphas)
    loaded = load_adapter(folder, model_config=config)
    assert loaded.config.rank == 5
    merged = merge(params, apply_config(loaded.weights, loaded.config))
    for (name, layer), delta in deltas.items():
        got = merged["layers"]["ffn"][name]["kernel"][layer] - params["layers"]["ffn"][name]["kernel"][layer]
        np.testing.assert_allclose(got, delta, atol=2e-5)


def test_pissa_is_saved_as_an_adapter_of_the_original_or_not_at_all(tmp_path, config, params):
    lora = LoraConfig(rank=3, targets=("down",), initialisation="pissa")
    start = initialise(lora, params, jax.random.key(0))
    with pytest.raises(ValueError, match="stands on a residual.*of_original_base"):
        save_adapter(tmp_path / "a", lora, start.weights, "base", model_config=config)
    plain = of_original_base(lora, start.weights, start.weights)
    save_adapter(tmp_path / "a", plain.config, plain.weights, "base", model_config=config)
    loaded = load_adapter(tmp_path / "a", model_config=config)
    assert loaded.config.rank == 6
    merged = merge(params, apply_config(loaded.weights, loaded.config))  # untrained: nothing is added
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, params)


def test_adapters_of_other_internlm2_modules_are_read(tmp_path, config):
    tensors = {}
    for layer in range(config.num_layers):
        stem = f"base_model.model.model.layers.{layer}.feed_forward.w2."
        tensors |= {stem + "lora_A.weight": np.ones((3, 48)), stem + "lora_B.weight": np.full((32, 3), layer)}
    folder = write_peft(tmp_path / "adapter", tensors, target_modules=["mlp.down_proj", "feed_forward.w2"])
    loaded = load_adapter(folder, model_config=config)
    assert loaded.config.targets == ("down",)
    np.testing.assert_array_equal(loaded.weights["layers"]["ffn"]["down"]["b"][2], 2.0)


@pytest.mark.parametrize("excluded", [["up_proj"], r".*\.up_proj", ["mlp.up_proj", "model.layers.9.mlp.down_proj"]])
def test_modules_that_are_named_and_excluded_have_no_adapter(tmp_path, config, excluded):
    tensors = {}
    for layer in range(config.num_layers):
        stem = f"base_model.model.model.layers.{layer}.mlp.down_proj."
        tensors |= {stem + "lora_A.weight": np.ones((3, 48)), stem + "lora_B.weight": np.ones((32, 3))}
    named = {"target_modules": ["up_proj", "down_proj"]}
    folder = write_peft(tmp_path / "adapter", tensors, exclude_modules=excluded, **named)
    assert load_adapter(folder, model_config=config).config.targets == ("down",)
    wrong = write_peft(tmp_path / "wrong", tensors, exclude_modules=["down_proj"], target_modules=["down_proj"])
    with pytest.raises(ValueError, match="has an adapter of model.layers.0.mlp.down_proj, and target_modules"):
        load_adapter(wrong, model_config=config)


def test_adapters_together_are_the_sum_of_each(config, params, tmp_path):
    configs = [ALL, LoraConfig(rank=2, alpha=1.0, targets=("query", "up"))]
    loaded = []
    for index, lora in enumerate(configs):
        save_adapter(tmp_path / str(index), lora, trained(lora, params, index), "base", model_config=config)
        loaded.append(load_adapter(tmp_path / str(index), model_config=config))
    merged = params
    for each in loaded:
        merged = merge(merged, apply_config(each.weights, each.config))
    wanted = decoder.logits(merged, TOKENS, config=config)
    together = decoder.logits(params, TOKENS, config=config, lora=combine(loaded))
    np.testing.assert_allclose(together, wanted, atol=2e-5)
    assert np.abs(decoder.logits(params, TOKENS, config=config) - wanted).max() > 0.1
    assert combine([]) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, r"lacks base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"down_proj": 8}}, r"factors \(3, 48\) and \(32, 3\), adapter_config.json says rank 8"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'.*path_initial_model_for_weight_conversion"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"r": None}, "PEFT writes r and lora_alpha"),
        ({"r": 0}, "r is 0, at least 1 is wanted"),
        ({"r": 4}, r"layers.0.mlp.down_proj has factors \(3, 48\) and \(32, 3\), adapter_config.json says rank 4"),
        ({"target_modules": ["up_proj"]}, r"has no adapter of model.layers.0.mlp.up_proj, and .* \['up_proj'\]"),
        ({"target_modules": r".*\.(up|gate)_proj"}, r"has no adapter of model.layers.0.mlp.gate_proj"),
        ({"target_modules": ["proj"]}, r"has an adapter of model.layers.0.mlp.down_proj, and target_modules"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, config, values, message):
    tensors = {}
    for layer in range(config.num_layers):
        stem = f"base_model.model.model.layers.{layer}.mlp.down_proj."
        tensors |= {stem + "lora_A.weight": np.ones((3, 48)), stem + "lora_B.weight": np.ones((32, 3))}
    folder = write_peft(tmp_path / "adapter", tensors, **values)
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, model_config=config)


def test_unmatched_missing_and_foreign_keys_are_refused(tmp_path, config, params):
    save_adapter(tmp_path / "good", ALL, trained(ALL, params), "base", model_config=config)
    good = {name: read_tensor(info) for name, info in read_header(tmp_path / "good" / WEIGHTS).items()}

    def refused(name, tensors, message):
        with pytest.raises(ValueError, match=message):
            load_adapter(write_peft(tmp_path / name, tensors), model_config=config)

    # another prefix: PEFT itself would load nothing of it
    refused(
        "prefix", {f"x.{name}": a for name, a in good.items()}, r"44 tensors that match nothing .* wanted are names"
    )
    refused(
        "extra",
        good | {"base_model.model.score.weight": np.ones(3)},
        "1 tensors .* the first is base_model.model.score",
    )
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    refused("cut", {name: a for name, a in good.items() if name != key}, f"lacks {key}; it is not whole")
    refused("empty", {}, "0 tensors that match nothing")
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(tmp_path / "good", model_config=dataclasses.replace(config, d_model=64))
    deeper = dataclasses.replace(config, num_layers=4)
    with pytest.raises(ValueError, match=r"lacks base_model.model.model.layers.3"):
        load_adapter(tmp_path / "good", model_config=deeper)


def test_weights_of_the_base_that_peft_saves_along_must_be_the_base_s(tmp_path, config, params):
    save_model(tmp_path / "base", config=config, params=params, tokenizer=None)
    save_adapter(tmp_path / "good", ALL, trained(ALL, params), tmp_path / "base", model_config=config)
    tensors = {name: read_tensor(info) for name, info in read_header(tmp_path / "good" / WEIGHTS).items()}
    head = np.asarray(params["head"]["kernel"]).T
    key = "base_model.model.lm_head.base_layer.weight"
    same = write_peft(tmp_path / "same", tensors | {key: head}, base_model_name_or_path=str(tmp_path / "base"))
    assert open_model(same).lora is not None
    other = write_peft(tmp_path / "other", tensors | {key: head + 1}, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"carries a lm_head.weight of its own, which differs from the base's"):
        open_model(other)


def test_a_base_folder_without_weights_is_refused_when_saving(tmp_path, config, params):
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        save_adapter(tmp_path / "a", ALL, trained(ALL, params), tmp_path / "base", model_config=config)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_folders_that_are_not_whole(tmp_path, config):
    folder = write_peft(tmp_path / "adapter", {})
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors \(found: adapter_config.json\)"):
        load_adapter(folder, model_config=config)


def test_a_collection_that_is_not_the_config_s_is_not_saved(tmp_path, config, params):
    weights = trained(ALL, params)
    with pytest.raises(ValueError, match=r"which its config does not target"):
        save_adapter(tmp_path / "a", LoraConfig(rank=3, targets=("query",)), weights, "base", model_config=config)
    few = LoraConfig(rank=3, targets=("query",))
    with pytest.raises(ValueError, match="targets 'up', its weights have none"):
        save_adapter(
            tmp_path / "a",
            LoraConfig(rank=3, targets=("query", "up")),
            trained(few, params),
            "base",
            model_config=config,
        )
    assert list(tmp_path.iterdir()) == []
