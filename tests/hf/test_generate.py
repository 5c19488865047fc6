"""internjax.generate: the text that greedy decoding by whole forwards gives, for texts and conversations."""

import dataclasses

import numpy as np
import pytest

import internjax
from internjax.decode.sample import SamplingParams
from internjax.hf.generate import default_sampling, generate
from internjax.hf.generation import GenerationConfig, default_generation
from internjax.hf.open import Model, logits
from internjax.model.config import NoScaling
from internjax.text.chat import Message, render


@pytest.fixture(scope="module")
def model(config, params, tokenizer):
    config = dataclasses.replace(config, rope_scaling=NoScaling(), vocab_size=300)
    return Model(config, params, tokenizer, default_generation(tokenizer), None, None)


def greedy(model, ids, count):
    """Greedy continuation, one forward over all ids per token."""
    row = np.zeros((1, len(ids) + count), np.int64)
    row[0, : len(ids)] = ids
    for length in range(len(ids), len(ids) + count):
        row[0, length] = int(logits(model, row)[0, length - 1].argmax())
        if row[0, length] in model.generation.eos_ids:
            break
    return model.tokenizer.decode(row[0, len(ids) : length + 1].tolist())


def test_a_text_is_continued(model):
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("the cat")]
    text = generate(model, "the cat", max_new_tokens=12)
    assert text == greedy(model, ids, 12) and text
    assert internjax.generate is generate


def test_a_conversation_is_answered(model):
    turns = [Message("user", "the dog sat on")]
    ids = render(turns, model.tokenizer, add_generation_prompt=True).ids
    assert generate(model, turns, max_new_tokens=8) == greedy(model, ids, 8)


def test_sampling_is_the_folder_s_unless_given(model):
    sampled = dataclasses.replace(model, generation=GenerationConfig((2,), do_sample=True, temperature=1.5, top_k=7))
    assert default_sampling(sampled) == SamplingParams(temperature=1.5, top_k=7)
    assert default_sampling(model).temperature == 0.0
    hot = SamplingParams(temperature=3.0, seed=1)
    texts = {generate(model, "the", max_new_tokens=12, sampling=s) for s in (hot, dataclasses.replace(hot, seed=2))}
    assert len(texts) == 2
    assert generate(model, "the", max_new_tokens=12, sampling=hot) in texts


def test_the_longest_answer_is_the_folder_s_unless_given(model):
    short = dataclasses.replace(model, generation=dataclasses.replace(model.generation, max_new_tokens=3))
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("the cat")]
    assert generate(short, "the cat") == greedy(model, ids, 3)


def test_without_tokenizer_there_is_no_text(model):
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(dataclasses.replace(model, tokenizer=None), "the cat")
