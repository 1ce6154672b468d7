"""The loss: stock's value and gradients where the batch is one, and the same however a step is cut."""

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.tasks import TASKS
from chatreid_plugin.training.loss import (
    ANSWERS,
    IGNORED,
    OTHER,
    OURS,
    RECORD_TASKS,
    RECORDS,
    TASK_NAMES,
    AnswerLoss,
    AnswerTrainer,
    RecordCollator,
    choose_loss,
    describe_answers,
    describe_tasks,
    extend_loss,
    find_obstacle,
    list_items,
)


WORDS, WIDTH = 11, 5
Batch = dict[str, torch.Tensor]


class Alone:
    """Stands for accelerate in a single process."""

    device = torch.device("cpu")
    gather = gather_for_metrics = staticmethod(lambda tensor: tensor)


class Words(torch.nn.Module):
    """The smallest language model: an embedding, and an output layer that notes how many positions it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        self.head = torch.nn.Linear(WIDTH, WORDS)
        self.double()
        self.positions = 0

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = self.head(self.embed(input_ids))
        self.positions = logits[..., 0].numel()
        return SimpleNamespace(logits=logits)


def run(model: Words, loss: AnswerLoss, batch: Batch, items: int, training: bool = True) -> torch.Tensor:
    """Return a batch's loss as the trainer computes it."""
    inputs = dict(batch)
    with loss.follow(inputs, training):
        labels = inputs.pop("labels")
        assert inputs.keys() == {"input_ids"}  # what the model is given
        return loss(model(**inputs), labels, num_items_in_batch=items)


def draw_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return rows of one to three records, some of which have no answer: tokens, labels, records, tasks."""
    rows: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(1, 9))):
        records = int(rng.integers(1, 4))
        lengths = rng.integers(2, 7, records)
        ids = rng.integers(0, WORDS, lengths.sum())
        learnt = rng.random(len(ids)) < 0.4
        learnt[np.cumsum(lengths) - lengths] = False  # a record begins with its question
        owners = np.repeat(np.arange(records), lengths)
        tasks = rng.integers(0, len(TASK_NAMES), records)
        rows.append({"ids": ids, "labels": np.where(learnt, ids, IGNORED), "owners": owners, "tasks": tasks})
    return rows


def collate(rows: Sequence[dict[str, Any]]) -> Batch:
    def pad(name: str, value: int) -> torch.Tensor:
        longest = max(len(row[name]) for row in rows)
        return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

    batch = {"input_ids": pad("ids", 0), "labels": pad("labels", IGNORED)}
    starts = [[list(row["owners"]).index(record) for record in range(len(row["tasks"]))] for row in rows]
    records = [list(zip(start, map(int, row["tasks"]), strict=True)) for start, row in zip(starts, rows, strict=True)]
    return batch | describe_answers(batch["labels"], records)


def count_items(batch: Batch, weighting: str) -> int:
    return int((list_items(batch, weighting) != IGNORED).sum())


def take_gradients(model: Words) -> torch.Tensor:
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return torch.cat(gradients)


@pytest.mark.parametrize("weighting", ["tokens", "records"])
def test_any_cut_of_a_step_gives_the_same_loss_gradients_and_log(weighting: str) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = draw_rows(rng)
        # By hand: each record's answer tokens, and the mean of them or of their means.
        model = Words()
        answers: dict[tuple[int, int], list[torch.Tensor]] = {}
        for number, row in enumerate(rows):
            logits = model(torch.tensor(row["ids"])).logits.log_softmax(-1)
            for place in range(1, len(row["ids"])):
                if row["labels"][place] != IGNORED:
                    value = -logits[place - 1, row["labels"][place]]
                    answers.setdefault((number, row["owners"][place]), []).append(value)
        if not answers:
            continue
        if weighting == "tokens":
            expected = torch.cat([torch.stack(values) for values in answers.values()]).mean()
        else:
            expected = torch.stack([torch.stack(values).mean() for values in answers.values()]).mean()
        expected.backward()
        gradients = take_gradients(model)

        loss = AnswerLoss(weighting, model.head, Alone())
        logs: list[dict[str, float]] = []
        for _ in range(3):
            # Two ranks and their micro-batches: the ranks' gradients are averaged, so each counts twice.
            cuts = np.sort(rng.integers(0, len(rows) + 1, int(rng.integers(0, 5)))).tolist()
            pairs = zip([0, *cuts], [*cuts, len(rows)], strict=True)
            batches = [collate(rows[start:end]) for start, end in pairs if start < end]
            items = sum(count_items(batch, weighting) for batch in batches)
            total = 0.0
            for batch in batches:
                rank_loss = run(model, loss, batch, items) * 2
                assert model.positions == int((batch["labels"] != IGNORED).sum())
                (rank_loss / 2).backward()
                total += float(rank_loss.detach()) / 2
            assert total == pytest.approx(float(expected.detach()), rel=1e-6)  # computed in float32, as stock
            torch.testing.assert_close(take_gradients(model), gradients, rtol=1e-5, atol=1e-7)
            logs.append(loss.read_training())
        assert logs[1] == pytest.approx(logs[0], rel=1e-5)
        assert logs[2] == pytest.approx(logs[0], rel=1e-5)
        tasks = {TASK_NAMES[rows[row]["tasks"][record]] for row, record in answers}
        assert logs[0].keys() == {f"{kind}/{task}" for kind in ("loss", "share") for task in tasks}
        assert sum(value for name, value in logs[0].items() if name.startswith("share/")) == pytest.approx(1)


def test_a_batch_without_answers_counts_nothing_and_gives_no_nan() -> None:
    model = Words()
    loss = AnswerLoss("records", model.head, Alone())
    batch = collate([{"ids": [1, 2, 3], "labels": [IGNORED] * 3, "owners": [0] * 3, "tasks": [0]}] * 2)
    assert count_items(batch, "records") == count_items(batch, "tokens") == 0
    value = run(model, loss, batch, 0)
    value.backward()
    assert float(value.detach()) == 0 and float(take_gradients(model).abs().sum()) == 0
    assert loss.read_training() == {}


def test_logits_of_all_positions_where_they_are_asked_for() -> None:
    model = Words()
    loss = AnswerLoss("tokens", model.head, Alone())
    batch = collate(draw_rows(np.random.default_rng(5)))
    items = count_items(batch, "tokens")
    value = float(run(model, loss, batch, items, training=False).detach())
    loss.wants_logits = True
    assert float(run(model, loss, batch, items, training=False).detach()) == pytest.approx(value, rel=1e-6)
    assert model.positions == batch["labels"].numel()
    run(model, loss, batch, items)
    assert model.positions < batch["labels"].numel()


def test_log_tells_each_tasks_mean_and_share() -> None:
    sums = torch.zeros(len(TASK_NAMES), 2)
    sums[0], sums[OTHER] = torch.tensor([3.0, 2.0]), torch.tensor([1.0, 4.0])
    first = next(iter(TASKS))
    assert describe_tasks(sums, "eval_") == {
        f"eval_loss/{first}": 1.5,
        "eval_loss/other": 0.25,
        f"eval_share/{first}": 0.75,
        "eval_share/other": 0.25,
    }


def collate_length(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    for feature in features:
        feature.pop("images", None)
    return {"labels": torch.zeros(len(features), 8)}


def test_collator_says_which_record_and_task_each_token_is_of() -> None:
    one, two = list(TASKS)[:2]
    packing = {"sequence_boundaries": [0, 3, 5, 8], "image_subseq_ids": [0, 0, 1]}
    features: list[dict[str, Any]] = [
        {"images": [{"task": one}, {"task": one}]},
        {"images": [{"task": two}, {"task": two}, {"task": one}], "packing_params": packing},
        {"images": ["a.jpg"]},
        {"images": None, "packing_params": {"sequence_boundaries": [0, 8], "image_subseq_ids": [2**32]}},
        {"images": [{"task": one}, {"task": two}]},  # packing without neat_packing
    ]
    batch = pickle.loads(pickle.dumps(RecordCollator(collate_length)))(features)
    # Three records at most: the second row has those of numbers 3 to 5, the first at its start.
    assert batch[ANSWERS].tolist() == list(range(7)) + [row * 8 + place for row in range(1, 5) for place in range(7)]
    assert batch[RECORDS].tolist() == [0] * 7 + [3, 3, 4, 4, 5, 5, 5] + [6] * 7 + [9] * 7 + [12] * 7
    none = [OTHER] * 3
    assert batch[RECORD_TASKS].tolist() == [[0, OTHER, OTHER], [1, 0, OTHER], none, none, none]


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"use_dft_loss": True}, "use_dft_loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"moe_aux_loss_coef": 0.01}, "moe_aux_loss_coef"),
    ],
)
def test_another_loss_is_kept_and_refused_beside_records(
    parse: Callable[..., Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], obstacle: str
) -> None:
    assert parse(1, **changes).finetuning.chatreid_loss is None
    line = f"chatreid: the loss is LLaMA-Factory's own, because of {obstacle}."
    assert capsys.readouterr().err.splitlines().count(line) == 1
    with pytest.raises(ConfigError, match=f"chatreid_loss: records does not work with {obstacle}"):
        parse(1, **changes, chatreid_loss="records")


def test_key_is_checked_as_arguments_are_parsed(parse: Callable[..., Any]) -> None:
    assert parse(1).finetuning.chatreid_loss == "tokens"
    assert parse(1, chatreid_loss="records").finetuning.chatreid_loss == "records"
    with pytest.raises(ConfigError, match="chatreid_loss must be tokens or records, not 'words'"):
        parse(1, chatreid_loss="words")
    packed = {"packing": True, "chatreid_lazy": False}
    with pytest.raises(ConfigError, match="records does not work with packing without neat_packing"):
        parse(1, chatreid_loss="records", **packed)


def test_runs_that_are_not_ours_keep_their_loss(parse: Callable[..., Any]) -> None:
    parsed = parse(1)
    data = copy.copy(parsed.data)
    data.template = "qwen2_vl"
    assert choose_loss(parsed.model, data, parsed.training, parsed.finetuning) is None
    data.chatreid_loss = "records"
    with pytest.raises(ConfigError, match="records needs `template: chatreid` and `stage: sft`"):
        choose_loss(parsed.model, data, parsed.training, parsed.finetuning)


def test_a_sequence_that_is_cut_among_processes_has_stocks_loss(parse: Callable[..., Any]) -> None:
    parsed = parse(1)
    training = copy.copy(parsed.training)
    training.parallelism_config = SimpleNamespace(cp_enabled=False, sp_enabled=True)
    found = find_obstacle(parsed.model, parsed.data, training, parsed.finetuning)
    assert found == "parallelism_config"


def test_layers_that_take_multiples_of_eight_rows_are_left_alone(parse: Callable[..., Any]) -> None:
    parsed = parse(1)
    training = copy.copy(parsed.training)
    training.fp8, training.fp8_backend = True, "te"
    assert find_obstacle(parsed.model, parsed.data, training, parsed.finetuning) == "fp8_backend: te"


def test_extending_the_trainer_twice_is_extending_it_once() -> None:
    from llamafactory.train.sft import trainer

    extended = trainer.CustomSeq2SeqTrainer
    assert issubclass(extended, AnswerTrainer)
    extend_loss(trainer)
    assert trainer.CustomSeq2SeqTrainer is extended


def load_batch(parsed: Any, module: dict[str, Any], model: Any, rows: int) -> Any:
    """Return a batch of a run's first records, as LLaMA-Factory's own workflow makes it, and that of ours."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer

    template = get_template_and_fix_tokenizer(module["tokenizer"], parsed.data)
    dataset = get_dataset(template, parsed.model, parsed.data, parsed.training, stage="sft", **module)["train_dataset"]
    collator = SFTDataCollatorWith4DAttentionMask(template=template, model=model, pad_to_multiple_of=8, **module)
    return RecordCollator(collator)([dataset[index] for index in range(rows)])


def measure_step(trainer: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Return loss and gradients of a training step."""
    trainer.current_gradient_accumulation_steps = 1
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    value = float(trainer.training_step(trainer.model, dict(batch), items))
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    return value, torch.cat(gradients)


FULL, LORA = {"finetuning_type": "full"}, {"finetuning_type": "lora", "lora_target": "all"}
FREEZE = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}


@pytest.mark.parametrize(
    ("family", "template", "changes"),
    [
        ("qwen2_vl", "chatreid", FULL | {"gradient_checkpointing": True}),
        ("qwen2_vl", "chatreid", LORA),
        ("qwen2_vl", "chatreid", FREEZE),
        ("qwen2_5_vl", "chatreid_qwen2_5_vl", FULL),
        ("qwen3_vl", "chatreid_qwen3_vl", LORA | {"gradient_checkpointing": True}),
        ("qwen3_vl", "chatreid_qwen3_vl", FULL),
    ],
)
def test_loss_and_gradients_of_a_batch_are_stocks(
    parse: Callable[..., Any], workshop: Any, tmp_path: Path, family: Any, template: str, changes: dict[str, Any]
) -> None:
    from llamafactory.model import load_model, load_tokenizer
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    from chatreid_plugin.demo.people import sample_people
    from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model

    folder = workshop.model
    if family != "qwen2_vl":
        folder, patch = tmp_path / family, 16 if family == "qwen3_vl" else 14
        sizes = TinySizes(
            hidden=32, layers=2, heads=2, vision_hidden=32, vision_layers=1, patch_size=patch, vocabulary=600
        )
        write_tiny_model(folder, sample_people(20, 7), sizes=sizes, seed=1, family=family)
    parsed = parse(3, model_name_or_path=str(folder), template=template, chatreid_stage=None, **changes)
    module = load_tokenizer(parsed.model)
    model = load_model(module["tokenizer"], parsed.model, parsed.finetuning, is_trainable=True)
    batch = load_batch(parsed, module, model, 3)
    common = {"model": model, "args": parsed.training, "processor": module["processor"]}

    def make(weighting: str | None) -> Any:
        finetuning = copy.copy(parsed.finetuning)
        finetuning.chatreid_loss = weighting
        return CustomSeq2SeqTrainer(finetuning_args=finetuning, tokenizer=module["tokenizer"], **common)

    plain = {name: value for name, value in batch.items() if name not in OURS}
    stock = make(None)
    expected, expected_gradients = measure_step(stock, plain)
    expected_evaluation = stock.prediction_step(model, dict(plain), prediction_loss_only=True)[0]
    ours = make("tokens")
    wide: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: wide.append(logits[..., 0].numel()))
    value, gradients = measure_step(ours, batch)
    model.train()
    assert wide == [int((batch["labels"] != IGNORED).sum())]
    assert wide[0] < batch["labels"].numel() / 4
    assert value == pytest.approx(expected, rel=1e-6)
    highest = float(expected_gradients.abs().max())
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6 * highest)
    model.eval()
    evaluation = ours.prediction_step(model, dict(batch), prediction_loss_only=True)[0]
    assert float(evaluation) == pytest.approx(float(expected_evaluation), rel=1e-6)
    tasks = {TASK_NAMES[number] for number in batch[RECORD_TASKS].flatten().tolist()}
    assert tasks <= set(TASKS) and {f"loss/{task}" for task in tasks} <= ours.answer_loss.read_training().keys()
