"""``backend: http`` against ``chatreid serve``: the margins of the transformers backend, by either way."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from chatreid_plugin.datasets.benchmark import Query, make_image_query
from chatreid_plugin.errors import UpstreamError
from chatreid_plugin.eval.backends.http import SCORED_TOGETHER, HttpScorer
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.images import DEFAULT_IMAGE_MAX_PIXELS
from chatreid_plugin.pixels import encode_picture
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.serve.intake import MOST_BYTES
from chatreid_plugin.serve.model import ServedModel
from chatreid_plugin.serve.pictures import MOST_IMAGES
from chatreid_plugin.tasks import LETTERS, TASKS


pytestmark = pytest.mark.slow
PAIR = "image_to_image_one_to_one"
Crops = tuple[Path, list[ImageRecord]]
MakeSettings = Callable[..., EvalSettings]


def make_scorer(server: Any, make_settings: MakeSettings, crops: Crops, **changes: Any) -> HttpScorer:
    settings = make_settings(backend="http", filter="none", base_url=server.base_url, **changes)
    return HttpScorer(settings.server, settings.model, crops[0])


@pytest.fixture(scope="module")
def expected(make_settings: MakeSettings, crops: Crops) -> npt.NDArray[np.float32]:
    scorer = TransformersScorer(make_settings().model, crops[0])
    return scorer.score_pairs(make_image_query(crops[1][0]), crops[1][1:], PAIR)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server look like any other one that gives log-probabilities, of every token."""
    describe = ServedModel.describe
    monkeypatch.setattr(ServedModel, "describe", lambda model: {**describe(model), "chatreid": None})


def note_requests(scorer: HttpScorer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    ask = scorer.client.ask

    def note(path: str, *rest: Any) -> object:
        asked.append(path)
        return ask(path, *rest)

    monkeypatch.setattr(scorer.client, "ask", note)
    return asked


def test_fast_lane_gives_the_margins_of_the_transformers_backend(
    server: Any, make_settings: MakeSettings, crops: Crops, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = make_scorer(server, make_settings, crops)
    assert scorer.confidence == "margins"
    asked = note_requests(scorer, monkeypatch)
    monkeypatch.setattr("chatreid_plugin.eval.backends.http.SCORED_TOGETHER", 3)
    margins = scorer.score_pairs(make_image_query(crops[1][0]), crops[1][1:], PAIR)
    np.testing.assert_allclose(margins, expected, atol=1e-3)
    assert np.argsort(margins).tolist() == np.argsort(expected).tolist()
    assert margins.dtype == np.float32
    assert asked == ["/score"] * 2  # five candidates


def test_largest_request_of_the_default_policy_fits() -> None:
    side = int(DEFAULT_IMAGE_MAX_PIXELS**0.5)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    images = 1 + max(SCORED_TOGETHER, len(LETTERS))
    assert len(encode_picture(Image.fromarray(noise))) * images < MOST_BYTES - 10_000
    assert images <= MOST_IMAGES


def test_sender_decides_on_the_image_policy(server: Any, make_settings: MakeSettings, crops: Crops) -> None:
    settings = {"chatreid_stage": 1, "image_min_pixels": 9000, "chatreid_aspect": "keep"}
    scorer = make_scorer(server, make_settings, crops, **settings)  # the server was started with stage 2
    plainly = TransformersScorer(make_settings(**settings).model, crops[0])
    query = make_image_query(crops[1][0])
    margins, wanted = (one.score_pairs(query, crops[1], PAIR) for one in (scorer, plainly))
    np.testing.assert_allclose(margins, wanted, atol=1e-3)


def test_log_probabilities_give_the_same_margins_where_yes_and_no_are_returned(
    plain: None,
    server: Any,
    make_settings: MakeSettings,
    crops: Crops,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The tiny model is random: Yes and No are seldom among its best tokens, so that more are returned than usual.
    from chatreid_plugin.serve import bodies, completions

    everything = completions._list_tokens

    def list_all(*values: Any) -> Any:
        token, others = everything(*values[:4], 10**6, values[5])
        # The vocabulary has " Yes" as well; the likelier spelling would count, and the other backend knows one alone.
        return token, tuple(other for other in others if not other.text.startswith(" "))

    monkeypatch.setattr(completions, "_list_tokens", list_all)
    assert bodies.MOST_ALTERNATIVES == 20
    scorer = make_scorer(server, make_settings, crops, chatreid_stage=3, concurrency=3)
    assert scorer.confidence == "margins"
    asked = note_requests(scorer, monkeypatch)
    # The largest crop is smaller than stage 2 makes it, so that the server leaves all as they come.
    small = [record for record in crops[1] if record.width < 200]
    margins = scorer.score_pairs(make_image_query(small[0]), small[1:], PAIR)
    wanted = [value for value, record in zip(expected, crops[1][1:], strict=True) if record.width < 200]
    np.testing.assert_allclose(margins, wanted, atol=1e-3)
    assert np.argsort(margins).tolist() == np.argsort(wanted).tolist()
    assert asked == ["/chat/completions"] * len(wanted)
    assert (scorer.confidence, scorer.filled) == ("margins", 0)


def test_missing_words_are_counted_when_only_the_best_tokens_come(
    plain: None, server: Any, make_settings: MakeSettings, crops: Crops
) -> None:
    scorer = make_scorer(server, make_settings, crops)
    scores = scorer.score_pairs(make_image_query(crops[1][0]), crops[1][1:3], PAIR)
    assert scorer.filled > 0 and np.isfinite(scores).all()


def test_weights_and_not_the_address_make_the_fingerprint(
    server: Any, start: Callable[..., Any], make_settings: MakeSettings, crops: Crops
) -> None:
    elsewhere = start(server.model)
    one, other = (make_scorer(place, make_settings, crops).fingerprint for place in (server, elsewhere))
    assert one == other
    assert one["weights"] == TransformersScorer(make_settings().model, crops[0]).fingerprint["weights"]


@pytest.mark.parametrize(
    ("task", "query"),
    [
        ("standard_reid", {"image": True}),
        ("text_to_image_reid", {"text": "a red coat"}),
        ("attribute_retrieval", {"attributes": {"hat": "none"}}),
        ("multimodal_retrieval", {"image": True, "text": "a red coat"}),
        ("text_to_image_one_to_one", {"text": "a red coat"}),
        (PAIR, {"image": True}),
    ],
)
def test_fast_lane_carries_every_kind_of_question(
    server: Any,
    make_settings: MakeSettings,
    crops: Crops,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    query: dict[str, Any],
) -> None:
    seen: list[tuple[Query, int, str]] = []

    def score_pairs(asked: Query, candidates: Sequence[ImageRecord], task: str) -> npt.NDArray[np.float32]:
        seen.append((asked, len(candidates), task))
        server.model._scorer.prepare([asked], candidates)  # the server takes it that its scorer knows them now
        return np.arange(len(candidates), dtype=np.float32)

    def choose(asked: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[npt.NDArray[np.float32]]:
        return [score_pairs(asked, window, task) for window in windows]

    monkeypatch.setattr(server.model._scorer, "score_pairs", score_pairs)
    monkeypatch.setattr(server.model._scorer, "choose", choose)
    fields = query | ({"image": crops[1][0]} if "image" in query else {})
    scorer = make_scorer(server, make_settings, crops)
    asked = Query("q", "p", **fields)
    if TASKS[task].answer_kind == "match":
        scores = scorer.score_pairs(asked, crops[1][1:], task)
    else:
        (scores,) = scorer.choose(asked, [crops[1][1:]], task)
    assert scores.tolist() == [0, 1, 2, 3, 4]
    ((found, count, found_task),) = seen
    assert (found.text, dict(found.attributes), count, found_task) == (asked.text, dict(asked.attributes), 5, task)
    assert (found.image is None) == (asked.image is None)


def test_wrong_model_name_is_one_error(server: Any, make_settings: MakeSettings, crops: Crops) -> None:
    with pytest.raises(UpstreamError, match="does not know the model 'other'.*server has 'tiny'"):
        make_scorer(server, make_settings, crops, model="other")


def test_whole_evaluation_ranks_as_with_the_transformers_backend(
    server: Any, make_settings: MakeSettings, crops: Crops, tmp_path: Path
) -> None:
    from dataclasses import replace

    from chatreid_plugin.eval.run import run_evaluation
    from chatreid_plugin.shards import read_json, write_manifest

    records: Sequence[ImageRecord] = [
        replace(record, split="query" if index == 0 else "gallery", person_id=f"t:{index % 2}", camera_id=str(index))
        for index, record in enumerate(crops[1])
    ]
    manifest = tmp_path / "tiny.parquet"
    write_manifest(manifest, records, crops[0], {})
    common = {"manifest": manifest, "filter": "none", "model": "tiny"}
    found: list[Any] = []
    for backend in ("http", "transformers"):
        settings = make_settings(**common, backend=backend, base_url=server.base_url, output_dir=tmp_path / backend)
        run_evaluation(settings)
        found.append(read_json(tmp_path / backend / "results.json"))
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["provenance"]["fingerprint"]["weights"] == found[1]["provenance"]["fingerprint"]["weights"]
