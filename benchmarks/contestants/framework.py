"""This project: one fit for the whole stream, its images as uint8, its modes and its evaluations."""

import logging
import warnings
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from work import CLASSES_PER_TASK, Answer, Clock, Data, Work, make_data, resident, serve

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import ClassIncrementalDataModule
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.errors import ExpectedForgettingWarning
from bpn_lightning.functional.importance import fisher_diagonal, output_sensitivity
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import (
    EWC,
    BeneficialPerturbation,
    ContinualStrategy,
    FineTuning,
    GradientEpisodicMemory,
    LearningWithoutForgetting,
    MemoryAwareSynapses,
    ParameterSuperposition,
    SynapticIntelligence,
)


@dataclass(eq=False, repr=False)
class Stream(ClassIncrementalDataModule):
    """The images of a piece of work."""

    data: Data

    def read(self) -> ImageData:
        """They are in memory."""
        (images, labels), (test_images, test_labels) = self.data.train, self.data.test
        names = [str(number) for number in range(int(labels.max()) + 1)]
        train, test = Samples(images, labels), Samples(test_images, test_labels)
        return ImageData(train, test, names, "memory")


def strategies(work: Work) -> list[ContinualStrategy]:
    """Of a method; strengths are such that nothing diverges, and cost nothing."""
    ewc, bd = EWC(strength=20), BeneficialPerturbation(rank=100, epsilon=0.003)
    return {
        "finetune": [FineTuning()],
        "ewc": [ewc],
        "si": [SynapticIntelligence(strength=0.1)],
        "mas": [MemoryAwareSynapses(strength=0.1)],
        "lwf": [LearningWithoutForgetting()],
        "gem": [GradientEpisodicMemory(memory_size=work.memory_size)],
        "psp": [ParameterSuperposition()],
        "bd+ewc": [bd, ewc],
        "bd+psp": [bd, ParameterSuperposition()],
    }[work.method]


class Timer(Callback):
    """Times the epochs of every task but its first; closing and opening tasks is in none of them."""

    def __init__(self, work: Work) -> None:
        self.work, self.answer = work, Answer()
        self.clock = Clock(work.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Comes before the module closes a task."""
        epoch = trainer.current_epoch % self.work.epochs
        if epoch == 0:
            self.clock = Clock(self.work.device)
        if epoch == self.work.epochs - 1:
            self.answer.step.append(self.clock.read(self.work.timed_steps))
            self.answer.resident.append(resident())


def run(work: Work) -> Answer:
    """What `bpn-fit` does, without its files."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", ExpectedForgettingWarning)
    seed_everything(0, verbose=False)
    stream = Stream(
        data=make_data(work),
        num_tasks=work.tasks,
        classes_per_task=CLASSES_PER_TASK,
        epochs_per_task=work.epochs,
        batch_size=work.batch_size,
        eval_batch_size=work.eval_batch_size,
    )
    module = ContinualModule(MLP(list(work.hidden)), evaluate_on="current", task_agnostic=False)
    timer = Timer(work)
    Trainer(
        max_epochs=-1,
        accelerator="gpu" if work.device == "cuda" else "cpu",
        devices=1,
        callbacks=[*strategies(work), timer],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    ).fit(module, stream)
    answer = timer.answer
    module.to(work.device)

    clock = Clock(work.device)
    answer.accuracy = module.evaluate().tolist()
    answer.evaluation = clock.read()
    rate = {"ewc": fisher_diagonal, "mas": output_sensitivity}.get(work.method)
    if rate is not None:
        parameters = module.network.shared_parameters(include_head=True)
        clock = Clock(work.device)
        rate(module.host, work.tasks - 1, parameters)
        answer.importance = clock.read()
    return answer


if __name__ == "__main__":
    serve(run)
