"""Fixtures that many test files share: tiny models, made once per session."""

import gc
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_server
import tiny_models
import torch

gc.unfreeze = lambda: None  # or `settle` would look through all that is set aside before each walk: a third of a second
os.fsync = lambda _file: None  # no test outlives a power cut; processes of their own do wait for the disk
os.environ.pop("GITHUB_STEP_SUMMARY", None)  # or every validate of a test would write to the summary of our own CI
# What is remembered of models in a cache must not come from, or go to, that of the person who runs the tests.
_cache = tempfile.TemporaryDirectory(prefix="moepress-tests-")  # removed as the process ends
os.environ["XDG_CACHE_HOME"] = _cache.name
torch.set_num_threads(1)  # tiny matrices: threads only wait for each other, minutes in all where tests run in parallel

TinyFactory = Callable[..., Path]

LONG = (
    *("test_recipe", "test_doc_commands_guides", "test_doc_commands", "test_estimate", "test_push", "test_balance"),
    *("test_resume", "test_dry_run", "test_export", "test_generate", "test_pipeline", "test_examples"),
    *("test_float_schemes", "test_generations", "test_end_weight", "test_objects", "test_leases", "test_store"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: where each goes to one process, no process works alone at the end."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Libraries, test files and their cases are set aside before each file: each layer of a streamed forward collects
    garbage, and would look through them every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """`tiny_model(key, **options)`: a tiny model's folder (options of `tiny_models.make`), not to be changed."""
    made: dict[str, Path] = {}

    def get(key: str, **options: Any) -> Path:
        name = "-".join([key, *(f"{k}={v}" for k, v in sorted(options.items()))]).replace("torch.", "")
        if name not in made:
            made[name] = tiny_models.make(key, tmp_path_factory.mktemp(key) / "model", **options)
        return made[name]

    return get


@pytest.fixture
def tiny_copy(tiny_model: TinyFactory, tmp_path: Path) -> TinyFactory:
    """`tiny_copy(key, **options)`: the same in a folder of the test's own, which it may spoil."""

    def get(key: str, **options: Any) -> Path:
        folder = tmp_path / f"copy-{key}"
        shutil.copytree(tiny_model(key, **options), folder)
        return folder

    return get


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server, in a process of its own."""
    with s3_server.running() as address:
        yield address


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; the environment says where it is, and has the credentials."""
    s3_server.tell_environment(s3, monkeypatch)
    return s3_server.new_bucket(s3)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many spoiled inputs are tried, and of which seed."""
    parser.addoption("--inputs", type=int, default=300, help="spoiled inputs that tests/faults tries in all")
    parser.addoption("--seed", default="0", help="of the spoiled inputs; `random` takes a new one and prints it")


def pytest_configure(config: pytest.Config) -> None:
    """A random seed is drawn once, for all processes, and printed, so that what it found can be repeated."""
    if hasattr(config, "workerinput"):
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed == "random":
        config.option.seed = str(random.SystemRandom().randrange(1 << 32))
        print(f"spoiled inputs: --inputs {config.option.inputs} --seed {config.option.seed}")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist gives its processes the words of the command line, where the seed may be the word `random`."""
    node.workerinput["seed"] = node.config.option.seed


@pytest.fixture(scope="session")
def fuzz(request: pytest.FixtureRequest) -> tuple[int, int]:
    """How many inputs, and the seed; the same in all processes of a parallel run."""
    inputs, seed = request.config.getoption("--inputs"), request.config.getoption("--seed")
    return int(inputs), int(seed)
