"""`moepress generate`: every kind of folder goes on from a prompt, and what cannot be done is said in one sentence."""

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import onnxruntime
import pytest
import tiny_models
import torch
from onnx_runs import to_onnx
from stage_runs import (
    add_tokenizer,
    command,
    content,
    keep_of,
    pruned_folder,
    quantized_folder,
    streamed_logits,
)
from transformers import AutoTokenizer

from moepress.converters.safetensors.artifact import open_source
from moepress.errors import InvalidInputError
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages import generate
from moepress.stages.export import export_stage
from moepress.stages.places import Output, model_folder
from moepress.validation.quality.decoding import stop_tokens

PROMPT = "def main():"
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"


def made(*arguments: object) -> dict[str, Any]:
    """The JSON that a command prints."""
    code, printed, errors = command("generate", *arguments, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(printed)
    assert isinstance(found, dict)
    return found


def refused(code: int, *arguments: object) -> str:
    found, printed, errors = command("generate", *arguments)
    assert (found, printed) == (code, ""), errors
    assert errors.startswith("Error: ")
    assert errors.count("\n") == 1
    return errors


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("demo"), tmp_path / "demo-copy"))


def test_the_demo_gives_the_text_of_transformers() -> None:
    folder = model_folder("demo")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), tiny_models.reference(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = inputs["input_ids"]
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)[0].tolist()
    found = made("demo", PROMPT, "--max-new-tokens", 40)
    assert found["token_ids"] == whole[ids.shape[1] :]
    assert PROMPT + found["text"] == tokenizer.decode(whole, skip_special_tokens=True)
    assert (found["prompt"], found["prompt_tokens"], found["tokens"]) == (PROMPT, ids.shape[1], 40)
    assert found["stopped"] == "length"
    assert found["seconds"] > 0
    assert found["runtime"].startswith("transformers ")
    assert (found["device"].split(":")[0] in {"cpu", "cuda", "mps"}, found["dtype"]) == (True, "float32")
    assert found["sampling"] == {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}


def test_a_person_gets_the_text_on_stdout_and_one_note_on_stderr() -> None:
    text = made("demo", PROMPT, "--max-new-tokens", 12)["text"]
    code, printed, errors = command("generate", "demo", PROMPT, "--max-new-tokens", 12)
    assert (code, printed) == (0, text + "\n")
    assert errors.startswith("Note: 12 tokens in ")
    assert "per second), transformers " in errors
    assert errors.count("\n") == 1


def test_the_text_is_written_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = generate.generate

    def watched(*arguments: Any, **options: Any) -> Iterator[int]:
        for token in plain(*arguments, **options):
            seen.append(sys.stdout.getvalue())  # type: ignore[attr-defined]
            yield token

    monkeypatch.setattr(generate, "generate", watched)
    _, printed, _ = command("generate", "demo", PROMPT, "--max-new-tokens", 8)
    assert seen == sorted(seen, key=len)
    assert len(set(seen)) > 4
    assert all(printed.startswith(part) for part in seen)


def test_every_kind_of_folder_goes_on_from_a_prompt(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    original = tiny_model("deepseek_v3")
    source, windows = open_checkpoint(original), tiny_models.windows(256, count=2, length=16)
    keep = keep_of(source, 8)
    folders = {name: tmp_path / name for name in ("plain", "fp8", "pruned", "ct", "gptq")}
    for name in ("plain", "fp8"):
        shutil.copytree(original, folders[name])
    tiny_models.to_fp8(folders["fp8"])
    pruned_folder(original, keep, folders["pruned"])
    quantized_folder(original, windows, folders["ct"], keep=keep)
    export_stage(str(folders["ct"]), Output(folder=folders["gptq"]), "gptq")  # type: ignore[arg-type]
    found = {}
    for name, folder in folders.items():
        add_tokenizer(folder)
        before = content(folder)
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]])
        found[name] = made(folder, PROMPT, "--max-new-tokens", 6, "--device", "cpu")["token_ids"]
        whole = torch.cat([ids, torch.tensor([found[name]])], dim=1)
        streamed = streamed_logits(open_source(folder), whole, tmp_path / f"scratch-{name}")
        assert streamed[0, ids.shape[1] - 1 : -1].argmax(-1).tolist() == found[name]
        assert content(folder) == before
    assert found["plain"] != found["pruned"]


@pytest.fixture(scope="module")
def demo_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(model_folder("demo"), tmp_path_factory.mktemp("demo") / "onnx")


def test_an_onnx_folder_gives_the_text_of_its_original(demo_onnx: Path) -> None:
    before = content(demo_onnx)
    theirs = made("demo", PROMPT, "--max-new-tokens", 40, "--device", "cpu")
    found = made(demo_onnx, PROMPT, "--max-new-tokens", 40)
    assert (found["token_ids"], found["text"]) == (theirs["token_ids"], theirs["text"])
    assert found["runtime"] == f"ONNX Runtime {onnxruntime.__version__}"
    assert (found["device"], found["dtype"], found["stopped"]) == ("CPU", "float32", "length")
    options = ["--temperature", 1, "--top-p", 0.8, "--seed", 3, "--max-new-tokens", 12]
    assert made(demo_onnx, PROMPT, *options)["token_ids"] == made("demo", PROMPT, *options)["token_ids"]
    assert content(demo_onnx) == before


def test_an_onnx_folder_has_a_context_and_a_chat_template_too(demo_onnx: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_onnx, tmp_path / "onnx"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert made(folder, "Hello", "--chat", "--max-new-tokens", 3)["tokens"] == 3
    assert "room for 512" in refused(2, folder, "word " * 2000)
    tiny_models.edit_config(folder, max_position_embeddings=12, eos_token_id=2047)
    (folder / "generation_config.json").unlink()
    found = made(folder, PROMPT)
    assert (found["stopped"], found["tokens"]) == ("context", 12 - found["prompt_tokens"])


def test_what_cannot_be_done_with_an_onnx_folder_is_said(demo_onnx: Path, tmp_path: Path) -> None:
    assert "leave out --dtype" in refused(2, demo_onnx, PROMPT, "--dtype", "bfloat16")
    assert "--device abacus" in refused(2, demo_onnx, PROMPT, "--device", "abacus")
    assert "is an fp32 graph" in refused(2, demo_onnx, PROMPT, "--device", "cuda")
    folder = Path(shutil.copytree(demo_onnx, tmp_path / "onnx"))
    (folder / "model.head.data").unlink()
    assert "model.head.data, which is missing" in refused(4, folder, PROMPT)
    (folder / "model.onnx").write_bytes(b"\xff" * 99)
    assert "not a readable ONNX model" in refused(4, folder, PROMPT)


def test_sampling_follows_its_options_and_its_seed() -> None:
    options = ["--temperature", 1.2, "--top-k", 40, "--top-p", 0.9, "--max-new-tokens", 16]
    first, again = made("demo", PROMPT, *options, "--seed", 5), made("demo", PROMPT, *options, "--seed", 5)
    assert first["sampling"] == {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 5}
    assert first["token_ids"] == again["token_ids"]
    assert first["token_ids"] != made("demo", PROMPT, *options, "--seed", 6)["token_ids"]
    greedy = made("demo", PROMPT, "--max-new-tokens", 16)["token_ids"]
    assert made("demo", PROMPT, "--temperature", 1, "--top-k", 1, "--max-new-tokens", 16)["token_ids"] == greedy


def test_another_dtype_is_used_and_told() -> None:
    assert made("demo", PROMPT, "--dtype", "bfloat16", "--max-new-tokens", 2)["dtype"] == "bfloat16"


def test_it_ends_with_the_text_and_the_end_token_is_no_text(demo_copy: Path) -> None:
    greedy = made("demo", PROMPT, "--max-new-tokens", 8)
    end = greedy["token_ids"][5]
    (demo_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, end]}))
    found = made(demo_copy, PROMPT)
    assert found["token_ids"] == greedy["token_ids"][: greedy["token_ids"].index(end) + 1]
    assert found["stopped"] == "end"


def test_it_ends_where_the_context_is_full(demo_copy: Path) -> None:
    (demo_copy / "generation_config.json").write_text("{}")
    tiny_models.edit_config(demo_copy, eos_token_id=2047, max_position_embeddings=12)
    found = made(demo_copy, PROMPT)
    assert found["stopped"] == "context"
    assert found["tokens"] == 12 - found["prompt_tokens"]


def test_end_tokens_come_from_the_generation_config_then_the_config_then_the_tokenizer(demo_copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_copy)
    file = demo_copy / "generation_config.json"
    file.write_text('{"eos_token_id": [5, 6]}')
    assert stop_tokens(demo_copy, tokenizer) == {5, 6}
    file.unlink()
    tiny_models.edit_config(demo_copy, eos_token_id=7)
    assert stop_tokens(demo_copy, tokenizer) == {7}
    tiny_models.edit_config(demo_copy, eos_token_id=None)
    assert stop_tokens(demo_copy, tokenizer) == {tokenizer.eos_token_id}
    file.write_text('{"eos_token_id": "end"}')
    with pytest.raises(InvalidInputError, match="eos_token_id is 'end'"):
        stop_tokens(demo_copy, tokenizer)


def test_a_prompt_can_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    given("Grüße\n\n".encode())
    assert made("demo", "-", "--max-new-tokens", 1)["prompt"] == "Grüße\n"  # the shell's newline is no part of it
    given(b"\xff\xfe")
    assert "stdin is not valid UTF-8" in refused(2, "demo", "-")
    given(b"\n")
    assert "prompt is empty" in refused(2, "demo", "-")


def test_a_chat_is_written_with_the_template_and_no_special_token_twice(demo_copy: Path) -> None:
    (demo_copy / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(demo_copy)
    ids = generate.encode(tokenizer, "Hello", chat=True)
    assert tokenizer.decode(ids) == "<|bos|>[user] Hello\n[assistant]"
    assert ids.count(tokenizer.bos_token_id) == 1
    found = made(demo_copy, "Hello", "--chat", "--max-new-tokens", 3)
    assert (found["prompt"], found["prompt_tokens"]) == ("Hello", len(ids))


def test_a_chat_that_cannot_be_written_is_refused(demo_copy: Path) -> None:
    assert "has no chat template; leave --chat out" in refused(2, "demo", "Hello", "--chat")
    (demo_copy / "chat_template.jinja").write_text("{{ raise_exception('only for poets') }}")
    assert "(only for poets)" in refused(4, demo_copy, "Hello", "--chat")


def test_what_cannot_be_done_is_said_in_one_sentence(demo_copy: Path, tiny_model: Callable[..., Path]) -> None:
    assert "prompt is empty" in refused(2, "demo", "")
    assert "room for 512" in refused(2, "demo", "word " * 2000)
    assert "--top-p 1.5" in refused(2, "demo", PROMPT, "--temperature", 1, "--top-p", 1.5)
    assert "--top-p 0.0" in refused(2, "demo", PROMPT, "--temperature", 1, "--top-p", 0)
    assert "add --temperature" in refused(2, "demo", PROMPT, "--top-k", 5)
    assert "not valid UTF-8" in refused(2, "demo", "\udcff")
    assert "--device abacus" in refused(2, "demo", PROMPT, "--device", "abacus")
    assert "nowhere is not a folder" in refused(4, "nowhere", PROMPT)
    assert "has no tokenizer" in refused(4, tiny_model("mixtral"), PROMPT)
    tiny_models.edit_config(demo_copy, model_type="llama")
    assert "'llama'" in refused(5, demo_copy, PROMPT)


def test_the_tokenizer_of_another_model_is_refused(tiny_copy: Callable[..., Path]) -> None:
    folder = tiny_copy("mixtral")
    for file in model_folder("demo").glob("tokenizer*"):
        shutil.copy(file, folder)
    assert "vocabulary has 256 entries" in refused(4, folder, "Zebra crossing, 東京")


def test_ctrl_c_ends_with_130_and_speaks_of_no_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generate.generate

    def interrupted(*arguments: Any, **options: Any) -> Iterator[int]:
        yield next(plain(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", interrupted)
    code, _, errors = command("generate", "demo", PROMPT)
    assert (code, errors) == (130, "Interrupted.\n")


def test_memory_that_runs_out_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any, **_options: Any) -> Iterator[int]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(generate, "generate", full)
    assert "ran out of memory; give a shorter prompt" in refused(1, "demo", PROMPT)


def test_a_closed_pipe_ends_without_a_word() -> None:
    python = shlex.join(fork_server.python())
    line = f"({python} -m moepress generate demo 'def' --max-new-tokens 400 | head -c 1 >/dev/null) 2>&1"
    found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert found.stdout == ""
