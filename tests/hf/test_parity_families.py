"""Live, with torch: stock transformers and this project read each other's folders of every family that both have."""

import numpy as np
import pytest

from internjax.hf.families import family_of, fitting_layout
from internjax.hf.open import logits, open_model
from internjax.hf.resolve import read_json
from internjax.hf.save import save_model

pytestmark = pytest.mark.parity

CASES = ["llama3", "llama biased", "mistral", "qwen2", "qwen2 tied", "qwen3", "qwen3 yarn", "qwen3 tied", "glm"]


@pytest.mark.parametrize("case", CASES)
def test_stock_folders_and_ours_compute_the_same(tmp_path, case):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from tests.golden.hf.make_families import CASES as MADE
    from tests.golden.hf.make_families import stock_model

    assert CASES == list(MADE)
    stock = stock_model(case)
    stock.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    tokens = np.random.default_rng(0).integers(3, 37, (2, 24))
    with torch.no_grad():
        wanted = stock(torch.from_numpy(tokens)).logits.numpy()
    model = open_model(tmp_path / "stock")
    np.testing.assert_allclose(logits(model, tokens), wanted, rtol=0, atol=1e-5)
    layout = family_of(read_json(tmp_path / "stock" / "config.json")).name
    assert fitting_layout(model.config) == layout
    save_model(tmp_path / "ours", config=model.config, params=model.params, tokenizer=None, layout=layout)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert type(back) is type(stock)
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.from_numpy(tokens)).logits.numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["Qwen2", "Mistral", "Glm"])
def test_a_scalar_head_is_a_stock_sequence_classifier(tmp_path, name):
    torch = pytest.importorskip("torch")
    import transformers

    from tests.golden.hf.make_families import SIZES

    config = getattr(transformers, f"{name}Config")(**SIZES, num_labels=1, pad_token_id=0, head_dim=8)
    torch.manual_seed(0)
    stock = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    tokens = np.random.default_rng(0).integers(3, 37, (2, 12))
    with torch.no_grad():
        wanted = stock(torch.from_numpy(tokens)).logits.numpy()
    model = open_model(tmp_path / "stock")
    assert model.config.head == "scalar"
    np.testing.assert_allclose(logits(model, tokens)[:, -1], wanted, rtol=0, atol=1e-5)
