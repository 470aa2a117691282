"""LitServe's hooks: what happens to a request in the process that holds the network."""

import multiprocessing
import signal
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Response
from fastapi.responses import JSONResponse
from litserve import LitAPI

from bpn_lightning.modes import Modes, Prediction, load
from bpn_lightning.serve.answering import Asked, Refused, answer, decode
from bpn_lightning.serve.following import Follower, fingerprint
from bpn_lightning.serve.metrics import ANSWERS, BATCH, RELOADS, TASKS
from bpn_lightning.serve.reading import Item, Limits, read_item

__all__ = ["PATH", "BundleAPI"]

PATH = "/predict"


class BundleAPI(LitAPI):  # type: ignore[misc]  # it comes without types
    """Answers from a bundle; inputs of different tasks are one batch.

    Args:
        folder: of the bundle.
        trust: import paths that its network may name.
        reject_below: confidence below which an answer is marked as rejected.
        limits: of a request.
        every: seconds between two looks at the folder.
        batch_size: inputs that are answered together, at most.
        batch_wait: seconds that a batch waits for more of them.
    """

    net: Modes
    follower: Follower

    def __init__(
        self,
        folder: str,
        *,
        trust: Sequence[str] = (),
        reject_below: float = 0.0,
        limits: Limits | None = None,
        every: float = 1.0,
        batch_size: int = 64,
        batch_wait: float = 0.005,
    ) -> None:
        super().__init__(max_batch_size=batch_size, batch_timeout=batch_wait, api_path=PATH)
        self.folder, self.trust, self.every = folder, tuple(trust), every
        self.reject_below, self.limits = reject_below, limits or Limits()

    def setup(self, device: str) -> None:
        """Load the bundle, and follow its folder."""
        if multiprocessing.parent_process() is not None:
            # Ctrl-C reaches all processes; this one answers until the server has ended it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        seen = fingerprint(self.folder)
        self.net = load(self.folder, trust=self.trust, device=device)
        TASKS.set(len(self.net.tasks))
        self.follower = Follower(self.net, self.every, self._after_change)
        self.follower.seen = seen
        self.follower.start()

    def _after_change(self, read: bool) -> None:
        RELOADS.labels("read" if read else "failed").inc()
        TASKS.set(len(self.net.tasks))

    def decode_request(self, request: Annotated[Item, Depends(read_item)]) -> Asked | Refused:
        """FastAPI reads the item, in the process that holds the connection; here it is decoded."""
        return decode(self.net, request, self.limits.max_pixels)

    def predict(self, x: Any) -> Any:
        """Answers to a list of what was decoded, or to one."""
        if not isinstance(x, list):  # batch_size is 1
            return self.predict([x])[0]
        found = answer(self.net, x, self.reject_below)
        BATCH.observe(len(found))
        for one in found:
            if isinstance(one, Prediction):
                ANSWERS.labels(one.task).inc()
        return found

    def encode_response(self, output: Prediction | Refused) -> Response:
        """JSON with the status of this request, whatever those of its batch have."""
        if isinstance(output, Refused):
            return JSONResponse({"detail": output.message}, output.status)
        return JSONResponse(
            {
                "class": output.class_name,
                "task": output.task,
                "task_id": output.task_id,
                "confidence": output.confidence,
                "rejected": output.rejected,
            }
        )
