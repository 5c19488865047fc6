"""Live, with torch: greedy answers are those of the generate loop of stock transformers, whatever ends them."""

import numpy as np
import pytest

from internjax.decode.generate import LENGTH, STOP, generate
from internjax.decode.sample import SamplingParams, stack
from internjax.hf.open import open_model
from internjax.hf.save import save_model
from internjax.model.config import ModelConfig
from internjax.text.tokenizer import train_tokenizer
from serve.answering.params import Params
from serve.pipeline import Pipeline
from tests.weights import random_params

pytestmark = pytest.mark.parity

BATCHES = (1, 3, 8, 16)
LONGEST, NEW, LEAST = 20, 24, 6
PAD = 0


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 model in the Llama layout that says tokens of several letters: others have logits of 0."""
    tokenizer = train_tokenizer(
        ["the cat sat on a mat, a dog ran into it; then both went over to sleep " * 4], vocab_size=320
    )
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        max_position_embeddings=64,
        rope_theta=10_000.0,
        initializer_range=0.2,
        dtype="float32",
    )
    params = random_params(config)
    pieces = [tokenizer.decode([token_id]) for token_id in range(config.vocab_size)]
    said = [token_id for token_id, piece in enumerate(pieces) if len(piece) > 1 and piece.isprintable()]
    assert len(said) > 20
    kernel = np.zeros_like(params["head"]["kernel"])
    kernel[:, said] = params["head"]["kernel"][:, said]
    path = tmp_path_factory.mktemp("parity") / "model"
    save_model(path, config=config, params=params | {"head": {"kernel": kernel}}, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def stock(torch, folder):
    """Returns what stock transformers draws behind prompts, padded on the left: `[B, N]`, and PAD behind their ends."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    model.generation_config.eos_token_id = None

    def draw(prompts, **settings):
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "tokenizer": tokenizer} | settings
        with torch.no_grad():
            return model.generate(ids_BT, attention_mask=mask_BT, **settings)[:, longest:].numpy()

    return draw


@pytest.fixture(scope="module")
def model(folder):
    return open_model(folder)


@pytest.fixture(scope="module")
def pipeline(model):
    """Of fewer slots than the largest batch, and pages and chunks that prompts end within."""
    with Pipeline(model, num_slots=5, page_size=4, prefill_chunk=16) as pipeline:
        yield pipeline


def prompts_of(batch):
    rng = np.random.default_rng(batch)
    lengths = rng.permutation([LONGEST, 1, *rng.integers(1, LONGEST, batch)][:batch])
    return [rng.integers(3, 300, length).tolist() for length in lengths]


def generated(model, prompts, stop_ids, **sampling):
    """Returns what `decode.generate` draws, as `stock` does, and why each row ended."""
    padded_BT = np.zeros((len(prompts), LONGEST), np.int32)
    for row_T, prompt in zip(padded_BT, prompts):
        row_T[: len(prompt)] = prompt
    found = generate(
        model.params,
        padded_BT,
        np.array([len(prompt) for prompt in prompts], np.int32),
        config=model.config,
        sampling=stack([SamplingParams(temperature=0.0, **sampling)] * len(prompts)),
        max_new_tokens=NEW,
        stop_ids=stop_ids,
    )
    ids = [row[:length] for row, length in zip(found.tokens_BN.tolist(), found.lengths_B.tolist())]
    return ids, found.finish_B.tolist()


def answered(pipeline, prompts, stop_ids=(), **settings):
    params = Params(temperature=0.0, max_tokens=NEW, ignore_eos=True, stop_token_ids=stop_ids, **settings)
    return pipeline(prompts, params)


def padded(rows, width):
    return np.array([[*row, *[PAD] * (width - len(row))] for row in rows])


@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_answers_and_where_they_end(stock, model, pipeline, batch):
    """Ragged prompts: no end but the longest length, several stop ids, and no end before so many tokens."""
    prompts = prompts_of(batch)
    free_BN = stock(prompts)
    # What some rows say early and late.
    stops = tuple({int(token) for token in (free_BN[0, 2], free_BN[-1, 9], free_BN[batch // 2, -2])})
    ends = []
    for stop_ids, least in (((), 0), (stops, 0), (stops, LEAST)):
        theirs = free_BN
        if stop_ids:
            theirs = stock(prompts, eos_token_id=list(stop_ids), min_new_tokens=least)
        ours, finish = generated(model, prompts, stop_ids, min_new_tokens=least)
        answers = answered(pipeline, prompts, stop_ids, min_tokens=least)
        np.testing.assert_array_equal(padded(ours, theirs.shape[1]), theirs)
        assert [list(answer.ids) for answer in answers] == ours
        assert [answer.finish for answer in answers] == [{STOP: "stop", LENGTH: "length"}[each] for each in finish]
        ends.append([len(row) for row in ours])
    assert ends[0] == [NEW] * batch and ends[1][0] <= 3 and min(ends[2]) >= LEAST
    assert ends[2] != ends[1]


@pytest.mark.parametrize("batch", BATCHES)
def test_answers_that_end_with_a_string(stock, model, pipeline, batch):
    """Strings that begin and end in the midst of tokens; the text is cut where the string begins."""
    prompts = prompts_of(batch)
    free = [[model.tokenizer.decode([token_id]) for token_id in row] for row in stock(prompts).tolist()]
    stops = tuple(row[i][1:] + row[i + 1] + row[i + 2][:1] for row, i in ((free[0], 2), (free[-1], 11)))
    free = ["".join(pieces) for pieces in free]
    # It fills ended rows up with PAD only where there is a stop id: one that is never said.
    theirs = stock(prompts, stop_strings=list(stops), eos_token_id=model.tokenizer.eos_id)
    answers = answered(pipeline, prompts, stop=stops)
    np.testing.assert_array_equal(padded([answer.ids for answer in answers], theirs.shape[1]), theirs)
    for answer, text in zip(answers, free):
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
        assert (answer.text, answer.stop) == ((text[: min(found)[1]], min(found)[2]) if found else (text, None))
    assert answers[0].stop in stops and answers[-1].stop in stops
