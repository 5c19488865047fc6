"""Writes the goldens beside it: logits of stock transformers on tiny random weights. Needs torch.

python tests/golden/hf/make.py
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent

# head_dim is not hidden_size / num_attention_heads, so that a reader that computes it is found out.
SIZES = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=8,
    rms_norm_eps=1e-5,
    initializer_range=0.15,
)
CASES = {
    "plain": dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "dynamic": dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    "linear": dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "tied": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=True),
}


def main() -> None:
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, **CASES["plain"]))
    for name, parameter in plain.named_parameters():
        if name.endswith("norm.weight"):  # ones would hide a norm that is left out or misplaced
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    tokens = torch.randint(3, SIZES["vocab_size"], (2, 20))  # 20 > max_position_embeddings: beyond the window
    outputs, configs = {"tokens": tokens}, {}
    for case, fields in CASES.items():
        config = LlamaConfig(**SIZES, **fields, architectures=["LlamaForCausalLM"])
        model = LlamaForCausalLM(config).eval()
        kept = {name: tensor for name, tensor in weights.items() if not (case == "tied" and name == "lm_head.weight")}
        model.load_state_dict(kept, strict=case != "tied")
        model.tie_weights()
        with torch.no_grad():
            outputs[case] = model(tokens).logits
        configs[case] = json.loads(config.to_json_string())
    save_file(weights, HERE / "llama_weights.safetensors", metadata={"format": "pt"})
    save_file(outputs, HERE / "llama_logits.safetensors", metadata={"format": "pt"})
    (HERE / "llama_configs.json").write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
