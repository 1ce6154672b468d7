"""The loss of ChatReID runs: computed where there are answers, and the same however a step is cut.

Three things are otherwise than in stock LLaMA-Factory 0.9.5:

- The output layer, 152,000 words wide, runs on the positions that predict an answer's token and on no other. One token
  in seven of the paper's records is one.
- The loss is the mean over all answer tokens of an optimizer step (``chatreid_loss: tokens``), or the mean over its
  records of each record's mean (``records``), whatever the micro-batch, the accumulation and the number of processes.
  Stock takes the mean of the micro-batches' means, in which a token counts the more the fewer its batch has: its
  ``CustomSeq2SeqTrainer`` sets ``model_accepts_loss_kwargs`` to False wherever there is an image processor, and
  ``Trainer.training_step`` then divides each batch's mean by the number of batches.
- Each task's own loss and its share in the whole are logged, in training and in evaluation.

The model is called as always, through whatever DDP, FSDP or DeepSpeed have wrapped it in. transformers' Trainer has a
place for a loss of one's own, ``compute_loss_func``. It hands over the number of items of a step in all processes and
multiplies by that of processes, since gradients are averaged over them. The output layer gets a forward hook
(transformers' ``logits_to_keep`` takes positions that all rows have in common).

Nothing here asks a GPU for a number in the middle of a step, which would stop the launching of its work: positions
come with the batch, from the data loader's workers.

This file imports nothing of LLaMA-Factory: a spawned worker imports it to unpickle a ``RecordCollator``.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from ..errors import ConfigError
from ..printing import say
from ..tasks import TASKS
from ..upstream import get_upstream
from .compat import get_function


KEY = "chatreid_loss"
WEIGHTINGS = ("tokens", "records")
IGNORED = -100  # the label of a token that is not learnt
# In a batch of B rows of T tokens, of R records at most: of each answer token, the position before it, which predicts
# it, among the B x T, and its record among the B x R; the task of each record, (B, R).
ANSWERS, RECORDS, RECORD_TASKS = "chatreid_answers", "chatreid_records", "chatreid_tasks"
OURS = (ANSWERS, RECORDS, RECORD_TASKS)
TASK_NAMES = (*TASKS, "other")  # other: data sets in a mixture that are not ours
OTHER = len(TASK_NAMES) - 1
_NUMBERS = {name: number for number, name in enumerate(TASK_NAMES)}
# What computes a loss of its own, or within the model: by the arguments that have the key.
_OTHER_LOSSES = {
    "finetuning": ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "use_mca", "use_hyper_parallel"),
    "model": ("enable_liger_kernel", "use_unsloth", "use_kt", "moe_aux_loss_coef"),
    "training": ("use_liger_kernel", "label_smoothing_factor"),
}


def find_obstacle(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> str | None:
    """Return what keeps a recipe from having our loss, mostly a key that asks for another; None if nothing does."""
    arguments = {"finetuning": finetuning_args, "model": model_args, "training": training_args}
    for owner, names in _OTHER_LOSSES.items():
        for name in names:
            if getattr(arguments[owner], name, None):
                return name
    if training_args.fp8 and training_args.fp8_backend == "te":
        return "fp8_backend: te"  # Transformer Engine's layers take multiples of eight rows, the output layer too
    if data_args.chatreid_loss == "records" and data_args.packing and not data_args.neat_packing:
        return "packing without neat_packing"  # nothing tells the records of a pack apart
    parallel = getattr(training_args, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
        return "parallelism_config"  # a process has a part of each sequence
    return "several GPUs in one process" if training_args.n_gpu > 1 else None


def choose_loss(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> str | None:
    """Return how the run's loss weighs, ``tokens`` or ``records``; None for LLaMA-Factory's own loss.

    Runs with a template that is not ours, and stages other than ``sft``, have LLaMA-Factory's own. So has, after a
    line that says so, a run that asks for another loss, unless it asks for ``records`` too.

    Raises:
        ConfigError: the run asks for ``records`` and cannot have it.
    """
    ours = str(data_args.template).startswith("chatreid")
    if not ours or finetuning_args.stage != "sft":
        if data_args.chatreid_loss == "records":
            raise ConfigError(
                f"{KEY}: records needs `template: chatreid` and `stage: sft`, found template {data_args.template!r} "
                f"and stage {finetuning_args.stage!r}. Remove {KEY}, or change the other two."
            )
        return None
    obstacle = find_obstacle(model_args, data_args, training_args, finetuning_args)
    if obstacle is None:
        return data_args.chatreid_loss
    if data_args.chatreid_loss == "records":
        raise ConfigError(f"{KEY}: records does not work with {obstacle}. Change one of the two.")
    if training_args.process_index == 0:
        say(f"chatreid: the loss is LLaMA-Factory's own, because of {obstacle}.", aside=True)
    return None


@dataclass
class RecordCollator:
    """LLaMA-Factory's collator, whose batches also say where answers are, and of which record and task."""

    collator: Any

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Return the batch with what ``OURS`` names, which the trainer takes out before the model."""
        rows = [_list_records(feature) for feature in features]  # first: the collator takes the images out
        batch = self.collator(features)
        batch.update(describe_answers(batch["labels"], rows))
        return batch


def describe_answers(labels: Tensor, rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Tensor]:
    """Return what ``OURS`` names, for labels (B, T) and the (first token, task) of each record of each row."""
    longest, width = max(map(len, rows)), labels.shape[1]
    filled = [[*row, *[(width, OTHER)] * (longest - len(row))] for row in rows]
    starts, tasks = torch.tensor(filled).unbind(-1)
    row, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    # The token that is predicted says the record: its predecessor may be the end of the one before.
    within = (starts[row] <= place[:, None] + 1).sum(1) - 1
    return {ANSWERS: row * width + place, RECORDS: row * longest + within, RECORD_TASKS: tasks}


def _list_records(feature: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (first token, task) of each record of a row: several under ``neat_packing``, else one."""
    images = feature.get("images") or ()
    tasks = [_NUMBERS.get(image.get("task", ""), OTHER) if isinstance(image, Mapping) else OTHER for image in images]
    packing = feature.get("packing_params")
    if packing is None:  # plain packing mixes tasks and does not say where a record begins
        return [(0, tasks[0] if len(set(tasks)) == 1 else OTHER)]
    # The packed images' records; a row without images has one number that is none's.
    owners = dict(zip(reversed(packing["image_subseq_ids"]), reversed(tasks), strict=False))
    starts = packing["sequence_boundaries"][:-1]
    return [(start, owners.get(number, OTHER)) for number, start in enumerate(starts)]


def list_items(batch: Mapping[str, Tensor], weighting: str) -> Tensor:
    """Return a number for each answer token, or record with one, of a batch; ``IGNORED`` among them counts nothing."""
    if weighting == "tokens":
        return batch[RECORDS]
    return torch.full_like(batch[RECORD_TASKS].flatten(), IGNORED).index_fill(0, batch[RECORDS], 0)


def describe_tasks(sums: Tensor, prefix: str = "") -> dict[str, float]:
    """Return what is logged of each task's (part, weight): its mean loss, and its share in the whole loss."""
    whole = float(sums[:, 0].sum())
    seen = [(name, *pair) for name, pair in zip(TASK_NAMES, sums.tolist(), strict=True) if pair[1]]
    losses = {f"{prefix}loss/{name}": part / weight for name, part, weight in seen}
    return losses | {f"{prefix}share/{name}": part / whole if whole else 0.0 for name, part, _ in seen}


class AnswerLoss:
    """The loss of one trainer's batches; called by it as ``compute_loss_func``.

    Args:
        weighting: ``tokens`` or ``records``.
        head: the model's output layer, which gets a hook; None: it computes all logits.
        accelerator: the trainer's.
    """

    def __init__(self, weighting: str, head: torch.nn.Module | None, accelerator: Any) -> None:
        self.weighting = weighting
        self.accelerator = accelerator
        self.wants_logits = False  # of all positions, in evaluation
        # Of training (True) and of evaluation: each task's part in the loss and its weight, batch by batch.
        self._sums: dict[bool, list[Tensor]] = {True: [], False: []}
        # Of the batch at hand:
        self._is_training = True
        self._answers: Tensor
        self._records: Tensor
        self._tasks: Tensor
        self._shape: torch.Size | None = None  # (B, T) if the logits of answers alone are wanted
        if head is not None:
            head.register_forward_pre_hook(self._keep_answers)

    @contextmanager
    def follow(self, inputs: dict[str, Any], is_training: bool) -> Generator[None]:
        """Take what is ours out of a batch, and keep to its answers while the model runs."""
        self._is_training = is_training
        self._answers, self._records, self._tasks = (inputs.pop(name) for name in OURS)
        self._shape = None if self.wants_logits and not is_training else inputs["labels"].shape
        try:
            yield
        finally:
            self._shape = None

    def _keep_answers(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._shape is None or not args or args[0].shape[:2] != self._shape:
            return None
        return (args[0].flatten(0, 1).index_select(0, self._answers), *args[1:])

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return a batch's part in the mean over the step.

        Args:
            outputs: the model's.
            labels: (B, T).
            num_items_in_batch: tokens or records of the step, over all processes.
        """
        logits = outputs.logits
        if logits.dim() == 3:  # the hook was not asked
            logits = logits.flatten(0, 1).index_select(0, self._answers)
        targets = labels.flatten().index_select(0, self._answers + 1)
        losses = cross_entropy(logits.float(), targets, reduction="none")
        parts, weights = self._weigh(losses)
        self._note(parts.detach(), weights)
        items = weights.sum() if num_items_in_batch is None else num_items_in_batch
        return parts.sum() / torch.as_tensor(items, device=parts.device).clamp(min=1)

    def _weigh(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return each record's part in the loss and its weight, (B, records)."""
        nothing = losses.new_zeros(self._tasks.numel())
        parts = nothing.index_add(0, self._records, losses)
        counts = nothing.index_add(0, self._records, torch.ones_like(losses))
        if self.weighting == "records":
            parts, counts = parts / counts.clamp(min=1), counts.clamp(max=1)
        return parts.view_as(self._tasks), counts.view_as(self._tasks)

    def _note(self, parts: Tensor, weights: Tensor) -> None:
        pairs = torch.stack([parts, weights], dim=-1)
        rows = (one_hot(self._tasks, len(TASK_NAMES))[..., None] * pairs[:, :, None]).sum(1)  # (B, tasks, 2)
        if not self._is_training:  # the last batch is filled up with records that were there before
            rows = self.accelerator.gather_for_metrics(rows)
        self._sums[self._is_training].append(rows.sum(0))

    def _take_sums(self, is_training: bool) -> Tensor:
        sums, self._sums[is_training] = self._sums[is_training], []
        return torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(len(TASK_NAMES), 2)

    def read_training(self) -> dict[str, float]:
        """Return what is logged of the steps since the last call; every process has to call."""
        sums = self._take_sums(True).float().to(self.accelerator.device)  # not all devices have doubles
        return describe_tasks(self.accelerator.gather(sums[None]).sum(0))

    def read_evaluation(self, prefix: str) -> dict[str, float]:
        """Return what is logged of an evaluation: its mean loss, each task's loss and share."""
        sums = self._take_sums(False)
        part, weight = sums.sum(0).tolist()
        return {f"{prefix}loss": part / weight} | describe_tasks(sums, prefix) if weight else {}


_Trainer: Any = object  # for the type checker: what is mixed in calls LLaMA-Factory's trainer


class AnswerTrainer(_Trainer):
    """Mixed into LLaMA-Factory's trainer: its own methods, with our loss in runs that ``choose_loss`` gave one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weighting = getattr(self.finetuning_args, KEY, None)
        self.answer_loss: AnswerLoss | None = None
        if weighting is not None:
            self.answer_loss = AnswerLoss(weighting, self.model.get_output_embeddings(), self.accelerator)
            self.compute_loss_func = self.answer_loss
            self.data_collator = RecordCollator(self.data_collator)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self.answer_loss is not None:
            # transformers counts labels, over all processes.
            batch_samples = [{"labels": list_items(batch, self.answer_loss.weighting)} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return a batch's loss, computed from its answers alone."""
        if self.answer_loss is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.answer_loss.follow(inputs, model.training):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> Any:
        """Evaluate a batch; ``compute_accuracy`` and its like get the logits of all positions."""
        if self.answer_loss is not None:
            self.answer_loss.wants_logits = not prediction_loss_only
            if self.args.predict_with_generate:  # there is no loss then, and `generate` would refuse them
                for name in OURS:
                    inputs.pop(name, None)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate a data set; its loss is the mean over its tokens or records, not over its batches."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.answer_loss is not None:
            output.metrics.update(self.answer_loss.read_evaluation(f"{metric_key_prefix}_"))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each task's loss and share to a line about training."""
        if self.answer_loss is not None and "loss" in logs:
            logs |= self.answer_loss.read_training()
        super().log(logs, start_time)


def extend_loss(module: ModuleType) -> None:
    """Put a trainer with this loss in the place of LLaMA-Factory's, once, in ``llamafactory.train.sft.trainer``."""
    stock = get_upstream(module, "CustomSeq2SeqTrainer")
    if issubclass(stock, AnswerTrainer):
        return
    get_function(module, "CustomSeq2SeqTrainer.compute_loss")
    get_function(module, "CustomSeq2SeqTrainer.prediction_step")
    get_function(module, "CustomSeq2SeqTrainer.evaluation_loop")
    get_function(module, "CustomSeq2SeqTrainer.log")
    get_function(module, "CustomSeq2SeqTrainer._get_num_items_in_batch")
    mixed = type(stock.__name__, (AnswerTrainer, stock), {"__module__": module.__name__})
    module.CustomSeq2SeqTrainer = mixed  # type: ignore[attr-defined]
