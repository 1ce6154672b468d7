"""What PEFT is kept from doing with an adapter, and the warning about its base."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatreid_plugin.checkpoints import ADAPTER_CONFIG, describe_other_base, find_base, guard_peft, names_same_model
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.shards import write_json


WEIGHTS = "adapter_model.safetensors"


class Small(torch.nn.Module):
    """Two layers that an adapter can be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Write an adapter of ``Small``."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(Small(), LoraConfig(target_modules=["first", "second"], r=2))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(adapter: Path) -> Any:
    from peft import PeftModel

    guard_peft()
    return PeftModel.from_pretrained(Small(), str(adapter))


def change(adapter: Path, **values: Any) -> None:
    path = adapter / ADAPTER_CONFIG
    write_json(path, json.loads(path.read_text()) | values)


def test_adapter_that_names_a_module_never_runs_it(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT imports ``megatron_core``; a folder below the working one is importable."""
    load(adapter)
    (adapter / "hostile.py").write_text("raise SystemExit('the code of the adapter ran')\n")
    monkeypatch.syspath_prepend(str(adapter.parent))
    change(adapter, auto_mapping={"base_model_class": "Small", "parent_library": "adapter.hostile"})
    load(adapter)
    change(adapter, megatron_config={"a": 1}, megatron_core="adapter.hostile")
    with pytest.raises(ConfigError, match=r"asks for the Python module 'adapter\.hostile' to be imported"):
        load(adapter)
    assert "adapter.hostile" not in sys.modules


def test_adapter_that_lacks_tensors_or_has_foreign_ones_is_refused(adapter: Path) -> None:
    """PEFT warns of the former, and the base is what is measured; of the latter it says nothing."""
    tensors = load_file(adapter / WEIGHTS)
    first = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, adapter / WEIGHTS)
    with pytest.raises(ConfigError, match=r"adapter lacks 1 tensor\(s\), first base_model\.model\.first\.lora_A"):
        load(adapter)
    save_file(tensors | {first.replace("first", "third"): tensors[first].clone()}, adapter / WEIGHTS)
    with pytest.raises(ConfigError, match=r"no place in the model for 1 tensor\(s\), first .*third\.lora_A"):
        load(adapter)
    save_file(tensors, adapter / WEIGHTS)
    load(adapter).load_adapter(str(adapter), "default")  # as the Trainer does for the best model


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("saves/a/stage2", "./saves/a/stage2", True),
        ("saves/a/stage2", "saves/a/../a/stage2", True),
        ("saves/a/stage2", "saves/b/stage2", False),
        ("Qwen/Qwen2-VL-2B-Instruct", "/models/Qwen2-VL-2B-Instruct", True),
        ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct", False),
        ("/data/a/chatreid_initial", "/data/b/chatreid_initial", False),
    ],
)
def test_names_of_one_model(first: str, second: str, same: bool) -> None:
    assert names_same_model(first, second) is names_same_model(second, first) is same


def test_adapter_on_another_base_is_warned_of_with_both_names(adapter: Path) -> None:
    assert describe_other_base(adapter, "any") is None  # it names no base
    assert describe_other_base(adapter.parent / "none", "any") is None
    change(adapter, base_model_name_or_path="saves/a/stage2")
    assert find_base(adapter) == "saves/a/stage2" and describe_other_base(adapter, "saves/a/stage2") is None
    text = describe_other_base(adapter, "saves/b/stage2")
    assert text is not None and "was trained on saves/a/stage2, and is put on saves/b/stage2" in text
    (adapter / ADAPTER_CONFIG).write_text("[]")
    with pytest.raises(ConfigError, match="holds no JSON object"):
        find_base(adapter)
