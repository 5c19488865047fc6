"""Accelerators as numbers: memory, capability, peaks, bandwidths. Every figure is the vendor's; none measured here.

Sources: NVIDIA's data sheets of the named products. GeForce cards: the architecture white papers of Turing, Ampere
GA102, Ada and RTX Blackwell, which give the rate with float32 accumulation for the 2080 Ti, 3070, 3080, 3090, 4080,
4090 and 5090; those are 512 operations per multiprocessor and clock, and so are the others here: published
multiprocessors x boost clock x 512. Data sheets of Hopper and newer print rates "with sparsity"; dense products run at
half of that, which is what stands here (training.md's "common error" is the other). Compute capabilities: NVIDIA's list
of CUDA GPUs. Memory is what the driver reports as total (nvidia-smi), a little below the round figure in the name; of
cards sold with several sizes the smaller one, but where the name says otherwise.
"""

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import jax

MIB = 1 << 20
GIB = 1 << 30

BFLOAT16_FROM = (8, 0)
"""Compute capability from which tensor cores multiply bfloat16; below it the compiler converts every product."""


class Device(NamedTuple):
    """One kind of accelerator. Bandwidths in bytes per second, each direction, per device."""

    name: str
    """What `--device` takes."""
    kind: str
    """Regular expression that finds jax's `device.device_kind`."""
    compute_capability: tuple[int, int]
    memory: int
    """Bytes."""
    peak_flops: float
    """Dense products of `compute_dtype` with float32 accumulation, per second."""
    memory_bandwidth: float
    link_bandwidth: float
    """To the other devices of its node: NVLink, or PCIe where there is none."""
    network_bandwidth: float
    """Beyond the node: one network port per device as in the vendor's reference systems (HGX/DGX), PCIe cards: half."""
    devices_per_node: int = 8

    @property
    def has_bfloat16(self) -> bool:
        return self.compute_capability >= BFLOAT16_FROM


def _card(number: str) -> str:
    """Returns the expression of a desktop card: no Ti, SUPER, D or Laptop of that number, which are other chips."""
    return rf"\bRTX {number}\b(?! (Ti|SUPER|D|Laptop)\b)"


# NVLink figures on data sheets add both directions: 900 GB/s are 450 each way. Reference systems have one 400 Gb/s
# port per Hopper or Blackwell GPU and one 200 Gb/s port per A100; plain PCIe cards are assumed to share 100 Gb/s ports.
DEVICES = (
    Device("b200", r"\bB200\b", (10, 0), 180 * 10**9, 2250e12, 7.7e12, 900e9, 50e9),
    Device("h200-nvl", r"\bH200 NVL\b", (9, 0), 143771 * MIB, 835e12, 4.8e12, 450e9, 25e9),
    Device("h200", r"\bH200\b", (9, 0), 143771 * MIB, 989e12, 4.8e12, 450e9, 50e9),
    Device("gh200", r"\bGH200\b", (9, 0), 97871 * MIB, 989e12, 4.0e12, 450e9, 50e9, 1),
    Device("h100-pcie", r"\bH100 PCIe\b", (9, 0), 81559 * MIB, 756e12, 2.0e12, 64e9, 25e9),
    Device("h100-nvl", r"\bH100 NVL\b", (9, 0), 95830 * MIB, 835e12, 3.9e12, 300e9, 25e9),
    Device("h100", r"\bH100\b", (9, 0), 81559 * MIB, 989e12, 3.35e12, 450e9, 50e9),
    Device("h800", r"\bH800\b", (9, 0), 81559 * MIB, 989e12, 3.35e12, 200e9, 50e9),
    Device("a100-40", r"\bA100.*40GB\b", (8, 0), 40960 * MIB, 312e12, 1.555e12, 300e9, 25e9),
    Device("a100-80", r"\bA100\b", (8, 0), 81920 * MIB, 312e12, 2.039e12, 300e9, 25e9),
    Device("v100-32", r"\bV100.*32GB\b", (7, 0), 32768 * MIB, 125e12, 0.9e12, 150e9, 12.5e9),
    Device("v100", r"\bV100\b", (7, 0), 16384 * MIB, 125e12, 0.9e12, 150e9, 12.5e9),
    Device("l40s", r"\bL40S\b", (8, 9), 46068 * MIB, 362e12, 0.864e12, 32e9, 12.5e9),
    Device("l4", r"\bL4\b", (8, 9), 23034 * MIB, 121e12, 0.3e12, 32e9, 12.5e9),
    Device("a10", r"\bA10\b", (8, 6), 23028 * MIB, 125e12, 0.6e12, 32e9, 12.5e9),
    Device("t4", r"\bT4\b", (7, 5), 15360 * MIB, 65e12, 0.32e12, 16e9, 12.5e9),
    Device("5090", _card("5090"), (12, 0), 32607 * MIB, 209.5e12, 1.792e12, 64e9, 12.5e9),
    Device("4090", _card("4090"), (8, 9), 24564 * MIB, 165.2e12, 1.008e12, 32e9, 12.5e9),
    Device("4080", _card("4080"), (8, 9), 16376 * MIB, 97.5e12, 0.717e12, 32e9, 12.5e9),
    Device("4070", _card("4070"), (8, 9), 12282 * MIB, 46 * 2475e6 * 512, 0.504e12, 32e9, 12.5e9),
    Device("4060-ti", r"\bRTX 4060 Ti\b", (8, 9), 8188 * MIB, 34 * 2535e6 * 512, 0.288e12, 16e9, 12.5e9),
    Device("4060-ti-16", r"\bRTX 4060 Ti 16GB\b", (8, 9), 16380 * MIB, 34 * 2535e6 * 512, 0.288e12, 16e9, 12.5e9),
    Device("4060", _card("4060"), (8, 9), 8188 * MIB, 24 * 2460e6 * 512, 0.272e12, 16e9, 12.5e9),
    Device("3090", _card("3090"), (8, 6), 24576 * MIB, 71e12, 0.936e12, 32e9, 12.5e9),
    Device("3080", _card("3080"), (8, 6), 10240 * MIB, 59.5e12, 0.76e12, 32e9, 12.5e9),
    Device("3070", _card("3070"), (8, 6), 8192 * MIB, 40.6e12, 0.448e12, 32e9, 12.5e9),
    Device("3060", _card("3060"), (8, 6), 12288 * MIB, 28 * 1777e6 * 512, 0.36e12, 32e9, 12.5e9),
    Device("2080-ti", r"\bRTX 2080 Ti\b", (7, 5), 11264 * MIB, 53.8e12, 0.616e12, 16e9, 12.5e9),
)

NAMES = tuple(device.name for device in DEVICES)


def named(name: str) -> Device:
    """Returns the device of that `--device` name, however it is spaced ("RTX 2080 Ti" is 2080-ti); raises ValueError
    listing the known ones."""
    plain = re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9]", "", name.lower())
    for device in DEVICES:
        if device.name.replace("-", "") == plain:
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


def compute_capability(device: "Device | jax.Device") -> tuple[int, int] | None:
    """Returns the compute capability of a device, here or of the table; None for what is no NVIDIA GPU."""
    if isinstance(device, Device):
        return device.compute_capability
    if device.platform not in ("gpu", "cuda"):
        return None
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def compute_dtype(
    device: "Device | jax.Device", wanted: Literal["float32", "bfloat16", "float16"] = "bfloat16"
) -> Literal["float32", "bfloat16", "float16"]:
    """Returns the dtype to compute in where `wanted` is asked for: float16 in place of bfloat16 where a GPU has none.

    Training in float16 wants a loss scale (`train.loss_scale`). A CPU computes what it is asked for.
    """
    capability = compute_capability(device)
    lacking = wanted == "bfloat16" and capability is not None and capability < BFLOAT16_FROM
    return "float16" if lacking else wanted


def dtype_note(device: "Device | jax.Device", wanted: str = "bfloat16") -> str | None:
    """Returns what a run or plan says where it computes in another dtype than asked for, None where it does not."""
    if compute_dtype(device, wanted) == wanted:
        return None
    name = device.name if isinstance(device, Device) else device.device_kind
    major, minor = compute_capability(device)
    return f"{name} (compute capability {major}.{minor}) has no bfloat16: computed in float16, with a loss scale"


def attention_problem(device: "Device | jax.Device", backend: str) -> str | None:
    """Returns why an attention back end cannot run on that GPU, None where the GPU is no obstacle.

    The fused kernels that jax calls through cuDNN are made for Ampere and newer: compute capability 8.0.
    """
    capability = compute_capability(device)
    if not backend.startswith("cudnn") or capability is None or capability >= (8, 0):
        return None
    name = device.name if isinstance(device, Device) else device.device_kind
    return (
        f"attention={backend} needs compute capability 8.0 (Ampere or newer), and {name} has "
        f"{capability[0]}.{capability[1]}. Use attention=chunked"
    )
