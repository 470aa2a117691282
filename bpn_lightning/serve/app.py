"""The server: LitServe's, with a page, the tasks, metrics, and limits on requests."""

import base64
import hashlib
from importlib.resources import files
from typing import Any

from fastapi import Response
from fastapi.responses import HTMLResponse, JSONResponse
from litserve import LitServer

from bpn_lightning.serve.api import PATH, BundleAPI
from bpn_lightning.serve.following import task_table
from bpn_lightning.serve.metrics import CountRequests, exposition
from bpn_lightning.serve.reading import DTYPES

__all__ = ["build_server"]

#: Of LitServe and FastAPI: its front page, and pages that load scripts of other servers.
_REPLACED = ("/", "/docs", "/docs/oauth2-redirect", "/redoc")

_TASK = {
    "description": "a task's name or ID; without it, the bundle's gate names the task",
    "anyOf": [{"type": "string"}, {"type": "integer"}],
}
_ANSWER = {
    "class": {"type": "string"},
    "task": {"type": "string", "description": "in whose mode it is answered"},
    "task_id": {"type": "integer"},
    "confidence": {"type": "number", "description": "probability of the class"},
    "rejected": {"type": "boolean", "description": "whether confidence is below --reject_below"},
}
_REFUSALS = {
    "404": "there is no such task",
    "408": "the body took too long",
    "413": "the body or the image is too large",
    "415": "the body is neither JSON nor a form",
    "422": "the input does not fit the task, or is malformed, or a task has to be named",
    "504": "the request waited too long for its turn",
}


def build_server(
    api: BundleAPI, *, device: str = "cpu", workers: int = 1, version: str = ""
) -> Any:
    """A server that is not started yet; ``run`` starts it.

    Args:
        api: of the bundle.
        device: ``cpu``, ``cuda`` or ``mps``.
        workers: processes that hold the network.
        version: of this package.
    """
    limits = api.limits
    server = LitServer(
        api,
        accelerator=device,
        devices=1,
        workers_per_device=workers,
        timeout=limits.timeout,
        middlewares=[(CountRequests, {"path": PATH})],
    )
    app = server.app
    app.state.limits = limits
    app.title, app.version = "bpn-serve", version
    routes = app.router.routes
    routes[:] = [one for one in routes if getattr(one, "path", None) not in _REPLACED]
    for route in routes:
        if getattr(route, "path", None) == PATH:
            route.openapi_extra, route.responses = _openapi(), {}
    for path, route in [("/", _page()), ("/tasks", _tasks_of(api.folder)), ("/metrics", _metrics)]:
        app.add_api_route(path, route, include_in_schema=False)
    return server


def _page() -> Any:
    page = files("bpn_lightning.serve").joinpath("page.html").read_text("utf-8")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_source(page, 'script')}",
            f"style-src {_source(page, 'style')}",
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def page_route() -> Response:
        return HTMLResponse(page, headers=headers)

    return page_route


def _source(page: str, tag: str) -> str:
    """The one element of the page that may run or style, named by its hash."""
    text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _tasks_of(folder: str) -> Any:
    def tasks() -> Response:  # not async: it reads files
        return JSONResponse(task_table(folder))

    return tasks


def _metrics() -> Response:
    return Response(exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _openapi() -> dict[str, Any]:
    numbers = {
        "description": "one raw input as nested lists of numbers, or in base64 with dtype and shape",
        "anyOf": [{"type": "array", "items": {}}, {"type": "string", "format": "byte"}],
    }
    as_json = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "task": _TASK,
            "image": {"type": "string", "format": "byte", "description": "an image file, base64"},
            "input": numbers,
            "dtype": {"enum": list(DTYPES), "description": "of input in base64, little-endian"},
            "shape": {"type": "array", "items": {"type": "integer"}},
        },
    }
    as_form = {
        "type": "object",
        "required": ["image"],
        "properties": {
            "task": {"type": "string"},
            "image": {"type": "string", "format": "binary", "description": "an image file"},
        },
    }
    answer = {"type": "object", "required": list(_ANSWER), "properties": _ANSWER}
    refusal = {"type": "object", "properties": {"detail": {"type": "string"}}}
    return {
        "summary": "The class of one input",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": as_json},
                "multipart/form-data": {"schema": as_form},
            },
        },
        "responses": {
            "200": {"description": "the answer", "content": _json(answer)},
            **{
                status: {"description": why, "content": _json(refusal)}
                for status, why in _REFUSALS.items()
            },
        },
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
