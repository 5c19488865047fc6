"""What the kernels written in Pallas for NVIDIA's Hopper (Mosaic GPU) share: which jax they are for, and how they run.

Mosaic GPU is experimental in jax, so this file says with which releases the kernels were lowered, and imports it where
it is needed. A kernel is written once and runs three ways: compiled on a GPU of compute capability 9.0; lowered for
CUDA anywhere (no GPU is asked for until it is compiled); and interpreted on a CPU, where jax simulates copies, barriers
and both kinds of memory. Two things the interpreter of the oldest release lacks, and `Run` stands between: layouts of
registers, which change no value, and the tensor cores' product of transposed or register operands.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_VERSIONS = ((0, 10, 2), (0, 11, 2), (0, 12, 0))
"""Releases of jax with which the kernels were lowered for CUDA and interpreted."""
_CAPABILITY = (9, 0)


class Run(NamedTuple):
    """How a kernel runs."""

    interpreted: bool = False

    def kernel(self, body: Callable, **how: Any) -> Callable:
        """Returns `plgpu.kernel` of the body with the compiler parameters that all kernels use."""
        plgpu = modules().plgpu
        if self.interpreted:
            how["interpret"] = _interpret_params()
        # Lane: every register array has a stated layout. The other semantics infer layouts, and the oldest release
        # finds none for these kernels.
        lane = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True)
        return plgpu.kernel(body, compiler_params=lane, **how)

    def cast(self, x: jax.Array, layout: Any) -> jax.Array:
        """Returns `x` laid out over the registers of the warpgroup as stated."""
        return x if self.interpreted else modules().plgpu.layout_cast(x, layout)

    def column_index(self, shape: tuple[int, int]) -> jax.Array:
        """Returns the column of every element of a product of the tensor cores, int32."""
        plgpu = modules().plgpu
        if self.interpreted:
            return lax.broadcasted_iota(jnp.int32, shape, 1)
        return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)

    def product(self, a: Any, b: Any, *, transposed: bool = False) -> jax.Array:
        """Returns a `[64, I]` times b `[I, O]`, or times b `[O, I]` transposed, float32.

        `a` is a reference to shared memory or a value in registers, `b` a reference. Interpreted it is the definition.
        """
        pl, plgpu = modules()
        if self.interpreted:
            a = a if isinstance(a, jax.Array) else a[...]
            dims = (((1,), (1 if transposed else 0,)), ((), ()))
            return lax.dot_general(a, b[...], dims, preferred_element_type=jnp.float32)

        def multiply(sums):
            plgpu.wgmma(sums, a, _transpose(b) if transposed else b)
            return sums[...]

        shape = (a.shape[0], b.shape[0 if transposed else 1])
        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


COMPILED = Run()


class _Modules(NamedTuple):
    pl: Any
    plgpu: Any


def modules() -> _Modules:
    """Returns jax's Pallas and its Mosaic GPU part."""
    from jax.experimental import pallas
    from jax.experimental.pallas import mosaic_gpu

    return _Modules(pallas, mosaic_gpu)


def tiles(columns: int, dtype: jnp.dtype) -> tuple:
    """Returns how a matrix of so many columns lies in shared memory, as copies and tensor cores want it."""
    plgpu = modules().plgpu
    bits = (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits
    swizzle = next(size for size in (128, 64, 32) if columns * bits % (8 * size) == 0)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def pairwise_sum(x: jax.Array, *, axis: int) -> jax.Array:
    """Returns the sum over an axis: neighbours first, then neighbours of those. Zeros behind the last change no bit."""
    while x.shape[axis] > 1:
        x = jnp.pad(x, [(0, x.shape[axis] % 2 if dim == axis else 0) for dim in range(x.ndim)])
        even, odd = (lax.slice_in_dim(x, start, None, stride=2, axis=axis) for start in (0, 1))
        x = even + odd
    return lax.squeeze(x, (axis,))


def unsupported() -> dict[str, bool]:
    """Returns what stands against the kernels, whatever they are given, each with whether it holds.

    It looks at jax, at the first device, and at the mesh that is set.
    """
    known = ", ".join(".".join(map(str, version)) for version in _VERSIONS)
    capability = _capability()
    mesh = jax.sharding.get_abstract_mesh()
    return {
        f"a mesh of {mesh.size} devices (one only)": not mesh.empty and mesh.size > 1,
        f"jax {jax.__version__} (lowered with {known} only: install one of them)": _version() not in _VERSIONS,
        f"the {jax.default_backend()} platform (NVIDIA GPUs only)": jax.default_backend() != "gpu",
        f"compute capability {'.'.join(map(str, capability)) or 'none'} (9.0, Hopper, only)": capability != _CAPABILITY,
    }


def _version() -> tuple[int, ...]:
    return tuple(jax.__version_info__[:3])


def _capability() -> tuple[int, ...]:
    """Returns the compute capability of the first device, () where it states none as numbers (not NVIDIA's)."""
    parts = str(getattr(jax.local_devices()[0], "compute_capability", "")).split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def _transpose(ref: Any) -> Any:
    if _version() < (0, 11):
        return modules().plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def _interpret_params() -> Any:
    # Public from 0.11 on; at the same place in all releases listed above.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
