"""Reading a config.json without overlooking anything: every field is honoured, known to have no effect, or refused."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from internjax.model.config import (
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    NoScaling,
    RopeScaling,
    YarnScaling,
)

# Fields of Hugging Face configs that do not change what the model computes.
BOOKKEEPING = frozenset(
    "_attn_implementation_autoset _name_or_path architectures attn_implementation auto_map bos_token_id dtype "
    "eos_token_id finetuning_task id2label label2id model_type name_or_path num_labels output_attentions "
    "output_hidden_states pad_token_id prefix pretraining_tp problem_type return_dict sep_token_id "
    "task_specific_params tokenizer_class torch_dtype torchscript transformers.js_config transformers_version "
    "unk_token_id use_bfloat16 use_cache use_return_dict".split()
)

# Sampling defaults that older transformers kept in config.json; internjax.hf.generation reads them there.
GENERATION = frozenset(
    "bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length max_new_tokens min_length min_p no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate "
    "suppress_tokens temperature top_k top_p typical_p".split()
)

# Fields that change the computation and have one value under which it is the one built here. Absent means that value.
FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bias": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "hidden_act": "silu",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "quantization_config": None,
    "sliding_window": None,
    "tie_encoder_decoder": False,
}


def check_fields(
    values: Mapping[str, Any],
    *,
    honoured: Collection[str],
    fixed: Mapping[str, Any] = {},
    ignored: Collection[str] = (),
    allow_unknown: Iterable[str] = (),
) -> None:
    """Raises ValueError naming every field of a config.json that would be ignored although it may matter.

    Passed are the fields in `honoured`, bookkeeping (and the family's own, `ignored`), fields that have the only value
    supported here (`FIXED`, and the family's own, `fixed`), and fields that are null or false (absent features).
    `allow_unknown` names further fields to read as if they were absent.
    """
    allowed = set(allow_unknown)
    if read := sorted(allowed & set(honoured) & values.keys()):
        raise ValueError(
            f"config.json: {', '.join(read)} is known and honoured here, so it cannot be read as if it were absent; "
            "take it out of allow_unknown, or out of config.json"
        )
    passed = BOOKKEEPING | GENERATION | set(honoured) | set(ignored) | allowed
    only = FIXED | dict(fixed)
    wrong = {}
    for name, value in values.items():
        if name in passed:
            continue
        if name in only:
            if value not in (only[name], None):
                wrong[name] = f"{name} is {value!r}, supported is {only[name]!r}"
        elif value is not None and value is not False:
            wrong[name] = f"{name} = {value!r} is not known here"
    if wrong:
        names = ", ".join(f"{name!r}" for name in wrong)
        raise ValueError(
            f"config.json: {'; '.join(wrong.values())}. Convert the checkpoint to an architecture that is supported; "
            f"or, if you know that it changes nothing for your purpose, pass allow_unknown=({names},) "
            f"(--allow-unknown {' '.join(wrong)})"
        )


def without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a config.json but those named."""
    names = set(names)
    return {name: value for name, value in values.items() if name not in names}


def required(values: Mapping[str, Any], *names: str) -> list[Any]:
    """Returns the sizes that no model can do without; raises ValueError naming what is missing or no whole number."""
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}; take the config.json that belongs to the weights")
    for name in names:
        if not isinstance(values[name], int) or isinstance(values[name], bool):
            raise ValueError(f"config.json: {name} is {values[name]!r}; it must be a whole number")
    return [values[name] for name in names]


def given(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a field, or `default` where it is absent or null."""
    value = values.get(name)
    return default if value is None else value


def flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    """Returns a field that is true or false; raises ValueError for anything else."""
    value = given(values, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {name} is {value!r}; it must be true or false")
    return value


def read_head(values: Mapping[str, Any], heads: Mapping[str, Literal["lm", "scalar"]]) -> Literal["lm", "scalar"]:
    """Returns the head of the architecture that config.json names, the first of `heads` where it names none.

    Raises ValueError for an architecture that is not in `heads`, and for a classifier of several labels.
    """
    architecture = given(values, "architectures", list(heads))[0]
    if architecture not in heads:
        raise ValueError(f"config.json names the architecture {architecture!r}; supported are {', '.join(heads)}")
    num_labels = len(given(values, "id2label", {0: 0, 1: 1}))
    if architecture.endswith("ForSequenceClassification") and num_labels != 1:
        raise ValueError(f"{architecture} has {num_labels} labels; a scalar head has 1 (id2label with one entry)")
    return heads[architecture]


def stock_heads(name: str) -> dict[str, Literal["lm", "scalar"]]:
    """Returns the two architectures of a family in stock transformers, with their heads."""
    return {f"{name}ForCausalLM": "lm", f"{name}ForSequenceClassification": "scalar"}


def head_fields(config: ModelConfig, heads: Mapping[str, str], *, layout: str) -> dict[str, Any]:
    """Returns `architectures`, and the labels of a classifier of one score: the inverse of `read_head`."""
    found = [name for name, head in heads.items() if head == config.head]
    if not found:
        raise ValueError(f"layout {layout!r} has no architecture with a {config.head} head; use layout='llama'")
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {"architectures": found} | (labels if found[0].endswith("ForSequenceClassification") else {})


_SCALINGS = {
    "default": NoScaling,
    "linear": LinearScaling,
    "dynamic": DynamicNTK,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
# What a scaling need not say: the default of our class is that of transformers.
_OPTIONAL = {"beta_fast", "beta_slow", "attention_factor"}


def read_rope(values: Mapping[str, Any], *, default_theta: float) -> tuple[float, RopeScaling]:
    """Returns the rotary base and its scaling, from `rope_parameters` (transformers 5) or the older two fields."""
    scaling = dict(given(values, "rope_parameters", {})) or dict(given(values, "rope_scaling", {}))
    theta = scaling.pop("rope_theta", None)
    theta = given(values, "rope_theta", default_theta) if theta is None else theta
    kinds = {scaling.pop(name) for name in ("rope_type", "type") if scaling.get(name) is not None}
    if len(kinds) > 1:
        raise ValueError(f"config.json names two rotary scalings, {sorted(kinds)}; keep the one that was trained with")
    kind = kinds.pop() if kinds else "default"
    if kind not in _SCALINGS:
        raise ValueError(
            f"config.json scales rotary positions by {kind!r}; supported are {', '.join(_SCALINGS)}. Within the "
            "length that the model was trained with before, remove the scaling"
        )
    names = [field.name for field in dataclasses.fields(_SCALINGS[kind])]
    numbers = {name: scaling.pop(name, None) for name in names}
    partial = scaling.pop("partial_rotary_factor", None)
    scaling.pop("factor", None)  # kind "default" may carry one, which transformers does not read
    unknown = sorted(name for name, value in scaling.items() if value is not None)
    if unknown or partial not in (None, 1.0):
        raise ValueError(
            f"config.json's rotary scaling {kind!r} has "
            + (f"partial_rotary_factor {partial}, supported is 1.0" if not unknown else f"unknown fields {unknown}")
            + f"; supported are {', '.join(['rope_type', 'rope_theta', *names])}"
        )
    numbers = {name: value for name, value in numbers.items() if value is not None}
    missing = [name for name in names if name not in numbers and name not in _OPTIONAL]
    if missing:
        raise ValueError(
            f"config.json's rotary scaling {kind!r} has no {', '.join(missing)}; add what was trained with"
        )
    whole = {"original_max_position_embeddings"}
    numbers = {name: int(value) if name in whole else float(value) for name, value in numbers.items()}
    return float(theta), _SCALINGS[kind](**numbers)


def scaling_to_hf(scaling: RopeScaling) -> dict[str, Any] | None:
    """Returns the scaling as config.json spells it, or None without one."""
    if scaling == NoScaling():
        return None
    kind = next(kind for kind, of in _SCALINGS.items() if isinstance(scaling, of))
    return {"type": kind} | {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}


# Fields that decoder_config reads, in every layout.
DECODER_FIELDS = frozenset(
    "hidden_size initializer_range intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
    "num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size".split()
)


def decoder_config(
    values: Mapping[str, Any], *, head: Literal["lm", "scalar"], head_dim: int | None = None
) -> ModelConfig:
    """Returns the ModelConfig of the fields that most families share, with Llama's defaults where absent."""
    vocab_size, d_model, num_layers, num_heads, ffn_dim = required(
        values, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    )
    if head_dim is None and d_model % num_heads:
        raise ValueError(
            f"config.json: hidden_size {d_model} is not a multiple of num_attention_heads {num_heads}, and head_dim is "
            "not given; add head_dim"
        )
    theta, scaling = read_rope(values, default_theta=10_000.0)
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=given(values, "num_key_value_heads", num_heads),
        head_dim=d_model // num_heads if head_dim is None else head_dim,
        ffn_dim=ffn_dim,
        max_position_embeddings=given(values, "max_position_embeddings", 2048),
        norm_eps=given(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=given(values, "tie_word_embeddings", False) and head == "lm",
        head=head,
        initializer_range=given(values, "initializer_range", 0.02),
    )


# What only some families have: fields of ModelConfig, their value where a family has no such thing, and the layouts
# that have a place for another.
_FEATURES: dict[str, tuple[Any, str]] = {
    "norm_head": (False, "baichuan"),
    "positions": ("rotary", "baichuan"),
    "rotary_dim": (None, "glm, chatglm"),
    "window": (None, "mistral, qwen2, qwen3"),
    "attention_bias": ("none", "llama, internlm ('all'), qwen2, glm, chatglm ('qkv')"),
    "ffn_bias": (False, "llama, chatglm"),
    "qk_norm": (False, "qwen3"),
}


def check_layout(config: ModelConfig, allowed: Mapping[str, Collection[Any]], *, layout: str) -> None:
    """Raises ValueError naming what a model has that `layout` has no place for.

    `allowed` holds, by field of ModelConfig, the values that the layout can say; the other fields of `_FEATURES` must
    be as they are without the feature.
    """
    for name, (plain, others) in _FEATURES.items():
        value, values = getattr(config, name), allowed.get(name, (plain,))
        if value not in values:
            raise ValueError(
                f"layout {layout!r} has no place for {name}={value!r}, only for {', '.join(map(repr, values))}; "
                f"other values are in layouts {others}"
            )


def check_square(config: ModelConfig, *, layout: str, grouped: bool = True) -> None:
    """Raises ValueError where the heads are not those of a layout without head_dim, or without key/value groups."""
    if config.head_dim * config.num_heads != config.d_model:
        raise ValueError(
            f"layout {layout!r} has no field for head_dim: it is d_model / num_heads = "
            f"{config.d_model / config.num_heads:g}, this model has {config.head_dim}. Use layout='llama'"
        )
    if not grouped and config.num_kv_heads != config.num_heads:
        raise ValueError(
            f"layout {layout!r} has as many key/value heads as query heads; this model has {config.num_kv_heads} and "
            f"{config.num_heads}. Use layout='llama'"
        )


def decoder_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json fields that most families share: the inverse of `decoder_config`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "use_cache": True,
    }
