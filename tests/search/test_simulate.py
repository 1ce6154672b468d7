"""Scripted users: what they say, and what is measured of the lists they get."""

import json
from pathlib import Path

import numpy as np
import pytest

from chatreid_plugin.eval.settings import RankSettings
from chatreid_plugin.search import simulate as module
from chatreid_plugin.search.ranking import Searcher, make_settings
from chatreid_plugin.search.simulate import Habits, Simulation, User, simulate
from tests.conftest import Workshop
from tests.search.conftest import NamedScorer


SETTINGS = ("scoring.backend=http", "filter.top_k=50")


class KnowingScorer(NamedScorer):
    """Knows who is who by half: a picture of the query's person and camera side scores higher."""

    def score_pairs(self, query, candidates, task):  # type: ignore[no-untyped-def]
        if query.image is None:
            agree = [
                sum(one.attributes.get(name) == value for name, value in query.attributes.items())
                for one in candidates
            ]
            return np.array([2.0 * count - len(query.attributes) for count in agree], dtype=np.float32)
        person = Path(query.image.path).name[:4]
        return np.array([3.0 if Path(one.path).name[:4] == person else -3.0 for one in candidates], dtype=np.float32)


@pytest.fixture
def searcher(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Searcher:
    monkeypatch.setattr("chatreid_plugin.search.ranking.make_scorer", lambda *arguments: KnowingScorer())
    settings: RankSettings = make_settings(None, SETTINGS)
    return Searcher(workshop.root / "manifests" / "world.parquet", settings, tmp_path / "index")


def test_marks_raise_the_list_and_are_the_same_again(workshop: Workshop, searcher: Searcher) -> None:
    manifest = workshop.root / "manifests" / "world.parquet"
    habits = Habits(rounds=2, shown=10, attributes=1)
    played = simulate(manifest, searcher, habits, ("marks", "question", "random"), users=3, seeds=2)
    assert [one.script for one in played] == ["marks", "question", "random"]
    marks = played[0]
    assert marks.users == 6 and [one.round for one in marks.rounds] == [0, 1, 2]
    assert marks.rounds[1].mean_ap == 1.0 >= marks.rounds[0].mean_ap
    assert marks.rounds[1].gain == pytest.approx(1.0 - marks.rounds[0].mean_ap)
    assert marks.rounds[0].interval[0] <= marks.rounds[0].mean_ap <= marks.rounds[0].interval[1]
    assert simulate(manifest, searcher, habits, ("marks",), users=3, seeds=2) == played[:1]


def test_figures_of_lists_worked_out_by_hand(workshop: Workshop, searcher: Searcher) -> None:
    simulation = Simulation(workshop.root / "manifests" / "world.parquet", searcher, Habits(rounds=2))
    (user, *_) = simulation.make_users(1, 0)
    matches = np.flatnonzero(simulation.labels.find_positives(user.place))
    others = np.flatnonzero(
        ~simulation.labels.find_positives(user.place) & ~simulation.labels.find_ignored(user.place)
    )

    def rank_first_match(rank: int) -> np.ndarray:
        row = np.full(len(searcher.gallery.images), -99.0, dtype=np.float32)
        row[others[: rank - 1]] = 1.0
        row[matches[0]] = 0.0
        return row

    user.rows = [rank_first_match(3), rank_first_match(1), rank_first_match(2)]
    user.marked = [frozenset()] * 3
    # Best ranks so far: 3, 1, 1.
    assert simulation._integrate(user) == pytest.approx(np.log(3) / 2 / 2)
    found = simulation.measure("marks", [[user]])
    assert found.rounds[0].rank == {1: 0.0, 5: 1.0, 10: 1.0} and found.rounds[1].rank[1] == 1.0
    user.marked = [frozenset(), *[frozenset(searcher.gallery.records[place].image_id for place in matches)] * 2]
    rest = simulation.measure("marks", [[user]]).rounds
    assert rest[0].rest is not None and rest[1].rest is None


def test_users_err_and_do_not_know(workshop: Workshop, searcher: Searcher) -> None:
    def mark(error_rate: float) -> tuple[str, ...]:
        habits = Habits(rounds=1, shown=5, error_rate=error_rate)
        simulation = Simulation(workshop.root / "manifests" / "world.parquet", searcher, habits)
        user: User = simulation.make_users(1, 0)[0]
        ranked = simulation._ask(user, simulation._begin(user))
        turn = simulation._mark(user, ranked, uses_hit=False)
        persons = [searcher.find_record(one).person_id == user.query.person_id for one in turn.different]
        return tuple(map(str, persons))

    assert set(mark(0.0)) == {"False"} and set(mark(1.0)) == {"True"}


def test_the_command(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("chatreid_plugin.search.ranking.make_scorer", lambda *arguments: KnowingScorer())
    manifest = str(workshop.root / "manifests" / "world.parquet")
    options = [manifest, *SETTINGS, "--index", str(tmp_path / "i"), "--users", "2", "--seeds", "1", "--rounds", "1"]
    assert module.main([*options, "--json", "--script", "image"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scripts"][0]["script"] == "image" and told["habits"]["rounds"] == 1
    assert module.main([*options, "--script", "question"]) == 0
    assert "question: BRI" in capsys.readouterr().out
    assert module.main([*options, "--error-rate", "2"]) == 2
    assert "an error rate 0 to 1" in capsys.readouterr().err
