"""Adapters chosen by the model's name, beside a model that drafts."""

import dataclasses

import jax
import numpy as np
import openai
import pytest

from internjax.decode.speculate import DraftModel
from internjax.hf.adapter import save_adapter
from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from internjax.model.lora import LoraConfig, init_lora
from serve.openai import create_app
from serve.pipeline import Params, Pipeline
from serve.server import start_server

LORA = LoraConfig(rank=4, alpha=8.0, targets=("query", "value", "down"))


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A model, the same under another name, and an adapter of each."""
    root = tmp_path_factory.mktemp("adapters")
    fresh, rng = jax.device_get(init_lora(LORA, tiny_model.params, jax.random.key(1))), np.random.default_rng(2)
    trained = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32), fresh)
    for base, adapter in (("base", "first"), ("other", "foreign")):
        save_model(root / base, config=tiny_model.config, params=tiny_model.params, tokenizer=tiny_model.tokenizer)
        save_adapter(root / adapter, LORA, trained, root / base, model_config=tiny_model.config)
    return root


@pytest.fixture(scope="module")
def pipeline(folders):
    model = open_model(folders / "base")
    sizes = {"num_slots": 2, "max_context": 128, "max_adapters": 2, "adapters": {"first": folders / "first"}}
    with Pipeline(model, **sizes, speculation=DraftModel(model.config, num_drafts=2), draft=model) as pipeline:
        yield pipeline


def assert_greedy(model, result, prompt):
    """Every token is the most likely one of the model as it stands in a folder."""
    ids = [*prompt, *result.ids]
    best = np.asarray(logits(model, [ids]))[0].argmax(axis=-1)
    assert [*result.ids] == best[len(prompt) - 1 : -1].tolist()


def test_the_name_of_the_model_chooses_the_adapter(pipeline, folders):
    prompt, greedy = [5, 6, 7] * 7, {"max_tokens": 24, "temperature": 0}
    base, adapted = open_model(folders / "base"), open_model(folders / "base", adapters=[folders / "first"])
    plain = pipeline.complete(prompt, Params(max_tokens=24, temperature=0.0)).result()
    assert_greedy(base, plain, prompt)
    changed = pipeline.complete(prompt, Params(max_tokens=24, temperature=0.0, adapter="first")).result()
    assert_greedy(adapted, changed, prompt)
    stats = pipeline.engine.stats()
    assert stats.num_turns < stats.num_drawn_tokens  # the model drafts for itself: what it says comes true
    with start_server(pipeline, model_name="tiny", drain_seconds=1) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            assert [model.id for model in client.models.list()] == ["tiny", "first"]
            assert client.models.retrieve("first").parent == "tiny"
            for name, result in (("tiny", plain), ("first", changed)):
                answer = client.completions.create(model=name, prompt=prompt, **greedy)
                assert (answer.model, answer.choices[0].text) == (name, result.text)
                # Pages are shared with those who asked the same of the same adapter, and said so.
                assert answer.usage.prompt_tokens_details.cached_tokens == 20
            with pytest.raises(openai.NotFoundError, match="'second' is not served here; 'tiny', 'first' are"):
                client.completions.create(model="second", prompt="x")


def test_adapters_come_and_go(pipeline, folders):
    pipeline.load_adapter("second", folders / "first")
    assert pipeline.adapters == ("first", "second")
    with pytest.raises(ValueError, match="places are taken"):
        pipeline.load_adapter("third", folders / "first")
    pipeline.unload_adapter("second")
    with pytest.raises(ValueError, match="'second' is not loaded"):
        pipeline.complete("x", Params(adapter="second"))
    with pytest.raises(ValueError, match=r"was trained on .*other"):
        pipeline.load_adapter("foreign", folders / "foreign")
    with pytest.raises(ValueError, match="no adapter_config.json"):
        pipeline.load_adapter("base", folders / "base")
    with pytest.raises(ValueError, match="are both named 'first'"):
        create_app(pipeline, model_name="first")


def test_drafts_of_another_vocabulary_are_refused(pipeline, tiny_model, folders):
    swapped = dataclasses.replace(tiny_model.tokenizer)
    object.__setattr__(swapped, "token", lambda token_id: tiny_model.tokenizer.token(token_id ^ 1))
    draft = dataclasses.replace(tiny_model, tokenizer=swapped)
    with pytest.raises(ValueError, match="the same tokenizer"):
        Pipeline(tiny_model, speculation=DraftModel(tiny_model.config), draft=draft)
    with pytest.raises(ValueError, match="merge it"):
        Pipeline(tiny_model, speculation=DraftModel(tiny_model.config), draft=dataclasses.replace(draft, lora=object()))
