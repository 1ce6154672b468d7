"""Batches of records of like length, by the stock key ``train_sampling_strategy: group_by_length``.

Random batches of the paper's Stage 2 are padded to 1.6 times their tokens at batch 4 and to 2.1 times at 16; sorted
within 50 batches, to 1.02 times. Stock transformers does that, but not for us:

- It tokenizes every record to learn its length, and opens the images for it under ``chatreid_bad_image: skip``. Here a
  record's length follows from its images' sizes and its characters; some records of each wording are tokenized to
  learn how many tokens those make.
- It hands out a window's batches from long to short, so that steps follow one another task by task. Here whole steps
  are shuffled, and the ranks of one step still have like lengths, so that none waits for another.
- Its order comes from the global random state: ranks may disagree, and a resumed run goes on in another order. Here it
  follows from seed and epoch alone.
- It shuffles evaluation too, and predictions are then written beside the answers of other records.
"""

from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from accelerate.utils import broadcast
from numpy.typing import NDArray
from torch.utils.data import Sampler, SequentialSampler

from ..images import STAGE1_SIZE
from ..tasks import TASKS
from ..upstream import get_upstream
from .compat import get_function
from .images import SkippingDataset
from .loader import ORIGIN_COLUMN, LazyTokenizer


KEY, STRATEGY = "train_sampling_strategy", "group_by_length"
# As transformers: sorted within so many steps, or fewer, so that a data set has at least four such windows.
WINDOW_STEPS, SMALLEST_WINDOWS = 50, 4
# Records of each wording that are tokenized.
SAMPLED = 12
ROWS_AT_ONCE = 500_000
# A visual token's count for an image whose size the record does not say takes this one.
UNKNOWN_SIZE = STAGE1_SIZE
Numbers = NDArray[Any]
compute: Any = pyarrow.compute  # without types


def order_records(lengths: Numbers, step: int, rng: np.random.Generator) -> Numbers:
    """Return the positions of all records, shuffled, so that each step's have like lengths.

    The longest step comes first: what does not fit into memory fails at once.

    Args:
        lengths: of each record, in tokens.
        step: records that all processes together take at once.
        rng: decides the order.
    """
    order = rng.permutation(len(lengths))
    window = step * max(1, min(WINDOW_STEPS, len(order) // (step * SMALLEST_WINDOWS)))
    for start in range(0, len(order), window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort(-lengths[part], kind="stable")]
    whole = len(order) // step * step
    steps = order[:whole].reshape(-1, step)
    rng.shuffle(steps)
    if len(steps):
        longest = int(lengths[steps[:, 0]].argmax())
        steps[[0, longest]] = steps[[longest, 0]]
    return np.concatenate([steps.ravel(), order[whole:]])


class LengthSampler(Sampler[int]):
    """Hands out a data set's positions epoch by epoch, see ``order_records``.

    Args:
        lengths: of each record.
        step: records that all processes together take at once.
        seed: of the run.
        find_epoch: tells the number of the epoch that begins. accelerate tells a sampler by ``set_epoch``, but not in
            an epoch that a run of several processes is resumed in.
    """

    def __init__(self, lengths: Numbers, step: int, seed: int, find_epoch: Callable[[], int]) -> None:
        self.lengths, self.step, self.seed, self.find_epoch = lengths, step, seed, find_epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return map(int, order_records(self.lengths, self.step, np.random.default_rng([self.seed, self.find_epoch()])))


def measure_records(dataset: Any) -> Numbers | None:
    """Return the length of each record: that of its tokens if it has them, else an estimate; None if unknown."""
    if isinstance(dataset, SkippingDataset):
        return estimate_lengths(dataset.rows, dataset.tokenizer)
    if not isinstance(dataset, datasets.Dataset):
        return None
    options: Any = dataset.format["format_kwargs"]
    if isinstance(options.get("transform"), LazyTokenizer):
        return estimate_lengths(dataset.with_format(None), options["transform"])
    if "input_ids" not in dataset.column_names:
        return None
    lengths = _fill(compute.list_value_length(dataset.data.table["input_ids"]))
    return _take_rows(dataset, lengths)


def _take_rows(dataset: Any, values: Numbers) -> Numbers:
    """Return values of the rows of a data set's table for the rows of the data set."""
    indices = dataset._indices  # of a split, a sample or an interleaved mixture; None: all rows
    return values if indices is None else values[indices.column(0).to_numpy()]


def _fill(column: Any) -> Numbers:
    return compute.fill_null(column, 0).to_numpy()


def estimate_lengths(rows: Any, tokenizer: Any) -> Numbers:
    """Return about how many tokens each record of a lazy data set has.

    Args:
        rows: compact records.
        tokenizer: the ``LazyTokenizer`` that training will use.
    """
    guard = tokenizer.processor
    template, processor, data_args = guard.processor.template, guard.processor.processor, guard.processor.data_args

    @cache
    def count_tokens(size: int) -> int:
        width, height = divmod(size, 1 << 16)
        image = dict(zip(("width", "height"), (width, height) if width and height else UNKNOWN_SIZE, strict=True))
        grid = template.mm_plugin._get_mm_token_metadata([image], [], [], processor)["image_grid_thw"][0]
        return int(grid.prod()) // processor.image_processor.merge_size**2

    table = rows.data.table
    slices = [table.slice(start, ROWS_AT_ONCE) for start in range(0, table.num_rows, ROWS_AT_ONCE)]
    parts = [_read_facts(part, count_tokens) for part in slices]
    facts, visual, kinds = (_take_rows(rows, np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    lengths = visual + _count_words(facts, visual, kinds, lambda positions: tokenizer(rows[positions]))
    return np.minimum(lengths, data_args.cutoff_len)


def _read_facts(table: Any, count_tokens: Callable[[int], int]) -> tuple[Numbers, Numbers, Numbers]:
    """Return of each record (1, characters, images, answer's letters, turns), its visual tokens and its wording."""
    images = table["images"]
    flat = compute.list_flatten(images)
    width, height = (_fill(compute.struct_field(flat, name)).astype(np.int64) for name in ("width", "height"))
    sizes = pa.array((width << 16) + height).dictionary_encode()
    counts = np.array([count_tokens(size) for size in sizes.dictionary.to_pylist()], dtype=np.int32)
    visual = _sum_lists(counts[sizes.indices.to_numpy()], images)
    answer = table["answer"]
    characters = _count_characters(table["captions"]) + _count_characters(table["attributes"], "name", "value")
    characters += _fill(compute.binary_length(compute.struct_field(answer, "text")))
    letters = _fill(compute.list_value_length(compute.struct_field(answer, "indices")))
    turns = np.zeros(table.num_rows, dtype=np.int32)
    if "turns" in table.column_names:
        characters += _count_characters(table["turns"], "caption", "name", "value")
        turns = _fill(compute.list_value_length(table["turns"]))
    ones = np.ones(table.num_rows, dtype=np.int32)
    facts = np.stack([ones, characters, _fill(compute.list_value_length(images)), letters, turns], axis=1)
    tasks = _fill(compute.index_in(table["task"], value_set=pa.array(list(TASKS)))).astype(np.int64)
    wording = _fill(table["variant"]).astype(np.int64) + (1 << 15)
    origins = table[ORIGIN_COLUMN].to_numpy().astype(np.int64)
    return facts.astype(np.int32), visual, (origins * len(TASKS) + tasks << 16) + wording


def _sum_lists(values: Numbers, lists: Any) -> Numbers:
    """Return the sum of each list's values, which stand one after another."""
    ends = np.cumsum(_fill(compute.list_value_length(lists)))
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[np.concatenate([[0], ends])]
    return np.diff(sums).astype(np.int32)


def _count_characters(lists: Any, *names: str) -> Numbers:
    """Return how many bytes each list's strings have, or those of the named fields of its structures."""
    flat = compute.list_flatten(lists)
    columns = [compute.struct_field(flat, name) for name in names] or [flat]
    return np.sum([_sum_lists(_fill(compute.binary_length(column)), lists) for column in columns], axis=0)


def _count_words(
    facts: Numbers, visual: Numbers, kinds: Numbers, tokenize: Callable[[list[int]], dict[str, list[Any]]]
) -> Numbers:
    """Return about how many tokens of text each record has: linear in its facts, fitted for each wording."""
    words = np.zeros(len(facts), dtype=np.int32)
    for kind in np.unique(kinds):
        positions = np.flatnonzero(kinds == kind)
        spread = np.linspace(0, len(positions) - 1, min(SAMPLED, len(positions))).astype(int)
        chosen = positions[spread].tolist()
        found = [len(ids) for ids in tokenize(chosen)["input_ids"]] - visual[chosen]
        weights = np.linalg.lstsq(facts[chosen].astype(float), found.astype(float), rcond=None)[0]
        words[positions] = np.maximum(np.rint(facts[positions] @ weights), 1)
    return words


def extend_sampler(module: ModuleType) -> None:
    """Give runs with a template of ours these batches, inside ``llamafactory.train.sft.trainer``."""
    get_train_sampler = get_function(module, "CustomSeq2SeqTrainer._get_train_sampler")
    get_eval_sampler = get_function(module, "CustomSeq2SeqTrainer._get_eval_sampler")
    trainer = get_upstream(module, "CustomSeq2SeqTrainer")

    def is_grouped(self: Any) -> bool:
        # getattr: transformers 4 has another key, and a trainer made in Python has none of ours.
        wanted = getattr(self.args, KEY, None) == STRATEGY and not self.finetuning_args.disable_shuffling
        return wanted and getattr(self.finetuning_args, "chatreid_template", False)

    @wraps(get_train_sampler)
    def get_length_sampler(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths = measure_records(self.train_dataset) if is_grouped(self) else None
        if lengths is None:
            return get_train_sampler(self, *args, **kwargs)
        # The first process's, should another machine have rounded otherwise: all ranks must have one order.
        shared: Any = broadcast(torch.from_numpy(lengths.astype(np.int32)).to(self.accelerator.device))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step = self.args.train_batch_size * max(1, self.args.world_size)
        return LengthSampler(shared.cpu().numpy(), step, seed, lambda: int(self.state.epoch or 0))

    @wraps(get_eval_sampler)
    def get_ordered_sampler(self: Any, eval_dataset: Any) -> Any:
        if not is_grouped(self) or not hasattr(eval_dataset, "__len__"):
            return get_eval_sampler(self, eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    trainer._get_train_sampler, trainer._get_eval_sampler = get_length_sampler, get_ordered_sampler
