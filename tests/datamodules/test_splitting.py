"""The order of classes and the held-out part."""

import pytest
import torch

from bpn_lightning.datamodules.splitting import choose_classes, hold_out
from bpn_lightning.errors import ConfigurationError

NAMES = ["ant", "bee", "cat", "dog", "7"]


def test_default_is_the_data_sets_own_order() -> None:
    assert choose_classes(NAMES) == [0, 1, 2, 3, 4]


def test_names_and_numbers_may_mix_and_a_name_may_look_like_a_number() -> None:
    assert choose_classes(NAMES, ["dog", 0, "7"]) == [3, 0, 4]


def test_order_seed_shuffles_what_is_listed_and_nothing_else_moves_it() -> None:
    names = [str(i) for i in range(30)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    shuffled = choose_classes(names, order_seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert choose_classes(names, order_seed=1) == shuffled
    assert sorted(shuffled) == list(range(30))
    assert shuffled != list(range(30))
    assert choose_classes(names, order_seed=2) != shuffled
    assert sorted(choose_classes(names, ["3", 5, 9], order_seed=1)) == [3, 5, 9]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["cta"], r"class_order .* got 'cta'\. Did you mean 'cat'\?"),
        ([5], r"numbers from 0 to 4, but got 5\. .*'ant', 'bee', 'cat', 'dog', '7'"),
        ([-1], r"but got -1\."),
        (["ant", "bee", 0, 1], r"each class once, but got 'ant', 'bee' more than once"),
    ],
)
def test_wrong_order_is_an_error(order: list[str | int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        choose_classes(NAMES, order)


def test_hold_out_takes_the_fraction_of_every_class() -> None:
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([100, 10, 2, 1]))
    labels = labels[torch.randperm(len(labels))]
    held = hold_out(labels, 0.2, "test", 0)
    assert labels[held].bincount(minlength=4).tolist() == [20, 2, 1, 0]
    assert hold_out(labels, 0.99, "test", 0)[labels == 2].sum() == 1, "one is left"
    assert not hold_out(labels, 0.0, "test", 0).any()


def test_hold_out_follows_from_its_key_alone() -> None:
    labels = torch.arange(60) % 3
    state = torch.get_rng_state()
    held = hold_out(labels, 0.5, "test", 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(hold_out(labels, 0.5, "test", 0), held)
    assert not torch.equal(hold_out(labels, 0.5, "test", 1), held)
    assert not torch.equal(held[labels == 0], held[labels == 1]), "classes draw apart"
    # what a class gives does not depend on which others there are
    some = labels != 1
    assert torch.equal(hold_out(labels[some], 0.5, "test", 0), held[some])
