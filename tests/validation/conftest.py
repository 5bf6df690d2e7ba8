"""The demo model, a pruned view of it, and a few short windows, measured once for all tests; 4 bit and ONNX folders."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import moepress.models.demo
from moepress.calibration.corpus import EvaluationCorpus, evaluation_windows
from moepress.calibration.sources import embedded_sources
from moepress.converters.onnx.export import OnnxRequest
from moepress.converters.onnx.folder import OnnxFolder, open_onnx
from moepress.converters.safetensors.compressed_tensors import layer_tensors
from moepress.converters.safetensors.compressed_tensors_config import quantization_config
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.stages.export import onnx_stage
from moepress.stages.places import Output
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.results import Quality
from moepress.validation.quality.routing import Kept

DEMO = Path(str(moepress.models.demo.__file__)).parent
LIMITS = Limits(memory_bytes=1 << 30, batch_windows=8)
KEPT = [group * 4 + expert for group in range(4) for expert in (0, 2)]  # half of each router group


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny; waiting threads only slow them down


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    return open_checkpoint(DEMO)


@pytest.fixture(scope="session")
def corpus() -> EvaluationCorpus:
    from transformers import AutoTokenizer

    return evaluation_windows(
        embedded_sources("evaluation"), AutoTokenizer.from_pretrained(DEMO), window=32, max_windows=2
    )


@pytest.fixture(scope="session")
def subjects(demo: Checkpoint) -> Sequence[Subject]:
    keep = dict.fromkeys(range(1, 5), KEPT)
    pruned = prune_source(demo, keep)
    size, parameters = demo.total_bytes, demo.total_bytes // 2
    half = {"stored_bytes": size // 2, "parameters": parameters // 2}
    return (
        Subject(label="demo", source=demo, folder=DEMO, stored_bytes=size, parameters=parameters),
        Subject(label="copy", source=demo, folder=DEMO, stored_bytes=size, parameters=parameters),
        Subject(label="pruned", source=pruned, folder=None, kept=Kept(experts=keep, total=16), **half),
    )


@pytest.fixture(scope="session")
def quality(subjects: Sequence[Subject], corpus: EvaluationCorpus, tmp_path_factory: pytest.TempPathFactory) -> Quality:
    return measure(
        subjects,
        corpus,
        device=torch.device("cpu"),
        dtype=torch.float32,
        limits=LIMITS,
        scratch_folder=tmp_path_factory.mktemp("scratch"),
    )


@pytest.fixture(scope="session")
def artifact(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with its routed experts rounded to 4 bits, in the compressed-tensors layout."""
    from safetensors.torch import save_file

    folder, scheme = tmp_path_factory.mktemp("artifact"), Scheme(bits=4, group_size=32)
    tensors: dict[str, torch.Tensor] = {}
    ignored = ["lm_head"]
    for name in demo.shapes:
        weight, module = demo.read(name), name.removesuffix(".weight")
        if ".mlp.experts." in name:
            grouped = weight.float().unflatten(1, (-1, 32))
            scales = (grouped.abs().amax(-1) / 7).bfloat16().float()
            codes = torch.clamp(torch.round(grouped / scales[..., None]), -8, 7).to(torch.int8).flatten(1)
            tensors |= layer_tensors(module, codes, scales, scheme, torch.bfloat16)
        else:
            tensors[name] = weight.contiguous()
            ignored += [module] if weight.ndim == 2 and "embed" not in name else []
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**demo.config, "quantization_config": quantization_config(scheme, ignored)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def onnx(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxFolder:
    """The artifact in ONNX, with fp32 activations."""
    folder = tmp_path_factory.mktemp("onnx") / "onnx"
    onnx_stage(str(artifact), Output(folder=folder), OnnxRequest(), check=False)
    return open_onnx(folder)


@pytest.fixture(scope="session")
def rough_onnx(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxFolder:
    """The artifact in ONNX, with int8 activations."""
    folder = tmp_path_factory.mktemp("rough") / "onnx"
    onnx_stage(str(artifact), Output(folder=folder), OnnxRequest(accuracy_level=4), check=False)
    return open_onnx(folder)
