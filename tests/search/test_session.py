"""Turns of a search: what they add, what marks do, the way back, and what is written."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.datasets.benchmark import Query
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.questions import ATTRIBUTE_PAIR, IMAGE_PAIR, MULTIMODAL_PAIR, TEXT_PAIR, combine_margins
from chatreid_plugin.search import ranking
from chatreid_plugin.search.session import LOG, Session, open_session, resume_session
from chatreid_plugin.search.turns import Turn, add_turn
from tests.search.conftest import OWN, NamedScorer


SERVER = ("scoring.backend=http", "filter.top_k=12")


def list_paths(session: Session, count: int = 12) -> list[str]:
    return [hit.path for hit in session.hits[:count]]


def test_colours_rank_where_there_is_no_model(folder: Path, tmp_path: Path) -> None:
    session = open_session(folder, overrides=["filter.top_k=4", "filter.floor=0"])
    hits = session.ask(image=tmp_path / "photo.png", box=(10, 20, 50, 90))
    assert hits[0].path == "0/red.png" and [hit.rank for hit in hits] == list(range(1, 13))
    assert [hit.score is None for hit in hits] == [False] * 4 + [True] * 8
    assert hits[0].gap == pytest.approx(hits[0].score - hits[1].score) and hits[3].gap is None
    assert "colour features alone, no model (similarities)" in session.title
    assert "2 file(s) could not be read" in session.render(3)
    with pytest.raises(ConfigError, match="Words need --model"):
        session.ask(text="a man")
    with pytest.raises(DataError, match="is not inside its 100 x 120 pixels"):
        session.ask(image=tmp_path / "photo.png", box=(10, 20, 91, 90))


def test_marks_take_out_and_pin_and_move_the_filter(folder: Path) -> None:
    session = open_session(folder)
    session.ask(image=folder / "0" / "red.png")
    first = list_paths(session)
    session.ask(different=[2], same=["0/blue.png"])
    assert list_paths(session, 1) == ["0/blue.png"] and session.hits[0].confirmed
    assert sorted(list_paths(session)) == sorted(set(first) - {first[1]})
    features, places = session.searcher.features, session.searcher.gallery.places
    assert features is not None
    query, confirmed, other = (features[places[session.find(path)]] for path in (first[0], "0/blue.png", first[1]))
    moved = query + 0.75 * confirmed - 0.15 * other
    np.testing.assert_allclose(session.searcher.locate(session.wanted), moved / np.linalg.norm(moved), atol=1e-6)
    # The other way round later: the last mark counts.
    session.ask(same=[first[1]], different=["0/blue.png"])
    assert list_paths(session, 1) == [first[1]] and "0/blue.png" not in list_paths(session)


def test_turns_add_up() -> None:
    first = Turn(image="a", text="in red", attributes={"hat": "cap", "bag": "none"}, same=("x", "y"), cameras=("1",))
    then = Turn(text="with a bag", attributes={"hat": "", "bag": "red"}, different=("x",), unknown=("shoes",))
    wanted = add_turn(add_turn(Turn(), first), then)
    assert (wanted.image, wanted.text, wanted.attributes) == ("a", "in red, with a bag", {"bag": "red"})
    assert (wanted.same, wanted.different, wanted.cameras) == (("y",), ("x",), ("1",))
    again = add_turn(wanted, Turn(text="in blue", attributes={"shoes": "brown"}, forget=("text", "same", "cameras")))
    assert (again.text, again.same, again.cameras, again.unknown) == ("in blue", (), (), ())


def test_limits_of_cameras_and_times(write_list: Callable[[], Path], folder: Path) -> None:
    session = open_session(write_list())
    session.ask(image=folder / "0" / "red.png", cameras=["c1"])
    assert len(session.hits) == 6 and {hit.camera for hit in session.hits} == {"c1"}
    session.ask(after="2026-03-02", before="2026-03-02T12:00")
    assert {hit.time for hit in session.hits} == {"2026-03-02T10:00:00"}
    with pytest.raises(DataError, match="No picture is left"):
        session.ask(after="2027-01-01")
    with pytest.raises(DataError, match="the time limit: 'soon' is not a time"):
        session.ask(after="soon")
    assert len(session.turns) == 2 and session.at == 1


def test_undo_branch_save_and_go_on(folder: Path, tmp_path: Path) -> None:
    session = open_session(folder, overrides=["filter.top_k=5"], operator="J. Doe")
    session.ask(image=folder / "0" / "red.png")
    session.ask(use=5)
    second = list_paths(session)
    session.undo()
    assert list_paths(session, 1) == ["0/red.png"]
    session.ask(different=["0/red.png"])
    assert [asked.parent for asked in session.turns] == [-1, 0, 0]
    session.go(2)
    assert list_paths(session) == second
    session.save(tmp_path / "case.json")
    Image.new("RGB", (30, 60), "white").save(folder / "new.png")

    again = resume_session(tmp_path / "case.json")
    assert again.searcher.settings.filter.top_k == 5 and again.at == 1 and again.turns == session.turns
    again.go(3)
    assert "0/red.png" not in list_paths(again) and "new.png" in list_paths(again, 99)
    with pytest.raises(ConfigError, match="There is no turn 4; the session has 3"):
        again.go(4)
    again.undo()
    with pytest.raises(ConfigError, match="There is no turn to go back to"):
        again.undo()
    log = [json.loads(line) for line in (session.searcher.folder / LOG).read_text().splitlines()]
    assert [entry["asked"] for entry in log] == [["image"], ["image"], ["different"]]
    assert {entry["operator"] for entry in log} == {"J. Doe"}


@pytest.mark.parametrize(
    "text",
    ['{"version": 2}', '{"version": 1}', '{"version": 1, "made_with": {"model": null, "overrides": [], "stage": 3}}'],
)
def test_a_file_that_is_no_session_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "case.json").write_text(text)
    with pytest.raises(DataError, match="is no session of"):
        resume_session(tmp_path / "case.json", folder)


def test_a_turn_that_follows_none_is_refused(folder: Path, tmp_path: Path) -> None:
    session = open_session(folder)
    session.ask(image=folder / "0" / "red.png")
    session.turns[0].parent = 0
    session.save(tmp_path / "case.json")
    with pytest.raises(DataError, match="a turn follows one that is not there"):
        resume_session(tmp_path / "case.json")


def test_exports(folder: Path, tmp_path: Path) -> None:
    (folder / "=cmd.png").write_bytes((folder / "0" / "red.png").read_bytes())
    session = open_session(folder)
    session.ask(image=folder / "0" / "red.png", same=["0/blue.png"])
    for name in ("hits.csv", "hits.json", "sheet.html"):
        session.export(tmp_path / name, 3)
    rows = list(csv.DictReader((tmp_path / "hits.csv").open(newline="")))
    assert [row["path"].lstrip("'") for row in rows] == list_paths(session, 3) and rows[0]["confirmed"] == "True"
    # A spreadsheet would run it as a formula.
    assert (rows[1]["path"], rows[1]["copies"]) == ("'=cmd.png", "0/red.png")
    told = json.loads((tmp_path / "hits.json").read_text())
    assert told["confidence"] == "similarities" and told["hits"][0]["path"] == "0/blue.png"
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg") == 4 and "http" not in page and "damaged.jpg" in page
    with pytest.raises(ConfigError, match=r"has to end in .csv, .json or .html"):
        session.export(tmp_path / "hits.pdf", 3)


def test_refuses_turns_that_say_nothing_or_contradict_themselves(folder: Path, tmp_path: Path) -> None:
    session = open_session(folder)
    with pytest.raises(ConfigError, match="The turn is empty"):
        session.ask()
    with pytest.raises(ConfigError, match="Nothing is searched for"):
        session.ask(different=["0/red.png"])
    with pytest.raises(ConfigError, match="Nothing has been asked yet"):
        print(session.hits)
    with pytest.raises(ConfigError, match="is marked as the one and as not the one"):
        session.ask(same=["0/red.png"], different=["0/red.png"])
    with pytest.raises(ConfigError, match="--image and --use"):
        session.ask(image=tmp_path / "photo.png", use="0/red.png")
    with pytest.raises(ConfigError, match="--box needs --image"):
        session.ask(box=(0, 0, 1, 1))
    with pytest.raises(ConfigError, match="--forget colour: choose of image, text"):
        session.ask(forget=["colour"])
    with pytest.raises(ConfigError, match="--weight nan"):
        session.ask(use="0/red.png", weight=float("nan"))
    with pytest.raises(DataError, match="There is no hit 3"):
        session.ask(use=3)
    with pytest.raises(DataError, match="is no picture of"):
        session.ask(use="0/white.png")
    with pytest.raises(ConfigError, match="backend: oracle knows nothing"):
        open_session(folder, overrides=["scoring.backend=oracle"])
    with pytest.raises(ConfigError, match="npz has no features of the picture"):
        open_session(folder, overrides=["filter.source=npz", "filter.features=f.npz"])


def test_no_pair_is_asked_twice_and_what_is_stopped_leaves_no_turn(
    folder: Path, named: NamedScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "PAIRS_PER_STEP", 5)
    session = open_session(folder, overrides=SERVER)

    def stop(done: int, count: int) -> None:
        assert (done, count) == (5, 12)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask(image=folder / "0" / "red.png", progress=stop)
    assert session.at == -1 and not session.turns
    session.ask(image=folder / "0" / "red.png")
    assert (session.ranked.asked, session.ranked.reused) == (7, 5)
    assert list_paths(session, 2) == ["0/red.png", "1/red.png"] and session.ranked.confidence == "margins"
    session.ask(different=["0/green.png"])
    assert (session.ranked.asked, session.ranked.reused) == (0, 11)
    session.undo()
    session.ask(text="green", weight=2.0)
    assert session.ranked.confidence == "standardised" and session.ranked.asked == 12
    assert set(list_paths(session, 2)) == {"0/green.png", "1/green.png"}
    assert {task for task, _ in named.asked} == {IMAGE_PAIR, TEXT_PAIR}


def test_confirmed_pictures_ask_beside_the_query(folder: Path, named: NamedScorer) -> None:
    session = open_session(folder, overrides=SERVER)
    session.ask(image=folder / "0" / "red.png")
    session.ask(same=["0/blue.png"])
    scores = {hit.path: hit.score for hit in session.hits}
    assert scores["1/red.png"] == scores["1/blue.png"] == pytest.approx(-0.01)
    assert scores["1/green.png"] == pytest.approx(-3.01) and scores["0/blue.png"] is None
    session.ask(attributes={"shade": "1"})
    assert list_paths(session, 1) == ["0/blue.png"] and {path[0] for path in list_paths(session, 3)[1:]} == {"1"}
    assert (ATTRIBUTE_PAIR, 11) in named.asked


def test_scores_are_fused_with_the_filter(folder: Path, named: NamedScorer) -> None:
    session = open_session(folder, overrides=[*SERVER, "scoring.fusion=linear", "scoring.fusion_weight=0.0"])
    hits = session.ask(image=folder / "0" / "red.png", text="green")
    assert [hit.rank_before for hit in hits] == list(range(1, 13))  # all weight is the filter's


def test_attributes_alone_rank_the_whole_gallery(folder: Path, named: NamedScorer) -> None:
    session = open_session(folder, overrides=SERVER)
    session.ask(attributes={"colour": "green"})
    assert list_paths(session, 2) == ["0/green.png", "1/green.png"]
    assert session.hits[0].rank_before is None and "colour: green" in session.title
    session.ask(use=1, text="red")
    assert session.hits[0].rank_before == 1
    assert [task for task, _ in named.asked] == [ATTRIBUTE_PAIR, MULTIMODAL_PAIR]


@pytest.mark.slow
def test_the_model_scores_as_in_an_evaluation_and_encodes_nothing_again(folder: Path, checkpoint: Path) -> None:
    session = open_session(folder, str(checkpoint), [*OWN, "filter.top_k=5", "filter.floor=0"], stage=2)
    session.ask(image=folder / "0" / "red.png")
    assert session.ranked.encoded == 0  # all of it is in the index
    assert [hit.score is None for hit in session.hits] == [False] * 5 + [True] * 7
    scorer = TransformersScorer(session.searcher.settings.model, folder)
    records = session.searcher.gallery.records
    red, blue = (session.searcher.find_record(session.find(path)) for path in ("0/red.png", "0/blue.png"))

    def compare(expected: np.ndarray) -> None:
        scores = {hit.path: hit.score for hit in session.hits if hit.score is not None}
        wanted = {record.path: score for record, score in zip(records, expected.tolist(), strict=True)}
        np.testing.assert_allclose(list(scores.values()), [wanted[path] for path in scores], atol=1e-4)

    alone = [scorer.score_pairs(Query("q", "", image=one), records, IMAGE_PAIR) for one in (red, blue)]
    compare(alone[0])
    session.ask(text="a woman in red")
    compare(scorer.score_pairs(Query("q", "", image=red, text="a woman in red"), records, MULTIMODAL_PAIR))
    assert (session.ranked.encoded, session.ranked.asked) == (0, 5)
    session.undo()
    session.ask(same=["0/blue.png"])
    compare(np.mean(alone, axis=0))
    session.ask(attributes={"hat": "cap"}, forget=["image", "same"])
    compare(scorer.score_pairs(Query("q", "", attributes={"hat": "cap"}), records, ATTRIBUTE_PAIR))
    assert len(session.ranked.scores) == 12  # nothing orders the gallery
    session.ask(use="0/red.png")
    assert session.ranked.confidence == "standardised"
    kept = sorted(session.ranked.scores)
    hat = scorer.score_pairs(
        Query("q", "", attributes={"hat": "cap"}), [records[place] for place in kept], ATTRIBUTE_PAIR
    )
    expected = combine_margins(alone[0][kept], hat)
    np.testing.assert_allclose([session.ranked.scores[place] for place in kept], expected, atol=1e-3)

    later = open_session(folder, str(checkpoint), OWN, stage=2)
    later.ask(image=folder / "0" / "red.png", text="a woman in red")
    assert later.ranked.encoded == 0
