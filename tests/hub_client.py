"""huggingface_hub told to speak with a `hub_server` and to keep its cache in a folder of the test's own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import Hub, serving
from huggingface_hub import constants

from moepress.hub import snapshot as hub_module

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_OIDC_RESOURCE")


@contextmanager
def client(home: Path) -> Iterator[Hub]:
    """A hub, and this process's library as if it had been imported with HF_ENDPOINT and HF_HOME of the test."""
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"})
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        forget()
        try:
            yield hub
        finally:
            forget()


def forget() -> None:
    """As in a new process: the hub is asked again for models that were named before."""
    hub_module._snapshot.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, as they are published."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def empty_cache() -> None:
    """As on another machine."""
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    forget()


def run_command(hub: Hub, home: Path, *arguments: object, token: str | None = None) -> tuple[int, str, str]:
    """A command in a process of its own, which knows of the hub by variables alone: code, stdout, stderr."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"HF_TOKEN": token} if token else {}
    found = subprocess.run(
        [str(a) for a in arguments], env=kept | variables, capture_output=True, text=True, timeout=120, check=False
    )
    return found.returncode, found.stdout, found.stderr


def moepress(hub: Hub, home: Path, *arguments: object, token: str | None = None) -> tuple[int, str, str]:
    """`moepress ...` in a process of its own."""
    return run_command(hub, home, sys.executable, "-m", "moepress", *arguments, token=token)
