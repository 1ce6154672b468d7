"""The HTTP side of ``chatreid serve``: paths, limits, errors in OpenAI's format. Nothing of a request is logged."""

import asyncio
import socket
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..config import check_settings
from ..errors import ChatReIDError, ConfigError, UpstreamError
from ..eval.settings import ModelOnly
from ..openai_client import is_local, read_key
from ..printing import say
from .bodies import BodyType, ChatRequest, RequestFault, ScoreRequest, describe_fault, parse_body
from .completions import Completion, Token
from .intake import Gate, Intake, list_own_names, make_gone
from .model import ServedModel


# Requests that wait for the model.
MOST_WAITING = 64


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

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.intake = Intake()
        self.waiting = 0
        self.turn = asyncio.Lock()

    async def _answer(self, request: Request, kind: type[BodyType], answer: Callable[[BodyType], Any]) -> Any:
        async with self.intake.receive(request) as content:
            body = parse_body(content, kind)
            content.clear()  # its texts are copies
            # Not before the body is there, or whoever sends none keeps everybody out.
            if self.waiting >= MOST_WAITING:
                raise RequestFault(f"{MOST_WAITING} requests are waiting already; try again later.", 503)
            self.waiting += 1
            try:
                async with self.turn:
                    if await _has_gone(request):
                        raise make_gone()  # not worth the model's time
                    return await asyncio.to_thread(answer, body)
            finally:
                self.waiting -= 1

    async def list_models(self) -> JSONResponse:
        """GET /v1/models."""
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
        return JSONResponse(describe_fault(message, error.status_code), error.status_code, error.headers)
    status = 500 if isinstance(error, UpstreamError) else 400
    return JSONResponse(describe_fault(str(error), status), status)


def _report_bug(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(describe_fault(f"The server failed: {type(error).__name__}.", 500), 500)


def make_app(model: ServedModel, key: str = "", names: Collection[str] = ()) -> FastAPI:
    """Return the application: /v1/chat/completions, /v1/score, /v1/models, /health.

    Args:
        model: what answers.
        key: that requests have to show; empty for none.
        names: by which the server may be called, beside ``localhost`` and any IP address.
    """
    gate = Gate(names, key)
    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(gate.check_sender)])
    paths = Paths(model)
    locked = [Depends(gate.check_key)]
    app.add_api_route("/health", paths.show_health, methods=["GET"])
    app.add_api_route("/v1/models", paths.list_models, methods=["GET"], dependencies=locked)
    app.add_api_route("/v1/chat/completions", paths.complete, methods=["POST"], dependencies=locked)
    app.add_api_route("/v1/score", paths.score, methods=["POST"], dependencies=locked)
    for kind in (RequestFault, ChatReIDError, HTTPException):
        app.add_exception_handler(kind, _report_fault)
    app.add_exception_handler(Exception, _report_bug)
    return app


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without the protocol asyncio does not switch Nagle's algorithm off, and answers are 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(f"Cannot listen on {host}, port {port}: {error}. Choose another --port.") from None
    return listener


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
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve a checkpoint until interrupted.

    Raises:
        ConfigError: the port is taken, the key is missing, or the checkpoint cannot be loaded.
        UpstreamError: the checkpoint is no model that answers Yes and No.
    """
    values = {"model": {"model_name_or_path": checkpoint, "chatreid_stage": stage or None}}
    settings = check_settings(values, overrides, ModelOnly, "chatreid serve").model
    key = "" if api_key_variable is None else _read_own_key(api_key_variable)
    with open_listener(host, port) as listener:
        model = ServedModel(settings, name or Path(checkpoint).name)
        address = format_address(host, listener.getsockname()[1])
        say(f"Serving {model.name} at {address}/v1 (Ctrl-C ends it)")
        if not is_local(address) and not key:
            say("Anybody who reaches this machine can ask it: there is no --api-key-variable.", aside=True)
        app = make_app(model, key, [*list_own_names(host, is_local=is_local(address)), *allowed_hosts])
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


async def _has_gone(request: Request) -> bool:
    """Whether the client has closed the connection.

    uvicorn stops reading after a body of more than 64 KB, so it does not see the end of the connection either, until
    it is asked for more: the first question makes it read on, the second one gets the answer.
    """
    if await request.is_disconnected():
        return True
    await asyncio.sleep(0.01)
    return await request.is_disconnected()
