"""The demo model, a pruned view of it, and a few short windows; measured once for all tests."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import moepress.models.demo
from moepress.calibration.corpus import EvaluationCorpus, evaluation_windows
from moepress.calibration.sources import embedded_sources
from moepress.models.checkpoint import Checkpoint, open_checkpoint
from moepress.models.experts import prune_source
from moepress.models.walk import Limits
from moepress.validation.measure import Subject, measure
from moepress.validation.results import Quality

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
    pruned = prune_source(demo, dict.fromkeys(range(1, 5), KEPT))
    size, parameters = demo.total_bytes, demo.total_bytes // 2
    half = {"stored_bytes": size // 2, "parameters": parameters // 2}
    return (
        Subject(label="demo", source=demo, folder=DEMO, stored_bytes=size, parameters=parameters),
        Subject(label="copy", source=demo, folder=DEMO, stored_bytes=size, parameters=parameters),
        Subject(label="pruned", source=pruned, folder=None, **half),
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
