"""Scripted users against a data set: ``python -m chatreid_plugin.search.simulate MANIFEST --model CHECKPOINT``.

A user looks for the person of a query image. Four scripts go on for some rounds; all but ``image`` begin with some of
the person's attributes (of the manifest; a caption where there are none):

``marks``: in the first round the best right picture among those shown becomes the query; in each further one the user
confirms a right picture among those shown and takes out the first two wrong ones.
``image``: the same marks in every round, but the query image itself begins.
``question``: the user answers the question with the largest expected information.
``random``: the user answers a question drawn at random.

A judgement or an answer is wrong with a given rate, an attribute that nobody labelled is "don't know". Pictures of the
person by the query's own camera are hidden, as in Market-1501's protocol. After each round the whole list is measured:
Rank-k, mAP and the best-rank integral (BRI: the mean over rounds, by trapezoids, of the logarithm of the best rank of
a match so far; PlugIR, Lee et al., ACL 2024; lower is better). What a user confirmed stands on top, which alone raises
mAP; ``rest`` therefore leaves all that was marked so far out of the list, and its gain compares with the round before
without the same pictures.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from ..archives import BoolArray, FloatArray, ScoreArray
from ..datasets.benchmark import Benchmark, make_image_query
from ..datasets.matching import Labels, label_benchmark
from ..errors import INTERRUPTED, ChatReIDError, ConfigError, DataError, end_on_sigterm
from ..eval.metrics import RankingMeter, RankingMetrics, bootstrap_interval
from ..printing import log_warnings, render_table, say
from ..records import ImageRecord
from ..shards import read_manifest
from .command import Bar
from .dialogue import list_questions
from .ranking import Ranked, Searcher, make_settings
from .turns import Turn, add_turn


Script = Literal["marks", "image", "question", "random"]
SCRIPTS: tuple[Script, ...] = ("marks", "image", "question", "random")
RANKS = (1, 5, 10)
WRONG_ONES = 2


@dataclass(frozen=True, slots=True)
class Habits:
    """How users behave.

    Attributes:
        rounds: turns after the first one.
        shown: how many hits they look at.
        attributes: how many they know at the start.
        error_rate: how often a judgement or an answer is wrong.
    """

    rounds: int = 4
    shown: int = 10
    attributes: int = 3
    error_rate: float = 0.0


DEFAULTS = Habits()


@dataclass(slots=True)
class User:
    """Somebody who looks for a person.

    Attributes:
        query: the picture in their mind; the search never sees it.
        place: its place among the queries that are measured.
        hidden: pictures that do not count for them.
        random: draws for them.
        wanted: what they asked for so far.
        rows: the list after each round, as scores (G,).
        marked: all they have marked after each round.
    """

    query: ImageRecord
    place: int
    hidden: frozenset[str]
    random: np.random.Generator
    wanted: Turn = field(default_factory=Turn)
    rows: list[ScoreArray] = field(default_factory=list[ScoreArray])
    marked: list[frozenset[str]] = field(default_factory=list[frozenset[str]])


@dataclass(frozen=True, slots=True)
class Rest:
    """mAP without what was marked so far, of the users who have a match left, and what it gained in the round."""

    users: int
    mean_ap: float
    gain: float
    gain_interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Round:
    """What is measured after a round: fractions, with 95 % intervals of mAP and of what it gained in this round."""

    round: int
    rank: dict[int, float]
    mean_ap: float
    interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]
    rest: Rest | None


@dataclass(frozen=True, slots=True)
class Played:
    """A script's figures: each round's, and the best-rank integral over all rounds with its interval."""

    script: Script
    users: int
    rounds: list[Round]
    bri: float
    bri_interval: tuple[float, float]


class Simulation:
    """A data set that users search."""

    def __init__(self, manifest: Path, searcher: Searcher, habits: Habits) -> None:
        """Read the queries.

        Raises:
            DataError: there are none that match something in the gallery.
        """
        self.searcher, self.habits = searcher, habits
        records, self.root = read_manifest(manifest)
        gallery = searcher.gallery.records
        asking = [record for record in records if record.split == "query"]
        queries = [make_image_query(record) for record in asking]
        self.labels: Labels = label_benchmark(Benchmark("search", "", queries, gallery, self.root))
        self.queries = [(n, record) for n, record in enumerate(asking) if len(self.labels.list_positives(n))]
        if not self.queries:
            raise DataError(f"{manifest} has no query that matches something in the gallery.")

    def make_users(self, count: int, seed: int) -> list[User]:
        """Return users of queries drawn without replacement; each knows what is drawn for it."""
        drawn = np.random.default_rng(seed).permutation(len(self.queries))[:count].tolist()
        gallery = self.searcher.gallery.records
        users: list[User] = []
        for number in drawn:
            place, query = self.queries[number]
            ignored = np.flatnonzero(self.labels.find_ignored(place)).tolist()
            hidden = frozenset(gallery[other].image_id for other in ignored)
            users.append(User(query, place, hidden, np.random.default_rng([seed, number])))
        return users

    def play(self, script: Script, user: User) -> None:
        """Let a user search, and note the list after each round."""
        ranked = self._ask(user, Turn(image=self._find_query(user)) if script == "image" else self._begin(user))
        for number in range(self.habits.rounds):
            if script in ("question", "random"):
                turn = self._answer(script, user, ranked)
            else:
                turn = self._mark(user, ranked, uses_hit=script == "marks" and number == 0)
            if turn == Turn():  # nothing to say
                user.rows.append(user.rows[-1])
                user.marked.append(user.marked[-1])
            else:
                ranked = self._ask(user, turn)

    def _find_query(self, user: User) -> str:
        return self.searcher.take_picture(self.root / user.query.path)

    def _ask(self, user: User, turn: Turn) -> Ranked:
        user.wanted = add_turn(user.wanted, turn)
        ranked = self.searcher.rank(user.wanted, user.hidden)
        # What is out of the list stands behind it.
        row = np.full(len(self.searcher.gallery.images), -len(self.searcher.gallery.images) - 1, dtype=np.float32)
        row[ranked.order] = -np.arange(len(ranked.order), dtype=np.float32)
        user.rows.append(row)
        known = frozenset(
            {*user.wanted.same, *user.wanted.different, user.wanted.image} & self.searcher.gallery.places.keys()
        )
        user.marked.append(known)
        return ranked

    def _begin(self, user: User) -> Turn:
        names = sorted(user.query.attributes)
        if names:
            known = user.random.permutation(names)[: self.habits.attributes].tolist()
            return Turn(attributes={name: user.query.attributes[name] for name in known})
        if any(user.query.captions):
            return Turn(text=next(filter(None, user.query.captions)))
        raise DataError(f"{user.query.path} has neither attributes nor a caption to begin with.")

    def _mark(self, user: User, ranked: Ranked, *, uses_hit: bool) -> Turn:
        records = [self.searcher.gallery.records[place] for place in ranked.order[: self.habits.shown].tolist()]
        records = [record for record in records if record.image_id not in user.marked[-1]]
        right: list[str] = []
        wrong: list[str] = []
        for record in records:
            judged = record.person_id == user.query.person_id
            if user.random.random() < self.habits.error_rate:
                judged = not judged
            (right if judged else wrong).append(record.image_id)
        if uses_hit:
            return Turn(image=right[0]) if right else Turn()
        return Turn(same=tuple(right[:1]), different=tuple(wrong[:WRONG_ONES]))

    def _answer(self, script: Script, user: User, ranked: Ranked) -> Turn:
        questions = list_questions(self.searcher, user.wanted, ranked)
        if not questions:
            return Turn()
        chosen = questions[0] if script == "question" else questions[int(user.random.integers(len(questions)))]
        value = user.query.attributes.get(chosen.name)
        if value is None:
            return Turn(unknown=(chosen.name,))
        others = [other for other in chosen.values if other != value]
        if others and user.random.random() < self.habits.error_rate:
            value = others[int(user.random.integers(len(others)))]
        return Turn(attributes={chosen.name: value})

    def measure(self, script: Script, groups: Sequence[Sequence[User]]) -> Played:
        """Return the figures of users who played, a group a seed."""
        rounds = range(self.habits.rounds + 1)
        lists = [[found for number in rounds if (found := self._measure(users, number))] for users in groups]
        rests = [[self._measure_rest(users, number) for number in rounds] for users in groups]
        found = [_summarise(number, lists, rests) for number in rounds]
        integrals = [np.array([self._integrate(user) for user in users]) for users in groups]
        bri = float(np.mean([own.mean() for own in integrals]))
        return Played(script, sum(map(len, groups)), found, bri, bootstrap_interval(*integrals))

    def _measure(self, users: Sequence[User], number: int, without: int | None = None) -> RankingMetrics | None:
        """Return one group's metrics after a round; ``without``: what was marked by then does not count.

        None if nobody has a match left.
        """
        gallery = self.searcher.gallery
        masks: list[BoolArray] = []
        for user in users:
            mask = self.labels.find_ignored(user.place).copy()
            if without is not None:
                mask[[gallery.places[one] for one in user.marked[without]]] = True
            masks.append(mask)
        persons = self.labels.query_person[[user.place for user in users]]
        labels = replace(self.labels, query_person=persons, ignore=masks.__getitem__, copies={}, _places={})
        meter = RankingMeter(labels, topk=RANKS)
        found = [meter.add(place, user.rows[number]) for place, user in enumerate(users)]
        return meter.summarise() if any(found) else None

    def _measure_rest(self, users: Sequence[User], number: int) -> tuple[FloatArray, FloatArray]:
        """Return the average precisions without what users had marked by a round, in it and in the one before."""
        pair = [self._measure(users, one, without=number) for one in (number, max(0, number - 1))]
        now, before = (np.empty(0) if one is None else one.average_precisions for one in pair)
        return now, before

    def _integrate(self, user: User) -> float:
        """Return the user's best-rank integral."""
        matches = self.labels.find_positives(user.place)
        visible = ~self.labels.find_ignored(user.place)
        best: list[float] = []
        for row in user.rows:
            first = 1 + int((row[visible] > row[matches].max()).sum())
            best.append(min([first, *best[-1:]]))
        logs = np.log(best)
        return float((logs[0] + logs[-1]) / 2 + logs[1:-1].sum()) / max(1, len(logs) - 1)


def _summarise(
    number: int,
    lists: Sequence[Sequence[RankingMetrics]],
    rests: Sequence[Sequence[tuple[FloatArray, FloatArray]]],
) -> Round:
    """Return one round's means over the groups."""
    now = [own[number].average_precisions for own in lists]
    gains = [own[number].average_precisions - own[max(0, number - 1)].average_precisions for own in lists]
    left = [own[number] for own in rests if len(own[number][0])]
    rest_gains = [after - before for after, before in left]
    return Round(
        number,
        {k: float(np.mean([own[number].cmc[k] for own in lists])) for k in RANKS},
        _average(now),
        bootstrap_interval(*now),
        _average(gains),
        bootstrap_interval(*gains),
        Rest(
            sum(len(after) for after, _ in left),
            _average([after for after, _ in left]),
            _average(rest_gains),
            bootstrap_interval(*rest_gains),
        )
        if left
        else None,
    )


def _average(groups: Sequence[FloatArray]) -> float:
    return float(np.mean([own.mean() for own in groups]))


def simulate(
    manifest: Path, searcher: Searcher, habits: Habits, scripts: Sequence[Script], users: int, seeds: int
) -> list[Played]:
    """Return what each script reaches; the users of a seed are the same in every script.

    Raises:
        ConfigError: no model answers questions.
        DataError: no query matches anything, or one has no words to begin with.
    """
    simulation = Simulation(manifest, searcher, habits)
    played: list[Played] = []
    for script in scripts:
        groups = [simulation.make_users(users, seed) for seed in range(seeds)]
        with tqdm(total=sum(map(len, groups)), desc=script, unit="user") as bar:
            for user in (user for group in groups for user in group):
                simulation.play(script, user)
                bar.update()
        played.append(simulation.measure(script, groups))
    return played


def render(played: Sequence[Played], habits: Habits) -> str:
    """Return the figures as a table."""
    columns = (
        "script",
        "round",
        *(f"Rank-{k}" for k in RANKS),
        "mAP",
        "95 %",
        "gain",
        "95 % ",
        "rest",
        "gain ",
        "95 %  ",
    )
    rows: list[tuple[str, ...]] = []
    for one in played:
        for found in one.rounds:
            hits = [f"{100 * found.rank[k]:.1f}" for k in RANKS]
            after, rest = found.round > 0, found.rest
            gain = (f"{100 * found.gain:+.1f}", _show(found.gain_interval)) if after else ("", "")
            left = (str(rest.users), f"{100 * rest.mean_ap:.1f}") if rest else ("0", "")
            more = (f"{100 * rest.gain:+.1f}", _show(rest.gain_interval)) if rest and after else ("", "")
            figures = f"{100 * found.mean_ap:.1f}", _show(found.interval), *gain, *left, *more
            rows.append((one.script, str(found.round), *hits, *figures))
    lines = [render_table(columns, rows), ""]
    lines += [
        f"{one.script}: BRI {one.bri:.3f} ({one.bri_interval[0]:.3f} to {one.bri_interval[1]:.3f}), {one.users} users"
        for one in played
    ]
    lines += ["", f"{habits.shown} hits shown, {habits.attributes} attributes known, error rate {habits.error_rate}."]
    return "\n".join(lines)


def _show(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m chatreid_plugin.search.simulate",
        description="Play scripted users against a data set and measure the dialogue after each round.",
    )
    parser.add_argument(
        "arguments", nargs="+", metavar="MANIFEST | key=value", help="the data set; keys of eval/*.yaml"
    )
    parser.add_argument("--model", metavar="CHECKPOINT", help="who ranks")
    parser.add_argument("--stage", type=int, default=3, help="image policy of the stage; 0 for none")
    parser.add_argument("--index", type=Path, metavar="DIR", help="MANIFEST.chatreid beside it by default")
    parser.add_argument("--script", choices=SCRIPTS, action="append", help="repeatable; all by default")
    parser.add_argument("--users", type=int, default=100, help="of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=DEFAULTS.rounds, help="after the first turn")
    parser.add_argument("--shown", type=int, default=DEFAULTS.shown, help="hits that a user looks at")
    parser.add_argument("--attributes", type=int, default=DEFAULTS.attributes, help="known at the start")
    parser.add_argument("--error-rate", type=float, default=DEFAULTS.error_rate, help="of judgements and answers")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code (0 done, 2 configuration, 3 data, 4 model)."""
    options = build_parser().parse_intermixed_args(argv)
    log_warnings()
    names = [item for item in options.arguments if "=" not in item]
    habits = Habits(options.rounds, options.shown, options.attributes, options.error_rate)
    try:
        numbers = options.users, options.seeds, options.shown, options.attributes
        if len(names) != 1 or min(numbers) < 1 or options.rounds < 0 or not 0 <= options.error_rate <= 1:
            raise ConfigError(
                "Name one manifest; users, seeds, shown and attributes are 1 or more, an error rate 0 to 1."
            )
        with end_on_sigterm():
            overrides = [item for item in options.arguments if "=" in item]
            settings = make_settings(options.model, overrides, options.stage)
            searcher = Searcher(Path(names[0]), settings, options.index, Bar("indexing", "image"))
            played = simulate(
                Path(names[0]), searcher, habits, options.script or SCRIPTS, options.users, options.seeds
            )
        told = {"habits": asdict(habits), "scorer": searcher.title, "scripts": [asdict(one) for one in played]}
        say(json.dumps(told, indent=2) if options.json else render(played, habits))
        return 0
    except ChatReIDError as error:
        say(f"Error: {error}", aside=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
