"""Safetensors: the same files as the library's, and one clear message for each way a folder can be broken."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from internjax.hf.weights import (
    INDEX,
    SINGLE,
    Plan,
    check_names,
    list_tensors,
    parse_size,
    read_header,
    read_tensor,
    write_file,
    write_model,
)

RANDOM = np.random.default_rng(0)


def plans_of(tensors):
    return {name: Plan(array.shape, array.dtype, lambda array=array: array) for name, array in tensors.items()}


def some_tensors():
    return {
        "b.half": RANDOM.normal(size=(3, 5)).astype(np.float16),
        "a.full": RANDOM.normal(size=(2, 3, 4)).astype(np.float32),
        "c.row": RANDOM.normal(size=(7,)).astype(np.float32),
    }


@pytest.mark.parametrize("shard_size", ["1GB", 60])
def test_the_library_reads_what_is_written(tmp_path, shard_size):
    tensors = some_tensors()
    write_model(tmp_path, plans_of(tensors), shard_size=shard_size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ([SINGLE] if shard_size == "1GB" else [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)])
    found = {}
    for file in files:
        found |= safetensors.numpy.load_file(tmp_path / file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_what_the_library_writes_is_read(tmp_path):
    tensors = some_tensors() | {"count": np.arange(4)}
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
    infos = list_tensors(tmp_path)
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read_tensor(infos[name]), tensor)


def test_the_index_names_the_file_of_every_tensor_and_the_size(tmp_path):
    tensors = some_tensors()
    write_model(tmp_path, plans_of(tensors), shard_size=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / file)


def test_bfloat16_keeps_every_bit(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(ml_dtypes.bfloat16)
    write_file(tmp_path / "x.safetensors", plans_of({"x": values}))
    info = read_header(tmp_path / "x.safetensors")["x"]
    assert info.dtype == "BF16"
    np.testing.assert_array_equal(read_tensor(info).view(np.uint16), bits)


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    tensors = {"a": np.ones(3, np.float16), "b": np.ones(5, np.float32), "c": np.ones(1, np.int8), "d": np.ones(2)}
    write_file(tmp_path / "x.safetensors", plans_of(tensors))
    for name, info in read_header(tmp_path / "x.safetensors").items():
        assert info.start % tensors[name].itemsize == 0, name


def test_a_plan_casts_to_its_dtype_when_fetched(tmp_path):
    values = np.array([1.0, 1.00390625, 3.14159265], np.float32)
    write_file(tmp_path / "x.safetensors", {"x": Plan((3,), np.dtype(ml_dtypes.bfloat16), lambda: values)})
    read = read_tensor(read_header(tmp_path / "x.safetensors")["x"])
    np.testing.assert_array_equal(read, values.astype(ml_dtypes.bfloat16))


def test_tensors_are_in_memory_of_their_own(tmp_path):
    write_model(tmp_path, plans_of({"x": np.ones(5, np.float32)}))
    read = read_tensor(list_tensors(tmp_path)["x"])
    with open(tmp_path / SINGLE, "r+b") as stream:
        stream.truncate(0)
    np.testing.assert_array_equal(read, 1.0)


@settings(max_examples=60, deadline=None)
@given(keep=st.integers(0, 10_000))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, keep):
    folder = tmp_path_factory.mktemp("cut")
    write_model(folder, plans_of(some_tensors()))
    size = os.path.getsize(folder / SINGLE)
    with open(folder / SINGLE, "r+b") as stream:
        stream.truncate(keep % size)
    with pytest.raises(ValueError, match=r"cut short|not a whole safetensors file"):
        list_tensors(folder)


def test_a_damaged_header_is_refused(tmp_path):
    write_model(tmp_path, plans_of(some_tensors()))
    data = bytearray((tmp_path / SINGLE).read_bytes())
    data[8] = ord("?")
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged header.*again"):
        list_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_model(tmp_path, plans_of(some_tensors()), shard_size=60)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of the 3 files .* missing \(model-00002-of-00003.safetensors\)"):
        list_tensors(tmp_path)


def test_a_shard_of_another_checkpoint_is_noticed(tmp_path):
    write_model(tmp_path, plans_of(some_tensors()), shard_size=60)
    write_file(tmp_path / "model-00002-of-00003.safetensors", plans_of({"other": np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match="places .* in model-00002-of-00003.safetensors, which does not hold it"):
        list_tensors(tmp_path)


@pytest.mark.parametrize("weight_map", [{"x": "../x.safetensors"}, {"x": "/etc/x"}, ["x"], {"x": 3}])
def test_an_index_that_is_not_one_is_refused(tmp_path, weight_map):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="not a valid index"):
        list_tensors(tmp_path)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickles.*safe_serialization"):
        list_tensors(tmp_path)


def test_the_names_and_shapes_that_do_not_fit_are_told_at_once(tmp_path):
    write_model(tmp_path, plans_of({"a": np.ones((2, 3), np.float32), "z": np.ones(1, np.float32)}))
    with pytest.raises(ValueError) as error:
        check_names(list_tensors(tmp_path), {"a": (3, 2), "b": (1,)}, where=tmp_path)
    message = str(error.value)
    assert "missing: b" in message and "unexpected: z" in message
    assert "wrong shape: a is (2, 3), config.json asks for (3, 2)" in message
    check_names(list_tensors(tmp_path), {"a": (2, 3)}, where=tmp_path, ignored=["z"])


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5KB", 1500), (77, 77), ("3TB", 3 * 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 bananas", 0, "5GiB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="a size is a positive number"):
        parse_size(text)
