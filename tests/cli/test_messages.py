"""Mistakes as users make them, and the whole line that they get."""

from pathlib import Path

import pytest

from bpn_lightning.cli.main import main
from bpn_lightning.cli.messages import shorten_help

pytestmark = pytest.mark.slow

ALL = " `bpn-fit --help_all` shows all."
DIGITS = (
    "It takes epochs_per_task, batch_size, eval_batch_size, validation_fraction, evaluation_split, augment, channels, "
    "seed, reset_optimizer, task_id_at_inference, num_tasks, classes_per_task, class_order, "
    "class_order_seed, domain_incremental, blurry."
)
NO_TASKS = f"SplitDigits has no argument 'num_taks' (data). Did you mean 'num_tasks'? {DIGITS}"
SGD = (
    "SGD has no argument 'momentm' (model.optimizer). Did you mean 'momentum'? It takes params, lr, "
    "momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused."
)


def said(
    line: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str = "bd+ewc"
) -> str:
    flags = ["--trainer.accelerator", "cpu", "--runs", str(tmp_path / "runs")]
    assert main(["--config", "digits_inc.yaml", "--method", method, *flags, *line]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    return shown.err.removeprefix("bpn-fit: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data.init_args.num_taks 3", NO_TASKS),
        ("--data.num_taks 3", NO_TASKS),
        (
            "--strategies.bd.epsilom 3",
            "There is no option --strategies.bd.epsilom. Did you mean '--strategies.bd.epsilon'?"
            + ALL,
        ),
        (
            "--trainer.max_epoch 3",
            "There is no option --trainer.max_epoch. Did you mean '--trainer.max_epochs'?" + ALL,
        ),
        (
            "--seed_everythin 3",
            "There is no option --seed_everythin. Did you mean '--seed_everything'?" + ALL,
        ),
        (
            "--model.init_args.mask task",
            "There is no option --model.init_args.mask. Did you mean '--model.mask'?" + ALL,
        ),
        (
            "--accelerator cpu",
            "There is no option --accelerator. Did you mean '--trainer.accelerator'?" + ALL,
        ),
        ("--gpus 1", "There is no option --gpus." + ALL),
        ("--seed 1", "There is no option --seed. Did you mean '--seed_everything'?" + ALL),
        ("--runs.dir x", "There is no key runs.dir: runs is a single value." + ALL),
        (
            "--modle.mask task",
            "There is no option --modle.mask. Did you mean '--model.mask'?" + ALL,
        ),
        ("--model.optimizer.momentm 1", SGD),
        (
            "--model.backbone.init_args.hiden [3]",
            "MLP has no argument 'hiden' (model.backbone). Did you mean 'hidden'? It takes hidden.",
        ),
        ("digits", "Expected an option, but got 'digits'. Options start with --."),
        ("--trainer.max_steps q", "Expected trainer.max_steps to be int, but got q."),
        ("--data.num_tasks q", "Expected data.init_args.num_tasks to be int or null, but got q."),
        (
            "--data.init_args.epochs_per_task q",
            "Expected data.init_args.epochs_per_task to be int or list[int], but got q.",
        ),
        (
            "--model.backbone.init_args.hidden [3.5]",
            "Expected model.backbone.init_args.hidden to be int, but got 3.5.",
        ),
        (
            "--model.mask tusk",
            "Expected model.mask to be 'all', 'seen', 'task' or 'shared', but got tusk.",
        ),
        (
            "--model.backbone.class_path bpn_lightning.nn.backbones.MPL",
            (
                "Expected model.backbone to match its type, but got an error: module "
                "'bpn_lightning.nn.backbones' has no attribute 'MPL'. Did you mean 'MLP'?" + ALL
            ),
        ),
        (
            "--model.backbone.class_path not_there.MLP",
            (
                "Expected model.backbone to match its type, but got an error: No module named 'not_there'."
                + ALL
            ),
        ),
        (
            "--model.optimizer SDG",
            (
                "Expected model.optimizer to match its type, but got an error: Expected a dot import path "
                "string: SDG. Did you mean 'SGD'?" + ALL
            ),
        ),
        (
            "--data lightning.Trainer",
            (
                "Expected data to match its type, but got 'lightning.Trainer': Import path does not "
                "correspond to a subclass of ContinualDataModule." + ALL
            ),
        ),
        (
            "--strategies.bd 3",
            'Expected strategies.bd to match its type, but got an error: Unable to load config "3".'
            + ALL,
        ),
        (
            "--ckpt_path a.ckpt --runs r",
            (
                "Expected ckpt_path to be 'last' or a checkpoint, but there is no file 'a.ckpt'. "
                "Those of this run are in r/digits_inc/bd+ewc/seed_0/checkpoints."
            ),
        ),
        (
            "--ckpt_path last --overwrite",
            (
                "Expected either --overwrite, which starts over, or --ckpt_path last, which resumes, but "
                "got both. Leave one out."
            ),
        ),
        (
            "--checkpoint_every_n_steps 0",
            (
                "Expected checkpoint_every_n_steps to be at least 1, but got 0. null disables this interval."
            ),
        ),
    ],
)
def test_a_wrong_flag(
    flags: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said(flags.split(), capsys, tmp_path) == message


@pytest.mark.parametrize("flag", ["--data.init_args.num_workers", "--data.num_workers"])
def test_workers_are_not_taken_for_tasks(
    flag: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = said(["--config", "digits_inc.yaml", flag, "4"], capsys, tmp_path)
    assert message.startswith(
        "SplitDigits has no argument 'num_workers' (data): a stream keeps its samples"
    )
    assert "num_tasks" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {init_args: {num_taks: 3}}", NO_TASKS),
        (
            "data: {class_path: SplitDigits, init_arg: {num_tasks: 3}}",
            f"SplitDigits has no argument 'init_arg' (data). Did you mean 'init_args'? {DIGITS}",
        ),
        (
            "trainer: {max_epoch: 3}",
            "There is no key trainer.max_epoch. Did you mean 'trainer.max_epochs'?" + ALL,
        ),
        (
            "trianer: {max_epochs: 3}",
            "There is no key trianer.max_epochs. Did you mean 'trainer.max_epochs'?" + ALL,
        ),
        (
            "sede_everything: 3",
            "There is no key sede_everything. Did you mean 'seed_everything'?" + ALL,
        ),
        (
            "method: bd+ewc\nstrategies: {bd: {epsilom: 1}}",
            "There is no key strategies.bd.epsilom. Did you mean 'strategies.bd.epsilon'?" + ALL,
        ),
        (
            "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentm: 1}}}",
            SGD,
        ),
        (
            "trainer: {max_epochs: '${data.init_args.num_taks}'}",
            (
                "Expected every ${...} to name another key, but got an error in trainer.max_epochs: "
                "Interpolation key 'data.init_args.num_taks' not found. `--print_config` shows all keys."
            ),
        ),
    ],
)
def test_a_wrong_key_in_a_file(
    text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert said(["--config", str(path)], capsys, tmp_path) == message


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (
            "--strategies.bd.epsilon -1",
            "Expected epsilon to be 0 or a positive number, but got -1.0.",
        ),
        ("--strategies.bd.rank 0", "Expected rank to be a whole number of at least 1, but got 0."),
        ("--strategies.ewc.strength -1", "Expected strength to be 0 or a positive number"),
        (
            "--trainer.accelerator gqu",
            "Expected the trainer's flags to be valid on this machine, but Lightning reports: You",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_before_training(
    flags: str, part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert part in said(flags.split(), capsys, tmp_path)


def test_help_is_not_a_list_of_all_modules_there_are() -> None:
    names = ", ".join(f"torch.nn.Module{k}" for k in range(200))
    text = f"--model.backbone BACKBONE\n (type: Module, known\n subclasses: {names})\n  --x (type: int)"
    assert shorten_help(text) == "--model.backbone BACKBONE\n (type: Module)\n  --x (type: int)"
    short = "(type: Optimizer, known subclasses: torch.optim.SGD, torch.optim.Adam)"
    assert shorten_help(short) == short
