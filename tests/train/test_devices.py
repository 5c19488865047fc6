"""The table of devices: who is found, what they compute in, and what they are refused for."""

from typing import NamedTuple

import jax
import pytest

from internjax.train import devices

KINDS = {
    "NVIDIA GeForce RTX 2080 Ti": "2080-ti",
    "NVIDIA GeForce RTX 3060": "3060",
    "NVIDIA GeForce RTX 3070": "3070",
    "NVIDIA GeForce RTX 3080": "3080",
    "NVIDIA GeForce RTX 3090": "3090",
    "NVIDIA GeForce RTX 4060": "4060",
    "NVIDIA GeForce RTX 4060 Ti": "4060-ti",
    "NVIDIA GeForce RTX 4070": "4070",
    "NVIDIA GeForce RTX 4080": "4080",
    "NVIDIA GeForce RTX 5090": "5090",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-16GB": "v100",
    "Tesla V100-SXM2-32GB": "v100-32",
    "NVIDIA A10": "a10",
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4070 Ti SUPER": None,
    "NVIDIA GeForce RTX 3080 Ti": None,
}


class Gpu(NamedTuple):
    """What is read of a device of jax."""

    compute_capability: str
    platform: str = "gpu"
    device_kind: str = "Tesla T4"


def test_every_card_is_found_by_its_own_name_and_no_other():
    found = {kind: devices.find(kind) for kind in KINDS}
    assert {kind: device and device.name for kind, device in found.items()} == KINDS
    assert len({device.name for device in devices.DEVICES}) == len(devices.DEVICES)
    assert devices.named("RTX 4060 Ti 16").memory > 1.9 * devices.named("4060ti").memory
    # The white papers' figures are multiprocessors x clock x 512.
    for name, multiprocessors, clock in (("2080-ti", 68, 1545e6), ("3070", 46, 1725e6), ("5090", 170, 2407e6)):
        assert devices.named(name).peak_flops == pytest.approx(multiprocessors * clock * 512, rel=3e-3)


def test_what_has_no_bfloat16_computes_in_float16():
    without = {device.name for device in devices.DEVICES if devices.compute_dtype(device) == "float16"}
    assert without == {"2080-ti", "t4", "v100", "v100-32"}
    assert without == {device.name for device in devices.DEVICES if not device.has_bfloat16}
    assert devices.compute_dtype(devices.named("t4"), "float32") == "float32"
    assert devices.compute_dtype(Gpu("7.5")) == "float16" and devices.compute_dtype(Gpu("12.0")) == "bfloat16"
    assert devices.compute_dtype(jax.devices("cpu")[0]) == "bfloat16" and devices.compute_capability(Gpu("?")) is None
    assert devices.dtype_note(Gpu("8.6")) is None
    assert "Tesla T4 (compute capability 7.5) has no bfloat16: computed in float16" in devices.dtype_note(Gpu("7.5"))


def test_fused_attention_is_refused_by_name_below_ampere():
    said = (
        "attention=cudnn_packed needs compute capability 8.0 (Ampere or newer), and t4 has 7.5. Use attention=chunked"
    )
    assert devices.attention_problem(devices.named("t4"), "cudnn_packed") == said
    assert "Tesla T4 has 7.0" in devices.attention_problem(Gpu("7.0"), "cudnn")
    for device, backend in ((Gpu("8.0"), "cudnn"), (Gpu("7.5"), "chunked"), (jax.devices("cpu")[0], "cudnn")):
        assert devices.attention_problem(device, backend) is None
