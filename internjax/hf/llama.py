"""Llama's layout in Hugging Face: what stock transformers, vLLM and others load without remote code."""

from collections.abc import Iterable, Mapping
from typing import Any

from internjax.hf.fields import DECODER_FIELDS, check_fields, decoder_config, decoder_fields, given
from internjax.hf.mapping import Family, Row
from internjax.model.config import ModelConfig

_HEADS = {"LlamaForCausalLM": "lm", "LlamaForSequenceClassification": "scalar"}


def config_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of a Llama config.json."""
    check_fields(values, honoured=DECODER_FIELDS | {"head_dim"}, allow_unknown=allow_unknown)
    architecture = given(values, "architectures", ["LlamaForCausalLM"])[0]
    if architecture not in _HEADS:
        raise ValueError(f"config.json names the architecture {architecture!r}; supported are {', '.join(_HEADS)}")
    num_labels = len(given(values, "id2label", {0: 0, 1: 1}))
    if _HEADS[architecture] == "scalar" and num_labels != 1:
        raise ValueError(f"{architecture} has {num_labels} labels; a scalar head has 1 (id2label with one entry)")
    return decoder_config(values, head=_HEADS[architecture], head_dim=values.get("head_dim"))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in Llama's layout."""
    values = decoder_fields(config)
    scaling = values["rope_scaling"]
    if scaling is not None:  # transformers before 4.43 read "type", later ones "rope_type"
        values["rope_scaling"] = scaling | {"rope_type": scaling["type"]}
    architecture = next(name for name, head in _HEADS.items() if head == config.head)
    labels = {} if config.head == "lm" else {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    features = {"head_dim": config.head_dim, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
    return {"architectures": [architecture], "model_type": "llama"} | values | features | labels


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the table of Llama's tensors."""
    layer = "model.layers.{layer}"
    head = "lm_head.weight" if config.head == "lm" else "score.weight"
    return (
        Row("model.embed_tokens.weight", ("embed.embedding",)),
        Row(f"{layer}.input_layernorm.weight", ("layers.attention_norm.scale",)),
        Row(f"{layer}.self_attn.q_proj.weight", ("layers.attention.query.kernel",)),
        Row(f"{layer}.self_attn.k_proj.weight", ("layers.attention.key.kernel",)),
        Row(f"{layer}.self_attn.v_proj.weight", ("layers.attention.value.kernel",)),
        Row(f"{layer}.self_attn.o_proj.weight", ("layers.attention.output.kernel",)),
        Row(f"{layer}.post_attention_layernorm.weight", ("layers.ffn_norm.scale",)),
        Row(f"{layer}.mlp.gate_proj.weight", ("layers.ffn.gate.kernel",)),
        Row(f"{layer}.mlp.up_proj.weight", ("layers.ffn.up.kernel",)),
        Row(f"{layer}.mlp.down_proj.weight", ("layers.ffn.down.kernel",)),
        Row("model.norm.weight", ("norm.scale",)),
    ) + (() if config.tie_embeddings else (Row(head, ("head.kernel",)),))


LLAMA = Family("llama", config_from_hf, config_to_hf, rows, head="lm_head.weight")
