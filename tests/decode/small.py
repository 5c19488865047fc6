"""A model small enough to be compiled in every way, its weights, and a guide of its answers."""

import numpy as np

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


class OnlySteps:
    """A guide that allows the last token + 1 or + 7, and the stop token 63 from the fifth on."""

    def __init__(self):
        self.taken = [0]

    def mask(self):
        allowed = {(self.taken[-1] + step) % 64 for step in (1, 7)} | ({63} if len(self.taken) > 4 else set())
        words = np.zeros(2, np.uint32)
        for token in allowed:
            words[token // 32] |= np.uint32(1) << np.uint32(token % 32)
        return words

    def take(self, token):
        self.taken.append(token)
