"""Models in a store, by its URL: what is small is fetched, shards are read in place.

    s3://bucket/path/NAME ──▶ CACHE/stores/<digest of names, sizes and versions>/NAME/

The folder holds config, tokenizer and licence, and a stand-in for each shard (`runs.store.remote`). A model that
changes in the store gets another folder. Which files are read is the same rule as on the hub.
"""

import functools
import hashlib
import json
import shutil
from pathlib import Path

from moepress.errors import InvalidInputError, UsageError
from moepress.hub.snapshot import INDEX, needed_files
from moepress.runs.byte_sizes import size_text
from moepress.runs.files import make_folders, new_id
from moepress.runs.progress import note
from moepress.runs.store.folder import FolderStore
from moepress.runs.store.objects import Facts, ObjectStore
from moepress.runs.store.remote import STAND_IN, RemoteFile, register
from moepress.runs.store.store import open_store

_SHARD = ".safetensors"


def is_url(name: str) -> bool:
    """Whether a model's name is a URL."""
    return "://" in name


@functools.cache
def stored_folder(url: str) -> Path:
    """A model's folder, in which shards of a bucket are stand-ins; the same one for as long as the process lives.

    Raises:
        InvalidInputError: there is no model, or one in a format that is not read.
        StoreError: the store does not answer.
        UsageError: the URL is of no known kind.
    """
    store = open_store(url)
    if isinstance(store, FolderStore):
        if not store.folder.is_dir():
            raise InvalidInputError(f"{url} is not a folder; give the folder of a Hugging Face model.")
        return store.folder
    if not isinstance(store, ObjectStore):
        raise UsageError(f"{url} is no place that models are read from.")
    listing = store.listing()
    if "config.json" not in listing:
        raise InvalidInputError(f"{store.url} has no config.json; give the URL of a Hugging Face model's folder.")
    folder = _folder(store, listing)
    shards = {
        folder / name: RemoteFile(store=store, name=name, size=facts.size, version=facts.version)
        for name, facts in listing.items()
        if name.endswith(_SHARD) and (folder / name).is_file()
    }
    size = sum(file.size for file in shards.values())
    register(shards)
    if shards:
        note(f"{store.url}: weights are read in place, {size_text(size)} in all, and not downloaded.")
    return folder


def _folder(store: ObjectStore, listing: dict[str, Facts]) -> Path:
    """The model's folder in the cache, made where it is not there: whole or not at all."""
    from platformdirs import user_cache_path

    rows = [[name, facts.size, facts.version] for name, facts in sorted(listing.items())]
    digest = hashlib.sha256(json.dumps([store.url, rows]).encode()).hexdigest()[:32]
    place = user_cache_path("moepress") / "stores" / digest
    folder = place / store.url.rpartition("/")[2]
    if folder.is_dir():
        return folder
    make_folders(place.parent)
    making = place.with_name(f"{digest}.{new_id()}.tmp")
    try:
        inner = making / folder.name
        inner.mkdir(parents=True)
        if INDEX in listing:
            store.fetch(INDEX, inner / INDEX)
        wanted = needed_files(store.url, listing, inner / INDEX if INDEX in listing else None, where="")
        for name in wanted:
            if name.endswith(_SHARD):
                facts = listing[name]
                told = {"url": f"{store.url}/{name}", "bytes": facts.size, "version": facts.version}
                (inner / name).write_bytes(STAND_IN + b" for a file in a store, " + json.dumps(told).encode() + b"\n")
            elif name != INDEX:
                store.fetch(name, inner / name)
        try:
            making.rename(place)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder
