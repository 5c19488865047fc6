"""Packed cuDNN attention. Without a GPU: its ranges of tokens, what it refuses, what it hands to cuDNN, and everything
around the kernel, with a kernel written here in its place that does what XLA asks of cuDNN and no more: it reads and
writes elements at the offsets that it is given, and leaves NaN wherever it is not told to write."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internjax import sharding
from internjax.kernels import attention as attention_module
from internjax.kernels import cudnn_attention as module
from internjax.kernels.attention import attention, check
from internjax.model.config import TINY, ModelConfig
from internjax.sharding import MeshConfig, make_mesh
from internjax.train import preflight
from internjax.train.batch import Batch
from internjax.train.losses import next_token
from internjax.train.memory import Job
from tests.weights import random_params

B, T, N, K, H, M = 4, 24, 4, 2, 8, 5
ROWS = [[(1, 24)], [(1, 8), (2, 8), (3, 8)], [(7, 3), (4, 10), (9, 5), (0, 6)], [(1, 1), (2, 1), (3, 20), (0, 2)]]


@pytest.fixture(autouse=True)
def no_mesh_afterwards():
    yield
    make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def packed(rows):
    """Returns segments and positions `[B, T]` of rows of (segment, length)."""
    segments = np.stack([np.repeat([name for name, _ in row], [size for _, size in row]) for row in rows])
    positions = np.stack([np.concatenate([np.arange(size) for _, size in row]) for row in rows])
    return segments.astype(np.int32), positions.astype(np.int32)


# --- ranges ----------------------------------------------------------------------------------------------------------

LENGTH, ROOM = 12, 4
found_documents = jax.jit(functools.partial(module.documents, max_segments=ROOM))


def documents_by_hand(row):
    starts, lengths, names = [], [], []
    for index, segment in enumerate(row):
        if index == 0 or segment != row[index - 1]:
            starts.append(index)
            lengths.append(0)
            names.append(segment)
        lengths[-1] += 1
    return starts, lengths, len(names) <= ROOM and len(set(names)) == len(names)


# Few enough runs that a segment which comes back is not always one of too many.
runs = st.lists(st.tuples(st.integers(0, 4), st.integers(1, LENGTH)), min_size=1, max_size=ROOM + 1)


def row_of(runs):
    row = [name for name, size in runs for _ in range(size)]
    return (row + [row[-1]] * LENGTH)[:LENGTH]


@settings(max_examples=100, deadline=None)
@given(st.lists(runs.map(row_of), min_size=2, max_size=2))
def test_documents_are_the_runs_of_a_row(rows):
    rows = np.array(rows)
    starts, lengths, valid = map(np.asarray, found_documents(rows.astype(np.int32)))
    for row, *found, is_valid in zip(rows, starts, lengths, valid, strict=True):
        want_starts, want_lengths, want_valid = documents_by_hand(row)
        assert is_valid == want_valid
        for given_, wanted in zip(found, (want_starts, want_lengths), strict=True):
            np.testing.assert_array_equal(given_, (wanted + [-1] * ROOM)[:ROOM])


def test_rows_of_too_many_documents_are_found_on_the_host():
    segments = np.arange(1, module.MAX_SEGMENTS + 1, dtype=np.int32)[None].repeat(2, 0)
    module.check_rows(segments)
    assert module.most_documents(np.zeros((3, 1), np.int32)) == 1
    with pytest.raises(ValueError, match="takes 32 documents per row.*has 33.*Use attention=cudnn or chunked"):
        module.check_rows(np.pad(segments, ((0, 0), (0, 1))))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_refused_by_name(monkeypatch):
    bad = {"dtype": jnp.float32, "head_dim": 12, "alibi": True, "window": 4}
    with pytest.raises(
        ValueError, match=r"'cudnn_packed' cannot do dtype float32.*head_dim 12.*ALiBi.*cpu platform.*sliding window"
    ):
        check("cudnn_packed", **bad)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(module, "_capability", lambda: (8, 6))
    monkeypatch.setattr(module, "_cudnn_version", lambda: 90500)
    good = {"dtype": jnp.bfloat16, "head_dim": 128}
    with pytest.raises(
        ValueError, match=r"do compute capability 8.6 \(9.0, Hopper, or newer only\); cuDNN 90500 \(90600 or newer"
    ):
        check("cudnn_packed", **good)
    monkeypatch.setattr(module, "_capability", lambda: (10, 0))
    monkeypatch.setattr(module, "_cudnn_version", lambda: 91300)
    check("cudnn_packed", **good)
    monkeypatch.setattr(module, "_version", lambda: (0, 13, 0))
    with pytest.raises(ValueError, match="do jax .*read for 0.10.2, 0.11.0.*install one.*Use attention='chunked'"):
        check("cudnn_packed", **good)


def test_preflight_refuses_rows_of_too_many_documents():
    """Before the back end is tried, so on any machine; what it remembers depends on the rows."""
    segments = np.arange(1, module.MAX_SEGMENTS + 2, dtype=np.int32)[None]
    model = dataclasses.replace(TINY, attention="cudnn_packed")
    rows = np.zeros_like(segments)
    batch = Batch(rows, rows, rows, rows, segments)
    job = Job(model, 1, segments.shape[1], mesh=MeshConfig(fsdp=1))
    subject = preflight.Subject(job=job, batch=batch)
    with pytest.raises(ValueError, match="a row of this batch has 33"):
        preflight.check_attention(subject)
    shorter = dataclasses.replace(subject, batch=batch._replace(segments=np.ones_like(segments)))
    with pytest.raises(ValueError, match="'cudnn_packed' cannot do"):
        preflight.check_attention(shorter)
    assert preflight._attention_key(subject) != preflight._attention_key(shorter)


def test_a_device_that_is_not_nvidias_has_no_capability(monkeypatch):
    class Device:
        compute_capability = "gfx90a"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert module._capability() == () and module._capability() < (9, 0)
    Device.compute_capability = "9.0"
    assert module._capability() == (9, 0)


def call(q, k, v, positions, segments, *, causal=True):
    return attention(
        q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
        causal=causal, backend="cudnn_packed",
    )  # fmt: skip


def test_sizes_that_it_cannot_take_are_refused(monkeypatch):
    monkeypatch.setattr(attention_module, "check", lambda *args, **kwargs: None)
    q, k, segments = (np.zeros(shape, np.float16) for shape in ((B, T, N, H), (B, T, K, H), (B, T)))
    with pytest.raises(ValueError, match="as many keys as queries are wanted, given 12 queries, 24 keys"):
        call(q[:, :12], k, k, segments, segments)
    with sharding.use(make_mesh(MeshConfig(fsdp=1, tensor=4), jax.devices()[:4])):
        with pytest.raises(ValueError, match="tensor 4 of the mesh does not divide 4 query and 2 key/value heads"):
            call(q, k, k, segments, segments)
    large = jax.ShapeDtypeStruct((128, 8192, 16, 128), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((128, 8192), jnp.int32)
    with pytest.raises(ValueError, match="in int32: 128 rows x 8192 tokens x 16 heads x 128"):
        jax.eval_shape(call, large, large, large, rows, rows)


# --- what cuDNN is given ---------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """A GPU as far as jax's own checks look, and a small number of documents."""
    private = module._private()
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(private, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(attention_module, "check", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "MAX_SEGMENTS", M)
    return private


def test_it_lowers_for_a_gpu(hopper):
    """From a CPU machine: both kernels, the kind of mask, and the number of documents as they reach XLA."""
    q, k, rows = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((B, T, N, H), jnp.bfloat16), ((B, T, K, H), jnp.bfloat16), ((B, T), jnp.int32))
    )

    def loss(q, k, v, positions, segments):
        return call(q, k, v, positions, segments).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, rows, rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    kernels = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
    assert ["Backward" in line for line in kernels] == [False, True]
    for line in kernels:
        assert '"mask_type": "PADDING_CAUSAL"' in line and f'"max_seg_per_batch": {M}' in line
        assert f"tensor<{B}x{M}xi32>, tensor<{B}x{M}xi32>, tensor<{B}x{M + 1}xi32>, tensor<{B}x{M + 1}xi32>)" in line
    assert f"tensor<{B}x{T}x{T}x" not in text and f"tensor<{B}x{N}x{T}x{T}x" not in text


def gathered(flat, offset, heads):
    """Returns tokens `[T, heads, H]` that begin at an element; NaN beyond the end."""
    index = offset + jnp.arange(T)[:, None] * (heads * H) + jnp.arange(heads * H)
    return jnp.take(flat.reshape(-1), index, mode="fill", fill_value=jnp.nan).reshape(T, heads, H)


def kernel(causal, scale, q, k, v, q_lengths, k_lengths, q_offsets, k_offsets):
    """Returns the output as cuDNN is asked for it: sequence by sequence, NaN where none of them lies."""
    query_heads, key_heads = q.shape[2], k.shape[2]

    def one(q_length, k_length, q_offset, k_offset):
        q_THD = jnp.nan_to_num(gathered(q, q_offset, query_heads))
        there_S = jnp.arange(T) < k_length
        k_SHD, v_SHD = (
            jnp.where(there_S[:, None, None], gathered(x, k_offset, key_heads), 0).repeat(query_heads // key_heads, 1)
            for x in (k, v)
        )
        mask_TS = there_S & (jnp.arange(T)[:, None] >= jnp.arange(T) if causal else True)
        logits = jnp.where(mask_TS, jnp.einsum("tnh,snh->nts", q_THD, k_SHD) * scale, -1e30)
        return jnp.einsum("nts,snh->tnh", jax.nn.softmax(logits, axis=-1), v_SHD)

    num = q_lengths.size
    offsets = (q_offsets.reshape(-1)[:num], k_offsets.reshape(-1)[:num])
    outs = jax.vmap(one)(q_lengths.reshape(-1), k_lengths.reshape(-1), *offsets)
    size = query_heads * H
    index = offsets[0][:, None, None] + jnp.arange(T)[:, None] * size + jnp.arange(size)
    index = jnp.where(jnp.arange(T)[:, None] < q_lengths.reshape(-1)[:, None, None], index, q.size)
    written = jnp.full(q.size, jnp.nan).at[index].set(outs.reshape(num, T, size), mode="drop")
    return written.reshape(q.shape)


def exact(*arrays):
    return (x.astype(jnp.float32) for x in arrays)


@pytest.fixture
def stand_in(hopper):
    """Runs the kernel above on CPUs wherever jax hands over to cuDNN."""

    def forward(q, k, v, bias, *ranges, mask_type, scale, is_training, **rest):
        out = kernel(mask_type == hopper.MaskType.PADDING_CAUSAL, scale, *exact(q, k, v), *ranges[:4])
        statistics = jnp.full((ranges[0].size, q.shape[2], T), jnp.nan)
        return (out.astype(q.dtype), statistics) if is_training else (out.astype(q.dtype),)

    def backward(q, k, v, bias, *rest, mask_type, scale, **how):
        *ranges, _, _, _, _, grad = rest
        run = functools.partial(kernel, mask_type == hopper.MaskType.PADDING_CAUSAL, scale)
        out, vjp = jax.vjp(lambda *qkv: run(*qkv, *ranges), *exact(q, k, v))
        dq, dk, dv = vjp(jnp.where(jnp.isnan(out), 0, grad.astype(jnp.float32)))
        unset = jnp.isnan(out).any(axis=(2, 3), keepdims=True)
        return tuple(jnp.where(unset, jnp.nan, x).astype(q.dtype) for x in (dq, dk, dv))

    for primitive, rule in (
        (hopper._dot_product_attention_fwd_p, forward),
        (hopper._dot_product_attention_bwd_p, backward),
    ):
        lowering = jax.interpreters.mlir.lower_fun(rule, multiple_results=True)
        jax.interpreters.mlir.register_lowering(primitive, lowering, platform="cpu")


def outputs_and_gradients(backend, segments, positions, *, causal=True, dtype=np.float16):
    rng = np.random.default_rng(0)
    qkv = tuple(rng.normal(size=(len(segments), T, heads, H)).astype(np.float16) for heads in (N, K, K))

    def loss(qkv, positions, segments):
        out = attention(
            *qkv, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
            causal=causal, backend=backend,
        ).astype(jnp.float32)  # fmt: skip
        return (jnp.where((segments != 0)[..., None, None], out, 0.0) * jnp.cos(jnp.arange(H))).sum(), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    grads, out = run(tuple(x.astype(dtype) for x in qkv), positions, segments)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


@functools.cache
def reference(causal):
    return outputs_and_gradients("xla", *packed(ROWS), causal=causal, dtype=np.float32)


def assert_equal(given, wanted, segments, *, tolerance=2e-3):
    real = segments != 0
    for one, other, what in zip(given, wanted, ("output", "dq", "dk", "dv"), strict=True):
        assert np.isfinite(one).all(), what  # padding too: no memory that nobody set comes out
        error = np.abs(one[real] - other[real]).max() / np.abs(other[real]).max()
        assert error < tolerance, (what, error)


MESHES = {
    "no mesh": None,
    "fsdp 2, tensor 2": MeshConfig(fsdp=2, tensor=2),
    "data 4, fsdp 2: rows that are not divided": MeshConfig(data=4, fsdp=2),
}


@pytest.mark.parametrize(("name", "causal"), [(name, True) for name in MESHES] + [("no mesh", False)])
def test_packed_rows_equal_the_reference(stand_in, name, causal):
    segments, positions = packed(ROWS)
    wanted = reference(causal)
    if MESHES[name] is None:
        given = outputs_and_gradients("cudnn_packed", segments, positions, causal=causal)
    else:
        devices = MESHES[name].data * MESHES[name].fsdp * MESHES[name].tensor
        with sharding.use(make_mesh(MESHES[name], jax.devices()[:devices])):
            given = outputs_and_gradients("cudnn_packed", segments, positions, causal=causal)
    assert_equal(given, wanted, segments)


def test_rows_that_the_kernel_cannot_see_right_are_nan(stand_in):
    """Each in a row of its own, and the row that is right stays as it is."""
    many = [(1 + index, 4) for index in range(M)] + [(0, T - 4 * M)]  # one more than there is room for
    rows = [ROWS[1], many, [(1, 8), (2, 8), (1, 8)], [(1, 24)], [(1, 24)]]
    segments, positions = packed(rows)
    positions[3, 10:] += 1  # a position is left out
    positions[4] = positions[4][::-1]
    given = outputs_and_gradients("cudnn_packed", segments, positions)[0]
    assert np.isfinite(given[0]).all() and np.isnan(given[1:]).all()
    q = np.ones((B, T, N, H), np.float16)
    call = functools.partial(attention, backend="cudnn_packed")
    out = jax.jit(call)(
        q, q, q, q_positions_BT=positions[:B], k_positions_BS=positions[:B], q_segments_BT=segments[:B],
        k_segments_BS=np.ones_like(segments[:B]),
    )  # fmt: skip
    assert np.isnan(np.asarray(out)[:3]).all()


def test_a_model_trains_with_it_on_a_mesh(stand_in):
    """Inside scanned, recomputed and sharded layers: loss and gradients are those of the reference, up to rounding."""
    config = ModelConfig(
        vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=16, remat="dots"
    )
    params = random_params(config)
    segments, positions = packed(ROWS)
    tokens = np.random.default_rng(0).integers(1, 32, (B, T), np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), (segments != 0).astype(np.float32), positions, segments)

    def value_and_gradients(backend):
        loss = next_token(dataclasses.replace(config, attention=backend), chunk_size=8)
        run = jax.value_and_grad(lambda params, batch: loss(params, None, batch, jax.random.key(0)).total)
        return jax.device_get(jax.jit(run)(params, batch))

    wanted, wanted_grads = value_and_gradients("xla")
    with sharding.use(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        given, grads = value_and_gradients("cudnn_packed")
    assert abs(given / wanted - 1) < 2e-3
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(other)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def gpu_case(lengths, backend, dtype):
    """Returns outputs and gradients of heads as the 1.8B model has them, float32 on the host."""
    size = sum(lengths[0])
    names = [[index + 1 for index in range(len(row) - 1)] + [0] for row in lengths]
    segments, positions = packed([list(zip(name, row, strict=True)) for name, row in zip(names, lengths, strict=True)])
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(len(lengths), size, heads, 128)).astype(np.float32) for heads in (16, 8, 8))

    def loss(qkv, weights, positions, segments):
        out = attention(
            *qkv, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
            backend=backend,
        ).astype(jnp.float32)  # fmt: skip
        return (jnp.where((segments != 0)[..., None, None], out, 0.0) * weights).sum(), out

    weights = rng.normal(size=q.shape).astype(np.float32)
    rounded = tuple(jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        grads, out = jax.jit(jax.grad(loss, has_aux=True))(rounded, weights, positions, segments)
    return [np.asarray(x, np.float32) for x in (out, *grads)], segments


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["xla", "chunked", "cudnn", "cudnn_packed"])
def test_every_back_end_equals_the_reference_on_a_gpu(backend):
    short = [30] * (module.MAX_SEGMENTS - 1)
    lengths = [[1000, 24], [300, 200, 500, 24], [1, 511, 509, 3], [*short, 1024 - sum(short)]]
    wanted, segments = gpu_case(lengths, "xla", jnp.float32)
    given, _ = gpu_case(lengths, backend, jnp.bfloat16)
    assert_equal(given, wanted, segments, tolerance=2e-2)


@pytest.mark.gpu
def test_a_row_of_too_many_documents_is_nan_on_a_gpu():
    row = [10] * module.MAX_SEGMENTS
    (out, *_), _ = gpu_case([[*row, 1024 - sum(row)], [1000, 24]], "cudnn_packed", jnp.bfloat16)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
