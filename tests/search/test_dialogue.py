"""What the dialogue asks back, and what the model says in words; and the command around it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chatreid_plugin import cli
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.search import dialogue
from chatreid_plugin.search.dialogue import (
    USUAL,
    ask_freely,
    expect_gain,
    explain,
    list_attributes,
    list_questions,
    read_attribute,
)
from chatreid_plugin.search.session import open_session
from tests.search.conftest import OWN, NamedScorer
from tests.search.test_session import SERVER


def test_expected_gain_is_mutual_information() -> None:
    even = np.array([0.5, 0.5])
    assert expect_gain(even, np.eye(2)) == pytest.approx(1.0)
    assert expect_gain(even, np.full((2, 2), 0.5)) == pytest.approx(0.0)
    assert expect_gain(np.array([1.0, 0.0]), np.eye(2)) == pytest.approx(0.0)
    assert 0.0 < expect_gain(even, np.array([[0.9, 0.1], [0.2, 0.8]])) < 1.0


def test_asks_for_what_splits_the_first_hits(write_list: Callable[[], Path], folder: Path, named: NamedScorer) -> None:
    session = open_session(write_list(), overrides=SERVER)
    assert list_attributes(session.searcher) == {
        "colour": ("blue", "green", "orange", "purple", "red", "yellow"),
        "shade": ("0", "1"),
    }
    session.ask(attributes={"colour": "green"})
    (question,) = list_questions(session.searcher, session.wanted, session.ranked)
    # The two green ones are far ahead, and the shade is all that tells them apart.
    assert question.name == "shade" and question.gain > 0.8 and sum(question.shares) == pytest.approx(1.0)
    assert question.render().startswith("shade? ")
    session.ask(unknown=["shade"])
    assert list_questions(session.searcher, session.wanted, session.ranked) == []
    session.ask(attributes={"shade": "1"})
    assert session.wanted.unknown == ()
    assert [hit.path for hit in session.hits][0] == "photos/1/green.png"
    first = [session.searcher.find_record(hit.image_id) for hit in session.hits[:2]]
    np.testing.assert_allclose(read_attribute(session.searcher, first, "shade", ("0", "1")).sum(axis=1), 1.0)


def test_a_gallery_without_labels_has_usual_attributes(folder: Path, named: NamedScorer) -> None:
    session = open_session(folder, overrides=SERVER)
    session.ask(text="red")
    assert {one.name for one in list_questions(session.searcher, session.wanted, session.ranked)} == set(USUAL)


def test_answers_in_words(folder: Path, named: NamedScorer) -> None:
    session = open_session(folder, overrides=SERVER)
    session.ask(text="red")
    with pytest.raises(ConfigError, match="There is no picture to compare a hit with"):
        explain(session, 1)
    session.ask(use=1)
    assert explain(session, "0/blue.png").startswith("Given the first images | and the second image |, please")
    assert ask_freely(session, 2, "<image>Same <|im_end|>bag?") == "||Same bag? ['red', 'red']"
    with pytest.raises(ConfigError, match="The question is empty"):
        ask_freely(session, 2, "<image>")
    alone = open_session(folder)
    alone.ask(image=folder / "0" / "red.png")
    for ask in (lambda: explain(alone, 1), lambda: list_questions(alone.searcher, alone.wanted, alone.ranked)):
        with pytest.raises(ConfigError, match="need a model that looks at the pictures"):
            ask()


@pytest.mark.slow
def test_the_command_goes_on_from_its_file(
    folder: Path,
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialogue, "ANSWER_TOKENS", 8)
    file = ["--session", str(tmp_path / "case.json")]

    def run(*arguments: str) -> str:
        cli.app(["search", *arguments, *file], standalone_mode=False)
        return capsys.readouterr().out

    keys = [*OWN, "filter.top_k=4", "filter.floor=0"]
    photo = str(tmp_path / "photo.png")
    text = run(str(folder), *keys, "--model", str(checkpoint), "--image", photo, "--box", "10,20,50,90", "--top", "3")
    assert "Turn 1: a picture (" in text and "(margins)" in text
    sheet = tmp_path / "sheet.html"
    told = json.loads(run("--not", "1", "--why", "2", "--question", "--json", "--export", str(sheet)))
    assert told["turn"] == 2 and told["scored"] == 4 and told["wanted"]["different"]
    assert isinstance(told["answer"], str) and told["question"]["name"] in USUAL
    assert sheet.is_file() and len(told["hits"]) == 10
    assert "Turn 1" in run("--undo")


def test_the_command_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    def refuse(match: str, *arguments: str) -> None:
        with pytest.raises(ConfigError, match=match):
            cli.app(["search", *arguments], standalone_mode=False)

    refuse("Name one gallery", "filter.top_k=3")
    refuse("Name one gallery", str(folder), str(tmp_path))
    refuse("NAME=VALUE; found red", str(folder), "--attribute", "red")
    refuse("X,Y,WIDTH,HEIGHT in pixels; found 1,2", str(folder), "--box", "1,2")
    refuse("--say asks about a hit", str(folder), "--image", str(tmp_path / "photo.png"), "--say", "Why?")
    refuse("Nothing has been asked yet", str(folder))
