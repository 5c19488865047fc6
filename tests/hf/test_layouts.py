"""Checkpoints of others mean here what they mean there: logits, and every byte on the way back."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from internjax.hf import loading
from internjax.hf.internlm2 import INTERNLM2, fuse_wqkv, split_wqkv
from internjax.hf.llama import LLAMA
from internjax.hf.mapping import leaf_shapes, tensor_names, tensor_shape
from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from internjax.model import decoder
from internjax.model.config import INTERNLM2_7B, INTERNLM2_20B, TINY, DynamicNTK, LinearScaling
from tests.hf import numpy_reference

TOKENS = [5, 17, 2, 44, 9, 9, 31, 60, 3, 95, 12, 7]  # longer than max_position_embeddings = 8


@pytest.mark.parametrize("case", ["plain", "dynamic", "linear", "tied"])
def test_llama_logits_are_those_of_stock_transformers(golden, make_folder, case):
    tensors = dict(golden["weights"])
    if case == "tied":
        del tensors["lm_head.weight"]
    model = open_model(make_folder("llama", golden["configs"][case], tensors))
    np.testing.assert_allclose(logits(model, golden["tokens"]), golden["logits"][case], rtol=0, atol=1e-5)


def test_the_golden_cases_differ_from_each_other(golden):
    cases = list(golden["logits"].values())
    differences = [np.abs(a - b).max() for i, a in enumerate(cases) for b in cases[:i]]
    assert min(differences) > 0.1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"model_type": "internlm", "num_key_value_heads": 6},
        {"num_key_value_heads": 1, "rope_theta": 1e6, "rms_norm_eps": 1e-2},
    ],
    ids=["plain", "dynamic", "linear", "tied", "early", "one group"],
)
def test_internlm2_logits_are_those_of_the_numpy_reference(internlm2_checkpoint, make_folder, fields):
    values, tensors = internlm2_checkpoint(**fields)
    model = open_model(make_folder("internlm2", values, tensors))
    wanted = numpy_reference.logits(TOKENS, tensors, values)
    np.testing.assert_allclose(logits(model, [TOKENS])[0], wanted, rtol=0, atol=1e-5)


def test_internlm2_reward_scores_are_those_of_the_numpy_reference(internlm2_checkpoint, make_folder):
    values, tensors = internlm2_checkpoint(reward=True, reward_token_id=92)
    model = open_model(make_folder("reward", values, tensors))
    assert model.config.head == "scalar"
    wanted = numpy_reference.logits(TOKENS, tensors, values)
    assert wanted.shape == (len(TOKENS), 1)
    np.testing.assert_allclose(logits(model, [TOKENS])[0], wanted, rtol=0, atol=1e-5)


def test_wqkv_rows_of_the_7b_are_the_published_ranges():
    # Each row of the fused matrix holds its own index.
    query, key, value = split_wqkv(np.arange(6144)[:, None], INTERNLM2_7B)
    assert (query.shape, key.shape, value.shape) == ((4096, 1), (1024, 1), (1024, 1))
    for group, (q, k, v) in {0: (0, 512, 640), 7: (5376, 5888, 6016)}.items():
        np.testing.assert_array_equal(query[group * 512 : group * 512 + 512, 0], np.arange(q, q + 512))
        np.testing.assert_array_equal(key[group * 128 : group * 128 + 128, 0], np.arange(k, k + 128))
        np.testing.assert_array_equal(value[group * 128 : group * 128 + 128, 0], np.arange(v, v + 128))
    np.testing.assert_array_equal(fuse_wqkv([query, key, value], INTERNLM2_7B)[:, 0], np.arange(6144))


@pytest.mark.parametrize(
    "config",
    [TINY, INTERNLM2_20B, dataclasses.replace(TINY, tie_embeddings=True), dataclasses.replace(TINY, head="scalar")],
    ids=["tiny", "20b", "tied", "scalar"],
)
@pytest.mark.parametrize("family", [LLAMA, INTERNLM2], ids=["llama", "internlm2"])
def test_a_table_names_every_parameter_once(config, family):
    abstract = decoder.abstract_params(config)
    shapes = {
        ".".join(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    wanted = {p: shape[1:] if p.startswith("layers.") else shape for p, shape in shapes.items()}
    assert leaf_shapes(config) == wanted
    rows = family.rows(config)
    assert sorted(leaf for row in rows for leaf in row.leaves) == sorted(wanted)
    stored = sum(int(np.prod(tensor_shape(row, config))) * len(tensor_names(row, config)) for row in rows)
    assert stored == sum(leaf.size for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_internlm2_round_trip_is_byte_identical(internlm2_checkpoint, make_folder, read_folder, tmp_path, dtype):
    values, tensors = internlm2_checkpoint(dtype=dtype)
    model = open_model(make_folder("source", values, tensors, shard_size="20KB"))
    assert model.params["layers"]["attention"]["key"]["kernel"].dtype == dtype
    save_model(tmp_path / "back", config=model.config, params=model.params, tokenizer=None, layout="internlm2")
    assert_same_bytes(read_folder(tmp_path / "back"), tensors)


def test_llama_round_trip_is_byte_identical(golden, make_folder, read_folder, tmp_path):
    model = open_model(make_folder("source", golden["configs"]["dynamic"], golden["weights"]))
    save_model(tmp_path / "back", config=model.config, params=model.params, tokenizer=None)
    assert_same_bytes(read_folder(tmp_path / "back"), golden["weights"])
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert LLAMA.config_from_hf(again) == LLAMA.config_from_hf(golden["configs"]["dynamic"])


def test_one_layout_through_the_other_and_back_is_byte_identical(
    internlm2_checkpoint, make_folder, read_folder, tmp_path
):
    values, tensors = internlm2_checkpoint(rope_scaling={"type": "dynamic", "factor": 2.0})
    model = open_model(make_folder("source", values, tensors))
    save_model(tmp_path / "llama", config=model.config, params=model.params, tokenizer=None, layout="llama")
    model = open_model(tmp_path / "llama")
    save_model(tmp_path / "back", config=model.config, params=model.params, tokenizer=None, layout="internlm2")
    assert_same_bytes(read_folder(tmp_path / "back"), tensors)
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert again["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    assert INTERNLM2.config_from_hf(again) == INTERNLM2.config_from_hf(values)


def assert_same_bytes(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("scaling", [None, LinearScaling(2.0), DynamicNTK(3.0)])
@pytest.mark.parametrize("family", [LLAMA, INTERNLM2], ids=["llama", "internlm2"])
def test_configs_survive_the_way_through_json(config, family, scaling):
    config = (
        dataclasses.replace(config, norm_eps=3e-6)
        if scaling is None
        else dataclasses.replace(config, rope_scaling=scaling, head="scalar")
    )
    back = family.config_from_hf(json.loads(json.dumps(family.config_to_hf(config))))
    how = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    assert dataclasses.replace(back, **how) == config


def test_internlm2_has_no_place_for_another_head_dim(config):
    with pytest.raises(ValueError, match="head_dim.*layout='llama'"):
        INTERNLM2.config_to_hf(dataclasses.replace(config, head_dim=16))


def test_layers_placed_one_by_one_are_the_same(internlm2_checkpoint, make_folder, monkeypatch):
    values, tensors = internlm2_checkpoint()
    folder = make_folder("source", values, tensors)
    for quantize in (None, "int8", "int4", "nf4"):
        whole = open_model(folder, quantize=quantize)
        with monkeypatch.context() as patch:
            patch.setattr(loading, "HOST_STACK_BYTES", 0)
            streamed = open_model(folder, quantize=quantize)
        assert jax.tree.structure(streamed.params) == jax.tree.structure(whole.params)
        jax.tree.map(np.testing.assert_array_equal, streamed.params, whole.params)


def test_a_tied_checkpoint_may_repeat_its_table_but_not_change_it(golden, make_folder):
    tensors = dict(golden["weights"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert "head" not in open_model(make_folder("same", golden["configs"]["tied"], tensors)).params
    with pytest.raises(ValueError, match="ties the embeddings, but lm_head.weight differs"):
        open_model(make_folder("other", golden["configs"]["tied"], golden["weights"]))


def test_buffers_of_old_checkpoints_are_ignored(internlm2_checkpoint, make_folder):
    values, tensors = internlm2_checkpoint()
    tensors["model.layers.0.attention.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    open_model(make_folder("old", values, tensors))


def test_mixed_dtypes_are_kept_where_they_can_be(internlm2_checkpoint, make_folder):
    values, tensors = internlm2_checkpoint(dtype=ml_dtypes.bfloat16)
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name] = tensors[name].astype(np.float32)
    params = open_model(make_folder("mixed", values, tensors)).params
    assert params["norm"]["scale"].dtype == np.float32
    assert params["layers"]["ffn"]["up"]["kernel"].dtype == ml_dtypes.bfloat16
