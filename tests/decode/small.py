"""A model small enough to be compiled in every way, and its weights."""

from internjax.model.config import ModelConfig
from tests.weights import random_params

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_position_embeddings=64,
    rope_theta=10_000.0,
    initializer_range=0.2,
    dtype="float32",
)
PARAMS = random_params(CONFIG, seed=1)
