"""A search in turns: what was asked and marked, what came out, and the way back.

Turns make a tree. Undoing goes to the turn before, or to any other; what is asked there is a branch, and nothing is
lost. A session is saved as JSON, with images by content hash, so that a gallery may be moved or grow in between.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..html import render_template
from ..pixels import encode_thumbnail
from ..printing import make_printable, render_table
from ..shards import read_json, write_json, write_text
from .gallery import EXAMPLES_SHOWN, Progress
from .ranking import Ranked, Searcher, make_settings
from .turns import Turn, add_turn


TEMPLATE = Path(__file__).with_name("sheet.html.j2")
VERSION = 1
# Of each turn, so that marks may name a rank after the gallery has changed.
HITS_SAVED = 100
LOG = "searches.jsonl"
# What reading JSON of another form raises.
DAMAGE = (AttributeError, KeyError, OverflowError, TypeError, ValueError)

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture of the list.

    Attributes:
        rank: from 1.
        image_id: hash of its bytes.
        path: its first file, below the gallery's root.
        copies: further files with the same bytes.
        score: None if the filter left it out, or it is confirmed.
        gap: how much less the next one scores.
        rank_before: by the filter alone, among what counts; None where nothing orders the gallery before the model.
        camera: where it was taken, if known.
        time: when, in ISO 8601.
        person: who it is, if the gallery says so.
        confirmed: whether it was marked as the one.
    """

    rank: int
    image_id: str
    path: str
    copies: tuple[str, ...]
    score: float | None
    gap: float | None
    rank_before: int | None
    camera: str
    time: str
    person: str
    confirmed: bool


@dataclass(slots=True)
class Asked:
    """A turn in the tree: what it added, which one it followed (-1: none), and its first hits' content hashes."""

    turn: Turn
    parent: int
    hits: list[str]


class Session:
    """A search that goes on from turn to turn.

    Attributes:
        searcher: ranks.
        turns: all that were asked, in the order of asking.
        at: number of the current one; -1 before the first.
    """

    def __init__(self, searcher: Searcher, operator: str = "", made_with: Mapping[str, Any] | None = None) -> None:
        """Begin.

        Args:
            searcher: ranks.
            operator: who searches, for the log.
            made_with: ``open_session``'s arguments, for the file of the session.
        """
        self.searcher = searcher
        self.operator = operator
        self.made_with = dict(made_with or {})
        self.turns: list[Asked] = []
        self.at = -1
        self._ranked: dict[int, Ranked] = {}
        self._hits: dict[int, list[Hit]] = {}

    @property
    def wanted(self) -> Turn:
        """All that is wanted now: the turns from the first to the current one, added up."""
        return self._add_up(self.at)

    def _add_up(self, number: int) -> Turn:
        path: list[Turn] = []
        while number >= 0:
            path.append(self.turns[number].turn)
            number = self.turns[number].parent
        return reduce(add_turn, reversed(path), Turn())

    def ask(
        self,
        *,
        image: Path | None = None,
        box: Box | None = None,
        use: str | int | None = None,
        text: str = "",
        attributes: Mapping[str, str] | None = None,
        weight: float | None = None,
        same: Sequence[str | int] = (),
        different: Sequence[str | int] = (),
        cameras: Sequence[str] = (),
        after: str = "",
        before: str = "",
        unknown: Sequence[str] = (),
        forget: Sequence[str] = (),
        progress: Progress = lambda done, count: None,
    ) -> list[Hit]:
        """Add a turn, and return the hits, best first; where it fails or is stopped, the session is as it was.

        Args:
            image: a picture to search for.
            box: left, top, width and height of the person in ``image``.
            use: a hit to search for instead; hits are named by rank, path or content hash.
            text: words that are added.
            attributes: name to value, added; an empty value drops one.
            weight: how much words count beside the picture, in two questions (``scoring.text_weight``).
            same: hits that are the one.
            different: hits that are not.
            cameras: the only ones that count from now on.
            after: ISO 8601, the earliest time.
            before: ISO 8601, the latest.
            unknown: attributes of which the user cannot tell.
            forget: of what earlier turns asked for, what is dropped first, by these arguments' names (``Turn``).
            progress: of the pairs that the model is asked about; may raise to stop.

        Raises:
            ConfigError: nothing is asked for, words that no model reads, or marks that contradict each other.
            DataError: a picture cannot be read, a hit is not in the list, or nothing is left.
        """
        if image is not None and use is not None:
            raise ConfigError("--image and --use both name the picture to search for; give one.")
        if box is not None and image is None:
            raise ConfigError("--box needs --image: it is cut out of that picture.")
        _check_weight(weight)
        known = [field.name for field in fields(Turn) if field.name != "forget"]
        if wrong := [name for name in forget if name not in known]:
            raise ConfigError(f"--forget {', '.join(wrong)}: choose of {', '.join(known)}.")
        picture = self.searcher.take_picture(image, box) if image is not None else ""
        turn = Turn(
            image=picture if use is None else self.find(use),
            text=text.strip(),
            attributes=dict(attributes or {}),
            weight=weight,
            same=tuple(dict.fromkeys(map(self.find, same))),
            different=tuple(dict.fromkeys(map(self.find, different))),
            cameras=tuple(cameras),
            after=after,
            before=before,
            unknown=tuple(unknown),
            forget=tuple(forget),
        )
        if both := set(turn.same) & set(turn.different):
            raise ConfigError(f"{self.searcher.find_record(both.pop()).path} is marked as the one and as not the one.")
        if turn == Turn():
            raise ConfigError("The turn is empty: ask for something, mark a hit or set a limit.")
        ranked = self.searcher.rank(add_turn(self.wanted, turn), progress=progress)
        self.turns.append(Asked(turn, self.at, []))
        self.at = len(self.turns) - 1
        self._ranked[self.at] = ranked
        self.turns[self.at].hits = [hit.image_id for hit in self.hits[:HITS_SAVED]]
        self._log(turn)
        return self.hits

    def undo(self) -> None:
        """Go back to the turn before.

        Raises:
            ConfigError: there is none.
        """
        if self.at < 0 or self.turns[self.at].parent < 0:
            raise ConfigError("There is no turn to go back to.")
        self.at = self.turns[self.at].parent

    def go(self, number: int) -> None:
        """Go to a turn, from 1; what is asked then is a branch.

        Raises:
            ConfigError: there is no such turn.
        """
        if not 1 <= number <= len(self.turns):
            raise ConfigError(f"There is no turn {number}; the session has {len(self.turns)}.")
        self.at = number - 1

    def find(self, hit: str | int) -> str:
        """Return the content hash of a hit: its rank in the current list, a path in the gallery, or the hash itself.

        Raises:
            DataError: there is no such hit.
        """
        name = str(hit)
        shown = self.turns[self.at].hits if self.at >= 0 else []
        if name.isdecimal() and len(name) <= len(str(HITS_SAVED)):
            if 1 <= int(name) <= len(shown):
                return shown[int(name) - 1]
            raise DataError(f"There is no hit {name}; the list has the first {len(shown)}. Name others by their path.")
        gallery = self.searcher.gallery
        if name in gallery.places:
            return name
        found = next((one.record.image_id for one in gallery.images if name in one.paths), None)
        if found is None:
            raise DataError(f"{make_printable(name)} is no picture of {gallery.source}: name its rank or its path.")
        return found

    @property
    def ranked(self) -> Ranked:
        """The current turn's ranking; of a loaded session it is made when it is first wanted.

        Raises:
            ConfigError: nothing has been asked yet.
        """
        if self.at < 0:
            raise ConfigError("Nothing has been asked yet: give --image, --text or --attribute.")
        if self.at not in self._ranked:
            self._ranked[self.at] = self.searcher.rank(self.wanted)
        return self._ranked[self.at]

    @property
    def hits(self) -> list[Hit]:
        """The current list, best first; all that counts."""
        ranked = self.ranked
        if self.at not in self._hits:
            self._hits[self.at] = list_hits(self.searcher, self.wanted, ranked)
        return self._hits[self.at]

    def _log(self, turn: Turn) -> None:
        """Note who searched how, but not for whom; finding people is a thing to be accountable for."""
        kinds = [field.name for field in fields(Turn) if getattr(turn, field.name) != getattr(Turn(), field.name)]
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "asked": kinds,
            "gallery": str(self.searcher.gallery.source),
            "operator": self.operator,
        }
        with (self.searcher.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self, path: Path) -> None:
        """Write the session as JSON.

        Raises:
            DataError: it cannot be written.
        """
        turns = [asdict(asked.turn) | {"parent": asked.parent, "hits": asked.hits} for asked in self.turns]
        source = str(self.searcher.gallery.source.resolve())
        known = {"version": VERSION, "gallery": source, "made_with": self.made_with, "at": self.at, "turns": turns}
        write_json(path, known)

    def load(self, path: Path) -> None:
        """Take the turns of a file that ``save`` wrote.

        Raises:
            DataError: it is damaged, or of another version.
        """
        self.turns, self.at = read_turns(path)
        self._ranked, self._hits = {}, {}

    def describe(self, top: int) -> dict[str, Any]:
        """Return the current turn for ``--json``: what is wanted, how it was ranked, and the first hits."""
        ranked, gallery = self.ranked, self.searcher.gallery
        return {
            "gallery": str(gallery.source),
            "images": len(gallery.images),
            "unreadable": dict(gallery.unreadable),
            "scorer": self.searcher.title,
            "confidence": ranked.confidence,
            "turn": self.at + 1,
            "wanted": {name: value for name, value in asdict(self.wanted).items() if value not in (None, "", (), {})},
            "scored": len(ranked.scores),
            "asked": ranked.asked,
            "reused": ranked.reused,
            "encoded": ranked.encoded,
            "seconds": round(ranked.seconds, 3),
            "hits": [asdict(hit) for hit in self.hits[:top]],
        }

    @property
    def title(self) -> str:
        """What is wanted, and who ranked how many images."""
        wanted, gallery = self.wanted, self.searcher.gallery
        asked = [f'"{wanted.text}"'] if wanted.text else []
        asked += [f"{name.replace('_', ' ')}: {value}" for name, value in wanted.attributes.items()]
        if wanted.image:
            record = self.searcher.find_record(wanted.image)
            asked.insert(0, f"a picture ({wanted.image})" if record.split == "query" else record.path)
        marks = [f"{len(wanted.same)} confirmed"] if wanted.same else []
        marks += [f"{len(wanted.different)} taken out"] if wanted.different else []
        where = f"{len(gallery.images):,} images of {gallery.source}, {len(self.ranked.scores):,} of them scored"
        kind = f"{self.searcher.title} ({self.ranked.confidence})"
        return make_printable(f"Turn {self.at + 1}: {', '.join([*asked, *marks])} in {where} by {kind}")

    def render(self, top: int) -> str:
        """Return the current list as a table."""
        rows = [
            (hit.path, hit.camera, str(hit.rank), _show(hit), _shorten(hit.gap), str(hit.rank_before or ""))
            for hit in self.hits[:top]
        ]
        lines = [self.title, "", render_table(("image", "camera", "rank", "score", "gap", "rank before"), rows, 2)]
        if unreadable := list(self.searcher.gallery.unreadable.values()):
            lines += ["", f"{len(unreadable)} file(s) could not be read and are not ranked:"]
            lines += [f"  {reason}" for reason in unreadable[:EXAMPLES_SHOWN]]
        return "\n".join(lines)

    def export(self, path: Path, top: int) -> None:
        """Write the first hits: ``.csv``, ``.json``, or ``.html`` for a contact sheet with the pictures inside.

        Raises:
            ConfigError: another ending.
            DataError: it cannot be written.
        """
        hits = self.hits[:top]
        if path.suffix == ".json":
            write_json(path, self.describe(top))
        elif path.suffix == ".csv":
            buffer = io.StringIO(newline="")
            writer = csv.writer(buffer)
            writer.writerow([field.name for field in fields(Hit)])
            writer.writerows([_write_cell(value) for value in asdict(hit).values()] for hit in hits)
            write_text(path, buffer.getvalue())
        elif path.suffix == ".html":
            gallery, wanted = self.searcher.gallery, self.wanted
            asked = wanted.image and encode_thumbnail(gallery.root / self.searcher.find_record(wanted.image).path)
            pictures = [(hit, encode_thumbnail(gallery.root / hit.path)) for hit in hits]
            values = {"title": self.title, "query": asked, "text": wanted.text, "unreadable": gallery.unreadable}
            write_text(path, render_template(TEMPLATE, pictures=pictures, **values))
        else:
            raise ConfigError(f"--export {path}: the name has to end in .csv, .json or .html (a contact sheet).")


def list_hits(searcher: Searcher, wanted: Turn, ranked: Ranked) -> list[Hit]:
    """Return all that counts, best first."""
    images, order = searcher.gallery.images, ranked.order.tolist()
    before: dict[int, int] = {}
    if ranked.similarities is not None:
        sorted_places = np.sort(ranked.order)
        by_filter = sorted_places[np.argsort(-ranked.similarities[sorted_places], kind="stable")]
        before = {place: rank for rank, place in enumerate(by_filter.tolist(), 1)}
    confirmed = set(wanted.same)
    hits: list[Hit] = []
    for rank, place in enumerate(order, 1):
        image, score = images[place], ranked.scores.get(place)
        following = ranked.scores.get(order[rank]) if rank < len(order) else None
        hits.append(
            Hit(
                rank,
                image.record.image_id,
                image.paths[0],
                image.paths[1:],
                score,
                None if score is None or following is None else score - following,
                before.get(place),
                image.record.camera_id,
                "" if image.time is None else image.time.isoformat(),
                image.record.person_id,
                image.record.image_id in confirmed,
            )
        )
    return hits


def _show(hit: Hit) -> str:
    return "confirmed" if hit.confirmed else _shorten(hit.score)


def _shorten(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


def _write_cell(value: Any) -> Any:
    """Return a value as a cell; a text that a spreadsheet would run as a formula begins with an apostrophe."""
    if isinstance(value, tuple):
        value = ";".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t") else value


def _check_weight(weight: float | None) -> None:
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"--weight {weight}: words count 0 times or more beside the picture; give such a number.")


def read_turns(path: Path) -> tuple[list[Asked], int]:
    """Return the turns of a saved session, and which one is the current.

    Raises:
        DataError: see ``read_session``; or a turn is damaged.
    """
    saved = read_session(path)
    try:
        turns = [_read_turn(values) for values in saved["turns"]]
        at = int(saved["at"])
        if not -1 <= at < len(turns) or any(not -1 <= asked.parent < place for place, asked in enumerate(turns)):
            raise ValueError("a turn follows one that is not there")
    except (*DAMAGE, ConfigError) as error:
        raise DataError(f"{path} is no session of `chatreid search`: {error}.") from None
    return turns, at


def _read_turn(values: Mapping[str, Any]) -> Asked:
    known = {field.name: values[field.name] for field in fields(Turn)}
    lists = ("same", "different", "cameras", "unknown", "forget")
    known |= {name: tuple(map(str, known[name])) for name in lists}
    known["attributes"] = {str(name): str(value) for name, value in known["attributes"].items()}
    known |= {name: str(known[name]) for name in ("image", "text", "after", "before")}
    known["weight"] = None if known["weight"] is None else float(known["weight"])
    _check_weight(known["weight"])
    return Asked(Turn(**known), int(values["parent"]), list(map(str, values["hits"])))


def read_session(path: Path) -> dict[str, Any]:
    """Return what ``Session.save`` wrote, unchecked but for its version.

    Raises:
        DataError: it is missing, is not JSON, or is of another version.
    """
    saved = read_json(path)
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        raise DataError(f"{path} is no session of this version of `chatreid search`.")
    return saved


def open_session(
    gallery: Path,
    model: str | None = None,
    overrides: Sequence[str] = (),
    *,
    stage: int = 3,
    index: Path | None = None,
    operator: str = "",
    progress: Progress = lambda done, count: None,
) -> Session:
    """Return a session that has asked nothing yet.

    Args:
        gallery: a folder, a .csv list or a manifest.
        model: checkpoint; None: colours alone rank, or what ``overrides`` name.
        overrides: keys of eval/*.yaml: filter.top_k=50, scoring.backend=http, ...
        stage: whose image policy applies; 0 for none.
        index: folder of the index; None: ``NAME.chatreid`` beside the gallery.
        operator: who searches, for the log.
        progress: of indexing; may raise to stop.

    Raises:
        ConfigError, DataError, UpstreamError: see ``make_settings`` and ``Searcher``.
    """
    made_with = {"model": model, "overrides": list(overrides), "stage": stage, "index": index and str(index.resolve())}
    return Session(Searcher(gallery, make_settings(model, overrides, stage), index, progress), operator, made_with)


def resume_session(
    path: Path,
    gallery: Path | None = None,
    model: str | None = None,
    overrides: Sequence[str] = (),
    *,
    index: Path | None = None,
    operator: str = "",
    progress: Progress = lambda done, count: None,
) -> Session:
    """Return the session of a file that ``Session.save`` wrote; arguments as in ``open_session``, None: as before.

    Raises:
        ConfigError, DataError, UpstreamError: see ``open_session``; or the file is damaged.
    """
    saved = read_session(path)
    try:
        made = saved["made_with"]
        model, overrides = model or made["model"], [*made["overrides"], *overrides]
        kept = index or (made["index"] and Path(made["index"]))
        source, stage = gallery or Path(saved["gallery"]), int(made["stage"])
    except DAMAGE as error:
        raise DataError(f"{path} is no session of `chatreid search`: {error}.") from None
    session = open_session(source, model, overrides, stage=stage, index=kept, operator=operator, progress=progress)
    session.load(path)
    return session
