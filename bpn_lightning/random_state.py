"""Random numbers: separately seeded generators, and the global states as plain data."""

import os
import random
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "restore_random_state", "run_seed", "seeded_generator"]


def run_seed() -> int:
    """The seed of Lightning's ``seed_everything`` (the variable PL_GLOBAL_SEED), or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def seeded_generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A separate generator for one purpose, seeded by the key only.

    It does not use or advance the global generator, so its numbers do not depend on other random
    draws, and a resumed run needs no saved state.

    >>> a, b = (torch.rand(2, generator=seeded_generator("task", 1)) for _ in range(2))
    >>> bool((a == b).all())
    True
    """
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def random_state() -> dict[str, Any]:
    """The states of all global generators, in types that load with ``weights_only=True``."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    twister = legacy["state"]
    state: dict[str, Any] = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "bit_generator": legacy["bit_generator"],
            "key": torch.from_numpy(twister["key"].astype(np.int64)),
            "position": int(twister["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the result of :func:`random_state`."""
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    key = legacy["key"].numpy().astype(np.uint32)
    twister = (legacy["bit_generator"], key, legacy["position"])
    np.random.set_state((*twister, legacy["has_gauss"], legacy["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])
