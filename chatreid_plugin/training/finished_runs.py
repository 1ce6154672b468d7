"""A run that is resumed at its end: nothing is left to train, and nothing is trained.

transformers 5.5.4 looks at the step limit only after a step: a finished run that is started once more, as schedulers
and ``overwrite_output_dir: false`` do, trains one step beyond its end each time, and changes the weights.
"""

from functools import wraps
from pathlib import Path
from typing import Any

from llamafactory.extras import logging
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..shards import read_json


# LLaMA-Factory's workflows write it into the output folder after training.
RESULTS = "train_results.json"


class TrainingFinished(Exception):
    """The run stands at its last step as training is about to begin."""


class StopAtTheEnd(TrainerCallback):
    """Leaves a run that has no step left; only the Trainer knows the number, once the checkpoint is loaded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise what ends ``Trainer.train``, below."""
        if 0 < state.max_steps <= state.global_step:
            raise TrainingFinished


def _read_results(output_dir: Path) -> dict[str, float]:
    """Return the figures of the training that is over, which are written again."""
    return read_json(output_dir / RESULTS) if (output_dir / RESULTS).is_file() else {}


def end_finished_run(trainer: Any) -> TrainOutput:
    """Do what is left of a training without steps: say so, take the best model, tell the callbacks.

    The caller goes on as after a training: it writes the model, which a run killed before that lacks, and evaluates.
    """
    state = trainer.state
    logger: Any = logging.get_logger(__name__)  # LLaMA-Factory adds warning_rank0 and its like to the class
    logger.warning_rank0(
        f"chatreid: this run is finished, at step {state.global_step} of {state.max_steps}: nothing is trained. Raise "
        "num_train_epochs or max_steps to go on, or set overwrite_output_dir: true to begin anew."
    )
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.is_in_train = False
    trainer.control = trainer.callback_handler.on_train_end(trainer.args, state, trainer.control)
    results = _read_results(Path(trainer.args.output_dir))
    return TrainOutput(state.global_step, results.get("train_loss", float("nan")), results)


def extend_training(trainer_class: Any) -> None:
    """Let every Trainer end a finished run without a step."""
    train = trainer_class.train

    @wraps(train)
    def train_what_is_left(self: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        callback = StopAtTheEnd()
        self.add_callback(callback)
        try:
            return train(self, *args, **kwargs)
        except TrainingFinished:
            return end_finished_run(self)
        finally:
            self.remove_callback(callback)

    trainer_class.train = train_what_is_left
