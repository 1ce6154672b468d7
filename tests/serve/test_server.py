"""``chatreid serve`` over a real socket: OpenAI's formats, log-probabilities, scores, and what it refuses."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import OpenAI
from PIL import Image

from chatreid_plugin.datasets.benchmark import Query, make_image_query
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.pixels import encode_picture, open_crop, prepare_crop
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.serve import server as server_module
from chatreid_plugin.serve.bodies import Message
from chatreid_plugin.serve.completions import render_messages
from chatreid_plugin.serve.server import run_server
from chatreid_plugin.tasks import format_chat_prompt


pytestmark = pytest.mark.slow
PAIR = "image_to_image_one_to_one"
IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"


def make_content(*parts: str) -> list[dict[str, Any]]:
    """Return parts of a message; data URLs become images."""
    return [
        {"type": "image_url", "image_url": {"url": part}}
        if part.startswith(("data:", "http", "/", "file:"))
        else {"type": "text", "text": part}
        for part in parts
    ]


def make_chat(*parts: str, **changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": make_content(*parts)}], "max_tokens": 1} | changes


def test_health_and_models_are_told(server: Any) -> None:
    assert server.ask("/health") == (200, {"status": "ok"})
    status, models = server.ask("/v1/models")
    assert status == 200 and [entry["id"] for entry in models["data"]] == ["tiny"]
    assert models["data"][0]["chatreid"]["chatreid_stage"] == 2
    assert models["data"][0]["chatreid"]["system_prompt"] == "You are a helpful assistant."


@pytest.mark.parametrize("system", ["", "Compare."])
def test_messages_begin_with_the_system_prompt_unless_they_bring_one(system: str) -> None:
    user, own = Message(role="user", content="Hello"), Message(role="system", content="Mine.")
    plain = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    first = "<|im_start|>system\nCompare.<|im_end|>\n" if system else ""
    assert render_messages([user], system) == first + plain
    assert render_messages([own, user], system) == "<|im_start|>system\nMine.<|im_end|>\n" + plain


def test_logprobs_are_those_of_a_plain_forward_pass(
    server: Any, urls: list[str], crops: tuple[Path, list[ImageRecord]], make_settings: Callable[..., EvalSettings]
) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": make_content("First ", urls[0], " second ", urls[2], " same?")}],  # type: ignore[typeddict-item]
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=20,
    )
    scorer = TransformersScorer(make_settings().model, crops[0])
    images = [prepare_crop(open_crop(crops[0] / crops[1][i].path), scorer.features.policy) for i in (0, 2)]
    text = format_chat_prompt(f"First {IMAGE_TOKENS} second {IMAGE_TOKENS} same?")
    inputs = scorer.processor(text=[text], images=images, return_tensors="pt")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == scorer.model.config.image_token_id).int()
    with torch.inference_mode():
        expected = scorer.model(**inputs).logits[0, -1].float().log_softmax(0)
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    found = [entry.logprob for entry in content[0].top_logprobs]
    np.testing.assert_allclose(found, expected.topk(20).values, atol=1e-4)
    assert content[0].logprob == pytest.approx(found[0])
    tokens = [scorer.processor.tokenizer.decode([token]) for token in expected.topk(3).indices.tolist()]
    assert [entry.token for entry in content[0].top_logprobs[:3]] == tokens
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]  # type: ignore[union-attr]
    assert answer.choices[0].message.content is not None


def test_answer_without_logprobs_has_none(server: Any) -> None:
    status, answer = server.ask("/v1/chat/completions", make_chat("Hello", max_tokens=2))
    assert status == 200
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] <= 2


def test_scores_are_those_of_the_transformers_backend(
    server: Any, urls: list[str], crops: tuple[Path, list[ImageRecord]], make_settings: Callable[..., EvalSettings]
) -> None:
    body = {"query": {"image": urls[0]}, "candidates": urls[1:], "task": PAIR}
    status, answer = server.ask("/v1/score", body)
    assert status == 200
    scorer = TransformersScorer(make_settings().model, crops[0])
    expected = scorer.score_pairs(make_image_query(crops[1][0]), crops[1][1:], PAIR)
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-4)
    assert len(set(answer["scores"])) == len(urls) - 1


def test_prepared_images_are_not_resized_again(server: Any, urls: list[str]) -> None:
    body = {"query": {"image": urls[0]}, "candidates": [urls[2]]}
    reduced = server.ask("/v1/score", body)[1]["scores"]
    kept = server.ask("/v1/score", {**body, "prepared": True})[1]["scores"]
    assert reduced != kept  # stage 2 reduces 400x200


def test_requests_at_once_do_not_disturb_each_other(server: Any, urls: list[str]) -> None:
    bodies = [{"query": {"image": urls[i]}, "candidates": [urls[(i + 1) % 4], urls[i]]} for i in range(4)]
    alone = [server.ask("/v1/score", body) for body in bodies]
    together: list[Any] = [None] * len(bodies)

    def ask(index: int) -> None:
        together[index] = server.ask("/v1/score", bodies[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one[1]["scores"], other[1]["scores"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": True}, "does not stream"),
        ({"temperature": 0.7}, "answers greedily"),
        ({"n": 2}, "gives one answer"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: .*20"),
        ({"stop": ["."]}, "does not know stop"),
        ({"tools": [{}]}, "does not know tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "token of the model's own"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_reason(server: Any, changes: dict[str, Any], message: str) -> None:
    status, answer = server.ask("/v1/chat/completions", make_chat("Hello") | changes)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer["error"]["message"])


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "https://example.org/a"]
)
def test_files_and_addresses_are_not_opened(server: Any, url: str) -> None:
    for path, body in (
        ("/v1/chat/completions", make_chat("See ", url)),
        ("/v1/score", {"query": {"text": "a man"}, "candidates": [url], "task": "text_to_image_one_to_one"}),
    ):
        status, answer = server.ask(path, body)
        assert status == 400
        assert "data URLs only" in answer["error"]["message"]


def make_white(side: int) -> str:
    picture = io.BytesIO()
    Image.new("1", (side, side)).save(picture, "PNG")
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


@pytest.mark.parametrize(
    ("url", "prepared", "message"),
    [
        ("data:image/png;base64,aGFsbG8=", False, "cannot be read"),
        ("data:image/png;base64,???", False, "cannot be read"),
        (make_white(5000), False, "too large"),
        (make_white(2500), True, "too large"),
    ],
    ids=["no image", "no base64", "huge", "huge and prepared"],
)
def test_damaged_and_huge_images_are_refused(server: Any, url: str, prepared: bool, message: str) -> None:
    body = {"query": {"image": url}, "candidates": [url], "prepared": prepared}
    status, answer = server.ask("/v1/score", body)
    assert status == 400 and message in answer["error"]["message"]


def test_limits_on_size_and_count_are_kept(server: Any, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatreid_plugin.serve.pictures.MOST_IMAGES", 16)
    monkeypatch.setattr("chatreid_plugin.serve.intake.MOST_BYTES", 4_000_000)
    status, answer = server.ask("/v1/score", {"query": {"image": urls[0]}, "candidates": [urls[1]] * 16})
    assert status == 413 and "17 images are too many" in answer["error"]["message"]
    status, answer = server.ask("/v1/score", b" " * 4_000_001)
    assert status == 413 and "4000000 bytes" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/nothing", {}, 404),
        ("/v1/score", None, 405),
        ("/v1/score", b"{", 400),
        ("/v1/score", {"query": {}, "candidates": []}, 400),
        ("/v1/score", {"query": {}, "candidates": ["data:"], "model": "other"}, 404),
        ("/v1/score", {"query": {}, "candidates": ["data:"], "task": "image_captioning"}, 400),
    ],
)
def test_wrong_requests_get_openais_error_format(server: Any, path: str, body: Any, status: int) -> None:
    found, answer = server.ask(path, body)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["message"]


def test_query_that_lacks_what_the_task_asks_with_is_refused(server: Any, urls: list[str]) -> None:
    status, answer = server.ask("/v1/score", {"query": {"text": "a man"}, "candidates": [urls[0]], "task": PAIR})
    assert status == 400 and PAIR in answer["error"]["message"]


def test_web_pages_cannot_ask_without_saying_that_it_is_json(server: Any) -> None:
    assert server.ask("/v1/score", b"{}", Content_Type="text/plain")[0] == 415


def test_question_beyond_the_models_context_is_refused(server: Any) -> None:
    status, answer = server.ask("/v1/chat/completions", make_chat("word " * 50_000))
    assert status == 400 and "32768 together is most" in answer["error"]["message"]


def test_full_queue_says_when_to_come_again(server: Any, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MOST_WAITING", 0)
    status, answer = server.ask("/v1/score", {"query": {"image": urls[0]}, "candidates": [urls[1]]})
    assert status == 503 and answer["error"]["type"] == "server_error"


def test_request_whose_client_has_gone_is_not_worked_on(
    server: Any, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on, worked = threading.Event(), threading.Event(), list[int]()

    def score(query: Query, records: Any, task: str) -> Any:
        worked.append(len(records))
        began.set()
        go_on.wait(20)
        return np.zeros(len(records), np.float32)

    monkeypatch.setattr(server.model._scorer, "score_pairs", score)

    def make_body(count: int) -> dict[str, Any]:
        # Longer than what uvicorn reads ahead, so that it does not see the connection end.
        return {"query": {"image": urls[0], "text": "red " * 50_000}, "candidates": urls[:count]}

    first = threading.Thread(target=server.ask, args=("/v1/score", make_body(1)))
    first.start()
    assert began.wait(20)
    with pytest.raises(TimeoutError):
        server.ask("/v1/score", make_body(2), timeout=0.3)
    time.sleep(3)  # until the server has seen it go
    go_on.set()
    first.join()
    assert server.ask("/v1/score", make_body(3))[0] == 200
    assert worked == [1, 3]


def test_bug_is_an_error_without_details(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(query: Query, records: Any, task: str) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(server.model._scorer, "score_pairs", fail)
    picture = "data:image/png;base64,"
    buffer = io.BytesIO()
    Image.new("RGB", (40, 80)).save(buffer, "PNG")
    picture += base64.b64encode(buffer.getvalue()).decode()
    status, answer = server.ask("/v1/score", {"query": {"image": picture}, "candidates": [picture]})
    assert status == 500 and "RuntimeError" in answer["error"]["message"] and "secret" not in json.dumps(answer)


def test_encoded_images_are_forgotten_beyond_the_limit(
    server: Any, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatreid_plugin.serve.model.MOST_KEPT_BYTES", 1000)
    forgotten: list[bool] = []
    forget = server.model._scorer.forget_images
    monkeypatch.setattr(server.model._scorer, "forget_images", lambda: forgotten.append(True) or forget())
    bodies = [{"query": {"image": urls[0]}, "candidates": urls[1:]}, {"query": {"image": urls[1]}, "candidates": urls}]
    scores = [server.ask("/v1/score", body)[1]["scores"] for body in (*bodies, bodies[0])]
    assert len(forgotten) >= 2
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-5)


def test_image_that_came_before_is_not_decoded_again(
    server: Any, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"query": {"image": urls[0]}, "candidates": urls[1:]}
    before = server.ask("/v1/score", body)
    monkeypatch.setattr("chatreid_plugin.serve.pictures.Image", None)
    assert server.ask("/v1/score", body) == before


def test_image_of_a_failed_request_is_read_again(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = encode_picture(Image.new("RGB", (50, 90), "teal"))
    body = {"query": {"image": url}, "candidates": [url]}
    with monkeypatch.context() as broken:
        broken.setattr(server.model._scorer, "score_pairs", None)
        assert server.ask("/v1/score", body)[0] == 500
    assert server.ask("/v1/score", body)[0] == 200


def test_taken_port_is_one_error(server: Any, checkpoint: Path) -> None:
    port = int(server.base_url.rpartition(":")[2].removesuffix("/v1"))
    with pytest.raises(ConfigError, match=f"port {port}.*Choose another --port"):
        run_server(str(checkpoint), [], "127.0.0.1", port, 3, None, None)


def test_wrong_key_value_is_one_error(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="chatreid serve has 1 fault"):
        run_server(str(checkpoint), ["model.dtype=float31"], "127.0.0.1", 0, 3, None, None)


@pytest.mark.parametrize("background", [False, True])
def test_command_serves_until_stopped_and_leaves_nothing(checkpoint: Path, tmp_path: Path, background: bool) -> None:
    """By Ctrl-C, or by SIGTERM where SIGINT is ignored; the tests' own handlers are not the child's."""
    command = [sys.executable, "-m", "chatreid_plugin", "serve", str(checkpoint), "model.device=cpu", "--port", "0"]
    handler = partial(signal.signal, signal.SIGINT, signal.SIG_IGN if background else signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=handler, env=os.environ | {"TMPDIR": str(tmp_path)}, **pipes)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Serving tiny at http://127.0.0.1:")
    finally:
        process.send_signal(signal.SIGTERM if background else signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
