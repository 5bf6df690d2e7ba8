"""Sessions of ONNX decoders: what they run on, and tokens fed in any portions."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_runs
import onnxruntime
import pytest
import tiny_models
import torch
from onnx_runs import (
    PREFILL,
    Models,
    graph_of,
    onnx_logits,
    own_logits,
    relative_error,
    to_onnx,
    tokens_of,
    windows_for,
)

from moepress.converters.onnx.folder import open_onnx
from moepress.converters.onnx.runtime import session_providers
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, MoepressError, UnsupportedError, UsageError
from moepress.models.families.family import Part
from moepress.validation.quality.onnx_session import CUDA_PROVIDER, Decoding, OnnxDecoder, open_session, read_logits

SWITCH = "ORT_QMOE_CPU_QNBIT_GEMM"
EXACT = 1e-4


def has_cuda() -> bool:
    """Whether a session really gets CUDA; the list of available providers does not tell."""
    listed = CUDA_PROVIDER in onnxruntime.get_available_providers()
    return listed and CUDA_PROVIDER in session_providers(CUDA_PROVIDER)


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return onnx_runs.models_of(tiny_model, tmp_path_factory)


@pytest.fixture(scope="module")
def mixtral(models: Models) -> Path:
    return models.onnx(models.quantized("mixtral"))


@pytest.fixture
def copied(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral, tmp_path / "copied"))


def test_the_providers_are_those_of_the_session(mixtral: Path) -> None:
    model = open_session(open_onnx(mixtral), "cpu")
    assert model.providers == tuple(model.session.get_providers()) == ("CPUExecutionProvider",)
    assert model.provider == "CPU"


@pytest.mark.skipif(has_cuda(), reason="CUDA is there")
def test_cuda_that_is_not_there_is_refused_where_it_was_asked_for(models: Models, mixtral: Path) -> None:
    made_for_cuda = open_onnx(models.onnx(models.quantized("mixtral"), preset="cuda"))
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match=f"--device {device}: the session got CPUExecutionProvider instead"):
            open_session(made_for_cuda, device)
        with pytest.raises(UsageError, match="is an fp32 graph, most of which CUDA has no kernels for"):
            open_session(open_onnx(mixtral), device)
    assert open_session(made_for_cuda).providers == ("CPUExecutionProvider",)


def test_devices_that_no_session_knows_are_refused(mixtral: Path) -> None:
    for device in ("mps", "abacus", "", "cudafoo", "cuda:", "cuda:-1"):
        with pytest.raises(UsageError, match="ONNX models run on cpu, cuda or cuda:1"):
            open_session(open_onnx(mixtral), device)


@pytest.mark.parametrize("before", [None, "int8"])
@pytest.mark.parametrize("exact", [True, False])
def test_the_switch_for_int8_activations_is_put_back(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, exact: bool
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    open_session(open_onnx(mixtral), "cpu", exact=exact)
    assert os.environ.get(SWITCH) == before


def test_the_switch_is_put_back_after_an_error(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "int8")
    model = graph_of(copied)
    next(node for node in model.graph.node if node.op_type == "QMoE").op_type = "NoSuchOperator"
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime can not load .*NoSuchOperator"):
        open_session(open_onnx(copied), "cpu")
    assert os.environ[SWITCH] == "int8"


def test_a_session_for_8_bits_is_exact_unless_speed_is_asked_for(models: Models) -> None:
    folder = models.coded("olmoe", Scheme(bits=8, group_size=32), parts=[Part.ROUTED, Part.SHARED])
    tokens = tokens_of(folder, PREFILL)
    exact, fast = (onnx_logits(models.onnx(folder), tokens, exact=exact) for exact in (True, False))
    assert relative_error(exact, models.own_logits(folder)[:, :PREFILL]) < EXACT
    assert relative_error(fast, exact) > 10 * EXACT


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral_window", "qwen3_moe"])
@pytest.mark.parametrize("portions", [[1] * 20, [20], [7, 1, 12], [3, 16, 1]])
def test_tokens_may_come_in_any_portions(models: Models, key: str, portions: list[int]) -> None:
    folder = models.quantized(key)
    decoding = Decoding(open_session(open_onnx(models.onnx(folder)), "cpu"))
    parts = [decoding.step(part) for part in tokens_of(folder, 20)[:1].split(portions, dim=1)]
    assert [part.shape[1] for part in parts] == portions
    assert decoding.length == 20
    assert parts[0].dtype == torch.float32
    assert relative_error(torch.cat(parts, dim=1), models.own_logits(folder)[:1, :20]) < EXACT


def test_sequences_of_one_session_do_not_see_each_other(models: Models) -> None:
    folder = models.quantized("mixtral")
    model = open_session(open_onnx(models.onnx(folder)), "cpu")
    tokens, wanted = tokens_of(folder, 10), models.own_logits(folder)
    one, two = Decoding(model), Decoding(model)
    for n in range(10):
        assert relative_error(one.step(tokens[:1, n : n + 1])[0, 0], wanted[0, n]) < EXACT
        assert relative_error(two.step(tokens[1:, n : n + 1])[0, 0], wanted[1, n]) < EXACT


def test_logits_of_windows_are_read_row_by_row(models: Models) -> None:
    folder = models.quantized("olmoe")
    windows = windows_for(folder, count=3, length=9)
    wanted = own_logits(folder, windows)[:, :-1].flatten(0, 1)
    read = read_logits(open_session(open_onnx(models.onnx(folder)), "cpu"), windows)
    assert relative_error(torch.cat([read(count) for count in (5, 8, 1, 10)]), wanted) < EXACT


def test_a_decoder_gives_the_last_logits_of_a_prompt_longer_than_a_chunk(tmp_path: Path) -> None:
    folder = tiny_models.make("mixtral", tmp_path / "model", max_position_embeddings=320, num_hidden_layers=2)
    decoder = OnnxDecoder(open_session(open_onnx(to_onnx(folder, tmp_path / "onnx")), "cpu"))
    assert (decoder.context, decoder.vocabulary) == (320, 256)
    tokens = windows_for(folder, count=1, length=301)
    wanted = own_logits(folder, tokens)[:, -2:]
    assert relative_error(decoder.step(tokens[:, :300]), wanted[:, 0]) < EXACT
    assert relative_error(decoder.step(tokens[:, 300:]), wanted[:, 1]) < EXACT


def test_a_graph_that_asks_for_positions_gets_them(models: Models, tmp_path: Path) -> None:
    folder = models.quantized("deepseek_v3")
    out = Path(shutil.copytree(models.onnx(folder), tmp_path / "onnx"))
    model, own, given = graph_of(out), "/model/inputs/positions/output_0", "position_ids"
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(given, onnx.TensorProto.INT64, ["batch_size", "sequence_length"])
    )
    uses = [(node, n) for node in model.graph.node for n, name in enumerate(node.input) if name == own]
    assert len(uses) == 6
    for node, n in uses:
        node.input[n] = given
    (out / "model.onnx").write_bytes(model.SerializeToString())
    assert relative_error(onnx_logits(out, tokens_of(folder, 12), 7), models.own_logits(folder)[:, :12]) < EXACT


def test_logits_that_are_no_numbers_are_refused(models: Models, copied: Path) -> None:
    norm = next(t for t in graph_of(copied).graph.initializer if t.name == "model.norm.weight")
    place = {row.key: row.value for row in norm.external_data}
    data = bytearray((copied / place["location"]).read_bytes())
    begin = int(place["offset"])
    data[begin : begin + 4] = np.float32("nan").tobytes()
    (copied / place["location"]).write_bytes(data)
    with pytest.raises(InvalidInputError, match="gives NaN or Inf logits"):
        onnx_logits(copied, tokens_of(copied, 2))


def test_what_stops_the_runtime_is_one_of_our_errors(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_models.edit_config(copied, max_position_embeddings=1000)  # the graph knows the angles of 256 positions
    decoder = OnnxDecoder(open_session(open_onnx(copied), "cpu"))
    with pytest.raises(MoepressError, match=r"ONNX Runtime stopped in .*; export it again"):
        decoder.step(torch.zeros(1, 300, dtype=torch.int64))
    capfd.readouterr()
