"""Quantised checkpoints of Hugging Face: quantization_config, and what AWQ and GPTQ have in place of a weight.

A weight is (code - zero) * scale, one scale and zero per group of input features and output feature. Codes and zeros
lie in int32 words of 32 / bits each, the first in the lowest bits:

    awq   qweight [I, O / 8]           qzeros [g, O / 8]           scales [g, O]
          8 output features per word, in the order 0 2 4 6 1 3 5 7
    gptq  qweight [I * bits / 32, O]   qzeros [g, O * bits / 32]   scales [g, O]   g_idx [I], the group of each input
          input features in order; zeros along the output, in checkpoint_format "gptq" less one, modulo 2^bits

I input features, O output features, g groups. In memory a QuantArray has them, packed for the product once.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from internjax.hf.fields import flag, given
from internjax.hf.mapping import LAYER, Row, is_kernel, leaf_shapes, tensor_names
from internjax.hf.weights import TensorInfo, read_tensor
from internjax.kernels.quant_matmul import Scheme, pack_nibbles
from internjax.model.config import ModelConfig
from internjax.model.quantize import QuantArray

FIELD = "quantization_config"
Packing = Literal["awq", "gptq"]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a folder's kernels are quantised: what its quantization_config says that matters."""

    packing: Packing
    bits: Literal[4, 8] = 4
    group: int = 128
    """Input features that share a scale; -1: all of them."""
    symmetric: bool = False
    """Every zero is the middle of the codes."""
    act_order: bool = False
    """Groups are not of neighbouring input features (GPTQ's desc_act)."""
    zeros_less_one: bool = False
    """GPTQ's first format, in which a zero of 0 is stored as the largest code; readers disagree on that."""
    whole: tuple[str, ...] = ()
    """Parts of names of modules that keep their precision."""
    head: bool = False
    """The output head is quantised too."""

    @property
    def scheme(self) -> Scheme:
        return "int4" if self.bits == 4 else "int8"

    def __str__(self) -> str:
        groups = "one group" if self.group == -1 else f"groups of {self.group}"
        return f"{self.packing}, {self.bits} bits in {groups}"


# Fields that say how a checkpoint was made, or which kernels of other programs are to read it. transformers writes
# GPTQ's for AWQ too.
_BOOKKEEPING = frozenset(
    "act_group_aware batch_size block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent dataset "
    "disable_exllama do_fuse exllama_config fuse_max_seq_len max_input_length meta model_file_base_name "
    "model_name_or_path model_seqlen module_name_preceding_first_block modules_to_fuse mse pad_token_id quantizer "
    "static_groups tokenizer true_sequential use_cuda_fp16 use_exllama".split()
)
# Fields with the values under which the tensors are the ones read here. Null means that too.
_FIXED: dict[str, dict[str, tuple]] = {
    "awq": {
        "bits": (4,),
        "zero_point": (True,),
        "version": ("gemm",),
        "format": ("gemm",),
        "desc_act": (False,),
        "backend": ("autoawq", "auto"),
    },
    "gptq": {
        "bits": (4, 8),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "format": ("gptq", "gptq_v2"),
        "pack_dtype": ("int32",),
        "dynamic": ({},),
        "backend": ("auto", "auto_trainable", "torch"),
    },
}
_HONOURED = {
    # Of AWQ's "sym" nothing follows: the zeros are written in either case.
    "awq": {"quant_method", "group_size", "modules_to_not_convert", "sym"},
    "gptq": {"quant_method", "group_size", "sym", "desc_act", "lm_head", "modules_in_block_to_quantize"},
}


def read_quantization(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> Quantization | None:
    """Returns what config.json says of quantised weights, None where there are none.

    Raises ValueError naming every field that would be ignored although it may matter; `allow_unknown` names those to
    read as if they were absent ("quantization_config.FIELD").
    """
    said = values.get(FIELD)
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise ValueError(f"config.json: {FIELD} is {said!r:.80}; it must be an object")
    method = said.get("quant_method")
    if method not in _HONOURED:
        raise ValueError(
            f"config.json: {FIELD} has quant_method {method!r}; read are {', '.join(_HONOURED)}. Take the unquantised "
            "checkpoint and quantise it: python -m serve.quantize, or quantize= while it is opened"
        )
    _check_fields(said, method, allowed={name.removeprefix(f"{FIELD}.") for name in allow_unknown})
    group = given(said, "group_size", 128)
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        raise ValueError(f"config.json: group_size is {group!r}; it must be a positive number, or -1 for one group")
    if method == "awq":
        return Quantization("awq", group=group, whole=tuple(given(said, "modules_to_not_convert", ())))
    formats = {str(said[name]).lower() for name in ("checkpoint_format", "format") if said.get(name)} or {"gptq"}
    if len(formats) > 1:
        raise ValueError(f"config.json: {FIELD} names two formats, {sorted(formats)}; keep the one it was written in")
    return Quantization(
        "gptq",
        bits=given(said, "bits", 4),
        group=group,
        symmetric=flag(said, "sym", True),
        act_order=flag(said, "desc_act", False),
        zeros_less_one=formats == {"gptq"},
        whole=_left_out(given(said, "modules_in_block_to_quantize", None)),
        head=flag(said, "lm_head", False),
    )


def _check_fields(said: Mapping[str, Any], method: str, *, allowed: Collection[str]) -> None:
    wrong = {}
    for name, value in said.items():
        if name in _HONOURED[method] | _BOOKKEEPING or value is None:
            continue
        values = _FIXED[method].get(name)
        if values is not None:
            if (value.lower() if isinstance(value, str) else value) not in values:
                wrong[name] = f"{name} is {value!r}, read is {' or '.join(map(repr, values))}"
        elif value is not False and name not in allowed:
            wrong[name] = f"{name} = {value!r} is not known here (allow_unknown=('{FIELD}.{name}',) reads on)"
    if wrong:
        raise ValueError(
            f"config.json: {FIELD} ({method}): {'; '.join(wrong.values())}. Take another release of the checkpoint, or "
            "quantise the original: python -m serve.quantize"
        )


# The linear layers of a block in stock transformers, which modules_in_block_to_quantize chooses from.
_MODULES = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


def _left_out(chosen: Iterable | None) -> tuple[str, ...]:
    """Returns the modules that are not among those quantised, which are given in groups or as one list."""
    if chosen is None:
        return ()
    names = [name for each in chosen for name in ([each] if isinstance(each, str) else each)]
    unknown = sorted(set(names) - set(_MODULES))
    if unknown:
        raise ValueError(
            f"config.json: modules_in_block_to_quantize names {', '.join(unknown)}; known are {', '.join(_MODULES)}"
        )
    return tuple(name for name in _MODULES if name not in names)


def quantization_to_hf(quantization: Quantization) -> dict[str, Any]:
    """Returns the quantization_config of a folder: the inverse of `read_quantization`."""
    whole = quantization.whole
    if quantization.packing == "awq":
        values = {"quant_method": "awq", "bits": 4, "group_size": quantization.group, "zero_point": True}
        return values | {"version": "gemm", "modules_to_not_convert": list(whole) or None}
    chosen = [name for name in _MODULES if name not in whole] if whole else None
    return {
        "quant_method": "gptq",
        "bits": quantization.bits,
        "group_size": quantization.group,
        "sym": quantization.symmetric,
        "desc_act": quantization.act_order,
        "checkpoint_format": "gptq" if quantization.zeros_less_one else "gptq_v2",
        "lm_head": quantization.head,
        "modules_in_block_to_quantize": None if chosen is None else [chosen],
    }


# --- which tensors ---------------------------------------------------------------------------------------------------


def is_packed(row: Row, quantization: Quantization | None, config: ModelConfig) -> bool:
    """Whether the kernels of a row are quantised. Raises ValueError where they are in some layers and not in others."""
    if quantization is None or not is_kernel(row.leaves[0]):
        return False
    if not row.per_layer:
        return quantization.head
    names = [row.name.replace(LAYER, str(layer)) for layer in range(config.num_layers)]
    packed = {not any(part in name for part in quantization.whole) for name in names}
    if len(packed) > 1:
        raise ValueError(
            f"{FIELD} leaves {row.name} whole in some layers and quantises it in others ({quantization.whole}); the "
            "layers of a model are one stack here, quantised or not. Take a checkpoint that treats them alike"
        )
    return packed.pop()


def packed_shapes(row: Row, quantization: Quantization, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that stand for a row's weight, by the last part of their names.

    Raises ValueError for a matrix that the packing has no words for.
    """
    shapes = [leaf_shapes(config)[leaf] for leaf in row.leaves]
    I, O = shapes[0][0], sum(shape[1] for shape in shapes)
    group, per_word = _group(quantization, I), 32 // quantization.bits
    if I % group or group % 2:
        raise ValueError(
            f"{row.name} has {I} input features, which group_size {group} does not divide into even groups; "
            "use a group that divides the widths of the model, or -1"
        )
    if O % per_word or (quantization.packing == "gptq" and I % per_word):
        raise ValueError(f"{row.name} is {I} x {O}, and {quantization.packing} packs {per_word} features into a word")
    shapes = {"qzeros": (I // group, O // per_word), "scales": (I // group, O)}
    if quantization.packing == "awq":
        return {"qweight": (I, O // per_word)} | shapes
    return {"qweight": (I // per_word, O)} | shapes | {"g_idx": (I,)}


def _group(quantization: Quantization, in_features: int) -> int:
    return in_features if quantization.group == -1 else quantization.group


def packed_tensors(
    row: Row, found: Collection[str] | None, quantization: Quantization, config: ModelConfig
) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """Returns, for every layer, the names and shapes of the tensors that stand for a row's weight.

    Without act order a folder, which has the tensors `found`, may leave out the groups of its inputs, g_idx.
    """
    shapes = packed_shapes(row, quantization, config)
    layers, weights = [], tensor_names(row, config)
    may_lack = found is not None and not quantization.act_order
    if may_lack and not any(weight.removesuffix("weight") + "g_idx" in found for weight in weights):
        shapes.pop("g_idx", None)
    for weight in weights:
        names = {part: weight.removesuffix("weight") + part for part in shapes}
        layers.append({part: (name, shapes[part]) for part, name in names.items()})
    return layers


def zero_biases(
    tensors: Mapping[str, TensorInfo], packed: Iterable[Row], wanted: Collection[str], config: ModelConfig
) -> set[str]:
    """Returns biases of quantised modules that the model has none of and that are all zero: old writers add them."""
    modules = [name.removesuffix("weight") for row in packed for name in tensor_names(row, config)]
    extra = [f"{name}bias" for name in modules if f"{name}bias" in tensors and f"{name}bias" not in wanted]
    return {name for name in extra if not read_tensor(tensors[name]).any()}


# --- words -----------------------------------------------------------------------------------------------------------

# Where in its word AWQ keeps each of eight neighbours: word nibble k holds output feature (0 2 4 6 1 3 5 7)[k].
_AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.int32)


def _shifts(packing: Packing, bits: int) -> np.ndarray:
    places = _AWQ_PLACES if packing == "awq" else np.arange(32 // bits, dtype=np.int32)
    return bits * places


def _from_words(words, *, packing: Packing, bits: int, axis: int):
    """Returns the codes, uint8, of int32 words that hold neighbours along an axis (0 or 1), of NumPy or JAX arrays."""
    shifts = _shifts(packing, bits)
    mask = np.int32((1 << bits) - 1)
    if axis == 1:
        codes = (words[:, :, None] >> shifts) & mask
        return codes.reshape(words.shape[0], -1).astype(np.uint8)
    codes = (words[:, None, :] >> shifts[:, None]) & mask
    return codes.reshape(-1, words.shape[1]).astype(np.uint8)


def _to_words(codes: np.ndarray, *, packing: Packing, bits: int, axis: int) -> np.ndarray:
    shifts = _shifts(packing, bits).astype(np.uint32)
    rows, columns = codes.shape
    if axis == 1:
        parts = codes.astype(np.uint32).reshape(rows, -1, len(shifts)) << shifts
        return np.bitwise_or.reduce(parts, axis=2).view(np.int32)
    parts = codes.astype(np.uint32).reshape(-1, len(shifts), columns) << shifts[:, None]
    return np.bitwise_or.reduce(parts, axis=1).view(np.int32)


def _axis(quantization: Quantization) -> int:
    return 1 if quantization.packing == "awq" else 0


def orders_of(g_idx: Mapping[str, np.ndarray], quantization: Quantization) -> list[np.ndarray]:
    """Returns, for every layer, the input features group by group, int32 `[I]`; none where they are so as it is.

    g_idx: of every layer, by the name of the tensor. Raises ValueError where groups are not of equal size.
    """
    orders = []
    for name, groups in g_idx.items():
        in_order = np.arange(len(groups)) // _group(quantization, len(groups))
        orders.append(np.argsort(groups, kind="stable").astype(np.int32))
        if not np.array_equal(groups[orders[-1]], in_order):
            raise ValueError(
                f"{name} does not put {_group(quantization, len(groups))} input features into each group; take "
                "another release of the checkpoint"
            )
    return [] if all((np.diff(order) == 1).all() for order in orders) else orders


def unpack(
    tensors: Mapping[str, Any],
    order,
    *,
    split: Callable,
    quantization: Quantization,
    config: ModelConfig,
    dtype: str,
) -> list[QuantArray]:
    """Returns the kernels that one module's tensors hold, of NumPy or JAX arrays. `dtype`: what they are restored to.

    split: of the module's row, which cuts a fused one along its output features as it does a plain weight.
    """
    bits, packing = quantization.bits, quantization.packing
    codes = _from_words(tensors["qweight"], packing=packing, bits=bits, axis=_axis(quantization))
    zeros = _from_words(tensors["qzeros"], packing=packing, bits=bits, axis=1)
    if quantization.zeros_less_one:
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
    codes = codes if order is None else codes[order]
    parts = [split(each.T, config) for each in (codes, zeros, tensors["scales"])]
    return [
        _array(*(each.T for each in part), order, quantization=quantization, dtype=dtype)
        for part in zip(*parts, strict=True)
    ]


def _array(codes, zeros, scales, order, *, quantization: Quantization, dtype: str) -> QuantArray:
    (I, O), scheme = codes.shape, quantization.scheme
    if scheme == "int8":
        codes, zeros = ((each.astype(np.int16) - 128).astype(np.int8) for each in (codes, zeros))
        zeros = None if quantization.symmetric else zeros
    else:
        codes = pack_nibbles(codes)
    return QuantArray(codes, scales, zeros, scheme, _group(quantization, I), I, O, dtype, order=order)


unpack_on_device = functools.partial(jax.jit, static_argnames=("split", "quantization", "config", "dtype"))(unpack)


def check_words(tensors: Mapping[str, TensorInfo], names: Iterable[str], *, where: Any) -> None:
    """Raises ValueError where words are not int32 or scales not floats of 16 or 32 bits."""
    for name in names:
        wanted = ("F16", "BF16", "F32") if name.endswith("scales") else ("I32",)
        if tensors[name].dtype not in wanted:
            raise ValueError(f"{where}: {name} holds {tensors[name].dtype} values; read are {' and '.join(wanted)}")


def check_symmetric(qzeros: np.ndarray, quantization: Quantization, *, name: str) -> None:
    """Raises ValueError where a checkpoint that calls itself symmetric has another zero than the middle code."""
    if not quantization.symmetric:
        return
    middle = 1 << (quantization.bits - 1)
    zeros = _from_words(qzeros, packing=quantization.packing, bits=quantization.bits, axis=1)
    if (zeros != middle - quantization.zeros_less_one).any():
        raise ValueError(
            f"{name} has zeros other than {middle}, and config.json says sym: true; set it to false where that is meant"
        )


FIELDS_OF = {"qweight": ("values", "order"), "qzeros": ("zeros",), "scales": ("scales",), "g_idx": ("order",)}
"""The fields of a QuantArray that each tensor is made of."""


def pack(
    name: str, parts: list[QuantArray], *, row: Row, quantization: Quantization, config: ModelConfig
) -> np.ndarray:
    """Returns one tensor of a module, `name` being the last part of its name; `parts` are of one layer, on the host."""
    bits, packing = quantization.bits, quantization.packing
    if name == "g_idx":
        I, orders = parts[0].in_features, [part.order for part in parts]
        if not all(np.array_equal(order, orders[0]) for order in orders):
            raise ValueError(
                f"{row.name} holds kernels whose input features are in different orders; use layout='llama'"
            )
        g_idx = np.arange(I, dtype=np.int32) // _group(quantization, I)
        return g_idx if orders[0] is None else g_idx[np.argsort(orders[0])]
    if name == "scales":
        return row.fuse([part.scales.T for part in parts], config).T
    if name == "qzeros":
        zeros = row.fuse([_unsigned_zeros(part).T for part in parts], config).T
        if quantization.symmetric and (zeros != 1 << (bits - 1)).any():
            raise ValueError(f"{row.name} has zeros of its own, and the folder would say sym: true; {_REMEDY}")
        if quantization.zeros_less_one:
            zeros = (zeros - np.uint8(1)) & np.uint8((1 << bits) - 1)
        return _to_words(zeros, packing=packing, bits=bits, axis=1)
    codes = row.fuse([_unsigned_codes(part).T for part in parts], config).T
    return _to_words(codes, packing=packing, bits=bits, axis=_axis(quantization))


def _unsigned_zeros(part: QuantArray) -> np.ndarray:
    if part.scheme == "int4":
        return part.zeros
    if part.zeros is None:
        return np.full((part.in_features // part.group, part.out_features), 128, np.uint8)
    return (part.zeros.astype(np.int16) + 128).astype(np.uint8)


def _unsigned_codes(part: QuantArray) -> np.ndarray:
    """Returns the codes `[I, O]` by input feature."""
    if part.scheme == "int4":
        codes = np.stack([part.values & 0xF, part.values >> 4], axis=1).reshape(part.in_features, part.out_features)
    else:
        codes = (part.values.astype(np.int16) + 128).astype(np.uint8)
    return codes if part.order is None else codes[np.argsort(part.order)]


_REMEDY = (
    "quantise the model with python -m serve.quantize, or restore it with "
    "internjax.model.quantize.dequantize_params and export it whole"
)


def check_storable(path: str, leaf: QuantArray, quantization: Quantization | None) -> None:
    """Raises ValueError for a QuantArray that the folder's packing cannot hold as it is."""
    if quantization is None:
        raise ValueError(f"{path} is quantised ({leaf.scheme}), and the folder is to hold plain floats; {_REMEDY}")
    fault = None
    if leaf.scheme != quantization.scheme:
        fault = f"is {leaf.scheme}"
    elif leaf.group != _group(quantization, leaf.in_features):
        fault = f"has groups of {leaf.group}"
    elif leaf.steps is not None or leaf.scales.dtype not in (jnp.float16, jnp.bfloat16):
        fault = "has scales that are not floats of 16 bits"
    elif leaf.order is not None and not quantization.act_order:
        fault = "has its input features in another order"
    elif quantization.symmetric and leaf.scheme == "int8" and leaf.zeros is not None:
        fault = "has zeros of its own"
    if fault:
        raise ValueError(f"{path} {fault}, and the folder would say {quantization}; {_REMEDY}")
