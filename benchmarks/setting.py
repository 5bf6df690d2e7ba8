"""What the benchmarks share: the trained model and the texts of ../shared where it is there, else the demo."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from moepress import __version__
from moepress.stages.places import model_folder

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results"
DOMAINS = ("german", "math", "python", "wiki")
TRAINED = ("bench", "wide", "demo")  # models of ../shared; the demo is everywhere


def bench_model() -> Path:
    """The bench model (28 M parameters), or the demo (4.6 M)."""
    bench = SHARED / "models" / "bench"
    return bench if bench.is_dir() else model_folder("demo")


def trained_model(name: str) -> Path:
    """A model of TRAINED.

    Raises:
        SystemExit: ../shared is not there.
    """
    folder = model_folder("demo") if name == "demo" else SHARED / "models" / name
    if not folder.is_dir():
        raise SystemExit(f"the model {name} is not here: it belongs to {folder}")
    return folder


def texts(split: str) -> tuple[str, ...]:
    """`NAME=FILE` of a split (train, test); nothing when only the embedded text is there."""
    data = SHARED / "data"
    return tuple(f"{d}={data / d / f'{split}.txt'}" for d in DOMAINS) if data.is_dir() else ()


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "moepress": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "model": bench_model().name,
        "data": "shared" if texts("test") else "embedded",
    }


def code_digest() -> str:
    """A digest of moepress's own code, tests and benchmarks apart: figures of other code are not continued."""
    found = hashlib.sha256()
    packages = sorted(
        file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name not in ("tests", "benchmarks")
    )
    for package in packages:
        for file in sorted(package.rglob("*")):
            if file.suffix in (".py", ".cpp", ".h", ".json") and "__pycache__" not in file.parts:
                found.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def save(name: str, rows: Any, **more: Any) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"machine": machine(), **more, "rows": rows}, indent=2) + "\n")
    print(f"written to {file.relative_to(ROOT)}")
