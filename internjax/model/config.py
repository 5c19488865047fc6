"""ModelConfig: the numbers that define a decoder, and the published InternLM2 sizes."""

import dataclasses
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class NoScaling:
    """Rotary frequencies as trained, at every length."""


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor`."""

    factor: float = 1.0
    """At least 1; 1 changes nothing."""

    def __post_init__(self):
        _check_factor(self.factor)


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
    """The rotary base grows with the sequence length beyond max_position_embeddings; no effect below it."""

    factor: float = 1.0
    """At least 1; 1 changes nothing."""

    def __post_init__(self):
        _check_factor(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended (Llama 3.1); at every length."""

    factor: float = 8.0
    """At least 1; 1 changes nothing."""
    low_freq_factor: float = 1.0
    """Frequencies that turn fewer times than this within original_max_position_embeddings are divided."""
    high_freq_factor: float = 4.0
    """Frequencies that turn more often than this within original_max_position_embeddings are kept."""
    original_max_position_embeddings: int = 8192
    """Length of training before the model was stretched."""

    def __post_init__(self):
        _check_factor(self.factor)
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.original_max_position_embeddings < 1:
            raise ValueError(
                "llama3 scaling needs 0 < low_freq_factor < high_freq_factor and a positive "
                f"original_max_position_embeddings, given {self}"
            )


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended, and scores sharpened (YaRN,
    arXiv:2309.00071); at every length."""

    factor: float = 4.0
    """At least 1; 1 changes nothing."""
    original_max_position_embeddings: int = 32768
    """Length of training before the model was stretched."""
    beta_fast: float = 32.0
    """Frequencies that turn more often than this within original_max_position_embeddings are kept."""
    beta_slow: float = 1.0
    """Frequencies that turn fewer times than this within original_max_position_embeddings are divided."""
    attention_factor: float | None = None
    """Queries and keys are multiplied by it. None: 0.1 ln(factor) + 1."""

    def __post_init__(self):
        _check_factor(self.factor)
        if not 0 < self.beta_slow < self.beta_fast or self.original_max_position_embeddings < 1:
            raise ValueError(
                "yarn scaling needs 0 < beta_slow < beta_fast and a positive original_max_position_embeddings, given "
                f"{self}"
            )


def _check_factor(factor: float) -> None:
    if not factor >= 1.0:
        raise ValueError(f"rotary scaling factor must be a number >= 1.0, given {factor!r}")


RopeScaling = NoScaling | LinearScaling | DynamicNTK | Llama3Scaling | YarnScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder with grouped-query attention, RMSNorm and SwiGLU; the families differ in these fields."""

    vocab_size: int
    """Rows of the embedding table, special tokens included."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; query head h reads key/value head h // (num_heads / num_kv_heads)."""
    head_dim: int
    """Width of a head; even."""
    ffn_dim: int
    """Width of the gated feed-forward layer."""
    max_position_embeddings: int = 32768
    """Length the model was trained for: where dynamic NTK scaling starts. Not a buffer size."""
    norm_eps: float = 1e-5
    """Added to the mean square under the root of every norm."""
    rope_theta: float = 1e6
    """Rotary base: the slowest frequency turns about once in 2 pi times this many positions."""
    rope_scaling: RopeScaling = NoScaling()
    rotary_dim: int | None = None
    """Dimensions of a head that turn, in pairs (j, j + head_dim / 2); the later pairs keep still (ChatGLM3: half of the
    head). None: all."""
    positions: Literal["rotary", "alibi"] = "rotary"
    """How attention knows positions: heads turned by them, or scores falling with the distance (Baichuan2-13B)."""
    window: int | None = None
    """A token sees the last `window` ones, itself included (Mistral). None: all."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Which projections of attention add a bias: none, query, key and value (Qwen2), the output as well (InternLM)."""
    ffn_bias: bool = False
    """Gate, up and down add a bias."""
    qk_norm: bool = False
    """Every query and key head is RMS-normalised before it is turned (Qwen3)."""
    tie_embeddings: bool = False
    """The output head is the transposed embedding table."""
    norm_head: bool = False
    """Vocabulary rows of the output head are L2-normalised in the forward pass (Baichuan2, native InternLM2-1.8B)."""
    head: Literal["lm", "scalar"] = "lm"
    """lm: one logit per vocabulary entry. scalar: one score per position (reward model, critic)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; attention output and ffn down are divided by sqrt(2 * (layer + 1))."""
    dtype: DType = "bfloat16"
    """Computation."""
    param_dtype: DType = "float32"
    """Stored parameters."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes per layer: nothing, all but matrix products, everything."""
    unroll_layers: int = 1
    """Layers per iteration of the compiled layer loop."""
    attention: Literal["xla", "chunked", "ring", "cudnn", "cudnn_packed"] = "xla"
    """Attention back end of full sequences: the reference, queries in chunks, keys round the sequence axis of the mesh,
    NVIDIA's fused kernel with a mask, the same told where documents lie; see internjax.kernels.attention."""
    paged_attention: Literal["xla", "mosaic"] = "xla"
    """Back end of attention over a key/value cache: the reference, a kernel for NVIDIA's Hopper; see
    internjax.kernels.paged_attention."""
    quant_matmul: Literal["xla", "mosaic"] = "xla"
    """Back end of decoding's products with matrices of 4 bits, likewise; see internjax.kernels.quant_matmul."""

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, given {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key/value head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, given {self.head_dim}")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim):
            raise ValueError(f"rotary_dim must be even and in 2..{self.head_dim} (head_dim), given {self.rotary_dim}")
        if self.positions == "alibi" and (self.rope_scaling != NoScaling() or self.rotary_dim is not None):
            raise ValueError("positions='alibi' turns no heads: leave rope_scaling and rotary_dim unset")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 token or None, given {self.window}")
        if not 1 <= self.unroll_layers <= self.num_layers:
            raise ValueError(f"unroll_layers must be in 1..{self.num_layers} (num_layers), given {self.unroll_layers}")
        if self.tie_embeddings and (self.norm_head or self.head == "scalar"):
            raise ValueError("tie_embeddings works with a plain lm head only: unset norm_head and use head='lm'")
        if self.norm_head and self.head == "scalar":
            raise ValueError("norm_head normalises vocabulary rows and has no meaning with head='scalar'")


def in_shape(config: ModelConfig) -> ModelConfig:
    """Returns the config with equal values for the numbers on which no shape and no dtype depends.

    What was traced for the shapes of one model is then found again for all that differ in those alone.
    """
    return dataclasses.replace(config, max_position_embeddings=1, norm_eps=1e-5, rope_theta=1e4, initializer_range=0.02)


def _parameters_per_layer(config: ModelConfig) -> tuple[int, int]:
    """Returns (matrix parameters, norm and bias parameters) of one layer."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention_bias = {"none": 0, "qkv": query + 2 * key, "all": query + 2 * key + config.d_model}[config.attention_bias]
    ffn_bias = 2 * config.ffn_dim + config.d_model if config.ffn_bias else 0
    norms = 2 * config.d_model + (2 * config.head_dim if config.qk_norm else 0)
    return config.d_model * (2 * query + 2 * key + 3 * config.ffn_dim), norms + attention_bias + ffn_bias


def num_params(config: ModelConfig) -> int:
    """Returns the exact number of parameters."""
    head = 0 if config.tie_embeddings else config.d_model * (config.vocab_size if config.head == "lm" else 1)
    layers = config.num_layers * sum(_parameters_per_layer(config))
    return config.vocab_size * config.d_model + layers + config.d_model + head


def num_matmul_params(config: ModelConfig) -> int:
    """Returns the parameters that take part in matrix products: layers and output head; no norms, no biases, no
    embedding table.

    This is the N of the 6 N FLOPs-per-token formula.
    """
    head = config.d_model * (config.vocab_size if config.head == "lm" else 1)
    return config.num_layers * _parameters_per_layer(config)[0] + head


_SCALINGS = {
    "none": NoScaling,
    "linear": LinearScaling,
    "dynamic": DynamicNTK,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the config as plain JSON values; `from_json` is its inverse."""
    values = dataclasses.asdict(config)
    name = next(name for name, kind in _SCALINGS.items() if isinstance(config.rope_scaling, kind))
    return values | {"rope_scaling": {"type": name} | values["rope_scaling"]}


def from_json(values: dict[str, Any]) -> ModelConfig:
    """Returns the config of `values`; raises ValueError naming unknown or missing fields."""
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING)
    if unknown or missing:
        raise ValueError(f"model config has unknown fields {unknown} and lacks {missing}; known: {', '.join(fields)}")
    scaling = dict(values.get("rope_scaling", {"type": "none"}))
    kind = scaling.pop("type", None)
    if kind not in _SCALINGS:
        raise ValueError(f"rope_scaling.type must be one of {', '.join(_SCALINGS)}, given {kind!r}")
    return ModelConfig(**(values | {"rope_scaling": _SCALINGS[kind](**scaling)}))


# The tiny chain's model: InternLM2's architecture at a size that a laptop CPU trains in minutes. Its vocabulary is
# replaced by the size of the tokenizer that the chain trains.
TINY = ModelConfig(
    vocab_size=2048,
    d_model=128,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    ffn_dim=384,
    max_position_embeddings=1024,
    rope_theta=10_000.0,
    initializer_range=0.06,
    dtype="float32",
)

# InternLM2 technical report (arXiv:2403.17297), table 3, with the released Hugging Face configurations. The scaling
# factor of the 20B comes from a published derivative of chat-20b.
INTERNLM2_1_8B = ModelConfig(
    vocab_size=92544,
    d_model=2048,
    num_layers=24,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=8192,
    rope_scaling=DynamicNTK(2.0),
)
INTERNLM2_7B = dataclasses.replace(INTERNLM2_1_8B, d_model=4096, num_layers=32, num_heads=32, ffn_dim=14336)
INTERNLM2_20B = dataclasses.replace(
    INTERNLM2_1_8B, d_model=6144, num_layers=48, num_heads=48, ffn_dim=16384, rope_scaling=DynamicNTK(3.0)
)
