"""The trap of a loss that depends on how a step is cut."""

from types import SimpleNamespace

import pytest
import torch

from chatreid_plugin.training.loss import IGNORED, AnswerLoss, describe_answers, list_items


def test_trap_31_the_loss_is_the_same_however_a_step_is_cut() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits, labels = torch.randn(4, 9, 7), torch.randint(7, (4, 9))
    for row, question in enumerate((1, 8, 8, 8)):  # one long answer, three of one token
        labels[row, :question] = IGNORED
    loss = AnswerLoss("tokens", None, SimpleNamespace())

    def make_batch(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"labels": rows} | describe_answers(rows, [[(0, 0)]] * len(rows))

    def compute(rows: torch.Tensor, names: torch.Tensor) -> float:
        with loss.follow(make_batch(names), is_training=True):
            return float(loss(SimpleNamespace(logits=rows), names, len(list_items(make_batch(labels), "tokens"))))

    def cut(size: int) -> tuple[float, float]:
        """Return stock's loss of the four rows in batches of this size, and ours."""
        pairs = list(zip(logits.split(size), labels.split(size), strict=True))
        stock = [float(ForCausalLMLoss(*pair, vocab_size=7)) for pair in pairs]
        return sum(stock) / len(stock), sum(compute(*pair) for pair in pairs)

    whole, single = cut(4), cut(1)
    assert single[0] != pytest.approx(whole[0], rel=0.05)
    assert single[1] == pytest.approx(whole[1]) == pytest.approx(whole[0])
