"""The FLOPs of Qwen2-VL-2B's shapes against sums made by hand, and what a share of a card's limit is."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def model_work(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import model_work

    return model_work


@pytest.fixture
def config(model_work: Any) -> Any:
    from transformers import Qwen2VLConfig

    return model_work.make_2b_config(Qwen2VLConfig())


def test_configuration_has_the_published_number_of_parameters(config: Any) -> None:
    """Qwen2-VL-2B-Instruct has 2,208,985,600."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_208_985_600


def test_work_of_2b_is_the_sum_made_by_hand(model_work: Any, config: Any) -> None:
    work = model_work.describe_work(config)
    # 28 layers: query and output 1536x1536, key and value 1536x256, gate, up and down 1536x8960.
    assert work.token == 2 * 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    assert work.answer == 2 * 1536 * 151936
    # 32 layers: QKV, projection, two matrices of the MLP; 1,176 numbers a patch; four patches are one merged token.
    tower = 32 * (3 + 1 + 4 + 4) * 1280 * 1280 + 3 * 2 * 14 * 14 * 1280
    assert work.patch == 2 * (tower + (5120 * 5120 + 5120 * 1536) / 4)
    # Each patch's scores and sums over the 180 of its image: two products of 1280 numbers.
    assert work.count_image(180) == 180 * (work.patch + 32 * 2 * 2 * 1280 * 180)
    assert work.count_image(180) == pytest.approx(235e9, rel=0.01)
    assert work.token == pytest.approx(2.62e9, rel=0.01)


def test_small_model_keeps_each_parts_share_of_the_work(model_work: Any, config: Any) -> None:
    from transformers import Qwen2VLConfig

    small, whole = map(model_work.describe_work, (model_work.make_2b_config(Qwen2VLConfig(), small=True), config))
    for part in ("token", "answer", "patch"):
        assert getattr(whole, part) / getattr(small, part) == pytest.approx(256, rel=0.06), part


def test_use_is_the_share_of_what_the_card_does(model_work: Any) -> None:
    assert model_work.describe_use(100e12, 2.0, 200e12) == "25.0 %"
    assert model_work.describe_use(100e12, 2.0, None) == "-"
