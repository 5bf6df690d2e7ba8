"""Models in a store by their URL: the same results as from a folder, and every way in which there is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fault_proxy
import pytest
import s3_server
from stage_runs import command

from moepress.calibration import profile
from moepress.calibration.profile import fingerprint
from moepress.errors import InvalidInputError, MoepressError, StoreError
from moepress.hub.stored import stored_folder
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.tensors import read_row, read_tensor
from moepress.runs.store import remote
from moepress.runs.store.objects import ObjectStore
from moepress.stages.places import local_folders, model_folder

SMALL = ["--tokens", "512", "--window", "64", "--max-memory", "1GiB"]
Put = Callable[[Path], str]


@pytest.fixture
def put(bucket: str) -> Put:
    """`put(folder)` copies a folder into the bucket; the model's URL."""

    def send(folder: Path) -> str:
        url = f"{bucket}/models/{folder.name}"
        store = ObjectStore(url)
        for file in folder.iterdir():
            if file.is_file():
                store.send(file, file.name)
        return url

    return send


@pytest.fixture
def sharded(tiny_copy: Callable[..., Path]) -> Path:
    folder = tiny_copy("olmoe")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the embedded model, named as it will be in the store."""
    target = tmp_path / "pressed-soon"
    target.mkdir()
    for file in model_folder("demo").iterdir():
        if file.suffix in (".json", ".safetensors") and file.name not in ("metrics.json", "training.json"):
            shutil.copyfile(file, target / file.name)
    return target


def test_quantizing_from_a_bucket_gives_the_bytes_of_a_folder(demo: Path, put: Put, tmp_path: Path) -> None:
    url = put(demo)
    for model, out in ((str(demo), "local"), (url, "remote")):
        code, _, told = command("quantize", model, "-o", tmp_path / out, *SMALL)
        assert code == 0, told
    names = sorted(file.name for file in (tmp_path / "local").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "remote").iterdir())
    assert "model.safetensors.index.json" in names
    for name in names:
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes(), name
    held = sum(file.stat().st_size for file in stored_folder(url).glob("*.safetensors"))
    assert held < 1000 < (demo / "model.safetensors").stat().st_size


def test_all_tensors_and_the_digest_are_those_of_the_folder(
    sharded: Path, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = open_checkpoint(sharded), open_checkpoint(model_folder(put(sharded)))
    assert local.stored.keys() == remote.stored.keys()
    for name, entry in local.stored.items():
        assert read_tensor(entry).equal(read_tensor(remote.stored[name]))
        if entry.shape[0] > 1:
            assert read_row(entry, 1).equal(read_row(remote.stored[name], 1))
    assert fingerprint(local) == fingerprint(remote)
    monkeypatch.setattr(profile, "_HASHED_WHOLE_BYTES", 1000)
    assert fingerprint(local) == fingerprint(remote)


def test_in_all_trouble_the_tensors_are_those_of_the_folder(
    sharded: Path, put: Put, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(sharded)
    with fault_proxy.between(s3, fault_proxy.ALL | {"old listing": 0.0}) as proxy:
        s3_server.tell_environment(proxy.url, monkeypatch)
        local, remote = open_checkpoint(sharded), open_checkpoint(model_folder(url))
        for name, entry in local.stored.items():
            assert read_tensor(entry).equal(read_tensor(remote.stored[name]))
        assert proxy.met


def test_inspect_and_check_name_the_url(sharded: Path, put: Put) -> None:
    url = put(sharded)
    code, out, _ = command("inspect", url, "--json")
    assert (code, json.loads(out)["model"]) == (0, url)
    code, out, _ = command("check", url, "--runtime", "vllm")
    assert code in (0, 4)
    assert out.startswith(url)
    assert local_folders(url, str(sharded)) == [sharded]


def test_a_changed_model_is_another_one(sharded: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(sharded)
    before = open_checkpoint(stored_folder(url))
    digest = fingerprint(before)
    shard = before.shards[0]
    data = bytearray((sharded / shard).read_bytes())
    data[-100] ^= 1
    ObjectStore(url).put(shard, bytes(data))
    stored_folder.cache_clear()  # another process
    after = open_checkpoint(stored_folder(url))
    assert before.folder != after.folder
    assert fingerprint(after) != digest
    monkeypatch.setattr(remote, "_BLOCKS", remote._Blocks())  # nothing is kept of what was read
    entry = max((e for e in before.stored.values() if e.file.name == shard), key=lambda e: e.end)
    remote._FILES[entry.file].head = b""
    with pytest.raises(StoreError, match="changed while it was read"):
        read_tensor(entry)


def test_a_file_url_is_its_folder(sharded: Path) -> None:
    assert model_folder(f"file://{sharded}") == sharded


def test_the_folder_of_stand_ins_is_refused_elsewhere(sharded: Path, put: Put, tmp_path: Path) -> None:
    shutil.copytree(stored_folder(put(sharded)), tmp_path / "copied")
    with pytest.raises(InvalidInputError, match="stands in for a file that lies in a store; give the model by the URL"):
        open_checkpoint(tmp_path / "copied")


def refusal(url: str, kind: type[MoepressError] = InvalidInputError) -> str:
    stored_folder.cache_clear()
    with pytest.raises(MoepressError) as caught:
        open_checkpoint(model_folder(url))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert s3_server.SECRET not in str(caught.value)
    return str(caught.value)


def test_what_is_no_model(sharded: Path, put: Put, bucket: str) -> None:
    url = put(sharded)
    store = ObjectStore(url)
    assert "has no config.json; give the URL" in refusal(f"{bucket}/models")
    assert "There is no bucket" in refusal("s3://no-such-bucket-at-all/x", StoreError)
    shard = sorted(file.name for file in sharded.glob("*.safetensors"))[0]
    index = json.loads((sharded / "model.safetensors.index.json").read_bytes())

    def indexed(name: str) -> None:
        swapped = {n: name if file == shard else file for n, file in index["weight_map"].items()}
        store.put("model.safetensors.index.json", json.dumps({"weight_map": swapped}).encode())

    indexed("../other.safetensors")
    assert "leads out of the folder" in refusal(url)
    indexed("missing.safetensors")
    assert "names missing.safetensors, which is missing" in refusal(url)
    indexed(shard)
    store.put(shard, b"<html>no entry</html>")
    assert "is a web page" in refusal(url)
    store.put(shard, (sharded / shard).read_bytes()[:-10])
    assert "is not a sound safetensors file" in refusal(url)
    store.delete("model.safetensors.index.json")
    for name in store.names(""):
        if name.endswith(".safetensors"):
            store.delete(name)
    store.put("pytorch_model.bin", b"pickle")
    told = refusal(url)
    assert told.startswith(f"{url} has only pickles (pytorch_model.bin), which can run code and are refused")
    assert "hub" not in told
