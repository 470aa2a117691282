"""What a run records of the weights that its network began with."""

from types import SimpleNamespace
from typing import Any

from torch import nn

from bpn_lightning import ContinualModule
from bpn_lightning.cli.train import _pretrained
from bpn_lightning.nn import MLP, Pretrained
from bpn_lightning.nn.weights import hash_of
from bpn_lightning.run.provenance import collect_provenance


def records(backbone: nn.Module) -> list[Any]:
    return _pretrained(SimpleNamespace(model=ContinualModule(backbone)))  # type: ignore[arg-type]


def test_pretrained_weights_are_named_with_their_hash_as_they_were_before_training() -> None:
    network = nn.Linear(2, 3)
    found = hash_of({f"network.{key}": value for key, value in network.state_dict().items()})
    backbone = Pretrained(network).set_origin("torch", "net", "some-weights")
    nn.init.zeros_(network.weight)
    (record,) = records(backbone)
    assert (record["name"], record["weights"], record["sha256"]) == ("net", "some-weights", found)
    assert collect_provenance(1.0, None, [record])["pretrained"] == [record]


def test_random_weights_are_not_named() -> None:
    assert records(nn.Sequential(Pretrained(MLP([3])))) == []
    assert "pretrained" not in collect_provenance(1.0)
