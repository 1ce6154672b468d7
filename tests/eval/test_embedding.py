"""``chatreid embed``: the model's features of a manifest in a file that filters read; a killed run goes on."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin import cli
from chatreid_plugin.archives import normalise
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval import embedding
from chatreid_plugin.eval.backends import encoder
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.embedding import embed_manifest
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_manifest


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]
OWN = ["model.device=cpu", "model.dtype=float32"]

pytestmark = pytest.mark.slow


def embed(
    checkpoint: Path, manifest: Path, target: Path, stage: int = 3, splits: Sequence[str] = ()
) -> embedding.Embedding:
    return embed_manifest(str(checkpoint), manifest, target, OWN, stage, splits)


def test_features_are_those_that_filter_vlm_computes(
    make_world: MakeWorld, make_settings: MakeSettings, checkpoint: Path, tmp_path: Path
) -> None:
    manifest, target = make_world(), tmp_path / "new" / "f.npz"
    told = embed(checkpoint, manifest, target)
    with np.load(target) as arrays:
        assert arrays["paths"].tolist() == [record.path for record in read_manifest(manifest)[0]]
        features = arrays["features"]
    assert features.dtype == np.float32 and features.shape == (told.images, told.width) == (16, told.width)
    model = {"backend": "transformers", "model_name_or_path": str(checkpoint), "device": "cpu", "dtype": "float32"}
    plan = make_plan(make_settings(manifest, filter="vlm", **model))
    assert plan.features is not None
    np.testing.assert_allclose(normalise(features)[:4], plan.features[0], atol=1e-5)
    read = run_evaluation(make_settings(manifest, backend="features", features=target))
    filtered = run_evaluation(make_settings(manifest, backend="features", filter="npz", filter_features=target))
    assert read.ranking.mean_ap == pytest.approx(filtered.ranking.mean_ap)
    assert [path.name for path in target.parent.iterdir()] == ["f.npz"]


def test_a_killed_run_goes_on_with_the_same_bytes(
    make_world: MakeWorld, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, whole, target = make_world(), tmp_path / "whole.npz", tmp_path / "f.npz"
    monkeypatch.setattr(encoder, "ENCODE_BATCH", 3)
    embed(checkpoint, manifest, whole)
    stream, batches = TransformersScorer.stream_pooled, list[int]()

    def stop(self: TransformersScorer, planned: Any) -> Iterator[Any]:
        batches.append(len(planned))
        for number, found in enumerate(stream(self, planned)):
            if number == 3 and len(batches) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(TransformersScorer, "stream_pooled", stop)
    with pytest.raises(KeyboardInterrupt):
        embed(checkpoint, manifest, target)
    assert not target.exists()
    part = tmp_path / ".f.npz.part"
    part.write_bytes(part.read_bytes() + b"torn")
    assert embed(checkpoint, manifest, target).kept == 9
    assert batches == [6, 3]
    assert target.read_bytes() == whole.read_bytes()
    assert not part.exists()
    # What another model or policy left is no beginning of this one.
    batches.clear()
    with pytest.raises(KeyboardInterrupt):
        embed(checkpoint, manifest, target, stage=1)
    assert embed(checkpoint, manifest, target).kept == 0


def test_takes_splits_and_refuses_what_it_cannot_write(
    make_world: MakeWorld, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_world()
    cli.app(
        ["embed", str(checkpoint), str(manifest), str(tmp_path / "q.npz"), *OWN, "--split", "query"],
        standalone_mode=False,
    )
    assert "features of 4 images" in capsys.readouterr().out
    with pytest.raises(DataError, match="no images of split train; it has gallery, query"):
        embed(checkpoint, manifest, tmp_path / "f.npz", splits=["train"])
    with pytest.raises(ConfigError, match=r"into an \.npz file"):
        embed(checkpoint, manifest, tmp_path / "f.csv")
    with (tmp_path / ".f.npz.part").open("a+b") as file:
        embedding.lock(file, tmp_path / "f.npz")
        with pytest.raises(ConfigError, match="another run is writing it"):
            embed(checkpoint, manifest, tmp_path / "f.npz")
