"""A memory and a teacher for any strategy: without a Trainer, against the stream and the network themselves."""

import pytest
import torch

from bpn_lightning.costs import tensor_bytes, tensors_in
from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.memory import EpisodicMemory, check_memory_size, memory_bytes
from bpn_lightning.model.host import Host
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.teacher import Teacher, student_outputs


@pytest.fixture
def host() -> Host:
    stream = SplitDigits(num_tasks=3, epochs_per_task=1, batch_size=64)
    stream.setup()
    torch.manual_seed(0)
    module = ContinualModule(MLP([8]))
    module.attach(stream)
    return module.host


def test_what_a_memory_gives_back_are_samples_of_the_stream(host: Host) -> None:
    """Inputs, targets and tasks, whatever order they are asked for in."""
    memory, known = EpisodicMemory(), {}
    for task in host.network.tasks:
        memory.store(host, task, 4, "class")
        for batch in host.stream.loader(task.id, "train"):
            pairs = zip(batch.inputs, batch.targets.tolist(), strict=True)
            known |= {image.numpy().tobytes(): (target, task.id) for image, target in pairs}
    indices = torch.tensor([23, 0, 9, 9])
    batch = memory.batch(indices)
    assert isinstance(batch.task, torch.Tensor)
    found = zip(batch.inputs, batch.targets.tolist(), batch.task.tolist(), strict=True)
    assert [known[image.numpy().tobytes()] for image, *_ in found] == list(
        zip(batch.targets.tolist(), batch.task.tolist(), strict=True)
    )
    assert batch.task.tolist() == [2, 0, 1, 1]
    assert memory_bytes(host, len(memory), torch.uint8) == tensor_bytes(
        tensors_in(memory.state_dict())
    )


def test_a_memory_larger_than_a_class_is_refused_by_the_name_of_the_argument(
    host: Host,
) -> None:
    with pytest.raises(ConfigurationError) as error:
        check_memory_size(host, 1000, "class", "size")
    assert str(error.value).startswith("Expected size to be at most the ")
    assert "training samples of class '" in str(error.value)


def test_a_teacher_is_what_the_network_was(host: Host) -> None:
    """Before and after a step of its weights; the student is what it is now."""
    inputs, teacher = torch.rand(5, 1, 8, 8), Teacher()
    before = host.network(inputs, task=0).detach()
    teacher.snapshot(host)
    with torch.no_grad():
        for parameter in host.network.parameters():
            parameter.add_(0.1)
    now = host.network(inputs, task=0).detach()
    assert not torch.allclose(now, before)
    torch.testing.assert_close(teacher.forward(host, inputs).logits, before)
    torch.testing.assert_close(student_outputs(host, inputs).logits.detach(), now)
