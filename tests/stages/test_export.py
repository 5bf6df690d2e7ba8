"""`moepress export --to onnx` as a person meets it: what comes out, what is refused, and runs that end early."""

import json
import os
import resource
import shutil
import signal
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fork_server
import onnx_runs
import pytest
import tiny_models
from onnx_runs import G16, Models, coded_folder, onnx_logits, own_logits, relative_error, tokens_of
from other_sites import ONNX_RUNTIME, other_site, python_in
from stage_runs import add_tokenizer, command, content
from torch import Tensor

from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part
from moepress.runs.output import partial_folder

# Runs the export again and again, each time killed at another moment: as the n-th write reaches the disk.
KILLED = """
import os, pathlib, signal, sys
from moepress import cli
from moepress.converters.onnx.export import OnnxRequest
from moepress.stages.export import onnx_estimate
from moepress.stages.places import Output

folder, outputs = sys.argv[1:]
none = Output(folder=pathlib.Path(outputs) / "none")
onnx_estimate(folder, none, OnnxRequest())  # imports what every run would import again
for number in range(1, 100, 2):
    if os.fork() == 0:
        plain, count = os.fsync, 0

        def fsync(handle):
            global count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(handle)

        os.fsync = fsync
        sys.argv = ["moepress", "export", folder, "--to", "onnx", "--no-check", "-o", f"{outputs}/{number}"]
        cli.main()
    _process, status = os.wait()
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        sys.exit(os.waitstatus_to_exitcode(status))
"""

TWICE = """
import sys
from pathlib import Path
from moepress import cli
try:
    cli.main()
except SystemExit as done:
    assert done.code == 5
assert not list(Path(sys.argv[-1]).parent.glob("out*"))
sys.argv.append("--no-check")
cli.main()
"""


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return onnx_runs.models_of(tiny_model, tmp_path_factory)


@pytest.fixture(scope="module")
def mixtral(models: Models) -> Path:
    return models.quantized("mixtral")


@pytest.fixture
def copied(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral, tmp_path / "copied"))


def exported(folder: object, out: Path, *options: object) -> str:
    """What a successful export prints; nothing of its work is left."""
    code, printed, errors = command("export", folder, "--to", "onnx", "-o", out, *options)
    assert code == 0, errors
    assert not partial_folder(out).exists()
    return printed


def refused(code: int, folder: object, out: Path, *options: object, to: str = "onnx") -> str:
    """The one sentence of a refusal, after which there is no output."""
    found, printed, errors = command("export", folder, "--to", to, "-o", out, *options)
    assert (found, printed) == (code, ""), errors
    assert not out.exists()
    assert errors.startswith("Error: ")
    assert errors.count("\n") == 1
    assert errors.endswith((".\n", "resume.\n"))
    return errors


def refused_before_work(code: int, folder: object, out: Path, *options: object, to: str = "onnx") -> str:
    said = refused(code, folder, out, *options, to=to)
    assert not partial_folder(out).exists()
    return said


def test_the_command_writes_a_checked_folder_and_says_so(mixtral: Path, models: Models, tmp_path: Path) -> None:
    found = json.loads(exported(mixtral, tmp_path / "out", "--json"))
    assert found["output"] == str(tmp_path / "out")
    assert found["bytes_after"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("model.*"))
    assert found["checked"]["providers"] == ["CPUExecutionProvider"]
    assert max(found["checked"]["prefill_error"], found["checked"]["decode_error"]) < 1e-4
    assert found["checked"]["genai_same"] is True
    assert content(tmp_path / "out") == content(models.onnx(mixtral))  # the check leaves no trace
    printed = exported(mixtral, tmp_path / "again")
    assert str(tmp_path / "again") in printed
    assert "CPUExecutionProvider" in printed


def test_options_choose_the_graph(mixtral: Path, models: Models, tmp_path: Path) -> None:
    exported(mixtral, tmp_path / "out", "--for", "cuda", "--experts", "loop", "--accuracy-level", "4", "--no-check")
    assert content(tmp_path / "out") == content(models.onnx(mixtral, preset="cuda", kernel="loop", accuracy_level=4))
    summary = json.loads((tmp_path / "out" / "moepress.json").read_text())
    assert [summary[key] for key in ("for", "kernel", "accuracy_level")] == ["cuda", "loop", 4]


def test_the_demo_is_exported_and_checked(tmp_path: Path) -> None:
    found = json.loads(exported("demo", tmp_path / "out", "--json"))
    assert found["checked"]["compared_with"] == "the artifact's logits"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_dry_run_states_the_exact_size_and_writes_nothing(mixtral: Path, models: Models, tmp_path: Path) -> None:
    found = json.loads(exported(mixtral, tmp_path / "out", "--dry-run"))
    sizes = {file.name: file.stat().st_size for file in models.onnx(mixtral).glob("model.*")}
    assert found["disk_bytes"] == sum(sizes.values())
    assert found["files"] == {name: size for name, size in sizes.items() if name != "model.onnx"}
    assert found["experts"] == {"0": 4, "1": 4, "2": 4}
    assert list(tmp_path.iterdir()) == []


def test_two_exports_have_the_same_bytes(mixtral: Path, models: Models, tmp_path: Path) -> None:
    exported(mixtral, tmp_path / "out", "--no-check")
    assert content(tmp_path / "out") == content(models.onnx(mixtral))


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Scheme(bits=3, group_size=32), "3-bit codes can not be exported to ONNX"),
        (Scheme(bits=4, group_size=8), "Groups of 8 columns can not be exported to ONNX"),
    ],
)
def test_schemes_without_a_kernel_are_refused(models: Models, tmp_path: Path, scheme: Scheme, said: str) -> None:
    folder = models.coded("mixtral", scheme, parts=[Part.ROUTED])
    assert said in refused_before_work(5, folder, tmp_path / "out")
    assert said in refused_before_work(5, folder, tmp_path / "out", "--experts", "loop")
    assert said in refused_before_work(5, folder, tmp_path / "out", "--dry-run")


def test_models_without_a_graph_are_refused(copied: Path, tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    rotary = tiny_copy("qwen3_moe")
    tiny_models.edit_config(rotary, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "'dynamic' changes with the length" in refused_before_work(5, rotary, tmp_path / "out")
    tiny_models.edit_config(copied, model_type="llama")
    assert "'llama'" in refused_before_work(5, copied, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"temperature": "hot"}', "temperature is 'hot', but a number from 0"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', which is no token"),
        ('{"eos_token_id": 256}', "eos_token_id is 256, which is no token"),
        ("{", "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
    ],
)
def test_an_unsound_generation_config_is_refused_before_any_work(
    copied: Path, tmp_path: Path, text: str, said: str
) -> None:
    (copied / "generation_config.json").write_text(text)
    for options in ([], ["--dry-run"]):
        errors = refused_before_work(4, copied, tmp_path / "out", *options)
        assert f"{copied / 'generation_config.json'}" in errors
        assert said in errors


def test_sampling_settings_of_zero_run_in_genai(copied: Path, tmp_path: Path) -> None:
    (copied / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.0, "top_k": 0}')
    assert json.loads(exported(copied, tmp_path / "out", "--json"))["checked"]["genai_same"] is True


def without(folder: Path, name: str) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        gone = [n for n in tensors if n.startswith(name)]
        assert gone
        for n in gone:
            del tensors[n]

    tiny_models.rewrite(folder, drop)


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2"


@pytest.mark.parametrize(
    "name", [EXPERT, f"{EXPERT}.weight_packed", "model.layers.2.self_attn.o_proj", "model.norm", "model.embed_tokens"]
)
def test_a_missing_tensor_is_named_before_anything_is_written(copied: Path, tmp_path: Path, name: str) -> None:
    without(copied, name)
    assert f"lacks {name.removesuffix('.weight_packed')}.weight" in refused_before_work(4, copied, tmp_path / "out")


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape"])
def test_a_missing_part_of_a_matrix_is_named(copied: Path, tmp_path: Path, part: str) -> None:
    without(copied, f"{EXPERT}.{part}")
    assert f"lacks {EXPERT}.{part}" in refused(4, copied, tmp_path / "out")


def test_a_truncated_shard_is_refused(copied: Path, tmp_path: Path) -> None:
    shard = sorted(copied.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-64])
    assert shard.name in refused_before_work(4, copied, tmp_path / "out")


@pytest.mark.parametrize("name", [f"{EXPERT}.weight_scale", "model.layers.2.input_layernorm.weight", "lm_head.weight"])
def test_values_that_are_no_numbers_are_refused_by_name(copied: Path, tmp_path: Path, name: str) -> None:
    tiny_models.rewrite(copied, lambda tensors: tensors[name].view(-1)[3].fill_(float("nan")))
    assert name in refused(4, copied, tmp_path / "out")


def test_fp16_refuses_what_it_cannot_hold_by_name(copied: Path, tmp_path: Path) -> None:
    name = "model.layers.2.input_layernorm.weight"
    tiny_models.rewrite(copied, lambda tensors: tensors[name].view(-1)[3].fill_(1e5))
    assert f"{name} holds values that fp16 can not" in refused(5, copied, tmp_path / "out", "--for", "cuda")
    tiny_models.rewrite(copied, lambda tensors: tensors[name].view(-1)[3].fill_(1.0))
    tiny_models.rewrite(copied, lambda tensors: tensors[f"{EXPERT}.weight_scale"].view(-1)[3].fill_(1e-9))
    assert EXPERT in refused(5, copied, tmp_path / "two", "--for", "cuda")


def test_options_of_onnx_go_with_onnx_only(mixtral: Path, tmp_path: Path) -> None:
    for options in (["--for", "cpu"], ["--experts", "loop"], ["--accuracy-level", "4"], ["--no-check"]):
        assert "go with --to onnx only" in refused_before_work(2, mixtral, tmp_path / "out", *options, to="gptq")
    refusal = refused_before_work(2, mixtral, tmp_path / "out", "--dry-run", to="gptq")
    assert "goes with --to onnx and --to gguf only" in refusal


def test_places_that_cannot_be_written_to_are_refused(copied: Path, tmp_path: Path) -> None:
    assert "lies inside the input" in refused_before_work(2, copied, copied / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    code, _, errors = command("export", copied, "--to", "onnx", "-o", tmp_path / "full")
    assert (code, errors.count("\n")) == (2, 1)
    assert content(tmp_path / "full") == {"mine": b""}
    assert "nowhere is not a folder" in refused_before_work(4, "nowhere", tmp_path / "out")


def test_too_little_room_is_told_before_any_work(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 10, 1000))
    assert "make room or write to another disk" in refused_before_work(1, mixtral, tmp_path / "out")


@contextmanager
def no_file_above(size_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow above that size, as it refuses where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_is_full_in_the_middle_can_be_resumed_from(models: Models, tmp_path: Path) -> None:
    folder, out = models.tiny("mixtral"), tmp_path / "out"  # its layers are larger than its embedding
    whole = models.onnx(folder)
    with no_file_above((whole / "model.layer-000.data").stat().st_size - 1):
        said = refused(1, folder, out, "--no-check")
    assert "takes no file so large" in said
    assert "repeat with --resume" in said
    assert sorted(file.name for file in partial_folder(out).glob("*.data")) == ["model.embedding.data"]
    assert "unfinished run; pass --resume" in refused(2, folder, out, "--no-check")
    assert "--experts was qmoe, now loop" in refused(2, folder, out, "--resume", "--experts", "loop", "--no-check")
    exported(folder, out, "--resume", "--no-check")
    assert content(out) == content(whole)


def test_an_export_killed_at_any_moment_ends_with_the_same_bytes(mixtral: Path, models: Models, tmp_path: Path) -> None:
    done = subprocess.run(
        [*fork_server.python(), "-c", KILLED, mixtral, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    names = sorted({int(path.name.removesuffix(".partial")) for path in tmp_path.iterdir()})
    assert len(names) > 8
    assert names == list(range(1, 2 * len(names), 2))
    whole, outputs = content(models.onnx(mixtral)), [tmp_path / str(name) for name in names]
    assert content(outputs.pop()) == whole  # that one was not killed
    for out in outputs:
        if partial_folder(out).exists():  # killed before the last rename; after it the output is whole
            exported(mixtral, out, "--resume", "--no-check")
        assert content(out) == whole


def test_a_failed_check_keeps_the_export_from_appearing(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moepress.converters.onnx import weights

    plain = weights.packed_rows
    with monkeypatch.context() as patch:
        patch.setattr(weights, "packed_rows", lambda codes, bits: plain(codes.flip(0), bits))
        assert "logits differ from the artifact's logits" in refused(1, mixtral, tmp_path / "out")
    exported(mixtral, tmp_path / "out", "--force")


def test_mixed_widths_go_through_the_command(models: Models, tmp_path: Path) -> None:
    def scheme(module: str) -> Scheme | None:
        return Scheme(bits=8, group_size=32) if ".layers.0." in module else G16

    folder = coded_folder(models.tiny("qwen2_moe"), tmp_path / "mixed", scheme, [Part.ROUTED, Part.SHARED])
    found = json.loads(exported(folder, tmp_path / "out", "--json"))
    assert max(found["checked"]["prefill_error"], found["checked"]["decode_error"]) < 1e-4
    assert (
        relative_error(onnx_logits(tmp_path / "out", tokens_of(folder, 8)), own_logits(folder, tokens_of(folder, 8)))
        < 1e-4
    )


def test_without_the_packages_it_is_said_what_to_install(models: Models, mixtral: Path, tmp_path: Path) -> None:
    arguments = ["export", str(mixtral), "--to", "onnx", "-o", str(tmp_path / "out")]
    bare = other_site(tmp_path / "bare", without=("onnx", *ONNX_RUNTIME))
    done = python_in(bare, "-m", "moepress", *arguments)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("Error: onnx is not installed; ")
    assert 'pip install "moepress[onnx]"' in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))

    half = other_site(tmp_path / "half", without=ONNX_RUNTIME)  # enough to write a graph, not to check it
    done = python_in(half, "-c", TWICE, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Error: ONNX Runtime is not installed; ")
    assert done.stderr.count("\n") == 1
    assert content(tmp_path / "out") == content(models.onnx(mixtral))


def test_an_export_of_an_onnx_folder_is_refused(models: Models, mixtral: Path, tmp_path: Path) -> None:
    refused_before_work(4, models.onnx(mixtral), tmp_path / "out")


def test_a_tokenizer_goes_along(copied: Path, tmp_path: Path) -> None:
    add_tokenizer(copied)
    exported(copied, tmp_path / "out", "--no-check")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (copied / "tokenizer.json").read_bytes()
