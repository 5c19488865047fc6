"""Every attention back end against a loop over queries written in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels import attention as module
from internjax.kernels.attention import attention

compiled = jax.jit(attention, static_argnames=("causal", "window", "backend"))


def reference(q, k, v, *, q_positions, k_positions, q_segments, k_segments, causal, window, slopes):
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        kv = n // (N // k.shape[2])
        scores = k[b, :, kv] @ q[b, t, n] / np.sqrt(H)
        distance = q_positions[b, t] - k_positions[b]
        if slopes is not None:
            scores = scores - slopes[n] * distance
        keep = (q_segments[b, t] == k_segments[b]) & (k_segments[b] != 0)
        if causal:
            keep &= distance >= 0
        if window is not None:
            keep &= distance < window
        if keep.any():
            weights = np.exp(scores[keep] - scores[keep].max())
            out[b, t, n] = weights @ v[b, keep, kv] / weights.sum()
    return out


def inputs(T, S, seed=0):
    rng = np.random.default_rng(seed)
    B, N, K, H = 2, 4, 2, 8
    q, k, v = (rng.normal(size=(B, n, h, H)).astype(np.float32) for n, h in ((T, N), (S, K), (S, K)))
    k_segments = np.sort(rng.integers(0, 3, size=(B, S)), axis=1)[:, ::-1]
    k_positions = np.tile(np.arange(S), (B, 1))
    return q, k, v, k_positions, np.ascontiguousarray(k_segments)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
@pytest.mark.parametrize(
    ("causal", "window", "alibi"), [(True, None, False), (False, None, False), (True, 3, False), (True, None, True)]
)
def test_back_ends_equal_the_reference(monkeypatch, backend, causal, window, alibi):
    monkeypatch.setattr(module, "QUERY_CHUNK", 4)  # 10 queries: two whole chunks and a padded one
    q, k, v, positions, segments = inputs(10, 10)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32) if alibi else None
    got = compiled(
        q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
        causal=causal, window=window, alibi_slopes_N=slopes, backend=backend,
    )  # fmt: skip
    want = reference(
        q, k, v, q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments,
        causal=causal, window=window, slopes=slopes,
    )  # fmt: skip
    real = segments != 0
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-6)
    assert np.isfinite(got).all()


def test_chunked_gradients_equal_the_reference_back_end(monkeypatch):
    monkeypatch.setattr(module, "QUERY_CHUNK", 4)
    q, k, v, positions, segments = inputs(10, 10)

    @functools.partial(jax.jit, static_argnames="backend")
    @jax.grad
    def gradient(qkv, backend):
        out = attention(
            *qkv, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments,
            k_segments_BS=segments, backend=backend,
        )  # fmt: skip
        return (out * (segments != 0)[..., None, None] * jnp.arange(8)).sum()

    want, got = (gradient((q, k, v), backend) for backend in ("xla", "chunked"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_a_back_end_is_refused_by_name_for_what_it_cannot_do():
    q, k, v, positions, _ = inputs(4, 4)
    with pytest.raises(ValueError, match=r"cudnn.*float32.*cpu platform.*attention='chunked'"):
        attention(q, k, v, q_positions_BT=positions, k_positions_BS=positions, backend="cudnn")
    with pytest.raises(ValueError, match="flash9"):
        attention(q, k, v, q_positions_BT=positions, k_positions_BS=positions, backend="flash9")
