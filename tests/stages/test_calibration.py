"""calibration make: the demo answers prompts, here and behind a server made of it; a run that was stopped goes on."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from stage_runs import command

from moepress.calibration.documents import read_documents
from moepress.calibration.templates import ChatTemplate
from moepress.stages.generate import Request, generate_stage
from moepress.stages.groundwork import load_tokenizer
from moepress.stages.places import Machine, model_folder
from moepress.validation.quality.decoding import Sampling

PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
THINKING = (
    "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)
FORGETTING = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"


def with_template(folder: Path, template: str) -> Path:
    """The demo with a chat template."""
    shutil.copytree(model_folder("demo"), folder, ignore=shutil.ignore_patterns("text", "__pycache__", "*.py"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tmp_path_factory.mktemp("chat") / "demo", PLAIN)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("The river\ndef main():\nDie Stadt\n")
    return file


def make(model: object, prompts: Path, file: Path, *options: object) -> tuple[int, str, str]:
    return command("calibration", "make", model, "--prompts", prompts, "-o", file, "--max-new-tokens", 6, *options)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_greedy_answers_are_those_of_generate(chat: Path, prompts: Path, tmp_path: Path) -> None:
    code, out, err = make(chat, prompts, tmp_path / "t.jsonl", "--temperature", 0, "--json")
    assert code == 0, err
    made = json.loads(out)
    assert (made["prompts"], made["before"], made["answers"], made["cut"]) == (3, 0, 3, 3)
    for row in lines(tmp_path / "t.jsonl"):
        question, answer = row["messages"]
        asked = Request(prompt=question["content"], chat=True, max_new_tokens=6)
        assert answer == {"role": "assistant", "content": generate_stage(str(chat), asked, Machine()).text.strip("\n")}
        assert row["made"]["tokens"] == 6
        assert row["made"]["stopped"] == "length"


def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(
    chat: Path, prompts: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert make(chat, prompts, whole, "--seed", 3)[0] == 0
    data = whole.read_bytes()
    first = data.index(b"\n") + 1
    stopped.write_bytes(data[: first + 20])  # killed within the second answer
    code, out, _ = make(chat, prompts, stopped, "--seed", 3, "--json")
    assert code == 0
    assert (json.loads(out)["before"], json.loads(out)["answers"]) == (1, 2)
    assert stopped.read_bytes() == data
    assert len({row["messages"][1]["content"] for row in lines(whole)}) == 3


def test_new_prompts_are_added_and_other_settings_refused(chat: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    assert make(chat, prompts, file)[0] == 0
    before = file.read_bytes()
    prompts.write_text("A new one\n" + prompts.read_text())
    assert make(chat, prompts, file)[0] == 0
    assert file.read_bytes().startswith(before)
    assert len(lines(file)) == 4
    code, _, err = make(chat, prompts, file, "--temperature", 1)
    assert code == 2
    assert "made with temperature 0.6, and now it is 1.0" in err
    assert prompts.read_text().startswith("A new one")
    assert make(chat, prompts, prompts)[0] == 2


@pytest.mark.parametrize(("template", "kept"), [(THINKING, "messages"), (FORGETTING, "text")])
def test_reasoning_is_in_the_calibration_text_whatever_the_template_does(
    template: str, kept: str, prompts: Path, tmp_path: Path
) -> None:
    """The prompt ends with the mark of reasoning, so all that the demo writes is that."""
    model, file = with_template(tmp_path / "model", template), tmp_path / "t.jsonl"
    code, out, err = make(model, prompts, file, "--json")
    assert code == 0, err
    assert json.loads(out)["reasoned"] == 3
    rows = lines(file)
    assert all(kept in row for row in rows)
    with ChatTemplate(load_tokenizer(model)) as chat_template:
        documents = [document.text for document in read_documents(file, chat_template)]
    assert len(documents) == 3
    for row, document in zip(rows, documents, strict=True):
        assert "<think>" in document
        if kept == "messages":
            assert row["messages"][1]["reasoning_content"] in document
    assert ("leave their reasoning out" in err) == (kept == "text")


def test_without_a_chat_template_lines_are_text_that_goes_on(prompts: Path, tmp_path: Path) -> None:
    code, _, err = make("demo", prompts, tmp_path / "t.jsonl")
    assert code == 0
    assert "has no chat template" in err
    assert [
        row["text"].startswith(p) for row, p in zip(lines(tmp_path / "t.jsonl"), ("The", "def", "Die"), strict=True)
    ]


@dataclass
class Served:
    """The demo behind a server: what it was asked, with which headers, and statuses to answer first."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    first: list[int] = field(default_factory=list)


@pytest.fixture
def served(chat: Path) -> Iterator[Served]:
    """A real HTTP server that speaks chat completions, with the demo's own answers."""
    state = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(request)
            state.keys.append(self.headers.get("Authorization"))
            state.paths.append(self.path)
            if state.first:
                self.send_response(state.first.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            sampling = Sampling(temperature=request["temperature"], seed=request["seed"])
            asked = Request(
                prompt=request["messages"][-1]["content"],
                chat=True,
                max_new_tokens=request["max_tokens"],
                sampling=sampling,
            )
            made = generate_stage(str(chat), asked, Machine())
            message = {"role": "assistant", "content": made.text, "reasoning_content": f"thought of {asked.prompt}"}
            body = json.dumps(
                {
                    "choices": [{"message": message, "finish_reason": "length"}],
                    "usage": {"completion_tokens": made.tokens},
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def contents(file: Path) -> Sequence[str]:
    return [row["messages"][1]["content"] for row in lines(file)]


def test_a_server_gives_the_answers_of_the_model_that_it_runs(
    chat: Path, served: Served, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert make(chat, prompts, here, "--temperature", 0)[0] == 0
    monkeypatch.setenv("THE_KEY", "secret")
    options = ("--endpoint", served.url, "--temperature", 0, "--api-key-env", "THE_KEY", "--json")
    code, out, err = make("served", prompts, there, *options)
    assert code == 0, err
    assert json.loads(out)["tokens"] == 18
    assert contents(there) == contents(here)
    assert lines(there)[0]["messages"][1]["reasoning_content"] == "thought of The river"
    assert set(served.paths) == {"/v1/chat/completions"}
    assert set(served.keys) == {"Bearer secret"}
    assert {request["model"] for request in served.asked} == {"served"}
    assert "secret" not in there.read_text()


LLAMA_SERVER = """
import sys, time
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 256, 1
params.chat_template, params.warmup, params.cpuparams.n_threads = "chatml", False, 1
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[str]:
    """The address of llama.cpp's own server, with the demo in it."""
    pytest.importorskip("xllamacpp")
    file = tmp_path / "demo.gguf"
    assert command("export", "demo", "--to", "gguf", "-o", file)[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", LLAMA_SERVER, str(file), str(port)], text=True, **pipes) as child:
        assert child.stdout is not None
        address = next((line.split()[1] for line in child.stdout if line.startswith("address ")), None)
        assert address is not None, "llama.cpp's server does not start"
        yield f"{address}/v1"
        child.kill()


def test_the_server_of_llama_cpp_is_understood(llama: str, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    code, out, err = make("demo", prompts, file, "--endpoint", llama, "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 18
    assert [row["messages"][0]["content"] for row in lines(file)] == prompts.read_text().splitlines()
    assert all(row["messages"][1]["content"].strip() for row in lines(file))
    assert {row["made"]["stopped"] for row in lines(file)} == {"length"}


def test_what_passes_by_itself_is_tried_again_and_a_refusal_keeps_what_is_whole(
    served: Served, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepress.calibration.endpoint.time.sleep", lambda _seconds: None)
    file, options = tmp_path / "t.jsonl", ("--endpoint", served.url, "--temperature", 0)
    served.first = [503, 429]
    prompts.write_text("The river\n")
    assert make("served", prompts, file, *options)[0] == 0
    assert len(served.asked) == 3
    served.first = [401]
    prompts.write_text("The river\ndef main():\n")
    code, _, err = make("served", prompts, file, *options)
    assert code == 1
    assert "answers 401" in err
    assert len(lines(file)) == 1
    assert make("served", prompts, file, *options)[0] == 0
    assert len(lines(file)) == 2


@pytest.mark.parametrize("status", [301, 307])
def test_a_server_that_sends_on_to_another_is_not_followed(
    served: Served, prompts: Path, tmp_path: Path, status: int
) -> None:
    served.first = [status]
    code, _, err = make("served", prompts, tmp_path / "t.jsonl", "--endpoint", served.url)
    assert code == 1
    assert f"answers {status}" in err
    assert len(served.asked) == 1


def test_wrong_use_is_one_sentence(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepress.calibration.endpoint.time.sleep", lambda _seconds: None)
    file = tmp_path / "t.jsonl"
    told: list[tuple[tuple[object, ...], int, str]] = [
        (("--endpoint", "localhost:8000"), 2, "is no address"),
        (("--endpoint", "http://127.0.0.1:9/v1"), 1, "can not be reached"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--api-key-env", "NOT_THERE_AT_ALL"), 2, "no such variable"),
        (("--api-key-env", "PATH"), 2, "goes with --endpoint only"),
        (("--temperature", "-1"), 2, "--temperature"),
    ]
    for options, expected, words in told:
        code, _, err = make("demo", prompts, file, *options)
        assert (code, words in err) == (expected, True), err
        assert not file.exists() or not file.read_bytes()
    code, _, err = make("demo", tmp_path / "none.txt", file)
    assert code == 4
    assert "Cannot read" in err
