"""GGUF files looked at without llama.cpp: what `check`, `inspect` and `generate` say of sound and of broken ones."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from byte_tokenizer import byte_tokenizer
from stage_runs import command

from moepress.converters.gguf.architectures import described, metadata
from moepress.converters.gguf.export import GgufRequest, head_bytes
from moepress.converters.gguf.file import gguf_file, open_gguf
from moepress.converters.gguf.tensors import Writer
from moepress.errors import InvalidInputError
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.export import gguf_stage
from moepress.stages.places import Output
from moepress.validation.rules.check import check_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 with groups as GGUF."""
    folder = tiny_models.make("deepseek_v3", tmp_path_factory.mktemp("v3") / "model")
    byte_tokenizer(folder, merges=True)
    out = folder.parent / "out"
    gguf_stage(str(folder), Output(folder=out), GgufRequest())
    return next(out.glob("*.gguf"))


@pytest.fixture
def spoiled(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same file with other metadata; its data follow unchanged."""

    def get(**changes: Any) -> Path:
        from moepress.converters.gguf.architectures import architecture_of

        source = open_checkpoint(made.parent.parent / "model")
        row = architecture_of(described(source))
        keys: dict[str, Any] = dict(metadata(described(source), row))
        keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
        for name, value in changes.items():
            key = name.replace("__", ".")
            keys = {k: v for k, v in keys.items() if k != key} | ({} if value is None else {key: value})
        tensors = Writer(source=source, row=row).tensors()
        file = tmp_path / "spoiled.gguf"
        data = b"".join(bytes(chunk) for tensor in tensors for chunk in _padded(tensor))
        file.write_bytes(head_bytes(row.name, keys, tensors) + data)
        return file

    return get


def _padded(tensor: Any) -> list[bytes]:
    data = b"".join(bytes(chunk) for chunk in tensor.data())
    return [data, bytes(-len(data) % 32)]


def rules(file: Path) -> Mapping[str, str]:
    return {finding.rule: finding.effect.value for finding in check_folder(file).findings}


def test_a_sound_file_has_no_findings(made: Path) -> None:
    assert rules(made) == {}
    code, said, _ = command("check", made)
    assert (code, "llama.cpp" in said) == (0, True)


@pytest.mark.parametrize(
    ("changes", "rule", "effect"),
    [
        ({"deepseek2__expert_group_count": 3}, "gguf-groups", "refuses"),
        ({"deepseek2__expert_group_used_count": 4}, "gguf-groups", "refuses"),
        ({"deepseek2__expert_group_count": 16}, "gguf-groups", "refuses"),
        ({"deepseek2__expert_count": 12}, "gguf-expert-count-by-layer", "refuses"),
        ({"deepseek2__expert_count": 2000}, "gguf-limits", "refuses"),
        ({"deepseek2__expert_used_count": 17}, "gguf-limits", "refuses"),
        ({"deepseek2__expert_gating_func": None}, "gguf-gating", "silently wrong"),
        ({"tokenizer__ggml__pre": "default"}, "gguf-pre-tokenizer", "silently wrong"),
        ({"tokenizer__ggml__pre": None}, "gguf-pre-tokenizer", "silently wrong"),
        ({"deepseek2__block_count": 27}, "gguf-query-rank", "refuses"),
        ({"deepseek2__block_count": 4}, "gguf-layers", "refuses"),
    ],
)
def test_what_llama_cpp_trips_over_is_found(
    spoiled: Callable[..., Path], changes: dict[str, Any], rule: str, effect: str
) -> None:
    found = rules(spoiled(**changes))
    assert found.get(rule) == effect


def test_what_would_end_the_process_is_refused_before(spoiled: Callable[..., Path]) -> None:
    code, _, said = command("generate", spoiled(deepseek2__expert_group_count=3), "hello")
    assert code == 4
    assert "16 experts do not divide into 3 groups" in said


def test_inspect_tells_what_a_file_is(made: Path) -> None:
    code, said, _ = command("inspect", made, "--json")
    found = json.loads(said)
    assert (code, found["architecture"], found["experts"], found["layers"]) == (0, "deepseek2", 16, 3)
    assert sum(row["bytes"] for row in found["types"]) < found["bytes"] == made.stat().st_size
    assert "ffn_up_exps" in command("inspect", made)[1]


def test_a_cut_file_is_one_sentence(made: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(made.read_bytes()[:700])
    code, _, said = command("inspect", cut)
    assert (code, said.count("\n")) == (4, 1)
    assert "is no GGUF file that can be read" in said


def test_a_missing_part_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copy(made, tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(InvalidInputError, match=r"00002-of-00002\.gguf is missing"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_a_folder_of_one_file_stands_for_it(made: Path) -> None:
    assert gguf_file(made.parent) == made
    assert gguf_file(made) == made
    assert gguf_file(made.parent.parent / "model") is None
