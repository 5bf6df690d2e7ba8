"""Where a stage works, as plain data: the machine, the text, the output; a model's folder by its name; and paths that
are not there, refused before anything heavy is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.hub.snapshot import HubModel, hub_model, origin_of, snapshot
from moepress.hub.stored import is_url, stored_folder
from moepress.models.storage.misnamed import misnamed
from moepress.runs.files import open_plain

DEMO, GGUF = "demo", ".gguf"
DEFAULT_TOKENS, EMBEDDED_TOKENS, DEFAULT_WINDOW = 131_072, 32_768, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and within what a stage runs.

    Attributes:
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16; what the forward pass computes in.
        memory_bytes: what may be used; None for half of what is free.
    """

    device: str = "auto"
    dtype: str = "auto"
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the model is fed.

    Attributes:
        sources: files, folders or data sets; none at all means the embedded text.
        domains: NAME=PATH.
        tokens: how many in all; None for the default.
        window: tokens per sequence; None for the model's context, at most 2048.
        seed: chooses the windows.
    """

    sources: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    tokens: int | None = None
    window: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where a stage writes, and what it may do to what is there."""

    folder: Path
    resume: bool = False
    force: bool = False


def model_folder(name: str) -> Path:
    """The folder of a model: a path, `demo` for the embedded one, an id on the hub, downloaded where it has to be, or a
    store's URL, whose shards are read in place.

    Raises:
        InvalidInputError: there is no such model.
        MoepressError: it is on the hub and cannot be downloaded, or in a store that does not answer.
    """
    if is_url(name):
        return stored_folder(name)
    found = _place(name)
    return found if isinstance(found, Path) else snapshot(found)


def names_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file by its name."""
    return path.suffix.lower() == GGUF


def anywhere(name: str) -> str:
    """A model's name that means the same on another machine: a URL, an id on the hub, `demo`, or a folder's path."""
    folder = Path(name)
    return str(folder.resolve()) if folder.is_dir() else name


def model_place(name: str) -> Path:
    """`model_folder`, or a GGUF file: for commands that run a model or look at one."""
    file = Path(name)
    return file if names_gguf(file) and file.is_file() else model_folder(name)


def local_folders(*names: str, gguf: bool = False) -> list[Path]:
    """The folders of those models that are no ids on the hub, for checks before anything is downloaded.

    Args:
        names: of models.
        gguf: GGUF files are taken, too.

    Raises:
        InvalidInputError: there is no such model.
    """
    names = tuple(name for name in names if not is_url(name))
    files = [Path(name) for name in names if gguf and names_gguf(Path(name)) and Path(name).is_file()]
    places = (_place(name) for name in names if Path(name) not in files)
    return [*files, *(found for found in places if isinstance(found, Path))]


def _place(name: str) -> Path | HubModel:
    folder = Path(name)
    if name == DEMO and not folder.exists():
        import moepress.models.demo as demo

        return Path(demo.__file__).parent
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise _refused_file(folder)
    if names_gguf(folder) and not folder.exists():
        raise InvalidInputError(f"There is no file {name}; give the path of a .gguf file that is there.")
    model = hub_model(name)
    if model is None or folder.exists():
        raise InvalidInputError(
            f"{name} is not a folder; give the folder of a Hugging Face model, its id on the hub (owner/name), its URL "
            "in a store (s3://bucket/path), or `demo`."
        )
    return model


def _refused_file(file: Path) -> MoepressError:
    try:
        other = misnamed(file)
    except OSError as error:
        return InvalidInputError(f"Cannot read {file}: {error.strerror or error}.")
    if other is not None:
        return UnsupportedError(other)
    return InvalidInputError(f"{file} is a file, not a folder; give the folder that it lies in.")


def display_name(folder: Path, given: str) -> str:
    """A model's name for people: `demo`, its id on the hub, or its folder's name."""
    origin = origin_of(folder)
    if origin is not None:
        return origin.repo
    return DEMO if given == DEMO else folder.resolve().name


def require_profiles(folders: Sequence[Path]) -> None:
    """Refuse folders that are no profiles, before what reads profiles is imported.

    Raises:
        InvalidInputError: as `load_profile` would.
    """
    for folder in folders:
        if not (folder / "profile.json").exists():
            raise InvalidInputError(f"{folder} has no profile.json; give a folder made by `moepress profile`.")


def require_file(file: Path) -> None:
    """Refuse a file that cannot be read, before what reads it is imported.

    Raises:
        InvalidInputError: as `read_json` would.
    """
    try:
        open_plain(file).close()
    except OSError as error:
        raise InvalidInputError(f"Cannot read {file}: {error.strerror or error}.") from error


def context_notes(tokens: int | None, context: int) -> list[str]:
    """What to know of a KV cache for more tokens than a model was made for."""
    if tokens is None or tokens <= context:
        return []
    said = f"The context of {tokens:,} tokens exceeds the model's own of {context:,}"
    return [f"{said}: a runtime takes it only with an extended rope, stated in config.json."]
