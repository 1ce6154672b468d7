"""LLaMA-Factory's second map of a data set, which makes tokens of its records, replaced where the data set is ours.

``eager`` and ``lazy`` each replace it, for the aligned records that they have made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

from .compat import get_function


@dataclass(frozen=True)
class Preprocessing:
    """What LLaMA-Factory wants tokenized, and how.

    Attributes:
        dataset: of aligned records.
        processor: LLaMA-Factory's own for the stage; it makes the tokens.
        data_args: the run's.
        training_args: the run's.
        is_eval: the data set is one to evaluate on.
        do_generate: answers will be generated: the prompts alone are wanted.
    """

    dataset: Any
    processor: Any
    data_args: Any
    training_args: Any
    is_eval: bool
    do_generate: bool

    def print_example(self, find_example: Callable[[], Any]) -> None:
        """Print a tokenized record as LLaMA-Factory does, on the processes that log."""
        if self.training_args.should_log:
            print("eval example:" if self.is_eval else "training example:")
            self.processor.print_data_example(find_example())


def replace_preprocessing(
    module: ModuleType, is_ours: Callable[[Any, str], bool], tokenize: Callable[[Preprocessing], Any]
) -> None:
    """Replace the map of ``llamafactory.data.loader`` where a data set is ours.

    Args:
        module: ``llamafactory.data.loader``.
        is_ours: tells so from a data set and the stage of training.
        tokenize: takes the map's place.

    Raises:
        UpstreamError: LLaMA-Factory has changed.
    """
    preprocess = get_function(module, "_get_preprocessed_dataset")
    get_processor = get_function(module, "_get_dataset_processor")

    @wraps(preprocess)
    def preprocess_ours(
        dataset: Any,
        data_args: Any,
        training_args: Any,
        stage: str,
        template: Any,
        tokenizer: Any,
        processor: Any = None,
        is_eval: bool = False,
    ) -> Any:
        if dataset is None or not is_ours(dataset, stage):
            return preprocess(dataset, data_args, training_args, stage, template, tokenizer, processor, is_eval)
        do_generate = training_args.predict_with_generate and is_eval
        dataset_processor = get_processor(data_args, stage, template, tokenizer, processor, do_generate)
        return tokenize(Preprocessing(dataset, dataset_processor, data_args, training_args, is_eval, do_generate))

    module._get_preprocessed_dataset = preprocess_ours  # type: ignore[attr-defined]
