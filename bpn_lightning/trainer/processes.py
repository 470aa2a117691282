"""Check that the state is the same on all processes, by comparing hashes.

Every process sees its own shard of the samples, but weights, keys, memories and importances have to be
the same. A method that forgets a reduction fails silently, so a run can check this
(``ContinualModule(check_processes=True)``).
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from bpn_lightning.errors import ProcessesError

__all__ = ["check_processes", "disagreements", "fingerprints", "leaves"]

#: Number of differences that an error names; the others are counted.
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
    """A hash of every leaf by its path: of a tensor's dtype, shape and bits, else of its repr.

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
    """The leaves in which processes differ from the first, and the ranks of these processes.

    Args:
        found: the :func:`fingerprints` of each process.

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
    """Compare the state of all processes; called on each of them.

    Args:
        held: nested mappings and lists, by their owner's name.
        moment: the time of the check, for the message.

    Raises:
        ProcessesError: on every process, naming the leaves, their owners and the ranks that differ.
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
            f"Expected every process to have the same state {moment}, but some differ from process 0 in "
            f"{', '.join(named[:NAMED])}{more}. host.batches gives a process its shard of the samples: "
            "sum over it, then host.all_reduce; draw random numbers from "
            "random_state.seeded_generator."
        )
