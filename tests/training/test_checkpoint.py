"""The decoder swap on disk, and through LLaMA-Factory's own loading."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatreid_plugin import shards
from chatreid_plugin.checkpoints import INDEX, WEIGHTS, find_weight_files
from chatreid_plugin.errors import ChatReIDError, ConfigError, DataError, UpstreamError
from chatreid_plugin.training import checkpoint
from chatreid_plugin.training.checkpoint import (
    MARKER,
    check_completeness,
    compose_checkpoint,
    find_local_checkpoint,
    find_vision_suffix,
)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(set(find_weight_files(folder).values())):
        tensors |= load_file(path)
    return tensors


def is_vision(name: str) -> bool:
    return find_vision_suffix(name) is not None


def compare(composed: Path, encoder: Path, decoder: Path) -> dict[str, int]:
    """Return how many tensors come from where; every tensor must equal one of the two, bit for bit."""
    result, first, second = (
        {find_vision_suffix(n) or n: (t, find_vision_suffix(n) is not None) for n, t in read_tensors(f).items()}
        for f in (composed, encoder, decoder)
    )
    assert result.keys() == second.keys()
    counts = {"encoder": 0, "decoder": 0, "both": 0}
    for name, (tensor, vision) in result.items():
        from_encoder = torch.equal(tensor, first[name][0])
        from_decoder = torch.equal(tensor, second[name][0])
        assert from_encoder or from_decoder, name
        assert from_encoder if vision and not name.startswith("merger.") else from_decoder or vision
        counts["both" if from_encoder and from_decoder else "encoder" if from_encoder else "decoder"] += 1
    return counts


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("visual.blocks.0.norm1.weight", "blocks.0.norm1.weight"),
        ("model.visual.merger.ln_q.bias", "merger.ln_q.bias"),
        ("model.layers.0.mlp.up_proj.weight", None),
        ("model.language_model.visual.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_vision_tensors_are_told_by_both_layouts(name: str, suffix: str | None) -> None:
    assert find_vision_suffix(name) == suffix


def test_composed_folder_holds_encoder_and_decoder_bit_for_bit(workshop: Any, tmp_path: Path) -> None:
    output = compose_checkpoint(workshop.other_model, workshop.model, tmp_path / "out" / "initial")
    first, second, composed = map(read_tensors, (workshop.other_model, workshop.model, output))
    assert composed.keys() == second.keys()
    for name, tensor in composed.items():
        assert torch.equal(tensor, (first if is_vision(name) else second)[name]), name
    changed = [n for n in composed if not torch.equal(first[n], second[n])]
    assert any("visual.merger." in n for n in changed)
    assert any(not is_vision(n) for n in changed)
    names = {path.name for path in output.iterdir()}
    assert {path.name for path in workshop.model.iterdir()} | {MARKER} == names
    origin = json.loads((output / MARKER).read_text())
    assert origin["encoder"] == str(workshop.other_model) and origin["vision_tensors"] > 10
    assert [path.name for path in output.parent.iterdir()] == ["initial"]


def test_projector_of_the_decoder_keeps_its_merger(workshop: Any, tmp_path: Path) -> None:
    output = compose_checkpoint(workshop.other_model, workshop.model, tmp_path / "initial", "decoder")
    first, second, composed = map(read_tensors, (workshop.other_model, workshop.model, output))
    for name, tensor in composed.items():
        vision = is_vision(name) and "visual.merger." not in name
        assert torch.equal(tensor, (first if vision else second)[name]), name


def rename(folder: Path, target: Path) -> Path:
    """Copy a checkpoint with the other of the two key layouts."""
    shutil.copytree(folder, target)
    tensors = load_file(target / WEIGHTS)
    old, new = ("model.visual.", "visual.") if any(n.startswith("model.visual.") for n in tensors) else ("", "model.")
    save_file({new + n.removeprefix(old) if is_vision(n) else n: t for n, t in tensors.items()}, target / WEIGHTS)
    assert {n.split("visual.")[0] for n in load_file(target / WEIGHTS) if is_vision(n)} == {new.split("visual.")[0]}
    return target


@pytest.mark.parametrize("renamed", ["encoder", "decoder"])
def test_layouts_of_encoder_and_decoder_may_differ(workshop: Any, tmp_path: Path, renamed: str) -> None:
    """Versions of transformers write visual.* or model.visual.*; the result has the names of the decoder's version."""
    folders = {"encoder": workshop.other_model, "decoder": workshop.model}
    folders[renamed] = rename(folders[renamed], tmp_path / "renamed")
    output = compose_checkpoint(folders["encoder"], folders["decoder"], tmp_path / "initial")
    assert read_tensors(output).keys() == read_tensors(folders["decoder"]).keys()
    assert compare(output, folders["encoder"], folders["decoder"])["encoder"] > 10


@pytest.mark.parametrize("sharded", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_sharded_checkpoints(workshop: Any, tmp_path: Path, sharded: tuple[str, ...]) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    folders = {"encoder": workshop.other_model, "decoder": workshop.model}
    for name in sharded:
        shutil.copytree(folders[name], tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        shard(folders[name], tmp_path / name)
        folders[name] = tmp_path / name
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
    output = compose_checkpoint(folders["encoder"], folders["decoder"], tmp_path / "initial")
    assert compare(output, folders["encoder"], folders["decoder"])["encoder"] > 10
    assert (output / INDEX).is_file() == ("decoder" in sharded)
    loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(output)
    reference: Any = Qwen2VLForConditionalGeneration.from_pretrained(folders["encoder"])
    for name, tensor in reference.model.visual.state_dict().items():
        assert torch.equal(tensor, loaded.model.visual.state_dict()[name])


def shard(folder: Path, target: Path) -> None:
    """Write a checkpoint's weights to a folder in several files with an index."""
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(target, max_shard_size="60KB")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_stale_index_beside_newer_weights_is_passed_over_as_transformers_does(
    workshop: Any, tmp_path: Path, side: str
) -> None:
    """A folder that was once sharded: the old shards are still there, and the file beside them is what loads."""
    from transformers import Qwen2VLForConditionalGeneration

    folders = {"encoder": workshop.other_model, "decoder": workshop.model}
    fresh, stale = folders[side], folders["decoder" if side == "encoder" else "encoder"]
    shard(stale, tmp_path / "once")
    shutil.copytree(fresh, tmp_path / "once", dirs_exist_ok=True)
    assert (tmp_path / "once" / INDEX).is_file() and len(list((tmp_path / "once").glob("*.safetensors"))) > 2
    loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "once")
    wanted: Any = Qwen2VLForConditionalGeneration.from_pretrained(fresh)
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert set(find_weight_files(tmp_path / "once").values()) == {tmp_path / "once" / WEIGHTS}
    folders[side] = tmp_path / "once"
    output = compose_checkpoint(folders["encoder"], folders["decoder"], tmp_path / "initial")
    assert compare(output, workshop.other_model, workshop.model)["encoder"] > 10
    assert not (output / INDEX).exists()


def test_weights_that_the_configuration_names_come_first(workshop: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(workshop.model, tmp_path / "model")
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    change_config(folder, transformers_weights="other.safetensors")
    shutil.copy(workshop.other_model / WEIGHTS, folder / WEIGHTS)
    assert set(find_weight_files(folder).values()) == {folder / "other.safetensors"}


@pytest.mark.parametrize("names", [["a"], {"a": 1}, {"a": "../model.safetensors"}])
def test_index_that_names_no_files_beside_it_is_refused(tmp_path: Path, names: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match="is no index of safetensors files|is no file beside it"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_swap_is_made_again_when_only_a_decoder_weight_or_only_the_encoder_changed(
    workshop: Any, tmp_path: Path, side: str
) -> None:
    """Either folder's content is in the fingerprint: a stale swap would train on with last week's weights."""
    folders = {"encoder": workshop.other_model, "decoder": workshop.model}
    folders[side] = shutil.copytree(folders[side], tmp_path / side)
    output = compose_checkpoint(folders["encoder"], folders["decoder"], tmp_path / "initial")
    tensors = load_file(folders[side] / WEIGHTS)
    name = next(n for n in tensors if is_vision(n) == (side == "encoder") and "norm" in n)
    tensors[name] = tensors[name] + 1
    save_file(tensors, folders[side] / WEIGHTS)
    compose_checkpoint(folders["encoder"], folders["decoder"], output)
    assert torch.equal(load_file(output / WEIGHTS)[name], tensors[name])


def test_folder_is_reused_when_nothing_changed_and_made_again_when_content_did(workshop: Any, tmp_path: Path) -> None:
    encoder = shutil.copytree(workshop.other_model, tmp_path / "encoder")
    output = compose_checkpoint(encoder, workshop.model, tmp_path / "initial")
    made = (output / WEIGHTS).stat()
    (encoder / WEIGHTS).touch()  # another time, the same content
    compose_checkpoint(encoder, workshop.model, output)
    assert ((output / WEIGHTS).stat().st_ino, (output / WEIGHTS).stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    tensors = load_file(encoder / WEIGHTS)
    name = next(n for n in tensors if "visual.blocks" in n)
    tensors[name] = tensors[name] + 1
    save_file(tensors, encoder / WEIGHTS)
    compose_checkpoint(encoder, workshop.model, output)
    assert torch.equal(load_file(output / WEIGHTS)[name], tensors[name])
    before = (output / MARKER).read_text()
    compose_checkpoint(encoder, workshop.model, output, "decoder")
    assert (output / MARKER).read_text() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "initial"]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(folder: Path, kind: str) -> None:
    """Make a checkpoint unfit in one way."""
    weights = folder / WEIGHTS
    if kind == "missing":
        shutil.rmtree(folder)
    elif kind == "weights missing":
        weights.unlink()
    elif kind == "config missing":
        (folder / "config.json").unlink()
    elif kind == "architecture":
        change_config(folder, model_type="qwen2_5_vl")
    elif kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no vision":
        save_file({n: t for n, t in load_file(weights).items() if not is_vision(n)}, weights)
    elif kind == "tensor missing":
        save_file({n: t for n, t in load_file(weights).items() if not n.endswith(PATCHES)}, weights)
    elif kind == "shape":
        other = torch.zeros(16, 3, 2, 14, 14)
        save_file({n: other if n.endswith(PATCHES) else t for n, t in load_file(weights).items()}, weights)
    elif kind == "shard missing":
        index = {"weight_map": dict.fromkeys(load_file(weights), "model-00001-of-00002.safetensors")}
        weights.unlink()
        (folder / INDEX).write_text(json.dumps(index))
    else:
        weights.unlink()
        (folder / INDEX).write_text("{}")


PATCHES = "visual.patch_embed.proj.weight"
FAULTS: dict[str, tuple[type[ChatReIDError], str]] = {
    "missing": (ConfigError, "Checkpoint folder .*spoilt does not exist"),
    "weights missing": (ConfigError, r"has no safetensors weights .*found: .*config\.json.*zero_to_fp32"),
    "config missing": (DataError, r"config\.json does not exist"),
    "architecture": (ConfigError, "is a qwen2_5_vl.*cannot swap"),
    "cut short": (ConfigError, r"model\.safetensors is not a readable safetensors file"),
    "no vision": (ConfigError, "has no vision tensors"),
    "tensor missing": (ConfigError, r"first visual\.patch_embed\.proj\.weight with shape .*missing"),
    "shape": (ConfigError, r"1 tensor\(s\) differ, first visual\.patch_embed\.proj\.weight with shape .*16, 3, 2, 14"),
    "shard missing": (ConfigError, r"model-00001-of-00002\.safetensors is not a readable"),
    "index": (ConfigError, r"index\.json has no weight_map"),
}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", FAULTS)
def test_unfit_checkpoint_is_one_clear_error_and_nothing_is_written(
    workshop: Any, tmp_path: Path, kind: str, side: str
) -> None:
    folders = {"encoder": workshop.other_model, "decoder": workshop.model}
    folders[side] = shutil.copytree(folders[side], tmp_path / "spoilt")
    if kind == "architecture" and side == "decoder":
        message = "the decoder .*a qwen2_5_vl: cannot swap"
    else:
        message = FAULTS[kind][1]
    spoil(folders[side], kind)
    with pytest.raises(FAULTS[kind][0], match=message):
        compose_checkpoint(folders["encoder"], folders["decoder"], tmp_path / "run" / "initial")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def incomplete(workshop: Any, tmp_path: Path) -> Path:
    """Write a checkpoint that lacks a tensor of its decoder, which transformers would fill with random numbers."""
    folder = shutil.copytree(workshop.model, tmp_path / "incomplete")
    tensors = {name: t for name, t in load_file(folder / WEIGHTS).items() if not name.endswith("0.mlp.up_proj.weight")}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


LACKS = r"incomplete lacks 1 of the model's parameters, first model\.language_model\.layers\.0\.mlp\.up_proj\.weight"


def test_swap_with_an_incomplete_decoder_is_refused(workshop: Any, tmp_path: Path, incomplete: Path) -> None:
    for encoder, decoder in ((workshop.other_model, incomplete), (incomplete, workshop.model)):
        with pytest.raises(ConfigError, match=LACKS):
            compose_checkpoint(encoder, decoder, tmp_path / "initial")
    assert not (tmp_path / "initial").exists()


def test_training_and_inference_from_an_incomplete_checkpoint_are_refused(
    parse: Callable[..., Any], incomplete: Path
) -> None:
    from llamafactory.hparams import get_infer_args

    stock = {"template": "qwen2_vl", "chatreid_stage": None, "chatreid_lazy": False, "dataset": "any"}
    parse(1, model_name_or_path=str(incomplete), **stock)  # not ours to judge
    with pytest.raises(ConfigError, match=LACKS):
        parse(1, model_name_or_path=str(incomplete))
    with pytest.raises(ConfigError, match=LACKS):
        get_infer_args({"model_name_or_path": str(incomplete), "template": "chatreid"})


def test_folder_that_is_no_composed_checkpoint_is_left_alone(workshop: Any, tmp_path: Path) -> None:
    output = tmp_path / "initial"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UpstreamError, match="exists and is no composed checkpoint"):
        compose_checkpoint(workshop.other_model, workshop.model, output)
    assert [path.name for path in tmp_path.rglob("*")] == ["initial", "notes.txt"]


def test_failure_while_writing_leaves_the_old_folder_and_no_temporary_one(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("disk full")

    output = compose_checkpoint(workshop.other_model, workshop.model, tmp_path / "initial")
    before = (output / MARKER).read_text()
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(DataError, match="initial cannot be written: disk full"):
        compose_checkpoint(workshop.model, workshop.other_model, output)
    assert [path.name for path in tmp_path.iterdir()] == ["initial"]
    assert (output / MARKER).read_text() == before


def test_leftover_of_a_killed_run_with_the_same_process_id_is_no_obstacle(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.os, "getpid", lambda: 17)
    monkeypatch.setattr(shards.platform, "node", lambda: "node-1")
    leftover = tmp_path / ".initial.node-1.17.tmp"
    leftover.mkdir()
    (leftover / "half").touch()
    output = compose_checkpoint(workshop.other_model, workshop.model, tmp_path / "initial")
    assert not (output / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["initial"]


def test_hub_name_is_fetched_and_a_failure_names_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[str, Any]] = []

    def fetch(name: str, revision: str, cache_dir: str | None) -> str:
        asked.append((name, revision))
        if name == "Qwen/missing":
            raise LocalEntryNotFoundError("offline")
        return str(tmp_path)

    arguments = SimpleNamespace(model_revision="main", cache_dir=None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_local_checkpoint("Qwen/Qwen2-VL-2B-Instruct", arguments, "model_name_or_path") == tmp_path
    assert find_local_checkpoint(str(tmp_path), arguments, "chatreid_encoder") == tmp_path
    with pytest.raises(ConfigError, match="chatreid_encoder: Qwen/missing is neither a folder nor a hub model"):
        find_local_checkpoint("Qwen/missing", arguments, "chatreid_encoder")
    with pytest.raises(ConfigError, match="chatreid_encoder: saves/deep/stage1 is not a folder"):
        find_local_checkpoint("saves/deep/stage1", arguments, "chatreid_encoder")
    assert asked == [("Qwen/Qwen2-VL-2B-Instruct", "main"), ("Qwen/missing", "main")]


@pytest.mark.parametrize("projector", ["encoder", "decoder"])
def test_model_that_stage_2_loads_has_stage_1s_encoder_and_the_fresh_decoder(
    parse: Callable[..., Any], workshop: Any, tokenizer_module: dict[str, Any], projector: str
) -> None:
    """Through LLaMA-Factory's own get_train_args, load_tokenizer and load_model."""
    from llamafactory.model import load_model, load_tokenizer
    from transformers import Qwen2VLForConditionalGeneration

    parsed = parse(2, chatreid_projector=projector)
    tokenizer = load_tokenizer(parsed.model)["tokenizer"]
    model = load_model(tokenizer, parsed.model, parsed.finetuning, is_trainable=True)
    stage1: Any = Qwen2VLForConditionalGeneration.from_pretrained(workshop.other_model, dtype=torch.float32)
    fresh: Any = Qwen2VLForConditionalGeneration.from_pretrained(workshop.model, dtype=torch.float32)
    first, second, loaded = stage1.state_dict(), fresh.state_dict(), model.state_dict()
    assert loaded.keys() == second.keys()
    for name, tensor in loaded.items():
        from_encoder = "visual." in name and (projector == "encoder" or ".merger." not in name)
        assert torch.equal(tensor, (first if from_encoder else second)[name]), name
    assert len(tokenizer) == len(tokenizer_module["tokenizer"])


def test_models_of_other_sizes_do_not_fit(workshop: Any, tmp_path: Path) -> None:
    from chatreid_plugin.demo.people import sample_people
    from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model

    sizes = TinySizes(hidden=32, layers=2, heads=2, vision_hidden=32, vision_layers=2, patch_size=14, vocabulary=600)
    write_tiny_model(tmp_path / "wide", sample_people(20, 7), sizes=replace(sizes, vision_hidden=64))
    write_tiny_model(tmp_path / "deep", sample_people(20, 7), sizes=replace(sizes, vision_layers=3))
    write_tiny_model(tmp_path / "larger", sample_people(20, 7), sizes=replace(sizes, layers=3))
    for name in ("wide", "deep"):
        with pytest.raises(ConfigError, match="The vision encoders do not fit"):
            compose_checkpoint(tmp_path / name, workshop.model, tmp_path / "initial")
    # Only the vision tensors have to fit: another decoder is the point of the swap.
    compose_checkpoint(workshop.other_model, tmp_path / "larger", tmp_path / "initial")


def test_checkpoint_is_looked_at_without_the_other_processes_under_zero_3(workshop: Any) -> None:
    """One process composes while the others wait: a model shared out among all would wait for ever."""
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    check_completeness(workshop.model)  # without process groups, which zero.init would need
    assert is_deepspeed_zero3_enabled()
    del config
