"""Served weights in nf4, as QLoRA has them: answers are those of the values that the bits stand for."""

import dataclasses

import jax
import numpy as np
import pytest

from internjax import sharding
from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from internjax.model.quantize import QuantArray, Quantised, dequantize_params
from serve import __main__ as server
from serve.pipeline import Params, Pipeline
from tests.weights import random_params

SIZES = {"num_slots": 2, "max_context": 64, "prefill_chunk": 16}
PROMPT = [5, 6, 7, 300, 12, 9] * 5


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, config=tiny_model.config, params=tiny_model.params, tokenizer=tiny_model.tokenizer)
    return path


@pytest.fixture(scope="module")
def wide(tiny_model, tmp_path_factory):
    """A model wide enough for two devices to have whole groups of 64 rows and whole blocks of 256 scales."""
    sizes = {"vocab_size": 512, "d_model": 128, "num_layers": 1, "head_dim": 256, "num_kv_heads": 2, "ffn_dim": 512}
    config = dataclasses.replace(tiny_model.config, **sizes, initializer_range=0.1)
    path = tmp_path_factory.mktemp("models") / "wide"
    save_model(path, config=config, params=random_params(config), tokenizer=tiny_model.tokenizer)
    return path


def test_answers_are_those_of_the_values_that_the_bits_stand_for(folder):
    model, stored = open_model(folder, quantize=Quantised()), open_model(folder)
    kernel = model.params["layers"]["ffn"]["up"]["kernel"]
    assert (kernel.scheme, kernel.scales.dtype.name) == ("nf4", "uint8")
    assert isinstance(model.params["head"]["kernel"], QuantArray)
    full = dataclasses.replace(model, params=jax.jit(dequantize_params)(model.params))
    np.testing.assert_allclose(logits(model, [PROMPT]), logits(full, [PROMPT]), atol=1e-5)
    assert np.abs(logits(stored, [PROMPT]) - logits(full, [PROMPT])).max() > 1e-2, "nothing was rounded"
    with Pipeline(model, **SIZES) as pipeline:
        result = pipeline.complete(PROMPT, Params(max_tokens=24, temperature=0.0, logprobs=0)).result()
    ids = [*PROMPT, *result.ids]
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits(full, [ids])[0]))[len(PROMPT) - 1 : -1]
    assert [*result.ids] == logprobs_TV.argmax(axis=-1).tolist()
    np.testing.assert_allclose([token.logprob for token in result.tokens], logprobs_TV.max(axis=-1), atol=1e-4)


def test_two_devices_share_them_or_are_refused(wide, folder):
    alone = open_model(wide, quantize=Quantised())
    try:
        mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=1, tensor=2), devices=jax.devices()[:2])
        model = open_model(wide, mesh=mesh, quantize=Quantised())
        key = model.params["layers"]["attention"]["key"]["kernel"]
        assert key.steps.sharding.spec == key.values.sharding.spec == sharding.partition_spec((None, "embed", "heads"))
        jax.tree.map(np.testing.assert_array_equal, model.params, alone.params)
        with Pipeline(model, **SIZES) as pipeline:
            result = pipeline.complete(PROMPT, Params(max_tokens=12, temperature=0.0)).result()
        with pytest.raises(ValueError, match="mesh axis 'tensor' of size 2 does not divide its dimension"):
            open_model(folder, mesh=mesh, quantize=Quantised())
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])
    best = np.asarray(logits(alone, [[*PROMPT, *result.ids]]))[0].argmax(axis=-1)
    assert [*result.ids] == best[len(PROMPT) - 1 : -1].tolist()


def test_the_server_takes_it_and_replicas_of_it(folder, capsys):
    args = server.build_parser().parse_args(
        [str(folder), "--quantize", "nf4", "--replicas", "2", "--max-batch", "2", "--max-context", "64"]
    )
    with server.open_pipeline(args) as pipeline:
        texts = [result.ids for result in pipeline([PROMPT] * 6, Params(max_tokens=4, temperature=0.0))]
    assert len(set(texts)) == 1
    printed = capsys.readouterr().out
    assert "MiB nf4, computed" in printed and "parameters in nf4" in printed
    assert "replicas 2 on 1 devices each, with such a cache and 2 slots each" in printed
    assert "slots    4 answers at once" in printed
    try:
        assert server.main([str(folder), "--quantize", "nf4", "--tensor", "2", "--port", "0"]) == 1
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])
    assert server.main([str(folder), "--replicas", "5", "--tensor", "2", "--port", "0"]) == 1
    refused = capsys.readouterr().err
    assert "does not divide" in refused and "--replicas 5 on --tensor 2 devices each: 10 of them" in refused
