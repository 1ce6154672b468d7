"""One command of ``chatreid search``: open or resume a session, take a turn, answer, and write files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import ConfigError
from .dialogue import ask_freely, explain, list_questions
from .session import Box, Session, open_session, resume_session


class Bar:
    """A progress bar that appears when there is something to show, with rate and time left."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, count: int) -> None:
        """Show that so many are done."""
        if self._bar is None:
            self._bar = tqdm(total=count, desc=self._what, unit=self._unit)
        self._bar.update(done - self._bar.n)
        if done >= count:
            self._bar.close()


def open_or_resume(
    arguments: Sequence[str], file: Path | None, model: str | None, stage: int, index: Path | None, operator: str
) -> Session:
    """Return the session of a file that exists, or a new one; ``arguments`` are the gallery and ``key=value``.

    Raises:
        ConfigError: no gallery, or several.
    """
    names = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    resumes = file is not None and file.exists()
    if len(names) > 1 or not (names or resumes):
        raise ConfigError(f"Name one gallery (folder, .csv list or manifest); found {', '.join(names) or 'none'}.")
    gallery = Path(names[0]) if names else None
    progress = Bar("indexing", "image")
    if file is not None and resumes:
        return resume_session(file, gallery, model, overrides, index=index, operator=operator, progress=progress)
    return open_session(
        Path(names[0]), model, overrides, stage=stage, index=index, operator=operator, progress=progress
    )


def read_attributes(texts: Sequence[str]) -> dict[str, str]:
    """Return ``NAME=VALUE`` texts as a mapping; an empty value drops the attribute.

    Raises:
        ConfigError: one is written otherwise.
    """
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, mark, _) in zip(texts, pairs, strict=True) if not (name.strip() and mark)]:
        raise ConfigError(f"--attribute is written NAME=VALUE; found {', '.join(wrong)}.")
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_box(text: str) -> Box | None:
    """Return a box ``X,Y,WIDTH,HEIGHT`` in pixels; None of an empty text.

    Raises:
        ConfigError: it is written otherwise.
    """
    if not text:
        return None
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError:
        raise ConfigError(f"--box is written X,Y,WIDTH,HEIGHT in pixels; found {text}.") from None
    return left, top, width, height


def run_search(
    session: Session,
    asked: Mapping[str, Any],
    *,
    file: Path | None = None,
    undo: bool = False,
    turn: int | None = None,
    question: bool = False,
    why: str | None = None,
    words: str = "",
    top: int = 10,
    exports: Sequence[Path] = (),
    as_json: bool = False,
) -> str:
    """Take a turn, and return what to print.

    Args:
        session: open.
        asked: ``Session.ask``'s arguments; those that are empty are not asked for.
        file: gets the session.
        undo: go back first.
        turn: go to this one first.
        question: add the follow-up question.
        why: a hit to compare with the query picture.
        words: the question about it, instead of similarities and differences.
        top: how many hits are shown and exported.
        exports: files for the hits.
        as_json: return JSON.

    Raises:
        ConfigError, DataError, UpstreamError: see ``Session``.
    """
    if words and why is None:
        raise ConfigError("--say asks about a hit: name it with --why.")
    if undo:
        session.undo()
    if turn is not None:
        session.go(turn)
    given = {name: value for name, value in asked.items() if value not in (None, "", [], {}, ())}
    if given:
        session.ask(**given, progress=Bar("asking", "pair"))
    told = session.describe(top)
    if why is not None:
        told["answer"] = ask_freely(session, why, words) if words else explain(session, why)
    questions = list_questions(session.searcher, session.wanted, session.ranked)[:1] if question else []
    if questions:
        told["question"] = {"text": questions[0].render(), **asdict(questions[0])}
    for path in exports:
        session.export(path, top)
    if file is not None:
        session.save(file)
    if as_json:
        return json.dumps(told, indent=2, ensure_ascii=False)
    lines = [session.render(top)]
    lines += ["", f"Next: {questions[0].render()}"] if questions else []
    lines += ["", str(told["answer"])] if "answer" in told else []
    return "\n".join(lines)
