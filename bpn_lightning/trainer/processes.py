"""Whether the processes of a run hold the same: compared leaf by leaf, by hash.

Every process sees its own share of the samples, and all of them must come to the same weights, keys,
memories and importances. A method that forgets to reduce something goes wrong silently, so a run can
be asked to look (``ContinualModule(check_processes=True)``).
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from bpn_lightning.errors import ProcessesError

__all__ = ["check_processes", "disagreements", "fingerprints", "leaves"]

#: Places that an error names; the others are counted.
NAMED = 3


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists, with their paths.

    >>> list(leaves({"a": [1, {"b": 2.0}]}))
    [('a/0', 1), ('a/1/b', 2.0)]
    """
    if isinstance(tree, Mapping):
        parts: Any = tree.items()
    elif isinstance(tree, list | tuple):
        parts = enumerate(tree)
    else:
        yield path, tree
        return
    for key, value in parts:
        yield from leaves(value, f"{path}/{key}" if path else str(key))


def fingerprints(tree: Any) -> dict[str, str]:
    """A hash of every leaf by its path: of a tensor's type, shape and bits, else of its text.

    >>> one, other = (fingerprints({"w": torch.tensor([value])}) for value in (0.5, 0.5 + 2**-24))
    >>> one == other
    False
    """
    return {path: _fingerprint(leaf) for path, leaf in leaves(tree)}


def _fingerprint(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return blake2b(repr(leaf).encode(), digest_size=16).hexdigest()
    bits = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest = blake2b(f"{leaf.dtype} {tuple(leaf.shape)}".encode(), digest_size=16)
    digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


def disagreements(found: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """Where processes differ from the first, and which ones.

    Args:
        found: of each process, :func:`fingerprints` of what it holds.

    >>> disagreements([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}])
    {'b': [1, 2]}
    """
    places = dict.fromkeys(place for one in found for place in one)
    differing = {
        place: [rank for rank, one in enumerate(found) if one.get(place) != found[0].get(place)]
        for place in places
    }
    return {place: ranks for place, ranks in differing.items() if ranks}


def check_processes(held: Mapping[str, Any], moment: str) -> None:
    """Compare what all processes hold; each of them calls this.

    Args:
        held: nested mappings and lists, by their owner's name.
        moment: when, for the message.

    Raises:
        ProcessesError: in every process, naming the places, their owners and who differs.
    """
    mine = {
        f"{path} of {owner}": value
        for owner, tree in held.items()
        for path, value in fingerprints(tree).items()
    }
    found: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, mine)
    differing = disagreements(found)
    if differing:
        named = [
            f"{place} (process {', '.join(map(str, ranks))})" for place, ranks in differing.items()
        ]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        raise ProcessesError(
            f"Expected every process to hold the same {moment}, but some differ from process 0 in "
            f"{', '.join(named[:NAMED])}{more}. host.batches gives a process its share of the samples: "
            "sum over it, then host.all_reduce; draw random numbers from "
            "random_state.seeded_generator."
        )
