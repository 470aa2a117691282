"""What gates and fronts see is normalized as the first task's inputs are, by the definition of both."""

import pytest
import torch
from torch import Tensor

from bpn_lightning.nn.common_normalization import CommonNormalization
from bpn_lightning.preparation import Preparation, prepare_raw

MEANS, DEVIATIONS = ([0.5, -1.0], [3.0, 0.25]), ([2.0, 1.0], [0.5, 4.0])


def features(part: int, tasks: int) -> Preparation:
    steps = [["normalize", MEANS[part], DEVIATIONS[part], 1]]
    return Preparation(tasks, "float64", (2,), steps)


def normalized(raw: Tensor, part: int) -> Tensor:
    return ((raw - torch.tensor(MEANS[part])) / torch.tensor(DEVIATIONS[part])).float()


@pytest.fixture
def raw() -> Tensor:
    return torch.randn(6, 2, dtype=torch.float64) * 3


def test_inputs_go_to_the_first_tasks_normalization_and_back(raw: Tensor) -> None:
    common = CommonNormalization([features(0, 2), features(1, 1)])
    first, second = normalized(raw, 0), normalized(raw, 1)
    torch.testing.assert_close(common.to_first(second, 2), first)
    torch.testing.assert_close(common.from_first(first, 2), second)
    task = torch.tensor([0, 2, 1, 2, 0, 2])
    own = torch.where((task == 2)[:, None], second, first)
    torch.testing.assert_close(common.to_first(own, task), first)
    torch.testing.assert_close(common.from_first(first, task), own)


def test_channels_of_images_have_their_own() -> None:
    images = [
        Preparation(1, "uint8", (2, 4, 4), [["normalize", mean, std, 255]])
        for mean, std in zip(([0.1, 0.6], [0.3, 0.2]), ([0.5, 0.2], [0.1, 0.4]), strict=True)
    ]
    raw = torch.randint(256, (3, 2, 4, 4), dtype=torch.uint8)
    first, second = (prepare_raw(images, raw, task) for task in (0, 1))
    common = CommonNormalization(images)
    torch.testing.assert_close(common.to_first(second, 1), first)
    torch.testing.assert_close(common.from_first(first, 1), second)
    assert [one.tasks for one in common.preparations] == [2]
    assert torch.equal(prepare_raw(common.preparations, raw, 1), first)


def test_what_differs_by_task_is_not_merged() -> None:
    parts = [
        Preparation(
            2, "uint8", (1, 4, 4), [["normalize", [mean], [1.0], 255], ["rotate", 90, 2, 0]]
        )
        for mean in (0.1, 0.2)
    ]
    common = CommonNormalization(parts)
    assert [one.tasks for one in common.preparations] == [2, 2]
    assert common.preparations[1] == parts[0]


@pytest.mark.parametrize(
    "other",
    [features(0, 3), Preparation(1, "float64", (2,), None, "Own.prepare")],
    ids=["the same", "by code"],
)
def test_nothing_is_done_where_nothing_can_be(raw: Tensor, other: Preparation) -> None:
    common = CommonNormalization([other, features(0, 1)])
    assert not common.differs
    assert common.to_first(raw, 1) is raw
    assert common.from_first(raw, torch.zeros(6)) is raw
