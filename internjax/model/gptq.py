"""GPTQ (arXiv:2210.17323): rows of a kernel are rounded one after the other, and those to come make up for the error.

With the second moments H of the inputs and H^-1 = U^T U, U upper triangular, the best answer to rounding row i of W is
W_j -= U_ij (W_i - Q_i) / U_ii for all rows j after it. Rows go in blocks, whose effect on later blocks is one product.

I input features, O output features, g groups along I, C rows of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from internjax.kernels.quant_matmul import Scheme
from internjax.model.calibrate import READERS, Statistics
from internjax.model.quantize import QuantArray, codes_of, fitting_group, range_of, step_of, stored_codes, zero_of

BLOCK = 128
"""Rows of a block, at most."""
DAMPING = 0.01
"""What is added to the moments' diagonal, as a part of its mean; ten times as much where that does not suffice."""


def quantize_layer(
    layer: dict,
    statistics: dict[str, Statistics],
    *,
    group: int,
    scheme: Scheme = "int4",
    symmetric: bool = True,
    act_order: bool = False,
    scale_dtype: str = "float16",
) -> dict:
    """Returns one layer's parameters, quantised. group -1: one group of all input features.

    act_order: rows with the largest moments are rounded first, while all others can still make up for them. Groups are
    of neighbours all the same, and their scales are those of the kernel as it was given.
    """
    new = layer | {half: {name: dict(part) for name, part in layer[half].items()} for half in ("attention", "ffn")}
    grid = Grid(scheme, symmetric, scale_dtype)
    for name, readers in READERS.items():
        order_I = rounding_order(statistics[name].moment_II, act_order=act_order)
        factor_II = inverse_factor(statistics[name].moment_II[order_I][:, order_I])
        for half, linear in readers:
            kernel = layer[half][linear]["kernel"]
            size = kernel.shape[0] if group == -1 else group
            shrink = 1.0 if act_order else None
            array = quantize_rows(kernel, factor_II, order_I, group=size, grid=grid, shrink=shrink)
            new[half][linear]["kernel"] = array
    return new


def rounding_order(moment_II: jax.Array, *, act_order: bool) -> jax.Array:
    """Returns the rows in the order of rounding: as they are, or those with the largest moments first."""
    return jnp.argsort(-jnp.diagonal(moment_II)) if act_order else jnp.arange(len(moment_II))


@jax.jit
def inverse_factor(moment_II: jax.Array) -> jax.Array:
    """Returns the upper triangular U with (H + damping)^-1 = U^T U; inputs that never came count as independent."""
    diagonal = jnp.diagonal(moment_II)
    moment_II = moment_II + jnp.diag(jnp.where(diagonal == 0, 1.0, 0.0))
    mean = jnp.mean(jnp.diagonal(moment_II))

    def factor(damping):
        damped = moment_II + damping * mean * jnp.eye(len(moment_II))
        # Of the matrix turned around, so that H = R R^T with R upper triangular: U is its inverse.
        upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(moment_II)), lower=False)

    def again(state):
        damping, _ = state
        return 10 * damping, factor(10 * damping)

    first = (jnp.float32(DAMPING), factor(DAMPING))
    broken = lambda state: ~jnp.isfinite(state[1]).all() & (state[0] < 1e3)  # noqa: E731
    return jax.lax.while_loop(broken, again, first)[1]


class Grid(NamedTuple):
    """The integers that a kernel is rounded to, and how their scales are stored."""

    scheme: Scheme
    symmetric: bool
    scale_dtype: str

    def fit(self, rows: jax.Array, *, axis: int, shrink: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
        """Returns the step, as it will be stored, and the zero of rows that share them."""
        how = {"scheme": self.scheme, "symmetric": self.symmetric}
        low, high = (shrink * edge for edge in range_of(rows, axis=axis))
        step = step_of(low, high, **how).astype(self.scale_dtype).astype(jnp.float32)
        step = jnp.where(step == 0, 1.0, step)
        return step, zero_of(low, step, **how)


@functools.partial(jax.jit, static_argnames=("group", "grid"))
def quantize_rows(
    kernel: jax.Array,
    factor_II: jax.Array,
    order_I: jax.Array,
    *,
    group: int,
    grid: Grid,
    shrink: jax.Array | float | None = None,
) -> QuantArray:
    """Returns a kernel `[I, O]` whose rows are rounded in an order; the factor is of the moments in that order.

    shrink: the scales are those of the kernel as given, for this part of each group's range (`[g, O]`, or one number).
    None: those of a group's rows as they are when their turn comes, which wants the order 0, 1, 2, ...
    """
    I, O = kernel.shape
    if I % group:
        raise ValueError(f"a group of {group} does not divide {I} input features; use {fitting_group(I)}, or -1")
    C = fitting_group(group, largest=BLOCK)
    whole = kernel.astype(jnp.float32)
    ranges = 1.0 if shrink is None else shrink
    steps_gO, zeros_gO = grid.fit(whole.reshape(I // group, group, O), axis=1, shrink=ranges)
    how = {"scheme": grid.scheme, "symmetric": grid.symmetric}

    def block(number, carry):
        left_IO, codes_IO, steps_gO, zeros_gO = carry
        start = number * C
        if shrink is None:
            own = start // group
            step, zero = grid.fit(jax.lax.dynamic_slice_in_dim(left_IO, own * group, group), axis=0)
            begins = start % group == 0
            steps_gO = steps_gO.at[own].set(jnp.where(begins, step, steps_gO[own]))
            zeros_gO = zeros_gO.at[own].set(jnp.where(begins, zero, zeros_gO[own]))
        groups_C = jax.lax.dynamic_slice_in_dim(order_I, start, C) // group
        steps_CO, zeros_CO = steps_gO[groups_C], zeros_gO[groups_C]
        factor_CI = jax.lax.dynamic_slice_in_dim(factor_II, start, C)
        factor_CC = jax.lax.dynamic_slice_in_dim(factor_CI, start, C, axis=1)

        def row(i, carry):
            rows_CO, codes_CO, errors_CO = carry
            codes = codes_of(rows_CO[i], steps_CO[i], zeros_CO[i], **how)
            error = (rows_CO[i] - (codes - zeros_CO[i]) * steps_CO[i]) / factor_CC[i, i]
            rows_CO -= factor_CC[i][:, None] * error
            return rows_CO, codes_CO.at[i].set(codes), errors_CO.at[i].set(error)

        rows_CO = jax.lax.dynamic_slice_in_dim(left_IO, start, C)
        zeros = jnp.zeros_like(rows_CO)
        _, codes_CO, errors_CO = jax.lax.fori_loop(0, C, row, (rows_CO, zeros, zeros))
        later_CI = jnp.where(jnp.arange(I) >= start + C, factor_CI, 0.0)
        left_IO -= jnp.matmul(later_CI.T, errors_CO, precision="highest")
        codes_IO = jax.lax.dynamic_update_slice_in_dim(codes_IO, codes_CO, start, axis=0)
        return left_IO, codes_IO, steps_gO, zeros_gO

    carry = (whole[order_I], jnp.zeros_like(whole), steps_gO, zeros_gO)
    _, codes_IO, steps_gO, zeros_gO = jax.lax.fori_loop(0, I // C, block, carry)
    codes_IO = codes_IO[jnp.argsort(order_I)]
    values, zeros = stored_codes(codes_IO, zeros_gO, **how)
    return QuantArray(
        values, steps_gO.astype(grid.scale_dtype), zeros, grid.scheme, group, I, O, jnp.dtype(kernel.dtype).name
    )
