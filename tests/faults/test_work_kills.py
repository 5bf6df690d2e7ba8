"""Shared runs whose workers, parents and stores die, hang and lag: all end with the bytes of the plain run."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fault_proxy
import pytest
import s3_server
from fork_client import Child
from shared_runs import assert_same, text_of, with_tokenizer
from work_processes import Crew, all_done, finish, left_over, lost_attempts, processes_of, start, wait_until

from moepress.runs.output import partial_folder
from moepress.runs.store.store import open_store

pytestmark = pytest.mark.slow
OPTIONS = ("--bits", "4", "--group-size", "32", "--match", "original")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A model, what is asked of `quantize`, and what it gives in small pieces and in usual ones."""

    arguments: list[object]
    whole: Path
    usual: Path


@pytest.fixture(scope="module")
def work(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Work:
    place = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_model("deepseek_v3", num_hidden_layers=4), place / "model")
    with_tokenizer(place / "model")
    arguments = [place / "model", *OPTIONS, *text_of(place, letters=8000), "--tokens", "1536"]
    finish("quantize", *arguments, "-o", place / "whole", log=place / "log")
    finish("quantize", *arguments, "-o", place / "usual", log=place / "log", small=False)
    return Work(arguments=arguments, whole=place / "whole", usual=place / "usual")


@pytest.fixture
def crew(work: Work, tmp_path: Path) -> Crew:
    """Workers of a run in a folder."""
    finish("plan-work", *work.arguments, "--store", tmp_path / "store", log=tmp_path / "log")
    return Crew(url=str(tmp_path / "store"), log=tmp_path / "log")


def fetched(work: Work, crew: Crew, out: Path) -> None:
    finish("work", "--store", crew.url, "-o", out, log=crew.log, env=crew.env)
    assert_same(out, work.whole)
    assert not partial_folder(out).exists()


def test_twenty_random_kills_change_nothing(work: Work, crew: Crew, tmp_path: Path) -> None:
    draw, killed, trial = random.Random(0), 0, 0
    while killed < 20:
        trial += 1
        each = Crew(url=f"{crew.url}-{trial}", log=crew.log)
        finish("plan-work", *work.arguments, "--store", each.url, log=crew.log)
        store = open_store(each.url)
        here = each.kill_at_random(store, draw, 20 - killed)
        assert lost_attempts(store) <= here  # repeated is what was in the hands of somebody who died, and no more
        assert left_over(store) == []
        assert store.names("scratch") == []
        killed += here
        fetched(work, each, tmp_path / f"out-{trial}")
    print(f"{killed} killed in {trial} runs")


def test_a_stopped_worker_is_overtaken_and_comes_too_late(work: Work, crew: Crew, tmp_path: Path) -> None:
    crew = Crew(url=crew.url, log=crew.log, options=("--threads", "1", "--lease", "1"))
    store, draw = open_store(crew.url), random.Random(1)
    slow = crew.one()
    stopped = 0
    while not all_done(store) and stopped < 4:
        begun = len(store.names("leases"))
        wait_until(lambda begun=begun: len(store.names("leases")) > begun or all_done(store))
        time.sleep(draw.uniform(0, 0.1))
        slow.send_signal(signal.SIGSTOP)
        stopped += 1
        if stopped == 4:
            assert crew.one().wait(300) == 0, crew.log.read_text()
            assert all_done(store)
        else:
            other = crew.one()
            wait_until(lambda begun=begun: len(store.names("leases")) > begun + 8 or all_done(store))
            other.send_signal(signal.SIGTERM)
            assert other.wait(60) in (0, 130)
        before = {name: store.get(name) for name in store.names("done")}
        slow.send_signal(signal.SIGCONT)
        assert {name: store.get(name) for name in before} == before
    assert slow.wait(120) == 0, crew.log.read_text()
    assert left_over(store) == []
    fetched(work, crew, tmp_path / "out")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_worker_gives_back_what_it_had(
    work: Work, crew: Crew, tmp_path: Path, how: signal.Signals
) -> None:
    store = open_store(crew.url)
    for begun in (1, 4, 9):
        one = crew.one()
        wait_until(lambda begun=begun: len(store.names("leases")) >= begun)
        one.send_signal(how)
        assert one.wait(60) == 130
        assert lost_attempts(store) == 0
        assert store.names("scratch") == []
    assert "Interrupted." in crew.log.read_text()
    fetched(work, crew, tmp_path / "out")


def test_two_at_once_who_fetch_into_the_same_folder(work: Work, crew: Crew, tmp_path: Path) -> None:
    logs = [tmp_path / f"log-{number}" for number in range(2)]
    both = [start("work", "--store", crew.url, "--threads", "1", "-o", tmp_path / "out", log=log) for log in logs]
    codes = [each.wait(300) for each in both]
    assert 0 in codes
    assert set(codes) <= {0, 2, 6}
    for code, log in zip(codes, logs, strict=True):
        said = [line for line in log.read_text().splitlines() if line.startswith("Error: ")]
        assert len(said) == (code != 0), log.read_text()
    assert_same(tmp_path / "out", work.whole)


def quantizing(work: Work, out: Path, *more: object) -> Child:
    """`quantize` by two processes that it starts itself."""
    return start("quantize", *work.arguments, "--workers", "2", "-o", out, *more, log=out.with_name("log"), small=False)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_parent_that_is_ended_leaves_no_worker_and_can_be_resumed(
    work: Work, tmp_path: Path, how: signal.Signals
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    store = open_store(str(partial_folder(out) / "work"))
    for begun in (1, 4):
        parent = quantizing(work, out, "--resume")
        wait_until(lambda begun=begun: len(store.names("leases")) >= begun)
        parent.send_signal(how)
        assert parent.wait(60) == (-9 if how == signal.SIGKILL else 130), log.read_text()
        wait_until(lambda: not processes_of(out), 30)
        assert lost_attempts(store) == 0
        assert not out.exists()
    assert quantizing(work, out, "--resume").wait(300) == 0, log.read_text()
    assert_same(out, work.usual)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


def test_a_parent_goes_on_with_one_that_is_killed_and_without_one_that_hangs(work: Work, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    parent = quantizing(work, out)
    store = open_store(str(partial_folder(out) / "work"))
    wait_until(lambda: len(processes_of(partial_folder(out))) == 2)
    hanging, other = processes_of(partial_folder(out))
    hanging.suspend()  # with nothing in its hands
    wait_until(lambda: len(store.names("leases")) > 1)
    other.kill()
    assert parent.wait(300) == 0, log.read_text()
    assert not hanging.is_running()
    assert "A worker was killed (signal 9) and is started again" in log.read_text()
    assert_same(out, work.usual)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


@pytest.fixture
def faulty(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[fault_proxy.Proxy]:
    with fault_proxy.between(s3, {**fault_proxy.ALL, "delay": 0.01}, seed=3) as proxy:
        s3_server.tell_environment(proxy.url, monkeypatch)
        yield proxy


def test_a_bucket_through_a_faulty_proxy_loses_nothing(
    work: Work, s3: str, faulty: fault_proxy.Proxy, tmp_path: Path
) -> None:
    url, log, draw = f"{s3_server.new_bucket(s3)}/run", tmp_path / "log", random.Random(4)
    env = s3_server.environment(faulty.url)
    finish("plan-work", *work.arguments, "--store", url, log=log, env=env)
    crew = Crew(url=url, log=log, env=env)
    store = open_store(url)
    killed = crew.kill_at_random(store, draw, 3)
    assert lost_attempts(store) <= killed
    fetched(work, crew, tmp_path / "out")
    assert sum(faulty.met.values()) > 50
    assert {kind for kind in faulty.trouble if faulty.met[kind]} == faulty.trouble.keys()
    print(f"{killed} killed; {dict(faulty.met)}")
