"""Live, with torch: stock transformers and this project read each other's folders and compute the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from internjax.hf.adapter import save_adapter
from internjax.hf.llama import LLAMA
from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from internjax.model.config import DynamicNTK, LinearScaling, NoScaling
from internjax.model.lora import LoraConfig, init_lora
from internjax.text.chat import Message, render

pytestmark = pytest.mark.parity

SCALINGS = [NoScaling(), DynamicNTK(2.0), LinearScaling(3.0)]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def random_tokens(vocab_size, length=24, seed=0):
    return np.random.default_rng(seed).integers(3, vocab_size, (2, length))


def stock_logits(torch, model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: type(scaling).__name__)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8),
        dict(num_attention_heads=4, num_key_value_heads=1, head_dim=16),
        dict(num_attention_heads=4, num_key_value_heads=4, head_dim=10),
    ],
    ids=["grouped", "one group, wide heads", "ungrouped, other head_dim"],
)
def test_stock_llama_folders_compute_the_same_here(torch, tmp_path, scaling, tied, sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {NoScaling: "default", DynamicNTK: "dynamic", LinearScaling: "linear"}[type(scaling)]
    parameters = {"rope_type": rope, "rope_theta": 5000.0} | ({"factor": scaling.factor} if rope != "default" else {})
    torch.manual_seed(0)
    stock = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=3,
            max_position_embeddings=16,
            initializer_range=0.12,
            rope_parameters=parameters,
            tie_word_embeddings=tied,
            **sizes,
        )
    ).eval()
    for name, parameter in stock.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    stock.save_pretrained(tmp_path / "stock", max_shard_size="30KB")
    tokens = random_tokens(101)
    model = open_model(tmp_path / "stock")
    np.testing.assert_allclose(logits(model, tokens), stock_logits(torch, stock, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: type(scaling).__name__)
def test_exports_load_in_stock_transformers_and_generate_the_same(
    torch, tmp_path, config, make_params, tokenizer, scaling
):
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(config, rope_scaling=scaling, initializer_range=0.12)
    save_model(tmp_path / "ours", config=config, params=make_params(config), tokenizer=tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert type(stock).__name__ == "LlamaForCausalLM" and stock.dtype == torch.float32
    assert stock.generation_config.eos_token_id == [2, tokenizer.special["<|im_end|>"]]
    model, tokens = open_model(tmp_path / "ours"), random_tokens(config.vocab_size)
    np.testing.assert_allclose(logits(model, tokens), stock_logits(torch, stock, tokens), rtol=0, atol=1e-5)
    # Greedy, one whole forward per token on both sides, from within the trained length of 16 to beyond it.
    row = tokens[:1, :14]
    for _ in range(5):
        ours, theirs = logits(model, row)[:, -1], stock_logits(torch, stock, row)[:, -1]
        assert ours.argmax() == theirs.argmax()
        row = np.concatenate([row, [[int(ours.argmax())]]], axis=1)


def test_a_scalar_head_is_a_stock_sequence_classifier(torch, tmp_path, config, make_params, tokenizer):
    from transformers import AutoModelForSequenceClassification

    config = dataclasses.replace(config, head="scalar", rope_scaling=NoScaling())
    save_model(tmp_path / "reward", config=config, params=make_params(config), tokenizer=tokenizer)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype="auto")
    tokens = random_tokens(config.vocab_size, 12)
    scores = logits(open_model(tmp_path / "reward"), tokens)
    with torch.no_grad():
        theirs = stock(torch.from_numpy(tokens)).logits.numpy()
    assert theirs.shape == (2, 1)
    np.testing.assert_allclose(scores[:, -1], theirs, rtol=0, atol=1e-5)
    stock.save_pretrained(tmp_path / "back")
    np.testing.assert_allclose(logits(open_model(tmp_path / "back"), tokens), scores, rtol=0, atol=1e-6)


def test_the_hf_back_end_of_lm_eval_scores_the_same(torch, tmp_path, config, make_params, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    config = dataclasses.replace(config, rope_scaling=NoScaling())
    save_model(tmp_path / "model", config=config, params=make_params(config), tokenizer=tokenizer)
    back_end = HFLM(pretrained=str(tmp_path / "model"), device="cpu", batch_size=2, dtype="float32")
    pairs = [("the cat sat on", " the mat"), ("the dog", " sat on the cat")]
    theirs = back_end.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    model = open_model(tmp_path / "model")
    for (context, text), (log_likelihood, _) in zip(pairs, theirs, strict=True):
        first, ids = len(tokenizer.encode(context)), tokenizer.encode(context + text)
        logprobs_TV = jax.nn.log_softmax(logits(model, [ids])[0])
        ours = sum(float(logprobs_TV[t - 1, ids[t]]) for t in range(first, len(ids)))
        assert log_likelihood == pytest.approx(ours, abs=1e-4) and ours < -5


@pytest.mark.parametrize("layout", ["llama", "internlm2"])
def test_the_tokenizer_loads_without_remote_code_and_renders_the_same(tmp_path, config, params, tokenizer, layout):
    from transformers import AutoTokenizer

    save_model(tmp_path / "ours", config=config, params=params, tokenizer=tokenizer, layout=layout)
    stock = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "the cat sat.\n  def f(x): return x  # 你好 🙂"
    assert stock.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert stock.decode(tokenizer.encode(text)) == text
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
    ours = render([Message(**turn) for turn in turns], tokenizer, add_generation_prompt=True).ids
    theirs = stock.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(theirs) == ours
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (1, 2, 2)


def test_a_stock_bfloat16_checkpoint_goes_through_byte_by_byte(torch, tmp_path, read_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "stock")
    model = open_model(tmp_path / "stock")
    save_model(
        tmp_path / "ours",
        config=model.config,
        params=model.params,
        tokenizer=None,
        generation=model.generation,
    )
    stock, ours = read_folder(tmp_path / "stock"), read_folder(tmp_path / "ours")
    assert {name: array.tobytes() for name, array in stock.items()} == {n: a.tobytes() for n, a in ours.items()}
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert values["torch_dtype"] == "bfloat16"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").dtype == torch.bfloat16
    assert LLAMA.config_from_hf(values) == LLAMA.config_from_hf(
        json.loads((tmp_path / "stock/config.json").read_text())
    )


def test_adapters_load_in_peft_and_compute_the_same(torch, tmp_path, config, make_params, tokenizer):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(config, rope_scaling=NoScaling(), initializer_range=0.12)
    params = make_params(config)
    save_model(tmp_path / "base", config=config, params=params, tokenizer=tokenizer)
    lora = LoraConfig(rank=3, alpha=6.0, targets=("query", "value", "down", "head"))
    weights = jax.tree.map(lambda leaf: leaf + 0.05, init_lora(lora, params, jax.random.key(0)))
    save_adapter(tmp_path / "adapter", lora, weights, tmp_path / "base", model_config=config)
    stock = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto"), tmp_path / "adapter"
    )
    tokens = random_tokens(config.vocab_size, 12)
    model = open_model(tmp_path / "adapter")
    np.testing.assert_allclose(logits(model, tokens), stock_logits(torch, stock, tokens), rtol=0, atol=1e-5)
    stock.save_pretrained(tmp_path / "back")
    back = open_model(f"{tmp_path / 'base'}+{tmp_path / 'back'}")
    jax.tree.map(np.testing.assert_array_equal, back.lora.weights, model.lora.weights)
