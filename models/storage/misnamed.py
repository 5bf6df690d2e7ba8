"""Files that are not what their names say, told by their first bytes: Git LFS pointers, web pages, archives."""

from pathlib import Path

from moepress.runs.store.remote import STAND_IN, open_file

_BYTES = 64
_SIGNS = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself; fetch it (`git lfs pull` in the repository, or `hf download`).",
    ),
    (STAND_IN, "stands in for a file that lies in a store; give the model by the URL that the file names."),
    (b"GGUF", "is a GGUF file; give the folder of the model that it was made from, with safetensors."),
    (
        b"PK\x03\x04",
        "is a zip archive or a pickle of torch, which is never opened; download or convert the file again.",
    ),
    (b"<!doctype html", "is a web page, such as an error or a login; download the file again."),
    (b"<html", "is a web page, such as an error or a login; download the file again."),
)


def misnamed(file: Path) -> str | None:
    """One sentence about a file that is something else than JSON or safetensors; None where nothing shows.

    Raises:
        OSError: the file can not be read.
    """
    with open_file(file) as stream:
        head = stream.read(_BYTES)
    for sign, what in _SIGNS:
        if head.startswith(sign) or head.lower().startswith(sign):
            return f"{file} {what}"
    return None
