"""What Prometheus is told, over all processes of the server.

Each process writes files into the folder ``PROMETHEUS_MULTIPROC_DIR``, which has to be set before this file is imported.
"""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

__all__ = ["ANSWERS", "BATCH", "RELOADS", "TASKS", "CountRequests", "exposition"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Message, Receive, Send], Awaitable[None]]

REQUESTS = Counter("bpn_serve_requests", "Requests for an answer, by HTTP status", ["status"])
SECONDS = Histogram("bpn_serve_request_seconds", "Seconds from a request to its response")
BATCH = Histogram(
    "bpn_serve_batch_inputs",
    "Inputs that were answered together",
    buckets=[2**n for n in range(11)],
)
ANSWERS = Counter(
    "bpn_serve_answers", "Answers, by the task in whose mode they were given", ["task"]
)
TASKS = Gauge("bpn_serve_tasks", "Tasks that are served", multiprocess_mode="livemostrecent")
RELOADS = Counter("bpn_serve_reloads", "Changes of the bundle's folder that were read", ["outcome"])


def exposition() -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    found: bytes = generate_latest(registry)
    return found


class CountRequests:
    """ASGI middleware: how many requests for a path there were, and how long they took.

    Args:
        app: what is called.
        path: of the requests that count.
    """

    def __init__(self, app: ASGIApp, path: str) -> None:
        self.app, self.path = app, path

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Count the request, and pass it on."""
        if scope["type"] != "http" or scope["path"] != self.path:
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                REQUESTS.labels(message["status"]).inc()
                SECONDS.observe(time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, send_counted)
