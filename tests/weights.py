"""Random parameters for tests, from NumPy: to draw them with `decoder.init` takes a second to trace and compile."""

import jax
import numpy as np

from internjax.model import decoder
from internjax.model.config import ModelConfig


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Returns parameters of the shapes and dtypes of `decoder.init`, as arrays on the default device.

    Kernels and tables are normal with the config's initializer_range, biases normal with 0.1, and scales normal around
    1 with 0.1: a scale or a bias that is left out is seen.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        spread = {"kernel": config.initializer_range, "embedding": config.initializer_range}.get(path[-1].key, 0.1)
        values = spread * rng.standard_normal(shape.shape, np.float32) + (path[-1].key == "scale")
        return values.astype(shape.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(leaf, decoder.abstract_params(config)))
