"""InternLM2 in plain NumPy, written from the published architecture and nothing of this project.

Reads the tensors of a checkpoint by their published names and the numbers of its config.json. One sequence, one head
at a time: slow and easy to check by eye.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x, position, theta):
    """One head's vector, turned: coordinate j is paired with j + half, by the angle position * theta^(-2j / dim)."""
    half = x.shape[-1] // 2
    angles = position * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)])


def attention(x, tensors, prefix, config, theta, position_scale):
    num_heads, num_groups = config["num_attention_heads"], config["num_key_value_heads"]
    per_group, dim = num_heads // num_groups, config["hidden_size"] // num_heads
    fused = x @ tensors[prefix + "attention.wqkv.weight"].T
    outputs = np.zeros((len(x), num_heads * dim))
    for head in range(num_heads):
        group, index = divmod(head, per_group)
        start = group * (per_group + 2) * dim
        query = fused[:, start + index * dim :][:, :dim]
        key = fused[:, start + per_group * dim :][:, :dim]
        value = fused[:, start + (per_group + 1) * dim :][:, :dim]
        for t in range(len(x)):
            q = rotate(query[t], t / position_scale, theta)
            scores = np.array([q @ rotate(key[s], s / position_scale, theta) for s in range(t + 1)]) / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            outputs[t, head * dim : (head + 1) * dim] = weights / weights.sum() @ value[: t + 1]
    return outputs @ tensors[prefix + "attention.wo.weight"].T


def feed_forward(x, tensors, prefix):
    w1, w2, w3 = (tensors[f"{prefix}feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def rotary_base(config, length):
    """theta of a sequence, and the divisor of its positions."""
    theta, scaling = config["rope_theta"], config.get("rope_scaling")
    if scaling is None:
        return theta, 1.0
    if scaling["type"] == "linear":
        return theta, scaling["factor"]
    longest, dim = config["max_position_embeddings"], config["hidden_size"] // config["num_attention_heads"]
    if length <= longest:
        return theta, 1.0
    return theta * (scaling["factor"] * length / longest - (scaling["factor"] - 1)) ** (dim / (dim - 2)), 1.0


def logits(token_ids, tensors, config):
    """[T, V] for one sequence of ids; [T, 1] scores where the checkpoint has a reward head."""
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    eps = config["rms_norm_eps"]
    theta, position_scale = rotary_base(config, len(token_ids))
    x = tensors["model.tok_embeddings.weight"][np.asarray(token_ids)]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(x, tensors[prefix + "attention_norm.weight"], eps)
        x = x + attention(normed, tensors, prefix, config, theta, position_scale)
        x = x + feed_forward(rms_norm(x, tensors[prefix + "ffn_norm.weight"], eps), tensors, prefix)
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    head = next(name for name in ("output.weight", "v_head.weight", "model.tok_embeddings.weight") if name in tensors)
    return x @ tensors[head].T
