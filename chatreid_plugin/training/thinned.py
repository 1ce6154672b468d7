"""The list of records that the cutoff guard has thinned, and the report at the end of an epoch.

``chatreid_thinned.txt`` in the output folder has a line for each: record id, tab, images left out. Several processes
write it: data loader workers in lazy mode, mapping processes in the eager one.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import TrainerCallback

from ..printing import say


LIST_NAME = "chatreid_thinned.txt"
# The environment reaches data loader workers and mapping processes, forked or spawned; as a field of the guard the
# path would be a part of the key of datasets' map cache.
LIST_VARIABLE = "CHATREID_THINNED_LIST"


def note_thinned(record_id: str, images: int) -> None:
    """Write down that a record has lost this many images; nothing outside a run."""
    path = os.environ.get(LIST_VARIABLE)
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # One short write at the end of the file: lines of several processes do not mix (POSIX, O_APPEND).
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{record_id}\t{images}\n")


def start_thinned_list(training_args: Any) -> None:
    """Make ``chatreid_thinned.txt`` in the output folder this run's list; a resumed run continues it."""
    path = Path(training_args.output_dir) / LIST_NAME
    os.environ[LIST_VARIABLE] = str(path.absolute())
    if training_args.process_index == 0 and training_args.resume_from_checkpoint is None:
        # The other processes wait for this one inside get_dataset, before they tokenize anything.
        path.unlink(missing_ok=True)


def _read_list(path: Path) -> dict[str, int]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {record_id: int(images) for record_id, images in (line.split("\t") for line in lines)}


def describe_thinned() -> str | None:
    """Return what the list says so far, each record counted once; None if nothing has been thinned."""
    path = Path(os.environ.get(LIST_VARIABLE, LIST_NAME))
    thinned = _read_list(path)
    if not thinned:
        return None
    images = sum(thinned.values())
    return f"{len(thinned)} record(s) over cutoff_len lost {images} gallery image(s); {path} lists them."


def _list_image_records(dataset: Any, column: str) -> Iterator[pa.Array]:
    """Yield batches of the record id of every image of a data set."""
    for batch in dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000):
        for chunk in batch[column].chunks:
            yield chunk.flatten().field("record")


def note_mapped(aligned: Any, tokens: Any) -> None:
    """Write down what a map has thinned, where its result comes from datasets' cache and nothing was tokenized.

    Args:
        aligned: the data set with ``_images`` before the map.
        tokens: the one with ``images`` after it; packed or not.
    """
    path = os.environ.get(LIST_VARIABLE)
    before, after = (sum(map(len, _list_image_records(*pair))) for pair in ((aligned, "_images"), (tokens, "images")))
    if path is None or before == after:
        return
    lost: Counter[str] = Counter()
    for dataset, column, sign in ((aligned, "_images", 1), (tokens, "images", -1)):
        for records in _list_image_records(dataset, column):
            for count in records.value_counts().to_pylist():
                lost[count["values"]] += sign * count["counts"]
    known = _read_list(Path(path))
    for record_id, images in lost.items():
        if images and record_id and record_id not in known:
            note_thinned(record_id, images)


def copy_thinned(folder: Path, back: bool = False) -> None:
    """Keep the run's list beside saved tokens, or bring it ``back`` with them.

    Args:
        folder: with the tokens.
        back: from the folder to the run.
    """
    path = os.environ.get(LIST_VARIABLE)
    if path is None:
        return
    source, target = (folder / LIST_NAME, Path(path)) if back else (Path(path), folder / LIST_NAME)
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


class ThinnedReport(TrainerCallback):
    """Says at the end of each epoch, on the first process, how many records have been thinned so far.

    Data loader workers tokenize, so this process reads the list that they write. Without a shared file system, the
    list holds the first node's records alone.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print one line if there is something to say."""
        line = describe_thinned() if state.is_world_process_zero else None
        if line is not None:
            say(f"chatreid: {line}", aside=True)
