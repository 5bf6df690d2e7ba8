"""ONNX and ONNX Runtime, which are extras: import them or say what to install, and ask what a session really runs on.

The wheels `onnxruntime` and `onnxruntime-gpu` own the same folder `onnxruntime/`. Installed together, the last one
wins; uninstalling one takes the files of the other along, and what remains imports as an empty namespace. Nothing here
is imported at the top: moepress works without either package.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from moepress.errors import UnsupportedError

CPU_PROVIDER = "CPUExecutionProvider"

# At least, and below: the versions that the extras in pyproject.toml allow. CPU kernels change between minor versions.
TESTED_ONNXRUNTIME = ((1, 31), (1, 33))

# Every wheel that puts its files into the folder onnxruntime/.
WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")

INSTALL = 'install it with `pip install "moepress[onnx]"`, or with `"moepress[onnx-gpu]"` for CUDA, never both'
REINSTALL = 'run `pip uninstall -y {wheels}`, then `pip install` either `"moepress[onnx]"` or `"moepress[onnx-gpu]"`'

_REINSTALL_ONNX = "reinstall it with `pip install --force-reinstall --no-deps onnx`"

_ERRORS_ONLY, _FATAL_ONLY = 3, 4  # of ONNX Runtime's severities 0 to 4; 2, with warnings, is its default

# Tried and shown, and no problem where missing: the CUDA wheel always lists TensorRT, and nothing here needs it.
OPTIONAL_PROVIDERS = frozenset({"TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"})
GPU_PROVIDERS = OPTIONAL_PROVIDERS | {
    *("CUDAExecutionProvider", "ROCMExecutionProvider", "MIGraphXExecutionProvider", "DmlExecutionProvider"),
    *("CoreMLExecutionProvider", "WebGpuExecutionProvider", "OpenVINOExecutionProvider", "QNNExecutionProvider"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a session got that asked for a provider, and what the runtime said on stderr meanwhile."""

    asked: str
    got: tuple[str, ...]
    said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Whether ONNX models can be run.

    Attributes:
        version: of ONNX Runtime; None where it cannot be used.
        error: why it cannot be used; None where it can, or where nothing is installed.
        onnx_error: why the package onnx cannot be used; without it there are no sessions here.
        available: the providers that ONNX Runtime claims.
        sessions: what real sessions got, for the CPU and each GPU provider that is claimed.
    """

    version: str | None = None
    error: str | None = None
    onnx_error: str | None = None
    available: tuple[str, ...] = ()
    sessions: tuple[Session, ...] = ()


def reinstall(*wheels: str) -> str:
    """How to mend a broken folder onnxruntime/: take away these wheels (the CPU and GPU one if none), install one."""
    return REINSTALL.format(wheels=" ".join(wheels or WHEELS[:2]))


def installed_version(name: str) -> str | None:
    """The version of an installed package by its metadata; it is not imported. None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_onnx() -> ModuleType:
    """The module `onnx`.

    Raises:
        UnsupportedError: it is not installed, or does not import.
    """
    module = _imported("onnx", f"onnx is not installed; {INSTALL}.", f"; {_REINSTALL_ONNX}.")
    if not hasattr(module, "ModelProto"):
        raise UnsupportedError(f"The folder of onnx is there without its files; {_REINSTALL_ONNX}.")
    return module


def require_onnxruntime() -> ModuleType:
    """The module `onnxruntime`, with the CUDA libraries of pip's packages loaded where it is built for CUDA.

    That two wheels are installed over each other is no error here as long as the module is whole.

    Raises:
        UnsupportedError: it is not installed, does not import, or was gutted by uninstalling another wheel.
    """
    module = _imported("onnxruntime", f"ONNX Runtime is not installed; {INSTALL}.", f"; {reinstall()}.")
    if not hasattr(module, "InferenceSession") or not hasattr(module, "__version__"):
        raise UnsupportedError(
            f"The package onnxruntime is gutted: another wheel's uninstall took its files along; {reinstall()}."
        )
    if "CUDAExecutionProvider" in module.get_available_providers():
        # Without this, ONNX Runtime does not look into pip's nvidia packages and finds only what the system has. What
        # is missing it prints; whoever asks for CUDA learns it from the session.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError, RuntimeError):
            module.preload_dlls()
    return module


def _imported(name: str, absent: str, mend: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # files of two versions beside each other fail in any way
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise UnsupportedError(absent) from error
        raise UnsupportedError(f"{name} does not import ({error}){mend}") from error


def session_options(severity: int = _FATAL_ONLY) -> Any:
    """Fresh `onnxruntime.SessionOptions` that write no warnings to stderr, nor errors: the exceptions say those.

    Raises:
        UnsupportedError: ONNX Runtime cannot be used.
    """
    options = require_onnxruntime().SessionOptions()
    options.log_severity_level = severity
    return options


def session_providers(provider: str) -> tuple[str, ...]:
    """The providers of a real session of a tiny model that asked for this one.

    Only this tells what runs: a GPU wheel on a machine without a GPU lists CUDA among its available providers, and
    gives the CPU without an error to whoever asks for CUDA. From here on the process's default logger, which speaks
    while providers are loaded, keeps its warnings to itself too; errors name the library that was not found.

    Args:
        provider: ONNX Runtime's name, like `CUDAExecutionProvider`.

    Raises:
        UnsupportedError: onnx or ONNX Runtime cannot be used.
    """
    runtime, model = require_onnxruntime(), _tiny_model()
    runtime.set_default_logger_severity(_ERRORS_ONLY)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints when it falls back
        warnings.simplefilter("ignore", UserWarning)  # "... is not in available provider names": our answer says it
        session = runtime.InferenceSession(model, session_options(_ERRORS_ONLY), providers=[provider])
    return tuple(session.get_providers())


def _tiny_model() -> bytes:
    """y = x + x for one number, in versions of the format that every tested runtime reads."""
    onnx = require_onnx()
    helper = importlib.import_module("onnx.helper")
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "tiny", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def runtime_state() -> Runtime:
    """Whether ONNX Runtime can be used, and what real sessions get of the CPU and of every GPU provider it claims."""
    onnx_error = None
    try:
        require_onnx()
    except UnsupportedError as error:
        onnx_error = str(error)
    if not any(map(installed_version, WHEELS)) and importlib.util.find_spec("onnxruntime") is None:
        return Runtime(onnx_error=onnx_error)
    try:
        with _stderr_caught():  # on some machines it warns while it is imported
            module = require_onnxruntime()
        available = tuple(module.get_available_providers())
    except UnsupportedError as error:
        return Runtime(error=str(error), onnx_error=onnx_error)
    asked = [CPU_PROVIDER, *(name for name in available if name in GPU_PROVIDERS)]
    return Runtime(
        version=str(module.__version__),
        onnx_error=onnx_error,
        available=available,
        sessions=() if onnx_error else tuple(_session(name) for name in asked),
    )


def _session(provider: str) -> Session:
    got: tuple[str, ...] = ()
    with _stderr_caught() as said:
        try:
            got = session_providers(provider)
        except Exception as error:  # a provider may refuse in its own way; it is shown, and the others are tried
            said.append(str(error))
    return Session(asked=provider, got=got, said="\n".join(said).strip())


@contextlib.contextmanager
def _stderr_caught() -> Iterator[list[str]]:
    """What is written to the process's stderr, by C++ too, goes to the list instead."""
    said: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield said
            finally:
                sys.stderr.flush()
                os.dup2(kept, 2)
                file.seek(0)
                said.append(file.read().decode("utf-8", errors="replace"))
    finally:
        os.close(kept)
