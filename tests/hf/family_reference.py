"""InternLM, Baichuan 2 and ChatGLM3 in plain NumPy, from their published architectures and nothing of this project.

Each reads the tensors of a checkpoint by their published names and the numbers of its config.json, one sequence and one
head at a time: slow and easy to check by eye.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def linear(x, tensors, name):
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def turn_halves(x, position, theta):
    """Coordinate j is paired with j + half, by the angle position * theta^(-2j / dim)."""
    half = len(x) // 2
    angles = position * theta ** (-2.0 * np.arange(half) / len(x))
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)])


def turn_neighbours(x, position, theta):
    """The first half of the head is turned, coordinate 2j with 2j + 1; the second half is left as it is."""
    y = x.copy()
    rotary = len(x) // 2
    for j in range(rotary // 2):
        angle = position * theta ** (-2.0 * j / rotary)
        y[2 * j] = x[2 * j] * np.cos(angle) - x[2 * j + 1] * np.sin(angle)
        y[2 * j + 1] = x[2 * j + 1] * np.cos(angle) + x[2 * j] * np.sin(angle)
    return y


def attend(queries, keys, values, turn, slope=0.0):
    """One head [T, H]; a score loses slope * distance."""
    out = np.zeros_like(values)
    for t in range(len(queries)):
        q = turn(queries[t], t)
        scores = [q @ turn(keys[s], s) / np.sqrt(len(q)) - slope * (t - s) for s in range(t + 1)]
        weights = np.exp(np.array(scores) - max(scores))
        out[t] = weights / weights.sum() @ values[: t + 1]
    return out


def heads_of(q, k, v, num_heads, turn, slopes=None):
    """All heads of the rows [T, heads * H]; query head n reads key and value head n // (query heads per key head)."""
    dim = q.shape[1] // num_heads
    shared = num_heads // (k.shape[1] // dim)
    cut = lambda x, head: x[:, head * dim : (head + 1) * dim]  # noqa: E731
    slopes = [0.0] * num_heads if slopes is None else slopes
    outputs = [attend(cut(q, n), cut(k, n // shared), cut(v, n // shared), turn, slopes[n]) for n in range(num_heads)]
    return np.concatenate(outputs, axis=1)


def gated(x, tensors, prefix):
    hidden = silu(linear(x, tensors, f"{prefix}gate_proj")) * linear(x, tensors, f"{prefix}up_proj")
    return linear(hidden, tensors, f"{prefix}down_proj")


def llama_like(token_ids, tensors, config, attention):
    """The skeleton that InternLM and Baichuan share with Llama, up to the last norm."""
    eps, x = config["rms_norm_eps"], tensors["model.embed_tokens.weight"][np.asarray(token_ids)]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(x, tensors[f"{prefix}input_layernorm.weight"], eps)
        x = x + linear(attention(normed, f"{prefix}self_attn."), tensors, f"{prefix}self_attn.o_proj")
        normed = rms_norm(x, tensors[f"{prefix}post_attention_layernorm.weight"], eps)
        x = x + gated(normed, tensors, f"{prefix}mlp.")
    return rms_norm(x, tensors["model.norm.weight"], eps)


def internlm(token_ids, tensors, config):
    """Biases on the projections of attention; the rotary base grows beyond max_position_embeddings."""
    num_heads, rotary = config["num_attention_heads"], config["rotary"]
    theta, dim = rotary["base"], config["hidden_size"] // num_heads
    stretch = len(token_ids) / config["max_position_embeddings"]
    if rotary["type"] == "dynamic" and stretch > 1:
        factor = rotary.get("scaling_factor", 1.0)
        theta = theta * (factor * stretch - (factor - 1)) ** (dim / (dim - 2))

    def attention(x, prefix):
        q, k, v = (linear(x, tensors, f"{prefix}{name}_proj") for name in "qkv")
        return heads_of(q, k, v, num_heads, lambda head, position: turn_halves(head, position, theta))

    return llama_like(token_ids, tensors, config, attention) @ tensors["lm_head.weight"].T


def published_slopes(num_heads):
    """The recursion of the ALiBi paper's code: a power of two is a geometric series, others borrow from the next."""
    power = 2 ** int(np.floor(np.log2(num_heads)))
    if power == num_heads:
        start = 2.0 ** (-(2.0 ** -(np.log2(num_heads) - 3)))
        return [start ** (i + 1) for i in range(num_heads)]
    return published_slopes(power) + published_slopes(2 * power)[0::2][: num_heads - power]


def baichuan2(token_ids, tensors, config):
    """W_pack holds query, key and value; the head's rows have length 1. The 13B has slopes instead of rotation."""
    num_heads, d_model = config["num_attention_heads"], config["hidden_size"]
    alibi = "max_position_embeddings" not in config
    slopes = published_slopes(num_heads) if alibi else None
    turn = (lambda head, position: head) if alibi else (lambda head, position: turn_halves(head, position, 10000.0))

    def attention(x, prefix):
        packed = linear(x, tensors, f"{prefix}W_pack")
        return heads_of(*(packed[:, i * d_model : (i + 1) * d_model] for i in range(3)), num_heads, turn, slopes)

    head = tensors["lm_head.weight"]
    head = head / np.sqrt((head**2).sum(axis=1, keepdims=True))
    return llama_like(token_ids, tensors, config, attention) @ head.T


def chatglm3(token_ids, tensors, config):
    """Fused query_key_value with few key/value heads; half of every head is turned, neighbours paired."""
    num_heads, dim, eps = config["num_attention_heads"], config["kv_channels"], config["layernorm_epsilon"]
    query, key = num_heads * dim, config["multi_query_group_num"] * dim
    theta = 10000.0 * config.get("rope_ratio", 1)
    x = tensors["transformer.embedding.word_embeddings.weight"][np.asarray(token_ids)]
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        normed = rms_norm(x, tensors[f"{prefix}input_layernorm.weight"], eps)
        fused = linear(normed, tensors, f"{prefix}self_attention.query_key_value")
        q, k, v = fused[:, :query], fused[:, query : query + key], fused[:, query + key :]
        mixed = heads_of(q, k, v, num_heads, lambda head, position: turn_neighbours(head, position, theta))
        x = x + linear(mixed, tensors, f"{prefix}self_attention.dense")
        normed = rms_norm(x, tensors[f"{prefix}post_attention_layernorm.weight"], eps)
        gate, up = np.split(linear(normed, tensors, f"{prefix}mlp.dense_h_to_4h"), 2, axis=1)
        x = x + linear(silu(gate) * up, tensors, f"{prefix}mlp.dense_4h_to_h")
    x = rms_norm(x, tensors["transformer.encoder.final_layernorm.weight"], eps)
    return x @ tensors["transformer.output_layer.weight"].T
