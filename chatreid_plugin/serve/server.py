"""The HTTP side of ``chatreid serve``: paths, limits, errors in OpenAI's format. Nothing of a request is logged."""

import asyncio
import logging
import secrets
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from ..config import check_settings
from ..errors import ChatReIDError, ConfigError, UpstreamError
from ..eval_settings import EvalSettings
from ..servers.key import is_local, read_key
from .bodies import ChatRequest, RequestFault, ScoreRequest, describe_fault
from .completions import Completion, Token
from .model import ServedModel


# Of one request.
MOST_BYTES = 64 << 20
# Requests that wait for the model; each holds its pictures in memory.
MOST_WAITING = 64

Body = TypeVar("Body", bound=BaseModel)

logger = logging.getLogger(__name__)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """Return the checked body.

    Raises:
        RequestFault: too long (413), not JSON (415), or not what the path takes (400).
    """
    # Asking for JSON makes browsers ask first, so that no web page can reach a server on its reader's machine.
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise RequestFault("Send JSON, with Content-Type: application/json.", 415)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
            raise RequestFault(f"The request has more than {MOST_BYTES} bytes; send fewer or smaller images.", 413)
    try:
        return kind.model_validate_json(bytes(content))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in error.errors()]
        raise RequestFault("; ".join(faults[:10])) from None


def _describe_token(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}


def describe_completion(completion: Completion, name: str) -> dict[str, Any]:
    """Return a completion in the format of OpenAI's API."""
    content = [
        _describe_token(token) | {"top_logprobs": [_describe_token(other) for other in others]}
        for token, others in zip(completion.tokens, completion.alternatives, strict=True)
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": completion.text},
        "logprobs": {"content": content} if content else None,
        "finish_reason": "stop" if completion.is_whole else "length",
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [choice],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.answer_tokens,
            "total_tokens": completion.prompt_tokens + completion.answer_tokens,
        },
    }


class Paths:
    """The server's paths, each a method."""

    def __init__(self, model: ServedModel, key: str) -> None:
        self.model = model
        self.key = key
        self.waiting = 0
        self.turn = asyncio.Lock()

    def _check_key(self, request: Request) -> None:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key and not secrets.compare_digest(shown.encode(), self.key.encode()):
            raise RequestFault("Wrong or missing key; send Authorization: Bearer KEY.", 401)

    async def _answer(self, request: Request, kind: type[Body], answer: Callable[[Body], Any]) -> Any:
        self._check_key(request)
        if self.waiting >= MOST_WAITING:
            raise RequestFault(f"{MOST_WAITING} requests are waiting already; try again later.", 503)
        self.waiting += 1
        try:
            body = await read_body(request, kind)
            async with self.turn:
                if await _has_gone(request):
                    raise RequestFault("The client has gone.", 499)  # not worth the model's time
                return await asyncio.to_thread(answer, body)
        finally:
            self.waiting -= 1

    async def list_models(self, request: Request) -> JSONResponse:
        """GET /v1/models."""
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self.model.describe()]})

    async def show_health(self) -> JSONResponse:
        """GET /health."""
        return JSONResponse({"status": "ok"})

    async def complete(self, request: Request) -> JSONResponse:
        """POST /v1/chat/completions."""
        completion = await self._answer(request, ChatRequest, self.model.complete)
        return JSONResponse(describe_completion(completion, self.model.name))

    async def score(self, request: Request) -> JSONResponse:
        """POST /v1/score."""
        scores = await self._answer(request, ScoreRequest, self.model.score)
        return JSONResponse({"object": "score", "model": self.model.name, "scores": scores})


def _report_fault(_: Request, error: Exception) -> JSONResponse:
    """Turn an exception into an error of OpenAI's format."""
    if isinstance(error, RequestFault):
        status = error.status
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse(describe_fault(str(error), status), status, headers)
    if isinstance(error, HTTPException):
        message = f"{error.detail}. Paths: /v1/chat/completions, /v1/score, /v1/models, /health."
        return JSONResponse(describe_fault(message, error.status_code), error.status_code)
    status = 500 if isinstance(error, UpstreamError) else 400
    return JSONResponse(describe_fault(str(error), status), status)


def _report_bug(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(describe_fault(f"The server failed: {type(error).__name__}.", 500), 500)


def make_app(model: ServedModel, key: str = "") -> FastAPI:
    """Return the application: /v1/chat/completions, /v1/score, /v1/models, /health.

    Args:
        model: what answers.
        key: that requests have to show; empty for none.
    """
    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="chatreid serve", docs_url=None, redoc_url=None, openapi_url=None)
    paths = Paths(model, key)
    app.add_api_route("/v1/models", paths.list_models, methods=["GET"])
    app.add_api_route("/health", paths.show_health, methods=["GET"])
    app.add_api_route("/v1/chat/completions", paths.complete, methods=["POST"])
    app.add_api_route("/v1/score", paths.score, methods=["POST"])
    for kind in (RequestFault, ChatReIDError, HTTPException):
        app.add_exception_handler(kind, _report_fault)
    app.add_exception_handler(Exception, _report_bug)
    return app


def _read_own_key(variable: str) -> str:
    """Return the key that requests have to show; whoever names a variable wants no server without one.

    Raises:
        ConfigError: the variable is not set or empty, or holds what no key can hold.
    """
    key = read_key(variable, "http://localhost", "--api-key-variable")
    if not key:
        raise ConfigError(
            f"The environment variable {variable!r} (--api-key-variable) is not set or empty. Put the key in it that "
            "requests have to show, or leave the option out to serve without one."
        )
    return key


def format_address(host: str, port: int) -> str:
    """Return the address of a host, an IPv6 address in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run_server(
    checkpoint: str,
    overrides: Sequence[str],
    host: str,
    port: int,
    stage: int,
    name: str | None,
    api_key_variable: str | None,
) -> None:
    """Serve a checkpoint until interrupted.

    Raises:
        ConfigError: the port is taken, the key is missing, or the checkpoint cannot be loaded.
        UpstreamError: the checkpoint is no model that answers Yes and No.
    """
    values = {"protocol": "folder", "manifest": "none", "output_dir": "none", "model_name_or_path": checkpoint}
    settings = check_settings(values | {"chatreid_stage": stage or None}, overrides, EvalSettings, "chatreid serve")
    key = "" if api_key_variable is None else _read_own_key(api_key_variable)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host}, port {port}: {error}. Choose another --port.") from None
    with listener:
        model = ServedModel(settings, name or Path(checkpoint).name)
        address = format_address(host, listener.getsockname()[1])
        print(f"Serving {model.name} at {address}/v1 (Ctrl-C ends it)", flush=True)
        if not is_local(address) and not key:
            print("Anybody who reaches this machine can ask it: there is no --api-key-variable.", file=sys.stderr)
        try:
            config = uvicorn.Config(make_app(model, key), log_level="warning", access_log=False)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            model.close()


async def _has_gone(request: Request) -> bool:
    """Whether the client has closed the connection.

    uvicorn stops reading after a body of more than 64 KB, so it does not see the end of the connection either, until
    it is asked for more: the first question makes it read on, the second one gets the answer.
    """
    if await request.is_disconnected():
        return True
    await asyncio.sleep(0.01)
    return await request.is_disconnected()
