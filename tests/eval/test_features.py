"""Tests of the filter's sources that run a network: timm (a stub of it), a tiny CLIP, and the scoring model itself."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval import candidates
from chatreid_plugin.eval.candidates import Plan, make_plan
from chatreid_plugin.eval.distributed import Processes
from chatreid_plugin.eval.filter import extract_features, form_batches
from chatreid_plugin.eval.report import render_table
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import DataSettings, EvalSettings
from chatreid_plugin.shards import read_manifest
from tests.support import alter


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


def make_network() -> Any:
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((2, 1)), torch.nn.Flatten(), torch.nn.Linear(6, 5))


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Put a small stand-in for timm in its place; return the list of what it was asked to make."""
    made: list[tuple[str, int]] = []

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> Any:
        if pretrained or name == "unheard_of":
            raise RuntimeError(f"Unknown model ({name})")
        made.append((name, num_classes))
        return make_network()

    stub: Any = ModuleType("timm")
    look = {"input_size": (3, 32, 16), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    stub.create_model, stub.data = create_model, SimpleNamespace(resolve_model_data_config=lambda model: look)
    monkeypatch.setitem(sys.modules, "timm", stub)
    return made


def test_timm_features_are_the_networks_with_local_weights(
    timm: list[tuple[str, int]], make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    records, root = read_manifest(make_world())
    network = make_network()
    weights = tmp_path / "w.pth"
    torch.save(network.state_dict() | {"head.weight": torch.zeros(3)}, weights)
    changes: dict[str, Any] = {"filter": "timm", "filter_model": "tiny", "filter_weights": weights, "device": "cpu"}
    found = extract_features(records, root, make_settings(Path(), **changes).filter)
    assert timm == [("tiny", 0)]
    from chatreid_plugin.pixels import open_crop

    pixels = np.asarray(open_crop(root / records[2].path).resize((16, 32), 2), dtype=np.float32) / 255
    expected = network(torch.tensor(pixels).permute(2, 0, 1)[None])[0].detach().numpy()
    assert found[2] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
    torch.save({"other": torch.zeros(1)}, weights)
    with pytest.raises(DataError, match="no state_dict of timm's tiny"):
        extract_features(records, root, make_settings(Path(), **changes).filter)
    with pytest.raises(ConfigError, match="filter.model: timm cannot make unheard_of"):
        extract_features(records, root, make_settings(Path(), **changes | {"filter_model": "unheard_of"}).filter)


class CrowdedNetwork(torch.nn.Module):
    """Gives each image the mean of its batch besides: what real networks do in the last bits, for all to see."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        own = inputs.mean(dim=(2, 3))
        return torch.cat([own, own.mean(dim=0, keepdim=True).expand_as(own)], dim=1)


def test_any_number_of_processes_gives_the_bits_of_one_when_a_result_depends_on_its_batch(
    timm: list[tuple[str, int]],
    make_world: MakeWorld,
    make_settings: MakeSettings,
    run_together: Callable[..., list[Plan]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys.modules["timm"], "create_model", lambda name, **options: CrowdedNetwork())
    torch.save({}, tmp_path / "w.pth")
    items = [("query", "1", "1"), ("query", "2", "1")]
    items += [("gallery", str(place % 4), str(place % 3 + 1)) for place in range(148)]
    changes: dict[str, Any] = {"filter": "timm", "filter_model": "tiny", "filter_weights": tmp_path / "w.pth"}
    settings = make_settings(make_world(items), device="cpu", **changes)
    (one,) = run_together([partial(make_plan, settings)])
    assert one.features is not None and len(np.unique(one.features[1], axis=0)) > 4
    for count in (2, 3, 5):
        for plan in run_together([partial(make_plan, settings)] * count):
            assert np.array_equal(plan.features[0], one.features[0])
            assert np.array_equal(plan.features[1], one.features[1])


@pytest.mark.parametrize("count", range(1, 8))
def test_shares_of_whole_batches_are_the_same_batches_again(make_world: MakeWorld, count: int) -> None:
    (record, *_), _ = read_manifest(make_world(images=False))
    items = [*["words"] * 70, *[record] * 200, *["words"] * 130, record]
    batches = form_batches(items)
    assert [len(batch) for batch in batches] == [64, 64, 64, 8, 64, 64, 64, 9]
    assert sorted(sum(batches, [])) == list(range(len(items)))
    for rank in range(count):
        share = Processes(rank, count).take_share(batches)
        own = [place for batch in share for place in batch]
        assert [[own[i] for i in batch] for batch in form_batches([items[i] for i in own])] == share


def test_says_what_to_install_when_timm_is_missing(
    monkeypatch: pytest.MonkeyPatch, make_world: MakeWorld, make_settings: MakeSettings
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    records, root = read_manifest(make_world())
    settings = make_settings(Path(), filter="timm", filter_model="tiny", filter_weights=Path("w.pth"))
    with pytest.raises(ConfigError, match=r"pip install chatreid-plugin\[baselines\]"):
        extract_features(records, root, settings.filter)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a CLIP of a few thousand random weights, with a tokenizer of bytes."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(str({word: place for place, word in enumerate(words)}).replace("'", '"'))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=size | {"vocab_size": len(words), "max_position_embeddings": 20, "eos_token_id": 1},
        vision_config=size | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_puts_words_and_images_in_one_space(
    clip: Path, make_world: MakeWorld, make_settings: MakeSettings
) -> None:
    records, root = read_manifest(make_world())
    settings = make_settings(Path(), filter="clip", filter_model=str(clip), device="cpu")
    found = extract_features([records[0], "a red coat", records[5], "blue"], root, settings.filter)
    assert found.shape == (4, 8)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0, abs=1e-5)
    alone = [
        extract_features([item], root, settings.filter)[0] for item in (records[0], "a red coat", records[5], "blue")
    ]
    assert found == pytest.approx(np.stack(alone), abs=1e-5)
    assert np.abs(found[1] - found[3]).max() > 1e-3
    assert np.abs(found[0] - found[2]).max() > 1e-4


def test_adapter_beside_a_clip_never_runs_its_code(
    clip: Path, make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers puts on an adapter that lies in the model's own folder, and PEFT imports what it names."""
    folder = shutil.copytree(clip, tmp_path / "hostile_clip")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(folder)}
    config |= {"megatron_config": {"a": 1}, "megatron_core": "hostile_clip.code"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('the code of the adapter ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = make_settings(Path(), filter="clip", filter_model=str(folder), device="cpu")
    with pytest.raises(ConfigError, match=r"asks for the Python module 'hostile_clip\.code' to be imported"):
        extract_features(["a red coat"], Path(), settings.filter)
    assert "hostile_clip.code" not in sys.modules


def test_clip_that_lacks_a_tensor_is_refused(clip: Path, make_settings: MakeSettings, tmp_path: Path) -> None:
    folder = shutil.copytree(clip, tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = make_settings(Path(), filter="clip", filter_model=str(folder), device="cpu")
    with pytest.raises(ConfigError, match=r"^filter.model: .*incomplete lacks 1 tensor\(s\), first text_projection"):
        extract_features(["a red coat"], Path(), settings.filter)


def test_clip_filters_for_queries_in_words(
    clip: Path, make_world: MakeWorld, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = candidates.load_benchmark

    def load_words(data: DataSettings, **keys: Any) -> Any:
        benchmark = load(data, **keys)
        first = replace(benchmark.queries[0], image=None, text="a red coat")
        return replace(benchmark, queries=[first, *benchmark.queries[1:]])

    monkeypatch.setattr(candidates, "load_benchmark", load_words)
    settings = make_settings(make_world(), filter="clip", filter_model=str(clip), device="cpu", top_k=2, floor=0)
    plan = make_plan(settings)
    words = extract_features(["a red coat"], Path(), settings.filter)[0]
    assert plan.features is not None and plan.features[0][0] == pytest.approx(words, abs=1e-5)
    assert [len(kept) for kept in plan.kept] == [2] * len(plan.kept)
    with pytest.raises(ConfigError, match="asks in words"):
        make_plan(alter(settings, {"filter": "colour"}))


def test_other_sources_refuse_words(make_settings: MakeSettings) -> None:
    with pytest.raises(ConfigError, match="compares images, and a query asks in words"):
        extract_features(["a red coat"], Path(), make_settings(Path(), filter="colour").filter)


def test_clip_needs_a_folder_that_can_be_loaded(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(Path(), filter="clip", filter_model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="filter.model: the folder .*nowhere does not exist"):
        extract_features(["a red coat"], Path(), settings.filter)


def test_the_scoring_model_filters_with_its_own_features(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "m", sample_people(20, 0), sizes=TinySizes(hidden=32, layers=1, vision_layers=1))
    changes = {"filter": "vlm", "backend": "transformers", "model_name_or_path": str(tmp_path / "m")}
    settings = make_settings(make_world(), **changes, device="cpu", dtype="float32", top_k=3, floor=0)
    plan = make_plan(settings)
    assert plan.scorer is not None and plan.features is not None
    scorer: Any = plan.scorer
    levels = scorer.features[plan.benchmark.gallery[1].image_id].levels[0].mean(dim=0).numpy()
    assert plan.features[1][1] == pytest.approx(levels / np.linalg.norm(levels), abs=1e-5)
    results = run_evaluation(settings)
    assert results.pairs == 3 * len(plan.kept)
    method = "mode pointwise, image order query_first, filter vlm, fusion none"
    content = json.loads((settings.output.output_dir / "results.json").read_text(encoding="utf-8"))
    assert content["scores"]["method"] == method
    assert method in (settings.output.output_dir / "report.html").read_text(encoding="utf-8")
    assert method in render_table(results)


def test_large_features_keep_their_direction_when_their_squares_overflow(
    make_world: MakeWorld, make_settings: MakeSettings
) -> None:
    records, root = read_manifest(make_world())
    settings = make_settings(Path(), filter="vlm", backend="transformers", model_name_or_path="m")
    found = extract_features(
        records[:2], root, settings.filter, pool_images=lambda items: np.full((len(items), 4), 1e30, np.float32)
    )
    assert found.tolist() == [[0.5] * 4] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": "timm", "filter_model": "x"}, "timm needs filter.model"),
        ({"filter": "clip"}, "clip needs filter.model"),
        ({"filter": "vlm"}, "vlm needs the model itself"),
    ],
)
def test_settings_name_what_a_source_lacks(make_settings: MakeSettings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(Path(), **changes)
