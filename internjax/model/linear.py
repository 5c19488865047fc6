"""The one linear layer of the decoder: a kernel, quantised or not, and what stands beside it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from internjax.model.config import ModelConfig
from internjax.model.lora import NODE_LEAVES, adapted
from internjax.model.quantize import matmul


class Linear(nn.Module):
    """x W (+ bias) (+ adapter). Reads its kernel as a variable, so that a QuantArray may stand in its place."""

    features: int
    axes: tuple[str, str]
    config: ModelConfig
    use_bias: bool = False
    lora_scale: float = 0.0
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            kernel_init = nn.with_logical_partitioning(nn.initializers.normal(self.config.initializer_range), self.axes)
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", kernel_init, shape, jnp.dtype(self.config.param_dtype))
        else:
            kernel = self.get_variable("params", "kernel")
        y = matmul(x, kernel)
        if self.has_variable("lora", "a"):
            node = {name: self.get_variable("lora", name) for name in NODE_LEAVES if self.has_variable("lora", name)}
            dropped = x
            if self.lora_dropout and self.has_rng("dropout"):
                dropped = nn.Dropout(self.lora_dropout, deterministic=False)(x)
            y = adapted(y, dropped, node, scale=self.lora_scale)
        if self.use_bias:
            # After the adapter: DoRA scales the columns of the matrix, not the bias.
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y += self.param("bias", bias_init, (self.features,), jnp.dtype(self.config.param_dtype)).astype(y.dtype)
        return y
