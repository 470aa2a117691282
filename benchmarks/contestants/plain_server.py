"""LitServe with one plain network of 5 x 300 units, as its documentation shows it."""

import base64
import itertools
import sys
from typing import Any

import litserve
import numpy as np
import torch
from torch import nn


class Plain(litserve.LitAPI):
    """Decodes, answers and encodes as a bundle's server does, for one task."""

    def setup(self, device: str) -> None:
        """Make the network."""
        sizes = [784, 300, 300, 300, 300, 300]
        pairs = itertools.pairwise(sizes)
        layers = [part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(300, 10)).eval().requires_grad_(False)

    def decode_request(self, request: dict[str, Any]) -> Any:
        """Numbers in base64."""
        return np.frombuffer(base64.b64decode(request["input"]), "<f4").reshape(request["shape"])

    def predict(self, x: Any) -> Any:
        """The likeliest class of each, with its probability."""
        confidence, classes = self.net(torch.from_numpy(np.stack(x))).softmax(1).max(1)
        return [*zip(classes.tolist(), confidence.tolist(), strict=True)]

    def encode_response(self, output: Any) -> dict[str, Any]:
        """Class and confidence."""
        return {"class": str(output[0]), "confidence": output[1]}


if __name__ == "__main__":
    api = Plain(max_batch_size=64, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[sys.argv.index("--port") + 1]),
        generate_client_file=False,
        log_level="warning",
    )
