"""The planner: exact bytes against real arrays on 8 devices, estimates against jax and a compiler, time by hand."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.kernels.cudnn_attention import MAX_SEGMENTS
from internjax.model import decoder, lora, quantize
from internjax.model.config import INTERNLM2_7B, INTERNLM2_20B, TINY, num_params
from internjax.model.lora import LoraConfig
from internjax.model.quantize import Quantised
from internjax.sharding import MeshConfig
from internjax.train import devices, flops, memory, plan
from internjax.train.batch import Batch
from internjax.train.freezing import split
from internjax.train.losses import next_token
from internjax.train.memory import Job
from internjax.train.optimizer import Adafactor, AdamW, Constant, make_optimizer
from internjax.train.step import init_state, make_step, put_batch

SMALL = dataclasses.replace(
    TINY, vocab_size=128, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=128
)
H100 = devices.named("h100")


@pytest.fixture(autouse=True)
def one_device_again():
    yield
    sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def on_one_device(tree):
    """Bytes that the first device really holds."""
    device, total = jax.devices()[0], 0
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.device == device)
    return total


def zeros(shapes):
    """Arrays of these shapes: what they take does not depend on what they hold."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


JOBS = {
    "full": Job(SMALL, batch_size=8, seq_len=16, mesh=MeshConfig(fsdp=4, tensor=2)),
    "int8 moments": Job(SMALL, batch_size=8, seq_len=16, optimizer=AdamW(moment_dtype="int8")),
    "adafactor": Job(SMALL, batch_size=8, seq_len=16, mesh=MeshConfig(data=4, fsdp=2), optimizer=Adafactor()),
    "zero-1": Job(SMALL, 8, 16, mesh=MeshConfig(data=8, fsdp=1, optimizer_state="over_data")),
    "frozen parts": Job(
        SMALL, 8, 16, mesh=MeshConfig(fsdp=4, tensor=2), accumulate=2, freeze=("embed.*", "layers.ffn.*", "*norm.scale")
    ),
    "dora": Job(SMALL, 8, 16, mesh=MeshConfig(fsdp=2, tensor=2, data=2), lora=LoraConfig(rank=4, kind="dora")),
    "qlora": Job(
        dataclasses.replace(SMALL, param_dtype="bfloat16"),
        batch_size=8,
        seq_len=16,
        mesh=MeshConfig(fsdp=2, sequence=2, tensor=2),
        lora=LoraConfig(rank=4),
        quantised=Quantised("nf4", 16, double=False),
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_exact_bytes_are_those_of_the_arrays_on_a_device(name):
    job = JOBS[name]
    mesh = sharding.make_mesh(job.mesh)
    optimizer = make_optimizer(job.optimizer, Constant(), 1)
    shapes = decoder.abstract_params(job.model)
    axes = decoder.logical_axes(job.model)
    where = {"mesh": mesh, "optimizer_state": job.mesh.optimizer_state}
    if job.lora is None:
        parts, places = split(zeros(shapes), job.freeze), split(axes, job.freeze)
        frozen = {"frozen": parts.frozen, "frozen_axes": places.frozen} if job.freeze else {}
        state = init_state(parts.trainable, optimizer, axes=places.trainable, **frozen, **where)
    else:
        weights = zeros(jax.eval_shape(functools.partial(lora.init_lora, job.lora), shapes, jax.random.key(0)))
        if job.quantised is not None:
            how = functools.partial(quantize.quantize_params, scheme="nf4", group=16)
            shapes = jax.eval_shape(how, shapes)
        params = zeros(shapes)
        own = lora.logical_axes(weights, axes)
        state = init_state(
            weights, optimizer, frozen=params, axes=own, frozen_axes=quantize.logical_axes(params, axes), **where
        )
    have = memory.held(job, job.mesh.shape(8))
    assert have.trainable == on_one_device(state.trainable)
    assert have.optimizer == on_one_device(state.opt_state)
    assert have.frozen == on_one_device(state.frozen)
    ids = np.zeros((job.batch_size, job.seq_len), np.int32)
    batch = put_batch(Batch(ids, ids, ids.astype(np.float32), ids, ids), mesh)
    roles = {role.name: role for role in memory.estimate(job, job.mesh.shape(8)).roles}
    assert roles["batch"].bytes == 2 * on_one_device(batch)
    sums = 0 if job.accumulate == 1 else have.trainable
    assert have.gradients == have.trainable + sums  # float32, as the parameters of those jobs are
    exact = have.trainable + have.optimizer + have.frozen + roles["batch"].bytes
    assert exact == sum(role.bytes for role in roles.values() if role.exact)


def test_the_20b_on_64_devices_is_what_a_compiler_takes_as_arguments():
    """Parameters and two float32 moments: 3.47 GiB of arguments, as compiled for 64 devices (training.md 9.2)."""
    job = Job(INTERNLM2_20B, 16, 4096, mesh=MeshConfig(fsdp=16, tensor=4))
    found = plan.make_plan(job, num_devices=64)
    assert found.memory.exact / devices.GIB == pytest.approx(3.47, abs=0.02)
    assert found.fits is None and found.step_seconds is None and found.gpu_hours(1e12) is None
    assert found.flops == 16 * 4096 * flops.training_flops(INTERNLM2_20B, seq_len=4096)


def saved(config, seq_len=32, **changes):
    how = {"lora_config": None, "quantised": None, "chunk_size": 16} | changes
    return memory.saved_for_backward(config, seq_len, **how)


def test_what_remat_saves():
    T, L, D, F, N, K, V = 32, 2, 64, 128, 64, 32, 128
    none, dots, full = (saved(dataclasses.replace(SMALL, remat=remat)) for remat in ("none", "dots", "full"))
    # Per layer full keeps the layer's input; dots the products as well, but for the last, which only feeds a sum.
    assert dots.per_row - full.per_row == 4 * L * T * (2 * N + 2 * K + 2 * F - N + D)
    deeper = saved(dataclasses.replace(SMALL, remat="full", num_layers=5))
    assert deeper.per_row - full.per_row == 4 * 3 * T * D
    assert none.per_row > 1.5 * dots.per_row and full.per_row < 4 * L * T * D + 4 * T * (6 * D + V)
    kernels = 4 * sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract_params(SMALL)["layers"]))
    assert none.weight_copies < 0.1 * kernels and full.weight_copies < 0.01 * kernels  # masks and other constants


def test_what_is_frozen_saves_nothing_that_only_its_gradient_wants():
    T, L, D, F = 32, 2, 64, 128
    whole = saved(SMALL)
    # The inputs of the projections feed the gradients of their kernels alone: those of gate, up (one normed stream) and
    # down. All else is still gone through backward.
    ffn = saved(SMALL, freeze=("layers.ffn.*",))
    assert whole.per_row - ffn.per_row == 4 * L * T * (D + F)
    head = saved(SMALL, freeze=("embed.*", "layers.*"))
    assert head.per_row < whole.per_row / 8 and saved(SMALL, freeze=("layers.*",)).per_row > whole.per_row / 2
    job = Job(SMALL, 8, 32, mesh=MeshConfig(fsdp=1), chunk_size=16)
    some = dataclasses.replace(job, freeze=("embed.*", "layers.*"))
    found = {role.name: role.bytes for role in memory.estimate(some, (1, 1, 1, 1)).roles}
    assert found["activations"] == 8 * head.per_row + head.weight_copies


def test_weights_that_are_cast_are_kept_without_remat():
    mixed = dataclasses.replace(SMALL, dtype="bfloat16", attention="chunked")
    kernels = sum(
        leaf.size for leaf in jax.tree.leaves(decoder.abstract_params(mixed)["layers"]) if len(leaf.shape) == 3
    )
    scales = 2 * 2 * 64
    masks = 5 * SMALL.num_heads * 32 * 32  # constants of the reference attention, float32 and boolean
    assert 0 <= saved(mixed).weight_copies - 2 * (kernels + scales) <= masks
    assert saved(dataclasses.replace(mixed, remat="full")).weight_copies < 1000
    same = dataclasses.replace(mixed, param_dtype="bfloat16")
    assert saved(same).weight_copies <= masks and saved(same).per_row == saved(mixed).per_row


def test_flash_back_ends_are_planned_where_they_cannot_run():
    chunked = saved(dataclasses.replace(SMALL, attention="chunked"))
    assert saved(dataclasses.replace(SMALL, attention="cudnn", dtype="float32")) == chunked
    assert saved(dataclasses.replace(SMALL, attention="ring")) == chunked
    packed = saved(dataclasses.replace(SMALL, attention="cudnn_packed"))
    statistics = 4 * SMALL.num_layers * SMALL.num_heads * 32 * MAX_SEGMENTS  # float32, per document of a row
    assert packed == (chunked.per_row + statistics, chunked.weight_copies)
    assert saved(SMALL, seq_len=256).per_row > 4 * saved(SMALL, seq_len=64).per_row * 1.5  # the reference keeps squares


LARGE_HEAD = {"vocab_size": 8192, "d_model": 512, "num_layers": 1, "ffn_dim": 256}


@pytest.mark.parametrize(
    ("changes", "mesh", "job"),
    [
        ({"remat": "full", "attention": "chunked"}, MeshConfig(fsdp=1), {}),
        ({"remat": "none", "attention": "xla"}, MeshConfig(fsdp=1), {}),
        # Logits larger than all that the layer holds.
        (LARGE_HEAD | {"remat": "full", "attention": "chunked"}, MeshConfig(fsdp=1), {"batch_size": 8}),
        # Two chunks, and a head that every shard gathers and has a whole gradient of.
        (
            LARGE_HEAD | {"remat": "full", "attention": "chunked"},
            MeshConfig(fsdp=8),
            {"batch_size": 8, "seq_len": 1024},
        ),
    ],
    ids=["full", "none", "large head", "sharded head"],
)
def test_the_estimate_is_near_a_compilers_temporaries(changes, mesh, job):
    """On CPU in float32, where its constants were fitted, at other sizes than those they were fitted on."""
    model = dataclasses.replace(
        SMALL, vocab_size=2048, d_model=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=768
    )
    job = Job(dataclasses.replace(model, **changes), **{"batch_size": 4, "seq_len": 512, "mesh": mesh} | job)
    optimizer = make_optimizer(job.optimizer, Constant(), 1)
    devices_of = None if mesh.fsdp == 1 else sharding.make_mesh(mesh)
    step = make_step(next_token(job.model), optimizer, mesh=devices_of)
    lowered = step.lower(memory.job_state(job, devices_of), memory.abstract_batch(job, devices_of))
    analysis = lowered.compile().memory_analysis()
    found = memory.estimate(job, mesh.shape(mesh.fsdp))
    batch_bytes = next(role.bytes for role in found.roles if role.name == "batch")
    assert analysis.argument_size_in_bytes == pytest.approx(found.exact - batch_bytes // 2, abs=64)
    assert found.total - found.exact == pytest.approx(analysis.temp_size_in_bytes, rel=0.15)


def test_shards_divide_what_a_device_computes():
    """Twice the devices on an axis, and half of what is cut by it."""
    model = dataclasses.replace(INTERNLM2_7B, remat="none", attention="chunked", param_dtype="bfloat16")

    def activations(**mesh):
        shape = MeshConfig(**({"fsdp": 1} | mesh)).shape(int(np.prod(list(mesh.values()))))
        job = Job(model, batch_size=8, seq_len=2048, mesh=MeshConfig(*shape))
        return next(role.bytes for role in memory.estimate(job, shape).roles if role.name == "activations")

    whole = activations(fsdp=1)
    for axis in ("data", "fsdp", "sequence"):
        assert activations(**{axis: 2}) == pytest.approx(whole / 2, rel=1e-4)
    assert whole // 2 < activations(tensor=2) < 0.8 * whole  # the residual stream stays whole


def test_time_traffic_and_mfu_by_hand():
    model = dataclasses.replace(INTERNLM2_7B, remat="full", attention="cudnn_packed")
    job = Job(model, batch_size=64, seq_len=4096, mesh=MeshConfig(data=2, fsdp=4, tensor=2), accumulate=4)
    found = plan.make_plan(job, num_devices=16, device=H100, efficiency=0.5)
    by_axis = {each.axis: each for each in found.traffic}
    assert set(by_axis) == {"data", "fsdp", "tensor"}
    size = num_params(model)
    rows, stream = 2, 2 * 4096 * 4096 * 2
    assert by_axis["tensor"].bytes == 4 * (2 * 1 // 2) * (32 * 5 + 2) * stream and rows == 64 // 8 // 4
    own = found.memory.roles[0].bytes // 4  # float32 parameters on one device
    assert by_axis["fsdp"].bytes == pytest.approx(4 * 0.75 * (2 * size * 2 / 2 + own * 4 * 2), rel=1e-6)
    assert by_axis["data"].bytes == pytest.approx(4 * 2 * 0.5 * own * 2, rel=1e-6)
    assert (by_axis["tensor"].path, by_axis["fsdp"].path, by_axis["data"].path) == ("link", "link", "network")
    # Useful work, one more forward pass of the layers, of attention, and of the head; no half in vain on cuDNN.
    head, layers = 4096 * 92544, flops.num_matmul_params(model) - 4096 * 92544
    attention = 6 * 32 * 4096 * 4096
    per_token = 6 * (head + layers) + attention + 2 * head + 2 * layers + 2 * attention // 3
    assert found.executed_flops == 64 * 4096 * per_token
    assert found.compute_seconds == pytest.approx(found.executed_flops / (16 * 989e12 * 0.5), rel=0.02)
    assert found.step_seconds == pytest.approx(found.compute_seconds + by_axis["tensor"].seconds)
    assert found.mfu == pytest.approx(found.flops / (found.step_seconds * 16 * 989e12)) and found.mfu < 0.5
    assert found.gpu_hours(64 * 4096 * 3600) == pytest.approx(16 * found.step_seconds)
    # The ring leaves blocks out that no query sees: beside the diagonal it computes half a block of keys and a chunk of
    # queries in vain, where other back ends compute the other half of the square.
    shares = {}
    for backend in ("cudnn_packed", "ring", "chunked"):
        long = dataclasses.replace(job, model=dataclasses.replace(model, attention=backend), seq_len=32_768)
        shares[backend] = plan.executed_flops(long)
    assert (shares["ring"] - shares["cudnn_packed"]) / (shares["chunked"] - shares["cudnn_packed"]) == pytest.approx(
        (2048 + 512) / 32_768, rel=1e-3
    )
    slow = H100._replace(network_bandwidth=1e8)
    assert plan.make_plan(job, num_devices=16, device=slow).bound == "communication over data"


def test_the_largest_batch_is_the_last_that_fits():
    job = Job(dataclasses.replace(INTERNLM2_7B, remat="full", attention="chunked"), 64, 4096, accumulate=2)
    found = plan.make_plan(job, num_devices=8, device=H100)
    assert found.largest_batch % 16 == 0

    def fits(batch_size):
        return plan.make_plan(dataclasses.replace(job, batch_size=batch_size), num_devices=8, device=H100).fits

    assert fits(found.largest_batch) and not fits(found.largest_batch + 16)


def test_meshes_worth_trying_fit_and_are_sorted():
    model = dataclasses.replace(INTERNLM2_7B, remat="full", attention="chunked")
    job = Job(model, batch_size=64, seq_len=4096, mesh=MeshConfig(data=8, fsdp=1))
    alone = plan.make_plan(job, num_devices=8, device=H100)
    assert not alone.fits  # every replica with all moments
    found = plan.meshes(job, num_devices=8, device=H100)
    assert len(found) > 2 and all(each.fits and each.num_devices == 8 for each in found)
    seconds = [each.step_seconds for each in found]
    assert seconds == sorted(seconds)
    assert all(each.job.batch_size == 64 for each in found)
    assert all(each.job.model.attention == "ring" for each in found if each.shape[2] > 1)


def test_remedies_are_tried_before_they_are_named():
    job = Job(dataclasses.replace(INTERNLM2_7B, attention="chunked"), batch_size=64, seq_len=4096)
    found = plan.make_plan(job, num_devices=8, device=H100)
    (remedy,) = plan.remedies(found)
    assert remedy == "Fits with remat=full, accumulate=2." or remedy == "Fits with remat=full."
    changes = {"accumulate": 2} if "accumulate" in remedy else {}
    mended = dataclasses.replace(job, model=dataclasses.replace(job.model, remat="full"), **changes)
    assert plan.make_plan(mended, num_devices=8, device=H100).fits
    assert f"does not fit: {found.memory.total / devices.GIB:.1f} of 71.7 GiB per h100. {remedy}" == plan.verdict(found)
    # One device cannot hold the state of a full run at all; adapters it can.
    alone = plan.make_plan(dataclasses.replace(job, batch_size=1), num_devices=1, device=H100)
    assert plan.remedies(alone)[0].startswith("Not even one row per device fits")
    assert plan.remedies(alone)[1] == "Adapters (method lora) would fit."
    small = plan.make_plan(alone.job, num_devices=1, device=devices.named("3080"))
    assert plan.mended(small) is None
    assert plan.remedies(small)[1:] == ["Adapters over a base in four bits (method qlora) would fit."]
    assert plan.verdict(plan.make_plan(job, num_devices=8)).endswith("name a --device to hold it against")


def test_the_text_says_what_is_exact_and_what_is_not():
    job = Job(SMALL, batch_size=8, seq_len=16, mesh=MeshConfig(fsdp=4, tensor=2))
    text = plan.describe(plan.make_plan(job, num_devices=8, device=H100))
    for line in (
        "parameters  .* exact",
        "optimizer state .* exact *AdamW",
        "activations .* estimate",
        "total .* exact",
    ):
        assert any(re.search(line, row) for row in text.splitlines()), line
    assert "fsdp 4 x tensor 2" in text and "recomputation not counted" in text and "(--efficiency)" in text
    assert f"\n{num_params(SMALL):,} parameters, full, 8 x h100" in f"\n{text}"
    total = plan.make_plan(job, num_devices=8).memory.total
    assert re.search("holds +MiB", text) and re.search(rf"total +{total / 2**20:.2f} ", text)
    large = dataclasses.replace(job, batch_size=1 << 20)
    assert re.search("holds +GiB", plan.describe(plan.make_plan(large, num_devices=8)))

    adapted = Job(SMALL, 8, 16, lora=LoraConfig(rank=4, kind="dora", scaling="rslora"), quantised=Quantised("int4", 4))
    text = plan.describe(plan.make_plan(adapted, num_devices=1))
    assert re.search(r"parameters, qlora \(dora, rslora, int4, [\d,]+ trained\), 1 x", text)

    some = dataclasses.replace(job, model=dataclasses.replace(SMALL, window=4), freeze=("embed.*", "layers.*"))
    found = plan.make_plan(some, num_devices=8, device=H100)
    text, head = plan.describe(found), 64 * 128
    assert f"parameters, full ({head + 64:,} trained), 8 x h100" in text and "window 4)" in text
    assert any(re.search("frozen parameters .* exact", row) for row in text.splitlines())
    # Only the head is gone through backward; what is masked is computed all the same.
    products, attention = 2 * flops.num_matmul_params(SMALL) + 4 * head, 2 * 2 * 64
    assert found.flops == 8 * (16 * products + attention * (16**2 - 12**2))
    assert found.executed_flops == 8 * 16 * (products + 2 * head + attention * 16 * 2)


REFUSED = {
    "rows": (Job(SMALL, 12, 16), 8, r"a batch of 12 rows cannot be cut into data 1 x fsdp 8 x accumulate 1 = 8"),
    "time": (Job(SMALL, 8, 15, mesh=MeshConfig(sequence=2)), 8, r"rows of 15 tokens cannot be cut over sequence 2"),
    "width": (Job(SMALL, 9, 16, mesh=MeshConfig(fsdp=3)), 3, r"mesh axis 'fsdp' of size 3 does not divide"),
    "devices": (Job(SMALL, 8, 16, mesh=MeshConfig(fsdp=4)), 8, r"does not fit 8 devices"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_that_cannot_be_cut_is_refused(name):
    job, num_devices, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        plan.make_plan(job, num_devices=num_devices)


def test_a_device_is_refused_for_what_it_cannot_do():
    fused = Job(dataclasses.replace(SMALL, attention="cudnn"), 8, 16)
    with pytest.raises(ValueError, match="attention=cudnn needs compute capability 8.0 .* t4 has 7.5"):
        plan.make_plan(fused, num_devices=1, device=devices.named("t4"))
    assert plan.make_plan(fused, num_devices=1, device=devices.named("3060")).fits


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="quantised kernels cannot be trained"):
        Job(SMALL, 8, 16, quantised=Quantised())
    with pytest.raises(ValueError, match="under adapters the whole model is frozen"):
        Job(SMALL, 8, 16, lora=LoraConfig(), freeze=("embed.*",))
    with pytest.raises(ValueError, match="lora_plus_ratio is the rate of adapters, and none are trained"):
        Job(SMALL, 8, 16, optimizer=AdamW(lora_plus_ratio=16.0))
    with pytest.raises(ValueError, match="accumulate must be at least 1, given 0"):
        Job(SMALL, 8, 16, accumulate=0)
    with pytest.raises(ValueError, match=r"lie in \(0, 1\]; given 1.5"):
        plan.make_plan(Job(SMALL, 8, 16), num_devices=8, efficiency=1.5)


def test_a_cache_is_what_decoding_allocates():
    from internjax.model.cache import dense_cache

    cache = dense_cache(SMALL, 3, 40, dtype="int8")
    assert memory.cache_bytes(SMALL, 3, 40, dtype="int8") == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    half = functools.partial(memory.cache_bytes, SMALL, 3, 40, dtype="bfloat16")
    assert half(tensor=2) - 12 == (half() - 12) // 2  # the page table stays whole
