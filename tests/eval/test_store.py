"""Tests of chatreid_plugin.eval.scores: exact scores, resume after a cut, another fingerprint, damage."""

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from chatreid_plugin.datasets.benchmark import Query, make_image_query
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.scores import Scored, ScoreStore, remove_scores
from chatreid_plugin.locks import hold_folder
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import read_manifest


FINGERPRINT: dict[str, Any] = {"model": "one", "pixels": 784}
SCORES = np.array([0.1, -3e38, 1e-38, 16777216.0], dtype=np.float32)


@pytest.fixture
def records(make_world: Callable[..., Path]) -> list[ImageRecord]:
    return read_manifest(make_world(images=False))[0]


def get(store: ScoreStore, query: Query, candidates: list[ImageRecord]) -> Any:
    saved = store.get(store.make_key(query, candidates), len(candidates))
    return None if saved is None else saved.scores


def add(store: ScoreStore, query: Query, candidates: list[ImageRecord], scores: Any, filled: bool = False) -> None:
    store.add(store.make_key(query, candidates), Scored(scores, filled))


def fill(folder: Path, records: list[ImageRecord], count: int = 3) -> Path:
    with ScoreStore(folder, FINGERPRINT) as store:
        for number, query in enumerate(records[:count]):
            add(store, make_image_query(query), records[4:8], SCORES + np.float32(number))
        return store.path


def read(folder: Path, records: list[ImageRecord], fingerprint: dict[str, Any] = FINGERPRINT) -> list[Any]:
    with ScoreStore(folder, fingerprint) as store:
        return [get(store, make_image_query(query), records[4:8]) for query in records[:3]]


def test_gives_back_the_same_bits(tmp_path: Path, records: list[ImageRecord]) -> None:
    fill(tmp_path, records)
    for number, scores in enumerate(read(tmp_path, records)):
        assert scores.dtype == np.float32
        assert scores.tobytes() == (SCORES + np.float32(number)).tobytes()


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_drops_a_torn_last_line_and_goes_on(
    tmp_path: Path, records: list[ImageRecord], cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(tmp_path, records)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with ScoreStore(tmp_path, FINGERPRINT) as store:
        assert get(store, make_image_query(records[1]), records[4:8]) is not None
        assert get(store, make_image_query(records[2]), records[4:8]) is None
        add(store, make_image_query(records[2]), records[4:8], SCORES + np.float32(2))
    assert path.read_bytes() == whole
    assert "torn line" in caplog.text


@pytest.mark.parametrize("left", [0, 5])
def test_starts_over_when_the_header_is_torn(tmp_path: Path, records: list[ImageRecord], left: int) -> None:
    path = fill(tmp_path, records)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    assert read(tmp_path, records) == [None] * 3
    fill(tmp_path, records)
    assert path.read_bytes() == whole


def test_starts_a_new_file_and_says_so_when_the_fingerprint_changed(
    tmp_path: Path, records: list[ImageRecord], caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(tmp_path, records)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, records, FINGERPRINT | {"model": "two"}) == [None] * 3
    assert path.name in caplog.text
    assert "another model, prompt or setting" in caplog.text
    assert len(list(tmp_path.glob("scores-*.jsonl"))) == 2
    assert all(scores is not None for scores in read(tmp_path, records))


def test_scores_again_when_the_candidates_changed(tmp_path: Path, records: list[ImageRecord]) -> None:
    fill(tmp_path, records)
    with ScoreStore(tmp_path, FINGERPRINT) as store:
        assert get(store, make_image_query(records[0]), records[4:9]) is None
        assert get(store, make_image_query(records[0]), records[7:3:-1]) is None


def test_removes_the_scores_of_every_process_but_of_no_other_fingerprint(
    tmp_path: Path, records: list[ImageRecord]
) -> None:
    fill(tmp_path, records)
    with ScoreStore(tmp_path, FINGERPRINT, rank=5) as left:
        add(left, make_image_query(records[3]), records[4:8], SCORES)
    with ScoreStore(tmp_path, {}) as other:
        add(other, make_image_query(records[0]), records[4:8], SCORES)
    remove_scores(tmp_path, FINGERPRINT)
    assert list(tmp_path.glob("scores-*")) == [other.path]
    assert read(tmp_path, records) == [None] * 3
    assert read(tmp_path, records, {})[0] is not None


@pytest.mark.parametrize("line", [b"not json\n", b"{}\n", b"[1]\n", b'{"query":"a","candidates":"b","scores":"!"}\n'])
def test_names_the_line_when_the_middle_is_damaged(tmp_path: Path, records: list[ImageRecord], line: bytes) -> None:
    path = fill(tmp_path, records)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(DataError, match=rf"{path.name}, line 3: damaged"):
        ScoreStore(tmp_path, FINGERPRINT)


def test_refuses_a_file_with_another_header(tmp_path: Path, records: list[ImageRecord]) -> None:
    path = fill(tmp_path, records)
    path.write_bytes(path.read_bytes().replace(b'"one"', b'"two"'))
    with pytest.raises(DataError, match="line 1: not the header"):
        ScoreStore(tmp_path, FINGERPRINT)


def test_skips_a_blank_line(tmp_path: Path, records: list[ImageRecord]) -> None:
    path = fill(tmp_path, records)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\n", *lines[2:], b" \n"]))
    assert all(scores is not None for scores in read(tmp_path, records))


def test_names_the_folder_when_another_run_has_the_file(tmp_path: Path, records: list[ImageRecord]) -> None:
    path = fill(tmp_path, records)
    whole = path.read_bytes()
    with (
        ScoreStore(tmp_path, FINGERPRINT),
        pytest.raises(ConfigError, match=rf"another evaluation is writing into {tmp_path} \(it holds {path.name}\)"),
    ):
        ScoreStore(tmp_path, FINGERPRINT)
    assert path.read_bytes() == whole
    assert all(scores is not None for scores in read(tmp_path, records))


def test_lock_holds_against_another_process_and_ends_with_it(tmp_path: Path, records: list[ImageRecord]) -> None:
    code = (
        "import sys; from pathlib import Path; from chatreid_plugin.locks import hold_folder\n"
        "from chatreid_plugin.eval.scores import ScoreStore\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"with hold_folder(folder, 'evaluation'), ScoreStore(folder, {FINGERPRINT}):\n"
        "    print('open', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match="another evaluation"):
            ScoreStore(tmp_path, FINGERPRINT)
        with pytest.raises(ConfigError, match="another evaluation"), hold_folder(tmp_path, "evaluation"):
            pass
        process.kill()
        process.wait()
    with hold_folder(tmp_path, "evaluation"):
        pass
    assert read(tmp_path, records) == [None] * 3


def test_ranks_of_one_run_have_files_of_their_own(tmp_path: Path, records: list[ImageRecord]) -> None:
    with ScoreStore(tmp_path, FINGERPRINT) as first, ScoreStore(tmp_path, FINGERPRINT, rank=1) as second:
        add(second, make_image_query(records[1]), records[4:8], SCORES)
        first.finished |= second.finished
        first.take_over()
    assert [scores is not None for scores in read(tmp_path, records)] == [False, True, False]
    assert len(list(tmp_path.glob("scores-*"))) == 1


def test_remembers_where_something_was_filled_in(tmp_path: Path, records: list[ImageRecord]) -> None:
    with ScoreStore(tmp_path, FINGERPRINT, rank=1) as other:
        for number, query in enumerate(records[:3]):
            add(other, make_image_query(query), records[4:8], SCORES, filled=number == 1)
    with ScoreStore(tmp_path, FINGERPRINT) as store:
        store.take_over()
    with ScoreStore(tmp_path, FINGERPRINT) as store:
        keys = [store.make_key(make_image_query(query), records[4:8]) for query in records[:3]]
        assert [store.finished[key].filled for key in keys] == [False, True, False]


def test_keeps_the_scores_of_other_candidates(tmp_path: Path, records: list[ImageRecord]) -> None:
    query = make_image_query(records[0])
    for count in (5, 3):
        with ScoreStore(tmp_path, FINGERPRINT) as store:
            add(store, query, records[4 : 4 + count], np.full(count, count, dtype=np.float32))
    with ScoreStore(tmp_path, FINGERPRINT) as store:
        for count in (5, 3):
            scores = get(store, query, records[4 : 4 + count])
            assert scores is not None and scores.tolist() == [count] * count


def test_stale_scores_of_a_later_rank_replace_no_valid_ones(tmp_path: Path, records: list[ImageRecord]) -> None:
    query = make_image_query(records[0])
    with ScoreStore(tmp_path, FINGERPRINT, rank=3) as stale:
        add(stale, query, records[5:9], SCORES * np.float32(0.5))
    with ScoreStore(tmp_path, FINGERPRINT, rank=1) as valid:
        add(valid, query, records[4:8], SCORES)
    with ScoreStore(tmp_path, FINGERPRINT) as store:
        store.take_over()
    with ScoreStore(tmp_path, FINGERPRINT) as store:
        scores = get(store, query, records[4:8])
        assert scores is not None and scores.tobytes() == SCORES.tobytes()


def test_scores_again_when_the_content_of_an_image_changed(tmp_path: Path, records: list[ImageRecord]) -> None:
    contents = {record.image_id: "1" for record in records}
    query, candidates = make_image_query(records[0]), records[4:8]
    with ScoreStore(tmp_path, FINGERPRINT, contents=contents) as store:
        add(store, query, candidates, SCORES)
    for changed, known in ((records[0], False), (records[5], False), (records[9], True)):
        with ScoreStore(tmp_path, FINGERPRINT, contents=contents | {changed.image_id: "2"}) as store:
            assert (get(store, query, candidates) is not None) is known


def test_names_the_folder_when_it_cannot_be_written_into(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # permissions would not stop a test that runs as root
    with pytest.raises(ConfigError, match=f"output_dir: {tmp_path} cannot be written into.*set another"):
        with hold_folder(tmp_path, "evaluation"):
            pass


def test_says_what_to_do_and_keeps_what_is_finished_when_the_disk_is_full(
    tmp_path: Path, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = fill(tmp_path, records, 1), os.write

    def write_little(file: int, content: memoryview) -> int:
        if len(content) < 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content[:50])

    with ScoreStore(tmp_path, FINGERPRINT) as store:
        monkeypatch.setattr(os, "write", write_little)
        with pytest.raises(
            DataError, match=f"{path} cannot be read or kept.*No space left.*Make room on the disk of output_dir"
        ):
            add(store, make_image_query(records[1]), records[4:8], SCORES)
    monkeypatch.undo()
    assert [scores is not None for scores in read(tmp_path, records)] == [True, False, False]


def test_explains_a_file_that_cannot_be_read_or_removed(
    tmp_path: Path, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fill(tmp_path, records)

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    for name, call in (
        ("read_bytes", lambda: ScoreStore(tmp_path, FINGERPRINT)),
        ("unlink", lambda: remove_scores(tmp_path, FINGERPRINT)),
    ):
        with monkeypatch.context() as patch, pytest.raises(DataError, match=f"{path}.*Permission denied"):
            patch.setattr(Path, name, refuse)
            call()
    assert all(scores is not None for scores in read(tmp_path, records))
