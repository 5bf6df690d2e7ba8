"""What is written is what the format's own library reads, byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moepress.models.storage.folder import INDEX
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import DTYPES, read_row, read_tensor, tensor_entry
from moepress.models.storage.writer import Entry, copy_companions, write_index, write_json, write_shard

GOLDEN = (
    b"\xc8\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},'
    b'"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
    b'"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},'
    b'"q":{"dtype":"U8","shape":[2],"data_offsets":[22,24]}}'
    b"  "  # padding to a multiple of 8
    b"\x00\x00\x80\x3f\x00\x00\x00\x40\x00\x00\x40\xc0\x00\x00\x00\x3f"  # 1, 2, -3, 0.5 in fp32
    b"\x80\x3f\x00\x40\x40\xc0"  # 1, 2, -3 in bf16
    b"\x07\xff"
)


def golden_tensors() -> dict[str, Tensor]:
    return {
        "w": torch.tensor([[1.0, 2.0], [-3.0, 0.5]]),
        "b": torch.tensor([1.0, 2.0, -3.0], dtype=torch.bfloat16),
        "q": torch.tensor([7, 255], dtype=torch.uint8),
    }


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    write_shard(file, [tensor_entry(name, tensor) for name, tensor in tensors.items()])


def same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
    return torch.equal(*flat)


def test_a_tiny_file_has_the_golden_bytes(tmp_path: Path) -> None:
    file = tmp_path / "golden.safetensors"
    write(file, golden_tensors())
    assert file.read_bytes() == GOLDEN


def test_golden_bytes_are_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    file = tmp_path / "golden.safetensors"
    file.write_bytes(GOLDEN)
    by_library, header = load_file(file), read_header(file)
    for name, tensor in golden_tensors().items():
        assert same_bytes(by_library[name], tensor)
        assert same_bytes(read_tensor(header[name]), tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 120, (5, 6 * dtype.itemsize), dtype=torch.uint8)
    tensors = {
        "matrix": raw.view(dtype),
        "cube": raw.view(dtype).reshape(5, 3, 2).clone(),
        "scalar": raw.view(dtype)[0, 0].clone(),
        "empty": torch.empty((0, 4), dtype=dtype),
        "transposed": raw.view(dtype).T,
    }
    file = tmp_path / "x.safetensors"
    write(file, tensors)
    by_library, header = load_file(file), read_header(file)
    assert list(header) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bytes(by_library[name], tensor)
        assert same_bytes(read_tensor(header[name]), tensor)
    assert same_bytes(read_row(header["cube"], 2), tensors["cube"][2])
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read_identically(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(i, 3) for i in range(1, 6)}
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert all(torch.equal(read_tensor(header[name]), tensor) for name, tensor in tensors.items())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.text(min_size=1, max_size=12), unique=True, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_names_and_shapes_survive(tmp_path: Path, names: list[str], seed: int) -> None:
    names = [n for n in names if n != "__metadata__" and n.isprintable()]
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(i % 4, len(n), generator=generator) for i, n in enumerate(names, seed)}
    file = tmp_path / "x.safetensors"
    write(file, tensors)
    by_library, header = load_file(file), read_header(file)
    assert by_library.keys() == header.keys() == tensors.keys()
    assert all(same_bytes(by_library[n], t) and same_bytes(read_tensor(header[n]), t) for n, t in tensors.items())
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_entries_are_asked_for_their_data_one_after_the_other(tmp_path: Path) -> None:
    asked: list[str] = []

    def entry(name: str) -> Entry:
        def data() -> object:
            asked.append(name)
            yield b"\x01\x02"
            yield bytearray(b"\x03\x04")

        return Entry(name=name, dtype="U8", shape=(4,), bytes=4, data=data)  # type: ignore[arg-type]

    write_shard(tmp_path / "x.safetensors", (entry(n) for n in "ab"))
    assert asked == ["a", "b"]
    assert load_file(tmp_path / "x.safetensors")["b"].tolist() == [1, 2, 3, 4]


def test_an_entry_of_the_wrong_size_is_a_bug(tmp_path: Path) -> None:
    entry = Entry(name="x", dtype="U8", shape=(4,), bytes=4, data=lambda: iter((b"\x01",)))
    with pytest.raises(AssertionError, match="x: size differs"):
        write_shard(tmp_path / "x.safetensors", [entry])


def test_a_single_file_needs_no_index_and_shards_do(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "model.safetensors"}, 8)
    assert not (tmp_path / INDEX).exists()
    write_index(tmp_path, {"b": "model-2.safetensors", "a": "model-1.safetensors"}, 16)
    text = (tmp_path / INDEX).read_text()
    assert json.loads(text)["metadata"] == {"total_size": 16}
    assert text.index('"a"') < text.index('"b"')


def test_json_is_written_as_hugging_face_writes_it(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"b": 1, "a": ["ü"]})
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == '{\n  "a": [\n    "ü"\n  ],\n  "b": 1\n}\n'


def test_companions_are_copied_as_bytes_and_the_rest_stays(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    copied = {
        "tokenizer.json": b'{"a":\r\n1}',
        "tokenizer.model": b"\x00\xff",
        "chat_template.jinja": b"{{ messages }}\r\n",
        "merges.txt": b"a b",
        "generation_config.json": b"{}",
        "LICENSE": b"MIT",
        "modeling_x.py": b"raise SystemExit",
        "LICENSE-MODEL": b"x",
        "Notice.txt": b"x",
    }
    left = [
        "config.json",
        INDEX,
        "other.index.json",
        "model.safetensors",
        "pytorch_model.bin",
        "README.md",
        "image.png",
    ]
    for name, data in copied.items():
        (source / name).write_bytes(data)
    for name in left:
        (source / name).write_bytes(b"x")
    (source / "folder.json").mkdir()
    assert copy_companions(source, target) == sorted(copied)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == copied
