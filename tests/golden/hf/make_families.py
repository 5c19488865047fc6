"""Writes families.json and family_logits.safetensors beside it: logits of stock transformers for every family that it
has, on tensors of tests.hf.family_weights. Needs torch.

python -m tests.golden.hf.make_families
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from tests.hf.family_weights import tensors_of

HERE = Path(__file__).parent

# An odd vocabulary, and 20 tokens against 8 positions and windows of 5.
SIZES = dict(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8,
    rms_norm_eps=1e-5,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 8.0}
WINDOW = dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)
CASES = {
    "llama3": ("Llama", dict(head_dim=16, rope_parameters=LLAMA3)),
    "llama biased": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(head_dim=8, sliding_window=5)),
    "qwen2": ("Qwen2", dict()),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True) | WINDOW),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "qwen3 yarn": ("Qwen3", dict(head_dim=16, rope_parameters=YARN)),
    "qwen3 tied": ("Qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "glm": ("Glm", dict(head_dim=8, pad_token_id=0)),
}


def stock_model(case: str) -> torch.nn.Module:
    """Returns stock transformers' model of a case."""
    name, fields = CASES[case]
    config = getattr(transformers, f"{name}Config")(**SIZES, **fields, architectures=[f"{name}ForCausalLM"])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors_of(shapes).items()}, strict=False)
    model.tie_weights()
    return model


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(3, SIZES["vocab_size"], (2, 20))
    outputs, cases = {"tokens": tokens}, {}
    for case in CASES:
        model = stock_model(case)
        with torch.no_grad():
            outputs[case] = model(tokens).logits
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        cases[case] = {"config": json.loads(model.config.to_json_string()), "shapes": shapes}
    save_file(outputs, HERE / "family_logits.safetensors", metadata={"format": "pt"})
    (HERE / "families.json").write_text(json.dumps(cases, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
