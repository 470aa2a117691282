"""The cursor of tasks: what a stream does to a Trainer, and what a Trainer may not do to a stream."""

import re

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger

from bpn_lightning import ContinualModule, evaluate
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import EWC, BeneficialPerturbation, ContinualStrategy, FineTuning
from bpn_lightning.tasks import Phase


def digits(**options):
    return SplitDigits(
        **{"num_tasks": 2, "epochs_per_task": 2, "batch_size": 64, "seed": 0, **options}
    )


def equal(one, two):
    """Whether two state dicts agree bit for bit."""
    tensors = [k for k, v in one.items() if isinstance(v, torch.Tensor)]
    return one.keys() == two.keys() and all(
        torch.equal(one[k].nan_to_num(-1), two[k].nan_to_num(-1)) for k in tensors
    )


class CallLog(ContinualStrategy):
    """Notes what happens, in order."""

    def __init__(self):
        self.events = []

    def phases(self, task, phases):
        return [Phase("warm_up", 1), *phases] if task.id else phases

    def on_stream_start(self, host, stream):
        self.events.append("stream")

    def on_task_start(self, host, task):
        self.events.append(f"start {task.id}")

    def capture_grad(self, host, parameters):
        position = host.position
        self.events.append(f"step {position.task} {position.phase}")

    def correct_step(self, host, parameters):
        self.events.append("stepped")

    def on_task_end(self, host, task):
        self.events.append(f"end {task.id}")


def test_every_event_of_a_stream_happens_once_and_in_order(fit):
    call_log = CallLog()
    module, trainer = fit([call_log], stream=digits(epochs_per_task=1, batch_size=1000))
    step = lambda task, phase: [f"step {task} {phase}", "stepped"]
    assert call_log.events == [
        *("stream", "start 0"),
        *step(0, "train"),
        *("end 0", "start 1"),
        *step(1, "warm_up"),
        *step(1, "train"),
        "end 1",
    ]
    assert trainer.current_epoch == module.schedule.total == 3
    assert (module.opened, module.closed) == (1, 1)


def test_the_matrix_has_every_row_and_the_last_one_is_what_the_network_scores(fit):
    module, trainer = fit([BeneficialPerturbation(8), EWC(100.0)])
    matrix = module.accuracy_matrix.accuracy
    assert matrix.shape == (3, 2)
    assert not matrix.isnan().any()
    assert torch.equal(matrix[-1], evaluate(module.host))
    assert torch.equal(matrix[0], fit_nothing())
    (tested,) = trainer.test(module, module.host.stream, verbose=False)
    assert [tested["test/accuracy/task_1"], tested["test/accuracy/task_2"]] == pytest.approx(
        matrix[-1].tolist()
    )


def test_the_current_task_alone_is_tested_and_in_the_end_all_are(fit):
    stream = {"num_tasks": 3, "epochs_per_task": 1}
    whole, _ = fit([EWC(100.0)], stream=digits(**stream))
    module, _ = fit([EWC(100.0)], stream=digits(**stream), evaluate_on="current")
    expected, found = whole.accuracy_matrix.accuracy, module.accuracy_matrix.accuracy
    measured = torch.eye(4, 3, dtype=torch.bool).roll(1, 0)
    measured[[0, -1]] = True
    assert torch.equal(~found.isnan(), measured)
    assert torch.equal(found[measured], expected[measured])
    full, short = whole.accuracy_matrix.summary(), module.accuracy_matrix.summary()
    same = ("average", "first_task", "per_task", "bwt", "after_learning")
    assert [full[key] for key in same] == [short[key] for key in same]
    assert short["fwt"] is short["forgetting"] is None


class Rows(Logger):
    """Keeps what is logged of the matrix."""

    name = version = "rows"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if "stream/tasks_learned" in metrics:
            self.rows.append(metrics)


@pytest.mark.parametrize("evaluate_on", ["all", "seen_and_next", "current"])
def test_no_metric_is_new_with_a_later_task(fit, evaluate_on):
    """A file with a column for each would be rewritten with every task."""
    logger = Rows()
    module, _ = fit(
        stream=digits(num_tasks=3, epochs_per_task=1),
        evaluate_on=evaluate_on,
        trainer={"logger": logger, "log_every_n_steps": 1},
    )
    matrix = module.accuracy_matrix.accuracy.tolist()
    before, *rows = logger.rows
    assert [row["stream/tasks_learned"] for row in logger.rows] == [0, 1, 2, 3]
    if evaluate_on == "current":
        assert [row["accuracy/current"] for row in rows] == [matrix[k][k - 1] for k in (1, 2, 3)]
        assert not any("/task_" in key for row in logger.rows for key in row)
    else:
        names = [f"accuracy/task_{k}" for k in (1, 2, 3)]
        assert [before[name] for name in names] == matrix[0]
        for k, row in enumerate(rows, start=1):
            assert [row[name] for name in names if name in row] == matrix[k][:k]
    assert rows[-1]["accuracy/average"] == pytest.approx(sum(matrix[-1]) / 3)
    assert "accuracy/average" not in before


def test_the_curve_of_tasks_is_the_matrix_over_the_epochs_that_there_were(fit):
    stream = digits(epochs_per_task=4, validation_fraction=0.2)
    module, trainer = fit(stream=stream, patience=1, lr=0.0)  # which never improves
    matrix = module.accuracy_matrix.accuracy.tolist()
    assert [point["accuracy"] for point in module.curve] == matrix
    assert [point["task"] for point in module.curve] == [0, 0, 1]
    first = module.schedule.lengths[0]
    assert [point["epoch"] for point in module.curve] == [0, first, trainer.current_epoch]
    assert trainer.current_epoch == 4


def fit_nothing():
    """Accuracies of the network that `fit` starts from."""
    from lightning.pytorch import seed_everything

    seed_everything(0, verbose=False)
    stream = digits()
    stream.setup()
    module = ContinualModule(MLP([16, 16]))
    module.attach(stream)
    return evaluate(module.host)


def test_predictions_answer_each_sample_in_its_own_mode(fit):
    module, trainer = fit([BeneficialPerturbation(8), EWC(100.0)])
    (logits,) = trainer.predict(module, module.host.stream)
    (batch,) = list(module.host.stream.test_dataloader())
    for task in (0, 1):
        rows = batch.task == task
        right = (logits[rows].argmax(1) == batch.targets[rows]).double().mean()
        assert right == module.accuracy_matrix.accuracy[-1, task]


def test_a_fresh_optimizer_and_schedule_for_every_task(fit):
    rates, counts = [], []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def halve_at_the_end(optimizer, num_steps):
        counts.append(num_steps)
        return torch.optim.lr_scheduler.StepLR(optimizer, num_steps - 1, gamma=0.5)

    fit([Watch()], lr=0.5, scheduler=halve_at_the_end)
    per_task = len(rates) // 2
    assert rates == ([0.5] * (per_task - 1) + [0.25]) * 2
    assert set(counts) == {per_task}


@pytest.mark.parametrize(("reset", "kept"), [("always", False), ("never", True)])
def test_reset_optimizer_decides_whether_momentum_survives_a_task(fit, reset, kept):
    found = []

    class Watch(ContinualStrategy):
        def capture_grad(self, host, parameters):
            state = host.trainer.optimizers[0].state
            found.append(any("momentum_buffer" in value for value in state.values()))

    stream = digits(epochs_per_task=1, batch_size=1000, reset_optimizer=reset)
    fit([Watch()], stream=stream, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert found == [False, kept]


def test_patience_ends_a_task_on_the_validation_split_alone(fit):
    touched = []
    stream = digits(epochs_per_task=6, validation_fraction=0.2)
    original = stream.loader
    stream.loader = lambda task, split, **k: touched.append(split) or original(task, split, **k)
    # A learning rate of 0 never improves: one bad epoch after the first, then the next task.
    module, trainer = fit([FineTuning()], stream=stream, lr=0.0, patience=1)
    assert module.schedule.lengths == [2, 2]
    assert trainer.current_epoch == 4
    assert module.closed == 1
    # Its length is asked for before, and at the stream's end it is scored on both tasks.
    assert touched.count("val") == 4 + 1 + 2


def test_every_phase_is_judged_by_its_own_best_loss(fit, monkeypatch):
    scores = iter([(1.0, 0.9), (2.0, 0.8), (3.0, 0.8)])  # the second task does not improve
    monkeypatch.setattr("bpn_lightning.model.task_loop.validation_scores", lambda *_: next(scores))
    stream = digits(epochs_per_task=[1, 3], validation_fraction=0.2)
    module, _ = fit([FineTuning()], stream=stream, patience=1)
    assert module.schedule.lengths == [1, 2]


def test_patience_without_a_validation_split_is_refused(fit):
    with pytest.raises(ConfigurationError, match="validation_fraction to be more than 0 when pat"):
        fit([], patience=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_epochs": None}, "Expected trainer.max_epochs to be -1, the length of the stream (4"),
        ({"max_epochs": 3}, "but got 3. Pass max_epochs=-1 or 4"),
        ({"fast_dev_run": True}, "Expected trainer.fast_dev_run to be off, but got"),
        ({"overfit_batches": 1}, "Expected trainer.overfit_batches to be 0, but got 1."),
    ],
)
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_trainer_flags_that_contradict_the_stream_are_refused_by_name(fit, flags, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        fit(trainer=flags)


def test_a_total_number_of_epochs_that_fits_is_accepted(fit):
    module, _ = fit(trainer={"max_epochs": 4})
    assert module.closed == 1


def test_two_projections_are_refused(fit):
    class One(ContinualStrategy):
        projects = True

    class Two(One):
        pass

    with pytest.raises(ConfigurationError, match="projects gradients, but got One and Two"):
        fit([One(), Two()])


@pytest.mark.parametrize(
    ("steps", "missing"),
    # Ten steps are a task: in the middle of an epoch, in a task's last epoch, and at a task's end.
    [(3, "tasks 1, 2 of 2"), (8, "tasks 1, 2 of 2"), (10, "tasks 2 of 2"), (13, "tasks 2 of 2")],
)
def test_a_stream_that_stops_early_says_so_and_goes_on_to_the_same_end(
    fit, tmp_path, steps, missing
):
    strategies = lambda: [BeneficialPerturbation(8), EWC(100.0)]
    whole, _ = fit(strategies())
    with pytest.warns(UserWarning, match=missing):
        part, trainer = fit(strategies(), trainer={"max_steps": steps})
    assert part.accuracy_matrix.accuracy[-1].isnan().all()
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest, _ = fit(strategies(), seed=1, ckpt_path=tmp_path / "part.ckpt")
    assert equal(whole.state_dict(), rest.state_dict())


def test_diverged_training_is_named_and_not_scored(fit):
    with pytest.raises(ConfigurationError, match="weights to be finite after task 0, but backbone"):
        fit(lr=1e20)


def test_masks_must_fit_the_classes_of_the_stream(fit):
    with pytest.raises(
        ConfigurationError, match="'all', 'seen' or 'task' for a stream that brings"
    ):
        fit(mask="shared")


def test_a_used_module_is_not_silently_trained_again(fit, tmp_path):
    module, _ = fit()
    again = Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="about to learn task 0, but it has opened task 1"):
        again.fit(module, digits())


def test_a_module_loads_without_a_trainer_and_answers_the_same(fit, tmp_path):
    module, trainer = fit([BeneficialPerturbation(8), EWC(100.0)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ContinualModule.load_from_checkpoint(
        tmp_path / "last.ckpt", backbone=MLP([16, 16]), weights_only=True
    ).eval()
    inputs = torch.randn(5, 1, 8, 8)
    module.eval()
    for task in (0, 1):
        assert torch.equal(loaded(inputs, task=task), module(inputs, task=task))
    stream = digits()
    stream.setup()
    loaded.attach(stream)
    assert torch.equal(evaluate(loaded.host), module.accuracy_matrix.accuracy[-1])
    assert torch.equal(loaded.accuracy_matrix.accuracy, module.accuracy_matrix.accuracy)


@pytest.mark.parametrize(
    ("strategies", "options", "message"),
    [
        (
            [FineTuning()],
            {},
            "they differ: strategies is ['finetune'] here and ['ewc'] there.",
        ),
        ([EWC()], {"stream": digits(num_tasks=1)}, "number of tasks is 1 here and 2 there; "),
        (
            [EWC()],
            {"stream": digits(class_order=[1, 0, 2, 3])},
            "they differ: task 0.class_names is ('1', '0') here and ('0', '1') there.",
        ),
        (
            [EWC()],
            {"stream": digits(seed=1), "mask": "seen"},
            "they differ: mask is 'seen' here and 'all' there; seed is 1 here and 0 there.",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(fit, tmp_path, strategies, options, message):
    _, trainer = fit([EWC()])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        fit(strategies, ckpt_path=tmp_path / "last.ckpt", **options)


def test_a_failure_while_a_task_closes_adds_nothing_twice(fit, tmp_path, monkeypatch):
    whole, trainer = fit([EWC(100.0)])
    importance = trainer.callbacks[0].penalty.importance

    class Fails(Callback):
        """Breaks the evaluation that closes the first task, after EWC has consolidated it."""

        def on_exception(self, trainer, module, error):
            trainer.save_checkpoint(tmp_path / "broken.ckpt")

    from bpn_lightning.model import task_loop as home

    real, calls = home.evaluate, []

    def fails_once(module, *args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return real(module, *args)

    monkeypatch.setattr(home, "evaluate", fails_once)
    with pytest.raises(RuntimeError, match="power cut"):
        fit([EWC(100.0), Fails()])
    rest, trainer = fit([EWC(100.0)], seed=3, ckpt_path=tmp_path / "broken.ckpt")
    assert equal(whole.state_dict(), rest.state_dict())
    assert equal(importance, trainer.callbacks[0].penalty.importance)
