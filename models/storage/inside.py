"""What of a model's folder may be read: plain files that lie in it, and no link that leads out of it.

A folder may come from anybody. A link in it to a file elsewhere (`LICENSE -> ~/.ssh/id_rsa`) would be copied into every
output and uploaded with it. The hub's cache has links that lead out of a snapshot, to blobs of its own; these are read.
"""

from collections.abc import Iterator
from pathlib import Path

from moepress.errors import InvalidInputError
from moepress.runs.files import require_plain
from moepress.runs.inputs import stamps

# What belongs to a model besides its weights; everything else in the folder stays behind. Code that the config names
# in auto_map goes along as bytes and is never run here.
CARRIED_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".tiktoken", ".md", ".py"}
_WEIGHTS = {".safetensors", ".onnx", ".data"}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_FOLDERS = ("additional_chat_templates",)  # below a model's folder, of which transformers reads files


def is_carried(name: str) -> bool:
    """Whether a file of that name is one that outputs take over, as far as the name tells."""
    return name.upper().startswith(_LICENCES) or Path(name).suffix in CARRIED_SUFFIXES


def model_files(folder: Path) -> Iterator[Path]:
    """The files of a model's folder that may be read or copied, by name."""
    for file in sorted(folder.iterdir()):
        if file.name in _FOLDERS:
            yield from sorted(file.iterdir()) if file.is_dir() else ()
        elif is_carried(file.name) or file.suffix in _WEIGHTS:
            yield file


def check_files(folder: Path) -> None:
    """Refuse a model's folder that holds a pipe, a socket or a device under a name that is read, or a link out of it.

    Raises:
        InvalidInputError: naming the file.
    """
    try:
        for name in _FOLDERS:
            if (folder / name).is_symlink():
                require_inside(folder, folder / name)
        for file in model_files(folder):
            require_inside(folder, file)
    except OSError as error:
        raise InvalidInputError(f"Cannot read {error.filename or folder}: {error.strerror or error}.") from error


def require_inside(folder: Path, file: Path) -> None:
    """Refuse a file of a folder that is a link out of it, or no plain file; one that is not there is left to others.

    Raises:
        InvalidInputError: with the link's target.
        OSError: it cannot be looked at.
    """
    if file.is_symlink():
        target = file.resolve()
        if folder.resolve() not in target.parents and not in_hub_cache(file):
            raise InvalidInputError(f"{file} is a link that leads out of the folder ({target}); copy the file there.")
    if file.is_file() or not file.exists() or file.is_dir():
        return
    require_plain(file)


def require_own(file: Path) -> None:
    """The same rule for a file that the user names (a plan, a recipe), where it lies in a model's folder.

    Raises:
        InvalidInputError: it is a link that leads out of that folder, or no plain file.
        OSError: it cannot be looked at.
    """
    if (file.parent / "config.json").exists():
        require_inside(file.parent, file)
    require_plain(file)


def in_hub_cache(file: Path) -> bool:
    """Whether a link is one of the hub's cache, which may lead out of the folder.

    The hub keeps snapshots/<revision>/<file> as links to ../../blobs/<hash>, which may itself be a link to the blobs
    that all its models share, blobs/<two digits>/<hash> at the cache's root.
    """
    place, target = file.parent.resolve(), file.resolve()
    snapshots = (place.parent if place.name in _FOLDERS else place).parent
    own, shared = snapshots.parent / "blobs", snapshots.parent.parent / "blobs"
    return snapshots.name == "snapshots" and (target.parent == own or target.parent.parent == shared)


def watched(folder: Path) -> dict[Path, tuple[int, int]]:
    """A model's files as they are now, for `open_run`: a model that changes while it is read is two models; of a file
    itself.

    Raises:
        InvalidInputError: as `check_files`.
    """
    if folder.is_file():
        return stamps([folder])
    check_files(folder)
    return stamps(file for file in model_files(folder) if file.is_file())
