"""Models by their id on the hub: what is fetched, what is kept, and every way in which there is nothing to fetch."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import client, contents, forget
from hub_server import READER, Hub
from huggingface_hub import constants
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store
from stage_runs import add_tokenizer, command

from moepress.errors import InvalidInputError, MoepressError
from moepress.hub.snapshot import INDEX, SINGLE, HubModel, headers_only, hub_model, needed_files, origin_of
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import model_folder

SMALL = ["--tokens", "512", "--window", "32", "--max-memory", "1GiB"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with client(tmp_path / "home") as hub:
        yield hub


@pytest.fixture(scope="module")
def sharded(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny model in three shards, with a tokenizer."""
    files = contents(tiny_model("olmoe"))
    folder = tmp_path_factory.mktemp("tokenizer")
    add_tokenizer(folder)
    assert len(shards_of(files)) > 2
    return files | contents(folder)


def shards_of(files: Iterable[str]) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


@pytest.fixture(scope="module")
def demo() -> dict[str, bytes]:
    """The embedded model, without the files that are not read."""
    others = ("__init__.py", "metrics.json", "training.json")
    return {name: data for name, data in contents(model_folder("demo")).items() if name not in others}


def refusal(name: str, kind: type[MoepressError] = InvalidInputError) -> str:
    """The sentence, as one line, that a name is refused with."""
    forget()
    with pytest.raises(MoepressError) as caught:
        model_folder(name)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("owner/name", HubModel("owner/name")),
        ("owner/Name-1.5_x@v1", HubModel("owner/Name-1.5_x", "v1")),
        ("owner/name@refs/pr/3", HubModel("owner/name", "refs/pr/3")),
        *((name, None) for name in ("demo", "a/b/c", "../name", "./name", "/owner/name", "owner/", "o n/x", "a/b@")),
    ],
)
def test_only_an_owner_and_a_name_are_an_id(name: str, found: HubModel | None) -> None:
    assert hub_model(name) == found


def test_nothing_is_fetched_but_what_is_read(hub: Hub, sharded: dict[str, bytes]) -> None:
    names = "pytorch_model.bin modeling_x.py consolidated.safetensors a.png tokenizer.pkl original/model.safetensors"
    others = dict.fromkeys([*names.split(), "onnx/model.onnx"], b"x")
    beside = {"LICENSE": b"MIT", "README.md": b"---\nlicense: mit\n---\n", "chat_template.jinja": b"{{ x }}"}
    commit = hub.add("maker/tiny", sharded | others | beside)
    folder = model_folder("maker/tiny")
    assert contents(folder) == sharded | beside
    assert origin_of(folder) == HubModel("maker/tiny", commit)
    assert open_checkpoint(folder).shards == tuple(shards_of(sharded))
    assert not [r for name in others for method in ("GET", "HEAD") for r in hub.sent(name, method)]
    before = len(hub.requests)
    assert model_folder("maker/tiny") == folder
    assert len(hub.requests) == before  # one process asks once
    forget()
    assert model_folder("maker/tiny") == folder
    assert not [r for r in hub.requests[before:] if r.method == "GET" and "/api/" not in r.path]


def test_a_download_is_announced(hub: Hub, demo: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.add("maker/demo", demo)
    model_folder("maker/demo")
    noted = capsys.readouterr().err
    size = sum(len(data) for data in demo.values()) / 2**20
    assert noted.startswith(f"Note: maker/demo at {commit[:7]}: downloading ")
    assert f"{size:.1f} MiB, to {constants.HF_HUB_CACHE}" in noted
    assert noted.count("\n") == 1


def test_a_model_that_the_disk_can_not_hold_is_refused_before(hub: Hub, demo: dict[str, bytes]) -> None:
    hub.add("maker/demo", demo)
    hub.claimed["model.safetensors"] = 1 << 60
    message = refusal("maker/demo", MoepressError)
    assert "needs 1073741824.0 GiB more in the hub's cache" in message
    assert not hub.sent("model.safetensors")


def test_a_dropped_connection_goes_on_where_it_was(
    hub: Hub, demo: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 18)  # of the library: 10 MiB, and the demo has 9
    hub.add("maker/demo", demo)
    hub.cuts["model.safetensors"] = 1_000_000
    assert contents(model_folder("maker/demo")) == demo
    ranges = [r.range for r in hub.sent("model.safetensors") if "/storage/" in r.path]
    assert ranges == [None, f"bytes={3 << 18}-"]


def test_a_download_that_broke_off_goes_on_with_what_is_missing(hub: Hub, sharded: dict[str, bytes]) -> None:
    hub.add("maker/tiny", sharded)
    done, refused, *_ = shards_of(sharded)
    hub.refused.add(refused)
    message = refusal("maker/tiny", MoepressError)
    assert "can not be downloaded (HTTP 403" in message
    assert "repeat the command to go on" in message
    first = [r.path for r in hub.sent(done) if "/storage/" in r.path]
    hub.refused.clear()
    forget()
    assert contents(model_folder("maker/tiny")) == sharded
    assert [r.path for r in hub.sent(done) if "/storage/" in r.path] == first != []


def test_the_storage_never_sees_the_token(hub: Hub, demo: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    hub.add("maker/demo", demo)
    model_folder("maker/demo")
    seen = {r.token for r in hub.requests if "/storage/" in r.path}
    assert {r.token for r in hub.requests if "/api/" in r.path} == {READER}
    assert seen == {None}


def test_a_revision_is_a_branch_or_a_commit(hub: Hub, demo: dict[str, bytes]) -> None:
    old = hub.add("maker/demo", demo)
    changed = demo | {"README.md": b"new"}
    new = hub.repos["maker/demo"].commit(changed, "v2")
    for name, commit in (("", old), ("@main", old), ("@v2", new), (f"@{old}", old), (f"@{new}", new)):
        folder = model_folder(f"maker/demo{name}")
        assert origin_of(folder) == HubModel("maker/demo", commit)
        assert contents(folder) == (changed if commit == new else demo)
    assert "maker/demo has no revision v3 on the hub" in refusal("maker/demo@v3")
    assert len([r for r in hub.sent("model.safetensors") if "/storage/" in r.path]) == 1  # the same bytes in both


def test_a_folder_that_is_here_wins(hub: Hub, demo: dict[str, bytes], tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "maker" / "demo").mkdir(parents=True)
    (tmp_path / "maker" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    hub.add("maker/demo", demo)
    assert model_folder("maker/demo") == Path("maker/demo")
    assert "maker/file is a file, not a folder" in refusal("maker/file")
    assert hub.requests == []


def test_what_may_not_be_had_is_one_sentence(hub: Hub, demo: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("maker/secret", demo, private=True)
    hub.add("maker/gated", demo, gated=True)
    hub.add("maker/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    for name in ("maker/nothing", "maker/secret"):
        message = refusal(name)
        assert f"{name} is not a folder here, and not a model on the hub that this machine may see" in message
        assert "`hf auth login`" in message
    gated = refusal("maker/gated")
    assert f"accept its terms on {hub.url}/maker/gated" in gated
    assert "`hf auth login`" in gated
    assert "only pickles (pytorch_model.bin)" in refusal("maker/pickled")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "does not take this machine's token for maker/gated; run `hf auth login`" in refusal("maker/gated")
    monkeypatch.setenv("HF_TOKEN", READER)
    forget()
    assert contents(model_folder("maker/secret")) == contents(model_folder("maker/gated")) == demo
    assert "not a model on the hub that this machine may see" in refusal("maker/nothing")
    assert "nor a valid id on the hub" in refusal("a--b/c")


def test_without_the_hub_the_cache_serves(
    hub: Hub, sharded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add("maker/tiny", sharded)
    folder = model_folder("maker/tiny")
    forget()
    capsys.readouterr()
    hub.down = True
    assert model_folder("maker/tiny") == folder
    assert "is taken from the cache, for the hub can not be asked (HTTP 503" in capsys.readouterr().err
    assert "HTTP 503: the hub is being mended" in refusal("maker/other", MoepressError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    for name in ("maker/tiny", f"maker/tiny@{commit}", "maker/tiny@main"):
        forget()
        assert model_folder(name) == folder
    assert capsys.readouterr().err == ""
    assert "HF_HUB_OFFLINE forbids to download it" in refusal("maker/other")
    (folder / shards_of(sharded)[2]).unlink()
    assert "nor whole in the hub's cache" in refusal("maker/tiny")
    assert len(hub.requests) == asked


def test_a_hub_that_does_not_answer_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal("maker/demo", MoepressError)
    assert "maker/demo is not a folder here and can not be downloaded (" in message


def test_inspect_reads_headers_alone(hub: Hub, sharded: dict[str, bytes], tmp_path: Path) -> None:
    commit = hub.add("maker/tiny", sharded)
    local = tmp_path / "tiny"
    local.mkdir()
    for name, data in sharded.items():
        (local / name).write_bytes(data)
    code, printed, errors = command("inspect", "maker/tiny", "--json")
    assert code == 0, errors
    assert "reading headers alone" in errors
    theirs, ours = (json.loads(text) for text in (printed, command("inspect", local, "--json")[1]))
    assert theirs["model"] == f"maker/tiny@{commit}"
    assert {k: v for k, v in theirs.items() if k not in ("machine", "estimates", "model")} == {
        k: v for k, v in ours.items() if k not in ("machine", "estimates", "model")
    }
    assert theirs["machine"]["read_measured"] is False
    asked = [r.range for r in hub.sent(r"model-.*safetensors") if "/storage/" in r.path]
    assert len(asked) == len(shards_of(sharded))
    assert None not in asked
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    with headers_only():
        first = model_folder("maker/tiny")
    assert {n: (first / n).stat().st_size for n in sharded} == {n: len(data) for n, data in sharded.items()}
    whole = model_folder("maker/tiny")
    assert (contents(whole), contents(first) == sharded) == (sharded, False)


def test_a_dry_run_downloads_no_weights(hub: Hub, demo: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("maker/demo", demo)
    for arguments in (("profile", "maker/demo"), ("run", "maker/demo", "--to", "onnx", "--group-size", "64")):
        code, printed, errors = command(*arguments, "-o", tmp_path / "out", "--dry-run", "--json", *SMALL)
        assert code == 0, errors
        assert json.loads(printed)
    assert None not in [r.range for r in hub.sent("model.safetensors") if "/storage/" in r.path]


def test_what_is_wrong_is_found_before_a_download(hub: Hub, demo: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("maker/demo", demo)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    for arguments in (
        ("profile", "maker/demo", "-o", tmp_path / "taken"),
        ("quantize", "maker/demo", "-o", tmp_path / "taken"),
        ("export", "maker/demo", "--to", "gptq", "-o", tmp_path / "taken"),
        ("run", "maker/demo", "-o", tmp_path / "taken"),
        ("run", "maker/demo", "-o", tmp_path / "out", "--group-size", "48"),
    ):
        code, _, errors = command(*arguments)
        assert code in (2, 5), errors
        assert not [r for r in hub.sent("model.safetensors") if r.range is None and "/storage/" in r.path]


def test_the_library_s_shared_blobs_are_read(hub: Hub, sharded: dict[str, bytes]) -> None:
    hub.add("maker/tiny", sharded)
    folder = model_folder("maker/tiny")
    for number, name in enumerate(shards_of(sharded)):
        blob = (folder / name).resolve()
        shared = publish_blob_to_shared_store(
            blob_path=str(blob),
            xet_hash=f"{number:064x}",
            cache_dir=constants.HF_HUB_CACHE,
            expected_size=len(sharded[name]),
            replace_existing=False,
        )
        assert shared
        assert blob.is_symlink()
    assert len(open_checkpoint(folder).stored) > 0
    name = shards_of(sharded)[0]
    outside = Path(constants.HF_HUB_CACHE).parent / "outside"
    outside.write_bytes(sharded[name])
    link = folder / (folder / name).readlink()
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(InvalidInputError, match="leads out of the folder"):
        open_checkpoint(folder)


def test_two_sets_of_weights_are_refused_before_a_download(tmp_path: Path) -> None:
    index = tmp_path / INDEX
    index.write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    names = dict.fromkeys((INDEX, SINGLE, "model-00001-of-00001.safetensors", "config.json"), 1)
    with pytest.raises(InvalidInputError, match="two sets of weights"):
        needed_files("org/model", names, index)
    del names[SINGLE]
    assert SINGLE not in needed_files("org/model", names, index)


def test_a_repository_of_gguf_files_is_named_for_what_it_is() -> None:
    with pytest.raises(InvalidInputError, match=r"only GGUF files \(model-q4\.gguf\)"):
        needed_files("org/model", {"model-q4.gguf": 1, "config.json": 1}, None)
