"""A model behind a real server, through lm-eval's own class, against the same model loaded here."""

from pathlib import Path

import pytest
import torch
from completions_server import Completions, serving
from tasks_asked import write_choices, write_sums

from moepress.errors import MoepressError, UnsupportedError, UsageError
from moepress.models.forward.dense import load_dense
from moepress.models.storage.checkpoint import Checkpoint
from moepress.validation.tasks.endpoint import endpoint_model, served_model
from moepress.validation.tasks.harness import ask, open_catalogue
from moepress.validation.tasks.language_model import language_model
from moepress.validation.tasks.names import check_endpoint
from moepress.validation.tasks.text_model import TextModel

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def completions(demo: Checkpoint, demo_text: TextModel) -> Completions:
    dense = load_dense(demo, device=torch.device("cpu"), dtype=torch.float32)
    return Completions(dense, demo_text.tokenizer)


def test_a_server_answers_as_the_model_loaded_here(
    completions: Completions, demo_text: TextModel, tmp_path: Path
) -> None:
    catalogue = open_catalogue([str(write_choices(tmp_path)), str(write_sums(tmp_path))])
    here, _ = ask(catalogue, language_model(demo_text), limit=None)
    with serving(completions) as url:
        assert served_model(url) == "demo"
        there, _ = ask(catalogue, endpoint_model(url, demo_text.tokenizer, longest=511), limit=None)
    assert there == here
    assert {body["model"] for body in completions.asked} == {"demo"}


def test_a_server_without_log_probabilities_of_the_prompt_is_refused(
    completions: Completions, demo_text: TextModel, tmp_path: Path
) -> None:
    silent = Completions(completions.model, completions.tokenizer, echo=False)
    with serving(silent) as url:
        model = endpoint_model(url, demo_text.tokenizer, longest=511)
        with pytest.raises(UnsupportedError, match="no log-probabilities of the prompt"):
            ask(open_catalogue([str(write_choices(tmp_path))]), model, limit=1)
        found, _ = ask(open_catalogue([str(write_sums(tmp_path))]), model, limit=2)
    assert len(found["sums"].items) == 2


def test_a_server_of_several_models_or_none_at_all(completions: Completions) -> None:
    with (
        serving(Completions(completions.model, completions.tokenizer, names=("a", "b"))) as url,
        pytest.raises(UsageError, match="has a and b"),
    ):
        served_model(url)
    with pytest.raises(MoepressError, match="does not answer"):
        served_model(url)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "http://", "http://a/v1?x=1", "http://a:b/v1", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="http://localhost:8000/v1"):
        check_endpoint(url)


def test_addresses_end_alike() -> None:
    assert check_endpoint("http://localhost:8000/v1/") == "http://localhost:8000/v1"
    assert check_endpoint("http://localhost:8000/v1/completions") == "http://localhost:8000/v1"
