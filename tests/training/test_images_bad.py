"""Records with unreadable images: replaced by the next one, listed once, whatever reads them."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.records import Answer, ImageReference, Instruction
from chatreid_plugin.training.images import LIST_NAME, LONGEST_RUN, BadImageList, SkippingDataset


RECORDS = 8


def make_record(number: int, stated: bool = True) -> Instruction:
    size = (64, 128) if stated else (0, 0)
    images = tuple(ImageReference(f"{number}{part}.jpg", *size) for part in "qab")
    return Instruction(f"r{number}", "standard_reid", images, 1, Answer(indices=(0,)), dataset="tiny")


@pytest.fixture
def load_skipping(load_rows: Callable[..., Any], write_dataset: Callable[..., Path], tmp_path: Path) -> Any:
    """Return a function that gives eight records' training set, whose images lie in ``tmp_path``."""

    def load(stated: bool = True, **changes: Any) -> Any:
        write_dataset(tmp_path / "info", [make_record(n, stated) for n in range(RECORDS)], tmp_path)
        keys = {"dataset": "made", "dataset_dir": str(tmp_path / "info"), "chatreid_bad_image": "skip"}
        return load_rows(3, **(keys | changes))

    for number in range(RECORDS):
        for part in "qab":
            pixels = np.random.default_rng(number).integers(0, 256, (128, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}{part}.jpg")
    return load


def list_ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["images"][0]["record"] for row in rows]


def read_list(folder: Path) -> list[dict[str, str]]:
    path = folder / "out" / LIST_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spoil(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "other size":
        Image.new("RGB", (65, 128)).save(path)
    else:
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"no image" * 50}[kind])


FAULTS = {
    "missing": "does not exist",
    "empty": "cannot be opened: ",
    "text": "cannot be opened: ",
    "truncated": "is damaged: ",
    "other size": "is 65x128 pixels, but the record says 64x128",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_record_with_a_bad_image_is_replaced_by_the_next(
    load_skipping: Any, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(tmp_path / "2b.jpg", kind)
    rows = load_skipping()
    assert len(rows) == RECORDS
    assert list_ids([rows[n] for n in range(RECORDS)]) == ["r0", "r1", "r3", "r3", "r4", "r5", "r6", "r7"]
    (line,) = read_list(tmp_path)
    assert (line["path"], line["record"]) == (str(tmp_path / "2b.jpg"), "r2")
    assert line["reason"].startswith(FAULTS[kind])
    error = capsys.readouterr().err
    assert error.count("2b.jpg (record r2)") == 1 and "1 bad image(s) so far" in error


def test_missing_file_of_unknown_size_is_skipped_too(load_skipping: Any, tmp_path: Path) -> None:
    spoil(tmp_path / "2q.jpg", "missing")
    rows = load_skipping(stated=False)
    assert list_ids(rows.__getitems__([1, 2])) == ["r1", "r3"]
    assert rows[1]["input_ids"] == load_skipping()[1]["input_ids"]


def test_search_goes_on_past_bad_neighbours_and_wraps(load_skipping: Any, tmp_path: Path) -> None:
    for name in ("6q", "7a", "7b", "0q"):
        spoil(tmp_path / f"{name}.jpg", "missing")
    rows = load_skipping()
    assert list_ids(rows.__getitems__([5, 6, 7])) == ["r5", "r1", "r1"]
    assert sorted(Path(line["path"]).stem for line in read_list(tmp_path)) == ["0q", "6q", "7a", "7b"]


def test_good_rows_are_those_of_raise_and_so_are_their_pixels(
    load_skipping: Any, tokenizer_module: dict[str, Any], parse: Callable[..., Any]
) -> None:
    import torch
    from llamafactory.data import get_template_and_fix_tokenizer

    skipping, raising = load_skipping(), load_skipping(chatreid_bad_image="raise")
    assert isinstance(skipping, SkippingDataset)
    plugin = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parse(3).data).mm_plugin
    for first, second in zip(skipping.__getitems__([0, 5]), raising.__getitems__([0, 5]), strict=True):
        assert first.keys() == second.keys()
        for name in ("input_ids", "attention_mask", "labels"):
            assert first[name] == second[name]
        pixels: list[Any] = [
            plugin.get_mm_inputs(
                row["images"], [], [], [3], [0], [0], [row["input_ids"]], tokenizer_module["processor"]
            )
            for row in (first, second)
        ]
        assert torch.equal(pixels[0]["pixel_values"], pixels[1]["pixel_values"])


def test_image_is_decoded_once(
    load_skipping: Any, tokenizer_module: dict[str, Any], parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.data import get_template_and_fix_tokenizer

    rows = load_skipping()
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda source, *rest: opened.append(source) or original(source, *rest))
    plugin = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parse(3).data).mm_plugin
    row = rows[4]
    plugin.get_mm_inputs(row["images"], [], [], [3], [0], [0], [row["input_ids"]], tokenizer_module["processor"])
    assert [Path(path).stem for path in opened] == ["4q", "4a", "4b"]


def test_image_folder_that_is_not_there_stops_the_run(load_skipping: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"Record 0 .* {LONGEST_RUN} in a row, .* Check that media_dir"):
        load_skipping(media_dir=str(tmp_path / "not_mounted"))
    assert len(read_list(tmp_path)) == 3 * RECORDS


def test_bad_record_still_stops_the_run(load_skipping: Any) -> None:
    rows = load_skipping()
    with pytest.raises(IndexError):
        _ = rows[RECORDS]
    with pytest.raises(IndexError):  # a loop over the rows has to end
        rows.__getitems__([0, RECORDS])


def test_raise_stops_and_lists_nothing(load_skipping: Any, tmp_path: Path) -> None:
    spoil(tmp_path / "2b.jpg", "missing")
    rows = load_skipping(chatreid_bad_image="raise")
    assert list_ids([rows[2]]) == ["r2"]  # the collator will stop: test_template_images.py
    assert read_list(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chatreid_bad_image": "ignore"}, "chatreid_bad_image must be raise or skip, not 'ignore'"),
        ({"chatreid_bad_image": "skip", "chatreid_lazy": False}, "chatreid_bad_image: skip needs chatreid_lazy: true"),
    ],
)
def test_wrong_keys_are_one_clear_error(parse: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(1, **changes)


def test_evaluation_set_skips_too_and_never_draws_from_the_training_set(
    load_skipping: Any, parse: Callable[..., Any], tokenizer_module: dict[str, Any], tmp_path: Path
) -> None:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer

    load_skipping()
    keys = {"dataset": "made", "dataset_dir": str(tmp_path / "info"), "chatreid_bad_image": "skip"}
    parsed = parse(3, val_size=0.5, **keys)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parsed.data)

    def load() -> Any:
        return get_dataset(template, parsed.model, parsed.data, parsed.training, stage="sft", **tokenizer_module)

    before = {name: set(list_ids([rows[n] for n in range(4)])) for name, rows in load().items()}
    spoil(tmp_path / f"{min(before['eval_dataset'])[1:]}q.jpg", "missing")
    spoil(tmp_path / f"{min(before['train_dataset'])[1:]}q.jpg", "missing")
    after = {name: set(list_ids([rows[n] for n in range(4)])) for name, rows in load().items()}
    for name, ids in before.items():
        assert after[name] == ids - {min(ids)}


def write_many(path: Path, first: int) -> None:
    bad_images = BadImageList(path)
    for number in range(200):
        # Each image is met by two of the four processes.
        bad_images.add({"path": f"/images/{(first + number) % 400}.jpg" * 20, "record": f"r{number}"}, "is damaged.")


def test_processes_write_whole_lines_and_each_image_once(tmp_path: Path) -> None:
    path = tmp_path / "out" / LIST_NAME
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(path, first)) for first in (0, 100, 200, 300)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    paths = [line["path"] for line in read_list(tmp_path)]
    assert len(paths) == len(set(paths)) == 400


def test_line_cut_short_by_a_full_disk_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / LIST_NAME
    path.write_text('{"path": "a.jpg", "record": "r", "reason": "x"}\n{"path": "b.j\n')
    bad_images = BadImageList(path)
    bad_images.add({"path": "a.jpg", "record": "r"}, "x")
    bad_images.add({"path": "c.jpg", "record": "r"}, "x")
    assert path.read_text().count("a.jpg") == path.read_text().count("c.jpg") == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_list_of_an_earlier_run_is_continued_only_when_resumed(
    parse: Callable[..., Any], tmp_path: Path, resumed: bool
) -> None:
    path = tmp_path / "out" / LIST_NAME
    path.parent.mkdir()
    path.touch()
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):  # the marks of a whole checkpoint
        (tmp_path / name).touch()
    parse(1, chatreid_bad_image="skip", resume_from_checkpoint=str(tmp_path) if resumed else None)
    assert path.exists() == resumed


def test_spawned_workers_skip_and_list_alike(load_skipping: Any, tmp_path: Path) -> None:
    import torch.utils.data

    spoil(tmp_path / "1q.jpg", "missing")
    spoil(tmp_path / "6q.jpg", "empty")
    loader: Any = torch.utils.data.DataLoader(
        load_skipping(), batch_size=2, num_workers=2, collate_fn=list_ids, multiprocessing_context="spawn"
    )
    assert [record for batch in loader for record in batch] == ["r0", "r2", "r2", "r3", "r4", "r5", "r7", "r7"]
    assert sorted(Path(line["path"]).stem for line in read_list(tmp_path)) == ["1q", "6q"]
