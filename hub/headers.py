"""A model of the hub without its weights: shards have their header, and a hole where the data would be.

What `inspect` and dry runs do needs names, shapes and sizes; of a file with holes they know that it tells nothing of
the disk's speed. Layout of a safetensors file: 8 bytes little-endian header length N, N bytes of JSON, the data.
"""

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError
from moepress.runs.progress import track

_FIRST_BYTES = 100_000  # holds most headers, so that one request is enough
_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
_AT_ONCE = 8
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def without_weights(repo: str, commit: str, sizes: Mapping[str, int]) -> Path:
    """A folder of files of a repository, laid out as in the hub's cache, that lives as long as the process.

    Args:
        repo: its id.
        commit: of the repository.
        sizes: names of the files, and their bytes.

    Raises:
        InvalidInputError: a shard is no safetensors file.
        Exception: what huggingface_hub raises.
    """
    from huggingface_hub import hf_hub_download

    shards = [name for name in sizes if name.endswith(".safetensors")]
    place = tempfile.TemporaryDirectory(prefix="moepress-", ignore_cleanup_errors=True)
    _FOLDERS.append(place)
    folder = Path(place.name) / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in sizes.keys() - set(shards):
        shutil.copyfile(hf_hub_download(repo, name, revision=commit), folder / name)

    def outline(name: str) -> None:
        header = _header(repo, commit, name, sizes[name])
        with (folder / name).open("wb") as stream:
            stream.write(header)
            stream.truncate(sizes[name])

    with track("headers", len(shards), unit="shards") as advance, ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        for _ in pool.map(outline, shards):
            advance(1)
    return folder


def _header(repo: str, commit: str, name: str, size: int) -> bytes:
    """The length, and the header itself, of a file of that size."""
    raw = _bytes(repo, commit, name, 0, min(_FIRST_BYTES, size))
    length = 8 + int.from_bytes(raw[:8], "little")
    if length > min(_HEADER_LIMIT_BYTES, size):
        raise InvalidInputError(f"{name} of {repo} on the hub is not a sound safetensors file: its header is too long.")
    if length > len(raw):
        raw += _bytes(repo, commit, name, len(raw), length)
    return raw[:length]


def _bytes(repo: str, commit: str, name: str, begin: int, end: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
    response: Any = get_session().get(hf_hub_url(repo, name, revision=commit), headers=headers)
    hf_raise_for_status(response)
    content = bytes(response.content)
    return content if response.status_code == 206 else content[begin:end]
