"""The model backend: cached, batched scoring must equal one plain forward pass per pair."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatreid_plugin import pixels
from chatreid_plugin.datasets.benchmark import make_image_query
from chatreid_plugin.errors import ConfigError, DataError, UpstreamError
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.questions import IMAGE_PAIR
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.records import Answer, ImageRecord, ImageReference, Instruction
from chatreid_plugin.tasks import render_prompt
from tests.support import make_eval_settings


SIZES = [(64, 128), (48, 128), (200, 400), (128, 256), (64, 128), (33, 190), (128, 256)]


@pytest.fixture(scope="module")
def crops(write_noise: Callable[..., tuple[Path, list[ImageRecord]]]) -> tuple[Path, list[ImageRecord]]:
    return write_noise(SIZES)


def make_settings(checkpoint: Path, tmp_path: Path, **changes: Any) -> EvalSettings:
    values = {"protocol": "folder", "manifest": "m.parquet", "model_name_or_path": str(checkpoint)}
    return make_eval_settings(values | {"output_dir": tmp_path, "device": "cpu"} | changes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_scorer_equals_one_forward_pass_per_pair(
    stage: int,
    checkpoint: Path,
    crops: tuple[Path, list[ImageRecord]],
    answer_plainly: Callable[..., float],
    tmp_path: Path,
) -> None:
    root, records = crops
    scorer = TransformersScorer(make_settings(checkpoint, tmp_path, chatreid_stage=stage, batch_size=2).model, root)
    query, candidates = records[0], records[1:]
    margins = scorer.score_pairs(make_image_query(query), candidates, IMAGE_PAIR)
    pair = Instruction("pair", IMAGE_PAIR, (ImageReference("a"), ImageReference("b")), 2, Answer(match=True))
    question = render_prompt(pair)
    expected = [answer_plainly(scorer, root, question, query, candidate) for candidate in candidates]
    np.testing.assert_allclose(margins, expected, atol=1e-4)
    assert np.argsort(margins).tolist() == np.argsort(expected).tolist()
    assert margins.dtype == np.float32
    assert len(set(np.round(margins, 6))) > 1


def test_scorer_decodes_and_encodes_every_image_once(
    checkpoint: Path, crops: tuple[Path, list[ImageRecord]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, records = crops
    scorer = TransformersScorer(make_settings(checkpoint, tmp_path).model, root)
    encoded, opened = list[int](), list[str]()
    get_image_features, open_regular = scorer.model.get_image_features, pixels.open_regular

    def count(pixels: torch.Tensor, grids: torch.Tensor) -> Any:
        encoded.append(len(grids))
        return get_image_features(pixels, grids)

    def note(path: Path) -> Any:
        opened.append(path.name)
        return open_regular(path)

    monkeypatch.setattr(scorer.model, "get_image_features", count)
    monkeypatch.setattr(pixels, "open_regular", note)
    scorer.prepare([], records)
    scorer.score_pairs(make_image_query(records[0]), records[1:], IMAGE_PAIR)
    scorer.score_pairs(make_image_query(records[1]), records[:1], IMAGE_PAIR)
    scorer.choose(make_image_query(records[2]), [records[3:], records[:2]], "standard_reid")
    assert sum(encoded) == len(records)
    assert sorted(opened) == sorted(record.path for record in records)


def test_fingerprint_changes_when_a_weight_changes(
    checkpoint: Path, crops: tuple[Path, list[ImageRecord]], tmp_path: Path
) -> None:
    from chatreid_plugin.eval.backends.checkpoint import compute_weights_fingerprint

    scorer = TransformersScorer(make_settings(checkpoint, tmp_path).model, crops[0])
    again = TransformersScorer(make_settings(checkpoint, tmp_path).model, crops[0])
    assert scorer.fingerprint == again.fingerprint
    with torch.no_grad():
        next(iter(again.model.parameters())).view(-1)[0] += 1
    assert compute_weights_fingerprint(again.model) != scorer.fingerprint["weights"]


def test_encodes_a_batch_whole_if_it_is_planned_and_nothing_else(
    checkpoint: Path, crops: tuple[Path, list[ImageRecord]], tmp_path: Path
) -> None:
    root, records = crops
    planned = TransformersScorer(make_settings(checkpoint, tmp_path, chatreid_stage=None).model, root)
    planned.prepare([], records[:1], records)
    alike = [record for record in records if (record.width, record.height) == (64, 128)]
    assert len(planned.features) == len(alike) == 2
    # A server's pictures come and go: one that failed must not be needed for another.
    gone = replace(records[0], image_id="gone", path="gone.png")
    with pytest.raises(DataError, match="gone"):
        planned.prepare([], [records[1], gone])
    planned.prepare([], [records[1]])
    assert records[1].image_id in planned.features


def test_weights_fingerprint_sees_the_end_of_a_large_tensor() -> None:
    from chatreid_plugin.eval.backends.checkpoint import compute_weights_fingerprint

    module = torch.nn.Linear(1024, 1024)
    before = compute_weights_fingerprint(module)
    with torch.no_grad():
        module.weight[-1, -1] += 1
    assert compute_weights_fingerprint(module) != before


def test_fingerprint_changes_with_image_sizes_tokenizer_and_configuration(
    checkpoint: Path, crops: tuple[Path, list[ImageRecord]], tmp_path: Path
) -> None:
    def compute(folder: Path) -> Any:
        return TransformersScorer(make_settings(folder, tmp_path).model, crops[0]).fingerprint

    def change(name: str, file: str, edit: Callable[[Any], None]) -> Path:
        folder = shutil.copytree(checkpoint, tmp_path / name)
        content = json.loads((folder / file).read_text())
        edit(content)
        (folder / file).write_text(json.dumps(content))
        return folder

    processor = next(path.name for path in checkpoint.glob("*processor_config.json"))
    image_sizes = change("sizes", processor, lambda c: c.get("image_processor", c)["size"].update(shortest_edge=6272))
    words = change("words", "tokenizer.json", lambda c: c["model"]["merges"].pop())
    theta = change("theta", "config.json", lambda c: c["vision_config"].update(hidden_act="gelu"))
    before = compute(checkpoint)
    assert compute(shutil.copytree(checkpoint, tmp_path / "moved")) == before
    for folder in (image_sizes, words, theta):
        after = compute(folder)
        assert after["weights"] == before["weights"] and after != before, folder.name


@pytest.mark.parametrize(
    "name", ["nowhere", "./saves/stage3", "/data/saves/stage3", "saves/full/stage3", "here/stage3"]
)
@pytest.mark.parametrize("key", ["model_name_or_path", "adapter_name_or_path"])
def test_missing_checkpoint_is_named_without_asking_the_hub(
    key: str, name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^model.{key}: the folder {name} does not exist"):
        TransformersScorer(make_settings(checkpoint, tmp_path, **{key: name}).model, tmp_path)


def test_says_that_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig

    def refuse(name: str, **options: Any) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"Qwen/Qwen2-VL.*no folder here, and not to be had from the hub: We could"):
        TransformersScorer(make_settings(Path("Qwen/Qwen2-VL"), tmp_path).model, tmp_path)
    assert "there is no folder Qwen/Qwen2-VL; asking the Hugging Face hub" in caplog.text


def test_file_in_place_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"model\.safetensors is a file"):
        TransformersScorer(make_settings(tmp_path / "model.safetensors", tmp_path).model, tmp_path)


def test_weights_that_are_cut_off_are_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cut/model\.safetensors is damaged or cut off .* Copy it again"):
        TransformersScorer(make_settings(folder, tmp_path).model, tmp_path)


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "cuda", "meta"])
def test_device_that_is_not_here_is_refused(
    device: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    here = "cpu, cuda, cuda:0" if device == "cuda:7" else "cpu"
    with pytest.raises(ConfigError, match=f"model.device: {device} is not on this machine, which has {here}"):
        TransformersScorer(make_settings(checkpoint, tmp_path, device=device).model, tmp_path)


def test_model_that_does_not_fit_is_one_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def run_out(self: PreTrainedModel, *arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PreTrainedModel, "to", run_out)
    with pytest.raises(UpstreamError, match="no memory for the model"):
        TransformersScorer(make_settings(checkpoint, tmp_path).model, tmp_path)


def test_damaged_image_is_named(checkpoint: Path, crops: tuple[Path, list[ImageRecord]], tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    scorer = TransformersScorer(make_settings(checkpoint, tmp_path).model, tmp_path)
    with pytest.raises(DataError, match=r"cut\.jpg"):
        scorer.prepare([], [replace(crops[1][0], path="cut.jpg")])


def change_tensors(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a checkpoint with other tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_checkpoint_without_a_tensor_or_with_a_foreign_one_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """transformers fills what is missing with random numbers: other scores each time, and no word."""
    name = "visual.blocks.0.mlp.fc1.weight"

    def take_away(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(stored for stored in tensors if stored.endswith(name))]

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)

    for change, message in ((take_away, f"lacks 1 .*{name}"), (add, r"beyond .* 1 tensor\(s\), first .*layers\.7")):
        folder = change_tensors(checkpoint, tmp_path / change.__name__, change)
        with pytest.raises(ConfigError, match=f"^model.model_name_or_path: .*{message}"):
            TransformersScorer(make_settings(folder, tmp_path).model, tmp_path)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_code_of_a_checkpoint_is_never_run_nor_asked_about(
    checkpoint: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on stdin, where ``yes |`` answers."""
    folder = shutil.copytree(checkpoint, tmp_path / "hostile")
    (folder / "hostile.py").write_text("open('ran', 'w').close()\nclass Any: pass\n")
    values = json.loads((folder / file).read_text())
    kinds = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoModelForImageTextToText")
    values |= {"auto_map": dict.fromkeys(kinds, "hostile.Any"), "model_type": "hostile"}
    values |= {"tokenizer_class": "Hostile", "processor_class": "Hostile"}
    (folder / file).write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    with pytest.raises(ConfigError, match="asks for Python code of its own to be run"):
        TransformersScorer(make_settings(folder, tmp_path).model, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_adapter_on_another_base_is_warned_of(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))
    adapter = {"adapter_name_or_path": str(tmp_path / "adapter")}
    TransformersScorer(make_settings(checkpoint, tmp_path, **adapter).model, tmp_path)
    assert "was trained on" not in caplog.text
    other = shutil.copytree(checkpoint, tmp_path / "other")
    TransformersScorer(make_settings(other, tmp_path, **adapter).model, tmp_path)
    assert f"was trained on {checkpoint}, and is put on {other}" in caplog.text
