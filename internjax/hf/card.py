"""The model card of an exported folder: README.md with what is known about the model, and how to run it."""

import json
from collections.abc import Mapping
from typing import Any

from internjax.hf.fields import scaling_to_hf
from internjax.hf.quantized import read_quantization
from internjax.model.config import ModelConfig, num_params

# Layouts whose classes transformers has itself, without remote code.
_STOCK = ("llama", "mistral", "qwen2", "qwen3", "glm")

_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""

_CLASSIFIER = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER")  # one label: the score of the last token
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""

_INTERNJAX = """```python
import internjax

model = internjax.open_model("FOLDER")
logits = internjax.logits(model, [[1, 2, 3]])
```"""


def model_card(name: str, config: ModelConfig, about: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Returns the text of README.md."""
    proof = about["proof"]
    facts = {
        "architecture": f"{values['architectures'][0]} ({about['layout']} layout)",
        "parameters": f"{num_params(config):,}",
        "layers x width": f"{config.num_layers} x {config.d_model}",
        "heads (query / key-value) x dimension": f"{config.num_heads} / {config.num_kv_heads} x {config.head_dim}",
        "feed-forward width": config.ffn_dim,
        "vocabulary": config.vocab_size,
        "trained length": config.max_position_embeddings,
        "rotary base, scaling": f"{config.rope_theta:g}, {_scaling(config)}",
        "stored as": _stored(values),
        "largest logit difference after reading back": f"{proof['max_logit_difference']:.2g}",
        "largest logit difference to the source": f"{proof['max_logit_difference_to_source']:.2g}",
    }
    sections = [
        "---\nlibrary_name: transformers\ntags:\n- internjax\n---",
        f"# {name}",
        f"Written by {about['made_by']}.",
        "## Model\n\n" + _table(facts),
    ]
    if about["provenance"]:
        sections.append("## How it was made\n\n" + _table(about["provenance"]))
    usage = [_INTERNJAX]
    if about["layout"] in _STOCK:
        usage.insert(0, _TRANSFORMERS if config.head == "lm" else _CLASSIFIER)
    sections.append("## Use\n\n" + "\n\n".join(usage))
    sections.append("`python -m internjax.hf check FOLDER` verifies every file and the recorded logits.")
    return "\n\n".join(sections) + "\n"


def _stored(values: Mapping[str, Any]) -> str:
    quantization = read_quantization(values)
    return values["torch_dtype"] + ("" if quantization is None else f", the layers' kernels as {quantization}")


def _scaling(config: ModelConfig) -> str:
    scaling = scaling_to_hf(config.rope_scaling)
    return "none" if scaling is None else f"{scaling['type']} x {scaling['factor']:g}"


def _table(rows: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for key, value in rows.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"| {key} | {' '.join(text.split()).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
