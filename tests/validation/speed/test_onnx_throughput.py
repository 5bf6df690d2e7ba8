"""ONNX folders timed in ONNX Runtime and onnxruntime-genai, beside a model in transformers."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx as onnx_package
import pytest
import torch
from onnx import TensorProto, helper

from moepress.converters.onnx.folder import OnnxFolder, open_onnx
from moepress.converters.safetensors.artifact import open_artifact
from moepress.stages.subjects import elsewhere_subject, subject_of
from moepress.validation.quality.measure import Subject
from moepress.validation.quality.onnx_session import Decoding, open_session
from moepress.validation.quality.results import Throughput, ThroughputRow
from moepress.validation.speed.onnx_throughput import SharedDecoding, shares_cache
from moepress.validation.speed.throughput import measure_throughput
from moepress.validation.speed.timing import Bench, paired_ratio

SMALL = Bench(device=torch.device("cpu"), dtype=torch.float32, prompt=8, decode=3, repetitions=2)
HIDDEN, VOCABULARY = 8, 16


def foreign(folder: Path) -> Path:
    """A decoder as other tools write it: the cache grows by Concat, and there is no genai_config.json."""
    folder.mkdir()
    shape = {"token": ["batch", "given"], "past": ["batch", 1, "past", HIDDEN], "present": ["batch", 1, "all", HIDDEN]}
    value = helper.make_tensor_value_info
    inputs = [value("input_ids", TensorProto.INT64, shape["token"])]
    inputs += [value(f"past_key_values.0.{part}", TensorProto.FLOAT, shape["past"]) for part in ("key", "value")]
    inputs += [value("attention_mask", TensorProto.INT64, ["batch", "all"])]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", "given", VOCABULARY])]
    outputs += [value(f"present.0.{part}", TensorProto.FLOAT, shape["present"]) for part in ("key", "value")]
    generator = torch.Generator().manual_seed(0)
    weights = {"table": (VOCABULARY, HIDDEN), "head": (HIDDEN, VOCABULARY)}
    tensors = [
        helper.make_tensor(name, TensorProto.FLOAT, size, torch.randn(size, generator=generator).flatten().tolist())
        for name, size in weights.items()
    ]
    tensors.append(helper.make_tensor("axis", TensorProto.INT64, [1], [1]))
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        helper.make_node("Unsqueeze", ["hidden", "axis"], ["new"]),
        *(
            helper.make_node("Concat", [f"past_key_values.0.{part}", "new"], [f"present.0.{part}"], axis=2)
            for part in ("key", "value")
        ),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "foreign", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx_package.save(model, str(folder / "model.onnx"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY, "max_position_embeddings": 64}))
    return folder


@pytest.fixture(scope="module")
def measured(
    subjects: Sequence[Subject],
    artifact: Path,
    onnx: OnnxFolder,
    rough_onnx: OnnxFolder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Throughput:
    broken = tmp_path_factory.mktemp("broken") / "onnx"
    shutil.copytree(onnx.folder, broken)
    (broken / "genai_config.json").write_text("{")
    others = (
        elsewhere_subject("onnx", onnx),
        elsewhere_subject("rough", rough_onnx),
        elsewhere_subject("broken", open_onnx(broken)),
        elsewhere_subject("huge", dataclasses.replace(onnx, total_bytes=1 << 60)),
        subject_of("artifact", open_artifact(artifact)),
    )
    return measure_throughput((subjects[0], *others), SMALL)


def rows_of(measured: Throughput, subject: str, runtime: str) -> list[ThroughputRow]:
    return [row for row in measured.rows if row.subject == subject and row.runtime.startswith(runtime)]


def test_rows_are_grouped_by_runtime_and_name_the_provider(measured: Throughput) -> None:
    runtimes = list(dict.fromkeys(row.runtime.rpartition(" ")[0] for row in measured.rows))
    assert runtimes == ["transformers", "ONNX Runtime", "onnxruntime-genai"]
    assert sorted(runtimes.index(row.runtime.rpartition(" ")[0]) for row in measured.rows) == [
        runtimes.index(row.runtime.rpartition(" ")[0]) for row in measured.rows
    ]
    assert {row.provider for row in measured.rows} == {"CPU"}
    for runtime in runtimes[1:]:
        for row, test in zip(rows_of(measured, "onnx", runtime), ("pp8", "tg3"), strict=True):
            assert (row.test, row.dtype, len(row.samples)) == (test, "float32", 2)
            assert min(row.samples) > 0


def test_ratios_are_to_the_first_model_in_the_same_runtime(measured: Throughput) -> None:
    for runtime in ("ONNX Runtime", "onnxruntime-genai"):
        first, other = (rows_of(measured, name, runtime) for name in ("onnx", "rough"))
        assert [row.ratio for row in first] == [None, None]
        for before, after in zip(first, other, strict=True):
            assert after.ratio == paired_ratio(after.samples, before.samples)
            assert "int8 activations" in (after.note or "")


def test_a_model_alone_in_its_runtime_is_compared_across_runtimes(
    subjects: Sequence[Subject], onnx: OnnxFolder
) -> None:
    found = measure_throughput((subjects[0], elsewhere_subject("onnx", onnx)), SMALL)
    first = rows_of(found, "demo", "transformers")
    for runtime in ("ONNX Runtime", "onnxruntime-genai"):
        for before, after in zip(first, rows_of(found, "onnx", runtime), strict=True):
            assert after.ratio == paired_ratio(after.samples, before.samples)
            assert (after.note or "").startswith(f"ratio: to demo in {before.runtime}")


def test_what_genai_can_not_load_is_still_timed_in_onnx_runtime(measured: Throughput) -> None:
    assert len(rows_of(measured, "broken", "ONNX Runtime")) == 2
    (row,) = rows_of(measured, "broken", "onnxruntime-genai")
    assert (row.test, row.tokens_per_second) == ("-", None)
    assert (row.note or "").startswith("not measured: onnxruntime-genai can not load it (")


def test_what_does_not_fit_into_memory_says_so_in_every_runtime(measured: Throughput) -> None:
    for runtime in ("ONNX Runtime", "onnxruntime-genai"):
        (row,) = rows_of(measured, "huge", runtime)
        assert (row.note or "").startswith("not measured: needs 1073741824.0 GiB")


def test_a_cache_written_in_place_gives_the_logits_of_a_growing_one(onnx: OnnxFolder) -> None:
    model = open_session(onnx, "cpu")
    tokens = torch.randint(2048, (1, 40), generator=torch.Generator().manual_seed(1))
    shared, growing = SharedDecoding(model, 40), Decoding(model)
    for start, stop in ((0, 30), (30, 31), (31, 38), (38, 40)):
        part = tokens[:, start:stop]
        torch.testing.assert_close(shared.step(part), growing.step(part), rtol=1e-4, atol=1e-4)


def test_a_folder_of_another_tool_is_timed_with_a_growing_cache(onnx: OnnxFolder, tmp_path: Path) -> None:
    other = open_onnx(foreign(tmp_path / "foreign"))
    assert shares_cache(onnx)
    assert not shares_cache(other)
    found = measure_throughput((elsewhere_subject("other", other),), SMALL)
    for row, test in zip(rows_of(found, "other", "ONNX Runtime"), ("pp8", "tg3"), strict=True):
        assert (row.test, len(row.samples)) == (test, 2)
        assert "the cache is copied at each step" in (row.note or "")
    (row,) = rows_of(found, "other", "onnxruntime-genai")
    assert (row.note or "").startswith("not measured: onnxruntime-genai can not load it (Error opening ")
