"""Accelerators as numbers: memory, peak arithmetic, bandwidths. Every figure is the vendor's; none is measured here.

Sources: NVIDIA's data sheets of the named products, except the GeForce cards: "Ada GPU Architecture" and "Ampere GA102
GPU Architecture" white papers (rate with float32 accumulation). Data sheets of Hopper and newer print rates "with
sparsity"; dense products run at half of that, which is what stands here (training.md's "common error" is the other).
Memory is what the driver reports as total (nvidia-smi), a little below the round figure in the name.
"""

import re
from typing import NamedTuple

MIB = 1 << 20
GIB = 1 << 30


class Device(NamedTuple):
    """One kind of accelerator. Bandwidths in bytes per second, each direction, per device."""

    name: str
    """What `--device` takes."""
    kind: str
    """Regular expression that finds jax's `device.device_kind`."""
    memory: int
    """Bytes."""
    peak_flops: float
    """Dense bfloat16 products with float32 accumulation, per second."""
    memory_bandwidth: float
    link_bandwidth: float
    """To the other devices of its node: NVLink, or PCIe where there is none."""
    network_bandwidth: float
    """Beyond the node: one network port per device as in the vendor's reference systems (HGX/DGX), PCIe cards: half."""
    devices_per_node: int = 8


# NVLink figures on data sheets add both directions: 900 GB/s are 450 each way. Reference systems have one 400 Gb/s
# port per Hopper or Blackwell GPU and one 200 Gb/s port per A100; plain PCIe cards are assumed to share 100 Gb/s ports.
DEVICES = (
    Device("b200", r"\bB200\b", 180 * 10**9, 2250e12, 7.7e12, 900e9, 50e9),
    Device("h200-nvl", r"\bH200 NVL\b", 143771 * MIB, 835e12, 4.8e12, 450e9, 25e9),
    Device("h200", r"\bH200\b", 143771 * MIB, 989e12, 4.8e12, 450e9, 50e9),
    Device("gh200", r"\bGH200\b", 97871 * MIB, 989e12, 4.0e12, 450e9, 50e9, 1),
    Device("h100-pcie", r"\bH100 PCIe\b", 81559 * MIB, 756e12, 2.0e12, 64e9, 25e9),
    Device("h100-nvl", r"\bH100 NVL\b", 95830 * MIB, 835e12, 3.9e12, 300e9, 25e9),
    Device("h100", r"\bH100\b", 81559 * MIB, 989e12, 3.35e12, 450e9, 50e9),
    Device("h800", r"\bH800\b", 81559 * MIB, 989e12, 3.35e12, 200e9, 50e9),
    Device("a100-40", r"\bA100.*40GB\b", 40960 * MIB, 312e12, 1.555e12, 300e9, 25e9),
    Device("a100-80", r"\bA100\b", 81920 * MIB, 312e12, 2.039e12, 300e9, 25e9),
    Device("l40s", r"\bL40S\b", 46068 * MIB, 362e12, 0.864e12, 32e9, 12.5e9),
    Device("l4", r"\bL4\b", 23034 * MIB, 121e12, 0.3e12, 32e9, 12.5e9),
    Device("a10", r"\bA10\b", 23028 * MIB, 125e12, 0.6e12, 32e9, 12.5e9),
    Device("4090", r"\bRTX 4090\b", 24564 * MIB, 165.2e12, 1.008e12, 32e9, 12.5e9),
    Device("3090", r"\bRTX 3090\b", 24576 * MIB, 71e12, 0.936e12, 32e9, 12.5e9),
)

NAMES = tuple(device.name for device in DEVICES)


def named(name: str) -> Device:
    """Returns the device of that `--device` name; raises ValueError listing the known ones."""
    for device in DEVICES:
        if device.name == name.lower():
            return device
    raise ValueError(f"unknown device {name!r}; known: {', '.join(NAMES)}")


def find(device_kind: str) -> Device | None:
    """Returns the device behind jax's `device.device_kind` (or a `--device` name), None where it is not in the table.

    A CPU is not: nobody publishes a peak that its training could be held against.
    """
    for device in DEVICES:
        if device.name == device_kind.lower() or re.search(device.kind, device_kind, re.IGNORECASE):
            return device
    return None
