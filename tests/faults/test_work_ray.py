"""Workers on a real Ray cluster of this machine: the bytes of the plain run, whoever of the cluster dies."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray_cluster
from fork_client import Child
from shared_runs import assert_same, text_of, with_tokenizer
from work_processes import all_done, finish, left_over, lost_attempts, start, wait_until

from moepress.runs.store.store import Store, open_store

pytestmark = pytest.mark.slow
OPTIONS = ("--bits", "4", "--group-size", "32", "--match", "original")


@pytest.fixture(scope="module")
def arguments(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    place = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_model("deepseek_v3", num_hidden_layers=5), place / "model")
    with_tokenizer(place / "model")
    return [place / "model", *OPTIONS, *text_of(place, letters=80000), "--tokens", "34000"]  # three shards


@pytest.fixture(scope="module")
def whole(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    finish("quantize", *arguments, "-o", place / "whole", log=place / "log", small=False)
    return place / "whole"


@pytest.fixture
def store(arguments: list[object], tmp_path: Path) -> Path:
    finish("plan-work", *arguments, "--store", tmp_path / "store", log=tmp_path / "log", small=False)
    return tmp_path / "store"


def working(store: Path, cluster: ray_cluster.Cluster) -> Child:
    """`moepress work --ray` with two workers."""
    words = ("work", "--store", store, "--ray", "--workers", "2", "--threads", "1", "--lease", "5")
    words += ("-o", store.with_name("out"))
    return start(*words, log=store.with_name("log"), env=cluster.environment, small=False)


def until_working(driver: Child, objects: Store, place: Path) -> None:
    """Ray takes a while until its workers work."""
    wait_until(lambda: len(objects.names("leases")) > 2 or driver.poll() is not None)
    assert driver.poll() is None, (place / "log").read_text()


def test_two_workers_one_of_whom_is_killed(store: Path, whole: Path, tmp_path: Path) -> None:
    objects, draw = open_store(str(store)), random.Random(0)
    with ray_cluster.running() as cluster:
        driver = working(store, cluster)
        until_working(driver, objects, tmp_path)
        assert len(cluster.actors()) == 2
        victim = draw.choice(cluster.actors())
        victim.kill()
        assert driver.wait(300) == 0, (tmp_path / "log").read_text()
    assert not victim.is_running()
    assert_same(tmp_path / "out", whole)
    assert lost_attempts(objects) <= 1
    assert left_over(objects) == []
    assert "2 workers did" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("who", ["gcs_server", "raylet"])
def test_the_head_is_killed_and_the_command_repeated(store: Path, whole: Path, tmp_path: Path, who: str) -> None:
    objects = open_store(str(store))
    with ray_cluster.running() as cluster:
        driver = working(store, cluster)
        until_working(driver, objects, tmp_path)
        victims = [each for each in cluster.daemons() if who in each.name()]
        assert victims
        for each in victims:
            each.kill()
        began = time.monotonic()
        code = driver.wait(400)
        print(f"{who}: code {code} after {time.monotonic() - began:.0f} s")
        assert code in (0, 1), (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    print(said[-1500:])
    assert (code == 0) == (tmp_path / "out").exists()
    with ray_cluster.running() as cluster:
        assert working(store, cluster).wait(300) == 0, (tmp_path / "log").read_text()
    assert all_done(objects)
    assert lost_attempts(objects) <= 2
    assert_same(tmp_path / "out", whole)
    assert not [each for each in psutil.process_iter() if each.pid in {victim.pid for victim in victims}]
