"""Avalanche 0.6, its own strategies as its documentation uses them; run in an environment of its own.

python -m venv avalanche && avalanche/bin/pip install torch torchvision avalanche-lib==0.6.0
"""

from typing import Any

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.training import EWC, GEM, MAS, LwF, Naive, SynapticIntelligence
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from work import Answer, Clock, Work, by_task, make_data, network, resident, serve

METHODS: dict[str, Any] = {
    "finetune": (Naive, {}),
    "ewc": (EWC, {"ewc_lambda": 0.1}),
    "si": (SynapticIntelligence, {"si_lambda": 0.1}),
    "mas": (MAS, {"lambda_reg": 0.1}),
    "lwf": (LwF, {"alpha": 1.0, "temperature": 2.0}),
    "gem": (GEM, {"memory_strength": 0.5}),
}


class Timer(SupervisedPlugin):
    """Times the epochs of every task but its first, and what happens at its end."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.answer = work, Answer()
        self.clock = Clock(work.device)

    def after_training_epoch(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Comes before what strategies do after a task."""
        epoch = strategy.clock.train_exp_epochs
        if epoch == 0:
            self.clock = Clock(self.work.device)
        if epoch == self.work.epochs - 1:
            self.answer.step.append(self.clock.read(self.work.timed_steps))
            self.answer.resident.append(resident())
            self.clock = Clock(self.work.device)


def run(work: Work) -> Answer:
    """Naive and the strategies around it, on normalized floats in memory, without any logger."""
    data = make_data(work)
    benchmark = tensors_benchmark(
        train_tensors=by_task(data.train, work),
        test_tensors=by_task(data.test, work),
        task_labels=[0] * work.tasks,
    )
    kind, arguments = METHODS[work.method]
    if work.method == "gem":
        arguments = {**arguments, "patterns_per_exp": work.memory_size}
    timer, net = Timer(work), network(work)
    strategy = kind(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=work.lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=work.batch_size,
        eval_mb_size=work.eval_batch_size,
        train_epochs=work.epochs,
        device=work.device,
        evaluator=EvaluationPlugin(),
        plugins=[timer],
        **arguments,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
        if work.method in ("ewc", "mas"):
            timer.answer.importance = timer.clock.read()
    clock = Clock(work.device)
    strategy.eval(benchmark.test_stream)
    timer.answer.evaluation = clock.read()
    with torch.no_grad():
        for images, labels in by_task(data.test, work):
            right = (net(images).argmax(1) == labels).double().mean()
            timer.answer.accuracy.append(float(right))
    return timer.answer


if __name__ == "__main__":
    serve(run)
