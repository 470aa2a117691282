"""The floor: a hand-written loop on tensors in memory.

It fine-tunes; as `gem` it also takes the gradient on every past task's memory, and does nothing with it:
what no implementation of that method can go without.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from work import Answer, Clock, Work, by_task, make_data, network, resident, serve


def run(work: Work) -> Answer:
    """Learn and test; no framework, floats that were normalized beforehand."""
    data = make_data(work)
    train, test = by_task(data.train, work), by_task(data.test, work)
    net = network(work).to(work.device)
    answer = Answer()
    memories: list[tuple[Tensor, Tensor]] = []
    for images, labels in train:
        optimizer = torch.optim.SGD(net.parameters(), lr=work.lr)
        clock = Clock(work.device)
        for epoch in range(work.epochs):
            if epoch == 1:
                clock = Clock(work.device)
            order = torch.randperm(len(labels)).to(work.device)
            for chosen in order.split(work.batch_size):
                loss = F.cross_entropy(
                    net(images.index_select(0, chosen)), labels.index_select(0, chosen)
                )
                optimizer.zero_grad()
                loss.backward()
                for kept in memories:
                    of_memory = F.cross_entropy(net(kept[0]), kept[1])
                    torch.autograd.grad(of_memory, list(net.parameters()))
                optimizer.step()
        if work.method == "gem":
            memories.append((images[: work.memory_size], labels[: work.memory_size]))
        answer.step.append(clock.read(work.timed_steps))
        answer.resident.append(resident())

    clock = Clock(work.device)
    with torch.no_grad():
        for images, labels in test:
            right = torch.zeros((), dtype=torch.int64, device=work.device)
            for start in range(0, len(labels), work.eval_batch_size):
                part = slice(start, start + work.eval_batch_size)
                right += (net(images[part]).argmax(1) == labels[part]).sum()
            answer.accuracy.append(float(right) / len(labels))
    answer.evaluation = clock.read()

    images, labels = train[-1]
    clock = Clock(work.device)
    for start in range(0, len(labels), work.batch_size):
        part = slice(start, start + work.batch_size)
        net.zero_grad()
        F.cross_entropy(net(images[part]), labels[part]).backward()
    answer.forward_backward = clock.read()
    return answer


if __name__ == "__main__":
    serve(run)
