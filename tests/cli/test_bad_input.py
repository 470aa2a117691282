"""Wrong inputs, and the whole line that each of them gets.

A row is what a user gives and what is said about it. Each row also says by its kind how the command
ends, and that no file was written, changed or lost on the way.
"""

import errno
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bpn_lightning import ContinualModule
from bpn_lightning.bench import cli as bench
from bpn_lightning.bench import collection
from bpn_lightning.cli import data as data_command
from bpn_lightning.cli import main as cli
from bpn_lightning.errors import CheckpointError, ResultsError
from bpn_lightning.nn import MLP
from bpn_lightning.run import results

Said = pytest.CaptureFixture[str]

EVIL = "from pathlib import Path\nPath('owned').touch()\nclass Net: pass\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a module from a stranger, which must never be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    Path("evil.py").write_text(EVIL)
    yield
    assert not Path("owned").exists()
    assert "evil" not in sys.modules


def files() -> dict[str, bytes]:
    """Every file below the current folder, and what is in it."""
    found = {}
    for path in sorted(Path().rglob("*")):
        # A cache's lock is all that is left of a cache that could not be built.
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".lock":
            found[str(path)] = path.read_bytes()
    return found


def refused(command: Any, line: str | list[str], capsys: Said) -> str:
    """What a command says of a line that it does not take."""
    before = files()
    assert command.main(line.split() if isinstance(line, str) else line) == 2
    shown = capsys.readouterr()
    assert files() == before
    assert shown.out == ""
    *notices, error = [line for line in shown.err.splitlines() if line]
    beside = (
        "bpn-fit: There are no tuned values of ",
        "bpn-fit: The values of ",
        "bpn-bench: 1 runs: ",
    )
    assert all(notice.startswith(beside) for notice in notices)
    return error


def filled(message: str) -> str:
    return message.replace("{here}", str(Path.cwd()))


# --- bpn-fit: the command line -------------------------------------------------------------------

LINES: list[tuple[str, str]] = [
    (
        "--config nowhere.yaml",
        (
            "Expected --config to be a file or a packaged config, but got 'nowhere.yaml'. "
            "`bpn-fit --list` shows the packaged ones."
        ),
    ),
    (
        "--config digits_inc.yaml --trust maybe",
        (
            "Expected --trust to be true or false, but got 'maybe'. Write --trust to import "
            "whatever the configs name."
        ),
    ),
    (
        "--config digits_inc.yaml --experiment ../up",
        (
            "Expected experiment to be a name for a folder, but got '../up'. Write 1 to 255 "
            "characters without slashes; --runs says where the folders lie."
        ),
    ),
    (
        "--config digits_inc.yaml --experiment ..",
        (
            "Expected experiment to be a name for a folder, but got '..'. Write 1 to 255 "
            "characters without slashes; --runs says where the folders lie."
        ),
    ),
    (
        "--config digits_inc.yaml --experiment " + "x" * 300,
        (
            "Expected experiment to be a name for a folder, but got "
            "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... (300 characters)'. "
            "Write 1 to 255 characters without slashes; --runs says where the folders lie."
        ),
    ),
    (
        "--config digits_inc.yaml --method bd/ewc",
        (
            "Expected method to be a name for a folder, but got 'bd/ewc'. Write 1 to 255 "
            "characters without slashes; --runs says where the folders lie."
        ),
    ),
    (
        "--config digits_inc.yaml --method bd+bd",
        "Expected --method to name each strategy once, but got 'bd+bd'. Leave one 'bd' out.",
    ),
    (
        "--config digits_inc.yaml --method os.system",
        (
            "Expected method in the flags to name a class of an installed package or a plugin, "
            "but got 'os.system'. Nothing of the standard library or of an installer can be "
            "named: much of it runs programs or opens files. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --method evil",
        (
            "Expected --method to be strategies joined by '+', but got 'evil' with the unknown "
            "'evil'. `bpn-fit --list` shows methods and strategies; a class "
            "of your own is named by its whole path, package.module.Class."
        ),
    ),
    (
        "--config digits_inc.yaml --method bd --trust=false --model.backbone evil.Net",
        (
            "Expected model.backbone in the flags to name what needs no trust, but got "
            "'evil.Net'. Using it runs its code: read it, then add --trust; docs/safety.md lists "
            "what needs none."
        ),
    ),
    (
        "--config digits_inc.yaml --method bd+evil.Net --trust=false",
        (
            "Expected method in the flags to name what needs no trust, but got 'evil.Net'. Using "
            "it runs its code: read it, then add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone os.system",
        (
            "Expected model.backbone in the flags to name a class of an installed package or a "
            "plugin, but got 'os.system'. Nothing of the standard library or of an installer can "
            "be named: much of it runs programs or opens files. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone builtins.eval",
        (
            "Expected model.backbone in the flags to name a class of an installed package or a "
            "plugin, but got 'builtins.eval'. Nothing of the standard library or of an installer "
            "can be named: much of it runs programs or opens files. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.optimizer subprocess.Popen",
        (
            "Expected model.optimizer in the flags to name a class of an installed package or a "
            "plugin, but got 'subprocess.Popen'. Nothing of the standard library or of an "
            "installer can be named: much of it runs programs or opens files. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.optimizer torch.load",
        (
            "Expected model.optimizer to be a subclass of Optimizer, or a function annotated to "
            "return one, but got 'torch.load'. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.optimizer torch.nn.Linear",
        (
            "Expected model.optimizer to be a subclass of Optimizer, or a function annotated to "
            "return one, but got 'torch.nn.Linear'. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.optimizer torch.relu",
        (
            "Expected model.optimizer to be a subclass of Optimizer, or a function "
            "annotated to return one, but got 'torch.relu'. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.scheduler torch.hub.load",
        (
            "Expected model.scheduler to be Callable[[Optimizer], Union[LRScheduler, "
            "ReduceLROnPlateau]] or null, but got torch.hub.load."
        ),
    ),
    (
        "--config digits_inc.yaml --model.scheduler torch.optim.SGD",
        (
            "Expected model.scheduler to be a subclass of LRScheduler or ReduceLROnPlateau, or a "
            "function annotated to return one, but got 'torch.optim.SGD'. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone torch.optim.SGD",
        (
            "Expected model.backbone to be a subclass of Module, but got 'torch.optim.SGD'. Name "
            "another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone torch.optim.os.system",
        "Expected model.backbone to be an importable class, but torch.optim has no 'os'.",
    ),
    (
        "--config digits_inc.yaml --trainer.callbacks os.system",
        (
            "Expected trainer.callbacks in the flags to name a class of an installed package or a"
            " plugin, but got 'os.system'. Nothing of the standard library or of an installer can"
            " be named: much of it runs programs or opens files. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.callbacks torch.nn.Linear",
        (
            "Expected trainer.callbacks to be a subclass of Callback, but got 'torch.nn.Linear'. Name "
            "another class."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.logger shutil.rmtree",
        (
            "Expected trainer.logger in the flags to name a class of an installed package or a "
            "plugin, but got 'shutil.rmtree'. Nothing of the standard library or of an installer "
            "can be named: much of it runs programs or opens files. Name another class."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone.init_args.hidden []",
        (
            "Expected hidden to be one or more positive widths, but got []. The paper's network "
            "is hidden=[300, 300, 300, 300, 300]."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone.init_args.hidden [8,0]",
        (
            "Expected hidden to be one or more positive widths, but got [8, 0]. The paper's "
            "network is hidden=[300, 300, 300, 300, 300]."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone bpn_lightning.nn.torchvision_backbone --model.backbone.name resnet19",
        (
            "Expected name to be a classification network of torchvision, but got 'resnet19'. Did"
            " you mean 'resnet18'? torchvision.models.list_models() has them all."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone bpn_lightning.nn.torchvision_backbone --model.backbone.name alexnet --model.backbone.weights_file nowhere.pt",
        (
            "Expected weights_file to be a file of weights, but reading nowhere.pt ended with "
            "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.pt'. Name a file "
            "that torch.save(torchvision.models.alexnet().state_dict(), ...) wrote."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone bpn_lightning.nn.torchvision_backbone --model.backbone.name alexnet --model.backbone.weights_file w.pt --model.backbone.weights DEFAULT",
        (
            "Expected weights or weights_file, but got both ('DEFAULT' and 'w.pt'). Set one of "
            "them to null."
        ),
    ),
    (
        "--config digits_inc.yaml --model.backbone bpn_lightning.nn.torchvision_backbone --model.backbone.name squeezenet1_1 --model.backbone.weights V9",
        (
            "Expected weights of squeezenet1_1 to be null, 'DEFAULT' or one of IMAGENET1K_V1, but"
            " got 'V9'."
        ),
    ),
    (
        "--config digits_inc.yaml --data.init_args.domain_incremental true",
        (
            "Expected mask to be 'shared' for a stream that has the same classes in every task, "
            "but got 'all'. Set model.mask, or choose another stream."
        ),
    ),
    (
        "--config digits_inc.yaml --model.patience 0",
        (
            "Expected patience to be at least 1 epoch or null, but got 0. null trains every phase"
            " to its full length."
        ),
    ),
    (
        "--config digits_inc.yaml --model.patience 2",
        (
            "Expected validation_fraction to be more than 0 where patience is set, but patience "
            "is 2 and the stream has no validation split."
        ),
    ),
    (
        "--config digits_inc.yaml --data.init_args.num_tasks 6",
        (
            "Expected num_tasks * classes_per_task to be at most the 10 classes of the digits in "
            "scikit-learn, but got 6 * 2. Lower one of the two, or add classes."
        ),
    ),
    (
        "--config digits_inc.yaml --data.init_args.classes_per_task 0",
        "Expected classes_per_task to be a whole number of at least 1, but got 0.",
    ),
    (
        "--config digits_inc.yaml --data.init_args.batch_size 0",
        "Expected batch_size to be a whole number of at least 1, but got 0.",
    ),
    (
        "--config digits_inc.yaml --data.init_args.epochs_per_task 0",
        "Expected epochs_per_task to be a whole number of at least 1, but got 0.",
    ),
    (
        "--config digits_inc.yaml --data.init_args.epochs_per_task [1,2]",
        (
            "Expected epochs_per_task to have one entry for each of the 5 tasks, but got 2. Give "
            "one number for all tasks, or 5 of them."
        ),
    ),
    (
        "--config digits_inc.yaml --data.init_args.validation_fraction 1.5",
        (
            "Expected validation_fraction to be at least 0 and below 1, but got 1.5. Use 0 for no"
            " validation part, 0.1 for a tenth."
        ),
    ),
    (
        "--config digits_inc.yaml --data.init_args.class_order [0,0]",
        (
            "Expected class_order to list each class once, but got '0' more than once. Remove the"
            " repetitions."
        ),
    ),
    (
        "--config digits_inc.yaml --data.init_args.class_order [ten]",
        (
            "Expected class_order to list names of classes or numbers from 0 to 9, but got 'ten'."
            " The classes are '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.max_epochs 3",
        (
            "Expected trainer.max_epochs to be -1, the length of the stream (150 epochs), but got"
            " 3. Pass max_epochs=-1 or 150 (unset, Lightning makes it 1000)."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.fast_dev_run 1",
        (
            "Expected trainer.fast_dev_run to be off, but got True. It would end the stream "
            "inside its first task. Use epochs_per_task=1 for a short run."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.overfit_batches 2",
        (
            "Expected trainer.overfit_batches to be 0, but got 2. It would replace each task's "
            "test data by training data. Use limit_train_batches."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.strategy fsdp",
        (
            "Expected the trainer's flags to fit this machine and each other, but Lightning says:"
            " The strategy `fsdp` requires a GPU accelerator, but received `accelerator='cpu'`. "
            "Please set `accelerator='cuda'`, `accelerator='gpu'`, or pass a `CUDAAccelerator()` "
            "instance to use FSDP."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.limit_train_batches 0",
        (
            "Expected trainer.limit_train_batches to be more than 0, but got 0. Nothing would be learned. "
            "Leave it out; trainer.test evaluates without training."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.gradient_clip_val -1",
        (
            "Expected trainer.gradient_clip_val to be at least 0, but got -1. Lightning would clip nothing, "
            "or fail. Leave it out for no clipping."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.precision 16-mixed --trainer.accelerator cpu",
        (
            "Expected trainer.precision to be one that the device has, but got 16-mixed, of which Lightning "
            "makes bf16-mixed here. Use bf16-mixed, or a GPU."
        ),
    ),
    (
        "--config digits_inc.yaml --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/loss",
        (
            "Expected trainer.callbacks to be without EarlyStopping, but got EarlyStopping. It would end the "
            "whole stream. ContinualModule(patience=...) stops each task early on its validation split."
        ),
    ),
    (
        "--config digits_inc.yaml --seed_everything one",
        "Expected seed_everything to be int, but got one.",
    ),
    (
        "--config digits_inc.yaml --seed_everything -1",
        (
            "Expected seed_everything to be a whole number from 0 to 4294967295, but got -1. 0 is"
            " the default."
        ),
    ),
    (
        "--config digits_inc.yaml --strategies.bd.direction up",
        (
            "Expected strategies.bd.direction to be 'sign', 'gradient', 'normalised' or 'frozen',"
            " but got up."
        ),
    ),
    (
        "--config digits_inc.yaml --strategies.bd.layers [neck]",
        (
            "Expected layers to be linear layers of the network, but got 'neck'. It has "
            "backbone.1, backbone.3, head."
        ),
    ),
    (
        "--config digits_inc.yaml --strategies.bd.layers []",
        (
            "Expected layers to name at least one linear layer, but got none. Leave it out to "
            "give every linear layer bias units."
        ),
    ),
    (
        "--config digits_inc.yaml --strategies.bd.w_scale 0",
        "Expected w_scale to be a positive number, but got 0.0. M and W both at 0 never move.",
    ),
    (
        "--config digits_inc.yaml --strategies.ewc.strength .nan",
        (
            "Expected strength to be 0 or a positive number, but got nan. 0 is fine-tuning; the "
            "paper uses 2000."
        ),
    ),
    (
        "--config digits_inc.yaml --strategies.ewc.fisher exactly",
        (
            "Expected strategies.ewc.fisher to be 'empirical', 'sampled', 'exact' or 'predicted',"
            " but got exactly."
        ),
    ),
    (
        "--config digits_inc.yaml --method ewc --strategies.ewc.update proximal --model.optimizer Adam",
        (
            "Expected the optimizer to be torch.optim.SGD without momentum where EWC's update is "
            "'proximal', but got Adam. Set update to 'clamped'."
        ),
    ),
    (
        "--config digits_inc.yaml --method gem+agem",
        (
            "Expected at most one strategy that projects gradients, but got "
            "GradientEpisodicMemory and AveragedGEM. Remove all but one."
        ),
    ),
    (
        "--config digits_inc.yaml --method joint+ewc",
        (
            "Expected JointTraining to be the only strategy, but got JointTraining and EWC. "
            "Remove JointTraining, or all the others."
        ),
    ),
    (
        "--config digits_inc.yaml --method stl+ewc",
        (
            "Expected IndependentNetworks to be the only strategy, but got IndependentNetworks "
            "and EWC. Remove IndependentNetworks, or all the others."
        ),
    ),
    (
        "--config digits_inc.yaml --model.optimizer.lr -1",
        (
            "Expected optimizer to take the parameters and its arguments, but it raised "
            "ValueError: Invalid learning rate: -1.0. Correct that argument."
        ),
    ),
    (
        "--config digits_inc.yaml --model.scheduler StepLR",
        (
            "Expected a value for model.scheduler.init_args.step_size, but got none. StepLR needs"
            " it: give it on the command line or in a config."
        ),
    ),
    (
        "--config digits_inc.yaml --runs evil.py",
        (
            "Expected evil.py/digits_inc/bd+ewc/seed_0 to be a folder that can be written to, but"
            " got: [Errno 20] Not a directory: 'evil.py/digits_inc/bd+ewc/seed_0'. Choose another"
            " with --runs."
        ),
    ),
    (
        "--config digits_inc.yaml --ckpt_path evil.py",
        (
            "Expected evil.py to be a checkpoint, but it cannot be read: File is not a zip file. "
            "Start afresh with --overwrite in the place of --ckpt_path."
        ),
    ),
    (
        "--config digits_inc.yaml --ckpt_path .",
        (
            "Expected ckpt_path to be 'last' or a checkpoint, but there is no file '.'. Those of "
            "this run are in runs/digits_inc/bd+ewc/seed_0/checkpoints."
        ),
    ),
    (
        "--config digits_inc.yaml --data SplitImageFolder",
        (
            "Expected a value for data.init_args.root, but got none. SplitImageFolder needs it: "
            "give it on the command line or in a config."
        ),
    ),
    (
        "--config digits_inc.yaml --data SplitImageFolder --data.root nowhere",
        (
            "Expected the folder {here}/nowhere/train with one folder of images for each class, "
            "but there is none. There is no folder {here}/nowhere: name the one that holds train and "
            "test."
        ),
    ),
    (
        "--config digits_inc.yaml --data SplitArrays --data.path nowhere.npz",
        (
            "Expected {here}/nowhere.npz to be readable, but got FileNotFoundError: [Errno 2] No "
            "such file or directory: '{here}/nowhere.npz'. Check that it is there and its "
            "permissions, or name another place."
        ),
    ),
    (
        "--config digits_inc.yaml --data SplitArrays --data.path evil.py",
        (
            "Expected {here}/evil.py to be a whole .npz archive of plain arrays, but got no zip "
            "archive. Fetch it again, or write it with numpy.savez."
        ),
    ),
    (
        "--config digits_inc.yaml --data SplitMNIST --data.root nowhere --data.download false",
        (
            "Expected the images of MNIST in {here}/nowhere, but could not get them. Tried: the "
            "folders {here}/nowhere/mnist/{train,test}/<class> (there are none); torchvision's "
            "files in {here}/nowhere/MNIST/raw (missing: train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte); nothing "
            "was downloaded, as download is off. Name the folder that has them with "
            "`--data.init_args.root DIR` or `export BPN_DATA=DIR`, or fetch them from "
            "https://ossci-datasets.s3.amazonaws.com/mnist/ into {here}/nowhere/MNIST/raw."
        ),
    ),
    (
        "--config digits_inc.yaml --data EightDatasets --data.root nowhere",
        (
            "Expected Oxford Flowers in {here}/nowhere/flowers-102, but there is no such folder. "
            "It has to hold jpg/image_00001.jpg ..., imagelabels.mat and setid.mat. Get "
            "102flowers.tgz, imagelabels.mat and setid.mat from "
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/, or let torchvision fetch them: "
            "torchvision.datasets.Flowers102(ROOT, download=True)."
        ),
    ),
    (
        "--config digits_inc.yaml --data EightDatasets --data.sets [flower]",
        (
            "Expected the name of an image set, but got 'flower'. Did you mean 'flowers'? The "
            "sets are flowers, scenes, birds, cars, aircraft, actions, letters, svhn."
        ),
    ),
    (
        "--config digits_inc.yaml --data EightDatasets --data.sets [svhn,svhn]",
        (
            "Expected sets to name at least one set, and each once, but got svhn, svhn. The sets "
            "are flowers, scenes, birds, cars, aircraft, actions, letters, svhn."
        ),
    ),
    (
        "--config digits_inc.yaml --data EightDatasets --data.sets [svhn] --data.options {cars:}",
        "Expected data.init_args.options to be dict, but got {cars:}.",
    ),
    (
        "--config digits_inc.yaml --data EightDatasets --data.image_size 300",
        (
            "Expected image_size to be at most resize, but got 300 and 256 pixels. AlexNet is "
            "used with 224 of 256."
        ),
    ),
    (
        "--config digits_inc.yaml --data EightDatasets --data.on_corrupt ignore",
        "Expected data.init_args.on_corrupt to be 'error' or 'skip', but got ignore.",
    ),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line[:70] for line, _ in LINES])
def test_a_line_of_bpn_fit(line: str, message: str, capsys: Said) -> None:
    assert (
        refused(cli, f"{line} --trainer.accelerator cpu", capsys)
        == f"bpn-fit: error: {filled(message)}"
    )


# --- bpn-fit: config files -----------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)

CONFIGS: list[tuple[str | bytes, str]] = [
    (
        "model: !!python/object/apply:os.system ['touch owned']",
        (
            "Expected x.yaml to be YAML, but got an error in line 1: could not determine a "
            "constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'. Correct "
            "that line."
        ),
    ),
    (
        "model: !!python/name:os.system",
        (
            "Expected x.yaml to be YAML, but got an error in line 1: could not determine a "
            "constructor for the tag 'tag:yaml.org,2002:python/name:os.system'. Correct that "
            "line."
        ),
    ),
    (
        BOMB,
        (
            "Expected x.yaml to hold at most 100,000 values, but got more, counted as often as "
            "aliases repeat them. Write out what it needs."
        ),
    ),
    (
        "trainer: " + "[" * 5000,
        ("Expected x.yaml to be YAML, but got an error: it nests too deeply. Correct that line."),
    ),
    (
        "- method",
        (
            "Expected x.yaml to hold keys and values, but got ['method']. Start from the output "
            "of `bpn-fit --config digits_inc.yaml --print_config`."
        ),
    ),
    (
        "just words",
        (
            "Expected x.yaml to hold keys and values, but got 'just words'. Start from the output"
            " of `bpn-fit --config digits_inc.yaml --print_config`."
        ),
    ),
    (
        "1: 2",
        (
            "Expected x.yaml to hold keys and values, but got {1: 2}. Start from the output of "
            "`bpn-fit --config digits_inc.yaml --print_config`."
        ),
    ),
    (
        b"method: \xff\xfe",
        (
            "Expected x.yaml to be YAML, but got an error: 'utf-8' codec can't decode byte 0xff "
            "in position 8: invalid start byte. Correct that line."
        ),
    ),
    (
        "seed_everything: 2001-13-45",
        (
            "Expected x.yaml to be YAML, but got an error: month must be in 1..12. Correct that "
            "line."
        ),
    ),
    (
        "method: [ewc]",
        (
            "Expected --method to be strategies joined by '+', but got \"['ewc']\" with the unknown"
            " \"['ewc']\". `bpn-fit --list` shows methods and strategies; a "
            "class of your own is named by its whole path, package.module.Class."
        ),
    ),
    (
        "model: {backbone: {class_path: evil.Net}}",
        (
            "Expected model.backbone.class_path in x.yaml to name what needs no trust, but got "
            "'evil.Net'. Using it runs its code: read it, then type its whole name on the "
            "command line, or add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "model: {backbone: evil.Net}",
        (
            "Expected model.backbone in x.yaml to name what needs no trust, but got 'evil.Net'. "
            "Using it runs its code: read it, then type its whole name on the command line, or "
            "add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "model: {optimizer: {class_path: evil.Net}}",
        (
            "Expected model.optimizer.class_path in x.yaml to name what needs no trust, but got "
            "'evil.Net'. Using it runs its code: read it, then type its whole name on the "
            "command line, or add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "data: evil.Stream",
        (
            "Expected data in x.yaml to name what needs no trust, but got 'evil.Stream'. Using "
            "it runs its code: read it, then type its whole name on the command line, or add "
            "--trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "data: {class_path: StreamOf, init_args: {streams: [{class_path: evil.Stream}]}}",
        (
            "Expected data.init_args.streams.class_path in x.yaml to name what needs no trust, "
            "but got 'evil.Stream'. Using it runs its code: read it, then type its whole name on "
            "the command line, or add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "trainer: {callbacks: [evil.Net]}",
        (
            "Expected trainer.callbacks in x.yaml to name what needs no trust, but got "
            "'evil.Net'. Using it runs its code: read it, then type its whole name on the "
            "command line, or add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "trainer: {logger: {class_path: evil.Net}}",
        (
            "Expected trainer.logger.class_path in x.yaml to name what needs no trust, but got "
            "'evil.Net'. Using it runs its code: read it, then type its whole name on the "
            "command line, or add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "method: bd+evil.Net",
        (
            "Expected method in x.yaml to name what needs no trust, but got 'evil.Net'. Using it "
            "runs its code: read it, then type its whole name on the command line, or add "
            "--trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "method: bd+os.system",
        (
            "Expected method in x.yaml to name a class of an installed package or a plugin, but "
            "got 'os.system'. Nothing of the standard library or of an installer can be named: "
            "much of it runs programs or opens files. Name another class."
        ),
    ),
    (
        "method: bd+mine\nstrategies: {mine: {class_path: evil.Net}}",
        (
            "Expected strategies.mine.class_path in x.yaml to name what needs no trust, but got "
            "'evil.Net'. Using it runs its code: read it, then type its whole name on the "
            "command line, or add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "experiment: evil\nmodel: {backbone: {class_path: '${experiment}.Net'}}",
        (
            "Expected model.backbone to be a class path, package.module.Class, but got "
            "'${experiment}.Net'. Write it out: nothing is put into it."
        ),
    ),
    (
        "model: {backbone: net.yaml}",
        (
            "Expected model.backbone in x.yaml to be a class or its keys, but got the file "
            "'net.yaml', and no config includes another. Name it by a --config of its own, its "
            "keys below `model.backbone:`."
        ),
    ),
    (
        "model: {backbone: {class_path: os.system, init_args: {command: touch owned}}}",
        (
            "Expected model.backbone.class_path in x.yaml to name a class of an installed package"
            " or a plugin, but got 'os.system'. Nothing of the standard library or of an "
            "installer can be named: much of it runs programs or opens files. Name another class."
        ),
    ),
    (
        "trainer: {callbacks: {class_path: subprocess.Popen, init_args: {args: [touch, owned]}}}",
        (
            "Expected trainer.callbacks.class_path in x.yaml to name a class of an installed "
            "package or a plugin, but got 'subprocess.Popen'. Nothing of the standard library or "
            "of an installer can be named: much of it runs programs or opens files. Name another "
            "class."
        ),
    ),
    (
        "model: {scheduler: {class_path: torch.hub.load, init_args: {repo_or_dir: .}}}",
        (
            "Expected model.scheduler.class_path in x.yaml to name what needs no trust, but got "
            "'torch.hub.load'. Using it runs its code: read it, then type its whole name on the "
            "command line, or add --trust; docs/safety.md lists what needs none."
        ),
    ),
    (
        "experiment: ../up",
        (
            "Expected experiment to be a name for a folder, but got '../up'. Write 1 to 255 "
            "characters without slashes; --runs says where the folders lie."
        ),
    ),
    (
        "experiment: /etc",
        (
            "Expected experiment to be a name for a folder, but got '/etc'. Write 1 to 255 "
            "characters without slashes; --runs says where the folders lie."
        ),
    ),
    ("trust: true", "There is no key trust. Did you mean 'runs'? `bpn-fit --help_all` shows all."),
    (
        "model: {backbone: {class_path: torch.nn.Linear}}",
        (
            "Expected a value for model.backbone.init_args.in_features, "
            "model.backbone.init_args.out_features, but got none. Linear needs it: give it on the"
            " command line or in a config."
        ),
    ),
    (
        "model: {mask: '${data.init_args.mask}'}",
        (
            "Expected every ${...} to name another key, but got an error in model.mask: "
            "Interpolation key 'data.init_args.mask' not found. `--print_config` shows the keys."
        ),
    ),
]


def write_config(content: str | bytes) -> None:
    Path("x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("net.yaml").write_text("class_path: evil.Net\n")


@pytest.mark.parametrize(("content", "message"), CONFIGS, ids=[str(c)[:60] for c, _ in CONFIGS])
def test_a_config(content: str | bytes, message: str, capsys: Said) -> None:
    write_config(content)
    line = "--config digits_inc.yaml --config x.yaml --trainer.accelerator cpu"
    assert refused(cli, line, capsys) == f"bpn-fit: error: {filled(message)}"


# --- bpn-bench -----------------------------------------------------------------------------------

GRIDS: list[tuple[str, str]] = [
    (
        "experiments: [{config: digits_inc, methods: [bd+ewk]}]",
        (
            "In experiment 1 of g.yaml: Expected --method to be strategies joined by '+', but got"
            " 'bd+ewk' with the unknown 'ewk'. Did you mean 'ewc'? `bpn-fit --list` shows "
            "methods and strategies; a class of your own is named by its whole path, "
            "package.module.Class."
        ),
    ),
    (
        "experiments: [{config: digits_in, methods: [ewc]}]",
        (
            "In experiment 1 of g.yaml: Expected --config to be a file or a packaged config, but "
            "got 'digits_in'. Did you mean 'digits_inc.yaml'? `bpn-fit --list` shows the packaged"
            " ones."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: some}]",
        (
            "Expected methods of experiment 1 of g.yaml to be a list of names, or `all` with "
            "tuned values, but got 'some'. `bpn-fit --list` shows them."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], label: ..}]",
        (
            "Expected label of experiment 1 of g.yaml to be a name for a folder, but got '..'. "
            "Write 1 to 255 characters without slashes; --runs says where the folders lie."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], label: a/b}]",
        (
            "Expected label of experiment 1 of g.yaml to be a name for a folder, but got 'a/b'. "
            "Write 1 to 255 characters without slashes; --runs says where the folders lie."
        ),
    ),
    (
        "experiments: [{config: up.yaml, methods: [ewc]}]",
        (
            "In experiment 1 of g.yaml: Expected experiment to be a name for a folder, but got "
            "'../../up'. Write 1 to 255 characters without slashes; --runs says where the folders"
            " lie."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [bd+evil.Net]}]",
        (
            "In experiment 1 of g.yaml: Expected method in the flags to name what needs no "
            "trust, but got 'evil.Net'. Using it runs its code: read it, then add --trust; "
            "docs/safety.md lists what needs none."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], set: {model.backbone: evil.Net}}]",
        (
            "In experiment 1 of g.yaml: Expected model.backbone in the flags to name what needs "
            "no trust, but got 'evil.Net'. Using it runs its code: read it, then add --trust; "
            "docs/safety.md lists what needs none."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], vary: {model.optimizer: [SGD, evil.Net]}}]",
        (
            "In experiment 1 of g.yaml: Expected model.optimizer in the flags to name what needs "
            "no trust, but got 'evil.Net'. Using it runs its code: read it, then add --trust; "
            "docs/safety.md lists what needs none."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], set: {runs: /tmp}}]",
        (
            "Expected a key in experiment 1 of g.yaml to begin with trainer., model., data., "
            "strategies., checkpoint_every_n_steps, checkpoint_every_n_epochs, "
            "checkpoint_every_n_tasks, checkpoint_every_n_minutes, but got 'runs'. Did you mean "
            "'--runs'? `bpn-fit --help_all` shows all keys."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], set: {trust: true}}]",
        (
            "Expected a key in experiment 1 of g.yaml to begin with trainer., model., data., "
            "strategies., checkpoint_every_n_steps, checkpoint_every_n_epochs, "
            "checkpoint_every_n_tasks, checkpoint_every_n_minutes, but got 'trust'. "
            "`bpn-fit --help_all` shows all keys."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], set: [3]}]",
        (
            "Expected set of experiment 1 of g.yaml to hold keys and values, but got [3]. Write "
            "{model.optimizer.init_args.lr: 0.1}."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], vary: {model.mask: ['"
        + "x" * 300
        + "']}}]",
        (
            "Expected the values of vary of experiment 1 of g.yaml, joined, to be a name for a "
            "folder, but got 'mask=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... "
            "(305 characters)'. Write 1 to 255 characters without slashes; --runs says where the "
            "folders lie."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], vary: {trainer.a: &v ["
        + "1," * 200
        + "], trainer.b: *v}}]",
        (
            "Expected experiment 1 of g.yaml to make at most 10,000 runs of a method, but got "
            "40,000. Vary fewer keys together, in entries of their own."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], seeds: [-1]}]",
        (
            "Expected seeds of experiment 1 of g.yaml to be whole numbers from 0, but got -1. "
            "Write [0, 1, 2]."
        ),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], probes: [{}]}]",
        ("Expected probes of experiment 1 of g.yaml to name some of regions, drift, but got {}."),
    ),
    (
        "experiments: [{config: digits_inc, methods: [ewc], method: ewc}]",
        (
            "Expected the keys of experiment 1 of g.yaml to be among config, methods, seeds, set,"
            " vary, label, probes, not_run, but got 'method'. Did you mean 'methods'?"
        ),
    ),
    (
        "experiments: 3",
        (
            "Expected experiments of g.yaml to be a list, but got 3. Give it at least one entry, "
            "`- config: digits_inc.yaml`."
        ),
    ),
    (
        "expermients: []",
        (
            "Expected the keys of g.yaml to be among title, text, seeds, experiments, compare, "
            "report, but got 'expermients'. Did you mean 'experiments'?"
        ),
    ),
    (
        "experiments: !!python/object/apply:os.system ['touch owned']",
        (
            "Expected g.yaml to be a grid in YAML, but got an error in line 1: could not "
            "determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'. Correct that line."
        ),
    ),
    (
        BOMB,
        (
            "Expected g.yaml to hold at most 100,000 values, but got more, counted as often as "
            "aliases repeat them. Write out what it needs."
        ),
    ),
    (
        "x: '",
        (
            "Expected g.yaml to be a grid in YAML, but got an error in line 1: found unexpected "
            "end of stream. Correct that line."
        ),
    ),
]


def write_grid(text: str) -> None:
    Path("g.yaml").write_text(text)
    Path("up.yaml").write_text("experiment: ../../up\nmethod: ewc\n")


@pytest.mark.parametrize(("text", "message"), GRIDS, ids=[text[:60] for text, _ in GRIDS])
def test_a_grid(text: str, message: str, capsys: Said) -> None:
    write_grid(text)
    assert refused(bench, "g.yaml", capsys) == f"bpn-bench: error: {filled(message)}"


def cells(**change: Any) -> str:
    """A cells.json that is read, but for what changes."""
    grid = {"name": "g", "title": "G", "text": "", "compare": [], "report": ["accuracy"]}
    whole = {"schema_version": 1, "grid": grid, "not_run": [], "missing": [], "cells": []}
    return json.dumps(whole | change)


REPORTS: list[tuple[str, str, str]] = [
    (
        "report",
        "",
        (
            "Expected report to be followed by one folder, but got nothing. Name one that has a "
            "cells.json, or folders with one."
        ),
    ),
    (
        "report nowhere",
        "",
        (
            "Expected nowhere to hold cells.json, or folders with one, but found none. `bpn-bench"
            " GRID --out DIR` and `bpn-bench collect` write it."
        ),
    ),
    (
        "report .",
        "",
        (
            "Expected . to hold cells.json, or folders with one, but found none. `bpn-bench GRID "
            "--out DIR` and `bpn-bench collect` write it."
        ),
    ),
    (
        "report --out x",
        "",
        (
            "Expected report to be followed by one folder, but got --out x. Name one that has a "
            "cells.json, or folders with one."
        ),
    ),
    (
        "report kept",
        "{",
        (
            "Expected kept/cells.json to be what bpn-bench keeps of a grid, but got: Expecting "
            "property name enclosed in double quotes: line 1 column 2 (char 1). Run the grid, or "
            "`bpn-bench collect`."
        ),
    ),
    (
        "report kept",
        "[]",
        (
            "Expected schema_version of kept/cells.json to be 1, but got None. Collect the runs "
            "again with this release."
        ),
    ),
    (
        "report kept",
        '{"schema_version": 7}',
        (
            "Expected schema_version of kept/cells.json to be 1, but got 7. Collect the runs "
            "again with this release."
        ),
    ),
    (
        "report kept",
        '{"schema_version": 1, "grid": {}}',
        "Expected grid.name of kept/cells.json to be there, but got nothing. Collect the runs again.",
    ),
    (
        "report kept",
        cells(cells=[{"experiment": "e"}]),
        (
            "Expected kept/cells.json to hold a run that can be read, but got none. Run 1 of "
            "kept/cells.json is left out: it is damaged or made up. ValueError: method is not there, but "
            "nothing. Collect the runs again."
        ),
    ),
    (
        "report kept",
        cells(grid=3),
        "Expected grid of kept/cells.json to be an object, but got 3. Collect the runs again.",
    ),
    (
        "digits --jobs none",
        "",
        ("argument --jobs: invalid int value: 'none'. `bpn-bench --help` shows how it is called."),
    ),
    (
        "digits --only seed_7",
        "",
        (
            "Expected --only to name an experiment, a method or a seed of the grid, but got "
            "'seed_7'. Did you mean 'seed_2'? It has digits_inc, agem, seed_0, seed_1, seed_2, "
            "bd+ewc, bd+psp, ebll, ebll_task_mask, ewc, ewc_task_mask, finetune, frozen+ewc, "
            "gd+ewc, gd+ewc_tuned, gem, gem_task_mask, imm, imm_task_mask, joint, lwf, "
            "lwf_task_mask, mas, mas_task_mask, psp, si, si_task_mask, slnid, slnid_task_mask, "
            "stl."
        ),
    ),
    (
        "digits --only ewc seed_0 --runs evil.py",
        "",
        (
            "Expected evil.py/digits_inc/ewc/seed_0 to be a folder that can be written to, but "
            "got: [Errno 20] Not a directory: 'evil.py/digits_inc/ewc/seed_0'. Choose another "
            "with --runs."
        ),
    ),
    ("collect digits --retry 3", "", "Expected the options of `bpn-bench --help`, but got '3'."),
    (
        "dgits",
        "",
        (
            "Expected a grid to be a file or one of digits.yaml, drift.yaml, eight_datasets.yaml,"
            " gd_step_sizes.yaml, incremental.yaml, permuted.yaml, psp_learning_rate.yaml, "
            "rank.yaml, superposition.yaml, toy.yaml, but got 'dgits'. Did you mean "
            "'digits.yaml'?"
        ),
    ),
]


def write_kept(text: str) -> None:
    if text:
        Path("kept").mkdir()
        Path("kept/cells.json").write_text(text)


@pytest.mark.parametrize(
    ("line", "kept", "message"), REPORTS, ids=[f"{l} {k[:40]}" for l, k, _ in REPORTS]
)
def test_a_line_of_bpn_bench(line: str, kept: str, message: str, capsys: Said) -> None:
    write_kept(kept)
    assert refused(bench, line, capsys) == f"bpn-bench: error: {filled(message)}"


# --- bpn-data ------------------------------------------------------------------------------------

CHECKS: list[tuple[str, str]] = [
    (
        "check nowhere",
        (
            "Expected ROOT to be the folder of data sets, but there is no folder {here}/nowhere. "
            "Make it, or name another one."
        ),
    ),
    (
        "check evil.py",
        (
            "Expected ROOT to be the folder of data sets, but there is no folder {here}/evil.py. "
            "Make it, or name another one."
        ),
    ),
    (
        "check . --sets birds,cats",
        (
            "Expected the name of an image set, but got 'cats'. Did you mean 'cars'? The sets are"
            " flowers, scenes, birds, cars, aircraft, actions, letters, svhn."
        ),
    ),
    (
        "check . --option birds",
        (
            "Expected --option to be SET.OPTION=VALUE, but got 'birds'. For example --option "
            "aircraft.level=variant."
        ),
    ),
    (
        "check . --option birds.crop",
        (
            "Expected --option to be SET.OPTION=VALUE, but got 'birds.crop'. For example --option"
            " aircraft.level=variant."
        ),
    ),
    (
        "check . --option birds.corp=true",
        "Expected an option of birds, but got 'corp'. Did you mean 'crop'? It takes crop.",
    ),
    ("check . --option birds.crop=3", "Expected crop of birds to be of type bool, but got 3."),
    (
        "check . --option letters.classes=61",
        "Expected classes of letters to be one of 62, 52, but got 61.",
    ),
    (
        "check . --option letters.test_fraction=2",
        (
            "Expected test_fraction of letters to be between 0 and 1, but got 2. 0.2 keeps a "
            "fifth of each class for the test."
        ),
    ),
    (
        "check . --option letters.column=0",
        (
            "Expected column of letters to be at least 1, but got 0. Columns of the lists count "
            "from 1."
        ),
    ),
    (
        "check . --option actions.context=0.5",
        (
            "Expected context of actions to be a factor from 1 to 10, but got 0.5. 1 cuts the box"
            " itself out, 1.5 half as much around it."
        ),
    ),
    (
        "check . --option birds.crop=!!python/name:os.system",
        (
            "Expected --option birds.crop to be a value as in YAML, but got "
            "'!!python/name:os.system'. Write it as a config has it, such as true or 0.2."
        ),
    ),
    (
        "check . --sets svhn --option birds.crop=true",
        (
            "Expected options of svhn, but got one of 'birds'. Add it to --sets, or leave its "
            "options out."
        ),
    ),
]


@pytest.mark.parametrize(("line", "message"), CHECKS)
def test_a_line_of_bpn_data(line: str, message: str, capsys: Said) -> None:
    assert refused(data_command, line, capsys) == f"bpn-data: {filled(message)}"


# --- data ----------------------------------------------------------------------------------------

Prepare = Callable[[pytest.MonkeyPatch], object]


def image(path: str, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def folders(*_: object) -> None:
    """Two classes, an image of each in either part."""
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            image(f"set/{part}/{name}/1.png")


def with_folders(change: Callable[[], object]) -> Prepare:
    def prepare(_: object) -> None:
        folders()
        change()

    return prepare


BEE = "set/train/bee/1.png"


def link(place: str, target: str) -> None:
    Path("elsewhere").mkdir()
    image("elsewhere/1.png")
    if Path(place).is_dir():
        Path(place, "1.png").unlink()
        Path(place).rmdir()
    else:
        Path(place).unlink()
    Path(place).symlink_to(Path(target).absolute())


FOLDERS: list[tuple[str, Prepare, str]] = [
    (
        "no test part",
        lambda _: image("set/train/ant/1.png"),
        (
            "Expected the folder {here}/set/test with one folder of images for each class, but "
            "there is none. There is {here}/set/train: move a part of each class's images from there to "
            "{here}/set/test/<class>/."
        ),
    ),
    (
        "no images",
        with_folders(lambda: Path(BEE).unlink()),
        (
            "Expected every class of the stream to have training images in {here}/set, but got "
            "none of 'bee'. Add images, or leave the class out with class_order."
        ),
    ),
    (
        "a truncated image",
        with_folders(lambda: Path(BEE).write_bytes(Path(BEE).read_bytes()[:40])),
        (
            "Expected {here}/set/train/bee/1.png to be a whole image that fits the data set, but "
            "got UnidentifiedImageError: cannot identify image file '{here}/set/train/bee/1.png'."
            " Replace the file or delete it."
        ),
    ),
    (
        "words",
        with_folders(lambda: Path(BEE).write_text("no image")),
        (
            "Expected {here}/set/train/bee/1.png to be a whole image that fits the data set, but "
            "got UnidentifiedImageError: cannot identify image file '{here}/set/train/bee/1.png'."
            " Replace the file or delete it."
        ),
    ),
    (
        "a program for Ghostscript",
        with_folders(
            lambda: Path(BEE).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
        ),
        (
            "Expected {here}/set/train/bee/1.png to be a whole image that fits the data set, but "
            "got UnidentifiedImageError: cannot identify image file '{here}/set/train/bee/1.png'."
            " Replace the file or delete it."
        ),
    ),
    (
        "deep pixels",
        with_folders(lambda: image("set/train/bee/1.tiff", mode="F")),
        (
            "Expected {here}/set/train/bee/1.tiff to be a whole image that fits the data set, but "
            "got ValueError: pixels that are not of 8 or 16 bits (mode F). Replace the file or "
            "delete it."
        ),
    ),
    (
        "a bomb",
        with_folders(lambda: image(BEE, (9500, 9500), "1")),
        (
            "Expected {here}/set/train/bee/1.png to be a whole image that fits the data set, but "
            "got ValueError: Image size (90250000 pixels) exceeds limit of 89478485 pixels, could"
            " be decompression bomb DOS attack. Replace the file or delete it."
        ),
    ),
    (
        "a large bomb",
        with_folders(lambda: image(BEE, (14000, 14000), "1")),
        (
            "Expected {here}/set/train/bee/1.png to be a whole image that fits the data set, but "
            "got ValueError: Image size (196000000 pixels) exceeds limit of 178956970 pixels, "
            "could be decompression bomb DOS attack. Replace the file or delete it."
        ),
    ),
    (
        "a link to a file",
        with_folders(lambda: link(BEE, "elsewhere/1.png")),
        (
            "Expected '{here}/set/train/bee/1.png' to lie in {here}/set, but it is or leads "
            "elsewhere. Put the file itself there, or name the folder that has it."
        ),
    ),
    (
        "a link to a folder",
        with_folders(lambda: link("set/train/bee", "elsewhere")),
        (
            "Expected '{here}/set/train/bee/1.png' to lie in {here}/set, but it is or leads "
            "elsewhere. Put the file itself there, or name the folder that has it."
        ),
    ),
    (
        "a link to nowhere",
        with_folders(lambda: link(BEE, "nowhere")),
        (
            "Expected '{here}/set/train/bee/1.png' to lie in {here}/set, but it is or leads "
            "elsewhere. Put the file itself there, or name the folder that has it."
        ),
    ),
]
IMAGES = "--data SplitImageFolder --data.root set --data.num_tasks 1 --data.image_size 8"


def arrays(**change: Any) -> Prepare:
    def prepare(_: object) -> None:
        images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
        whole = {"train_images": images, "train_labels": labels}
        whole |= {"test_images": images, "test_labels": labels}
        kept = {key: value for key, value in (whole | change).items() if value is not None}
        np.savez_compressed("x.npz", allow_pickle=True, **kept)

    return prepare


class Payload:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("owned"),)


def cut(_: object) -> None:
    arrays()(None)
    Path("x.npz").write_bytes(Path("x.npz").read_bytes()[:-40])


def array_bomb(patch: pytest.MonkeyPatch) -> None:
    """Instead of a gigabyte: as if much less were too much."""
    patch.setattr("bpn_lightning.untrusted.MOST_BYTES", 2**20)
    arrays(train_images=np.zeros((2**15, 8, 8), np.uint8))(None)


ARRAYS: list[tuple[str, Prepare, str]] = [
    (
        "a cut archive",
        cut,
        (
            "Expected {here}/x.npz to be a whole .npz archive of plain arrays, but got no zip "
            "archive. Fetch it again, or write it with numpy.savez."
        ),
    ),
    (
        "a pickle",
        lambda _: Path("x.npz").write_bytes(pickle.dumps(Payload())),
        (
            "Expected {here}/x.npz to be a whole .npz archive of plain arrays, but got no zip "
            "archive. Fetch it again, or write it with numpy.savez."
        ),
    ),
    (
        "pickled objects",
        arrays(train_labels=np.array([Payload()] * 4, object)),
        (
            "Expected {here}/x.npz to be a whole .npz archive of plain arrays, but got "
            "ValueError: Object arrays cannot be loaded when allow_pickle=False. Arrays of "
            "objects hold code: write strings with .astype(str), numbers as numbers."
        ),
    ),
    (
        "a missing array",
        arrays(test_labels=None),
        (
            "Expected {here}/x.npz to hold the arrays train_images, train_labels, test_images, "
            "test_labels, but got train_images, train_labels, test_images. Add test_labels."
        ),
    ),
    (
        "floats",
        arrays(train_images=np.zeros((4, 8, 8))),
        (
            "Expected train_images in {here}/x.npz to be uint8 or uint16 of shape (n, height, "
            "width) or (n, height, width, channels), but got float64 of shape (4, 8, 8). Scale "
            "them to 0 .. 255 and convert them with .astype('uint8')."
        ),
    ),
    (
        "five dimensions",
        arrays(train_images=np.zeros((4, 8, 8, 3, 1), np.uint8)),
        (
            "Expected train_images in {here}/x.npz to be uint8 or uint16 of shape (n, height, "
            "width) or (n, height, width, channels), but got uint8 of shape (4, 8, 8, 3, 1). Bring "
            "them into one of these shapes."
        ),
    ),
    (
        "too few labels",
        arrays(train_labels=np.arange(3)),
        (
            "Expected train_labels in {here}/x.npz to have one entry for each of the 4 images, "
            "but got 3. Write the archive again with both complete."
        ),
    ),
    (
        "labels of two kinds",
        arrays(train_labels=np.array(list("abab"))),
        (
            "Expected train_labels and test_labels in {here}/x.npz to be of one kind, but got <U1 "
            "and int64. Let both be integers, or both strings."
        ),
    ),
    (
        "targets of regression",
        arrays(train_labels=np.arange(4) / 4),
        (
            "Expected train_labels in {here}/x.npz to be integers or strings of shape (n,) or (n, 1), "
            "one class per sample, but got float64 of shape (4,). Regression targets are "
            "not classes: discretize them, for example with numpy.digitize."
        ),
    ),
    (
        "several labels each",
        arrays(train_labels=np.zeros((4, 2), int)),
        (
            "Expected train_labels in {here}/x.npz to be integers or strings of shape (n,) or (n, 1), "
            "one class per sample, but got int64 of shape (4, 2). Samples with several labels each "
            "cannot be split into tasks by class."
        ),
    ),
    (
        "two sizes",
        arrays(test_images=np.zeros((4, 9, 8), np.uint8)),
        (
            "Expected train_images and test_images in {here}/x.npz to be of one size, but got (1,"
            " 8, 8) and (1, 9, 8) (channels, height, width). Bring both to the same size."
        ),
    ),
    (
        "one class",
        arrays(train_labels=np.zeros(4, int), test_labels=np.zeros(4, int)),
        (
            "Expected num_tasks * classes_per_task to be at most the 1 classes of the arrays in "
            "{here}/x.npz, but got 1 * 2. Lower one of the two, or add classes."
        ),
    ),
    (
        "no images",
        arrays(train_images=np.zeros((0, 8, 8), np.uint8), train_labels=np.zeros(0, int)),
        (
            "Expected every class of the stream to have training images in {here}/x.npz, but got "
            "none of '0', '1'. Add images, or leave the class out with class_order."
        ),
    ),
    (
        "a bomb",
        array_bomb,
        (
            "Expected {here}/x.npz to unpack to at most 100 times its 2,892 bytes, but it says "
            "2,097,984. If it is no attack, write it again without compression."
        ),
    ),
]
ARCHIVE = "--data SplitArrays --data.path x.npz --data.num_tasks 1"


def birds(**change: str) -> Prepare:
    """A small CUB-200-2011 of two species, two training images and a test image each."""

    def prepare(_: object) -> None:
        lists = {
            "classes": "1 001.Auk\n2 002.Owl\n",
            "images": "".join(f"{k} 00{k % 2 + 1}.{'AO'[k % 2]}/{k}.png\n" for k in range(1, 7)),
            "image_class_labels": "".join(f"{k} {k % 2 + 1}\n" for k in range(1, 7)),
            "train_test_split": "".join(f"{k} {int(k < 5)}\n" for k in range(1, 7)),
        }
        Path("birds").mkdir()
        for name, text in (lists | change).items():
            if text:
                Path(f"birds/{name}.txt").write_text(text)
        for k in range(1, 7):
            image(f"birds/images/00{k % 2 + 1}.{'AO'[k % 2]}/{k}.png")

    return prepare


def with_birds(change: Callable[[], object]) -> Prepare:
    def prepare(_: object) -> None:
        birds()(None)
        change()

    return prepare


OWL = "birds/images/002.O/3.png"
LISTS: list[tuple[str, Prepare, str]] = [
    (
        "a missing list",
        birds(images=""),
        (
            "Expected {here}/birds/images.txt, a file of CUB-200-2011, but there is none. The "
            "folder has to hold images/<class>/<file>.jpg, images.txt, image_class_labels.txt, "
            "train_test_split.txt and classes.txt. Get CUB_200_2011.tgz from "
            "https://www.vision.caltech.edu/datasets/cub_200_2011/."
        ),
    ),
    (
        "an id without an image",
        with_birds(lambda: Path(OWL).unlink()),
        (
            "Expected every image that the lists of CUB-200-2011 name, but "
            "{here}/birds/images/002.O/3.png is missing. Get CUB_200_2011.tgz from "
            "https://www.vision.caltech.edu/datasets/cub_200_2011/."
        ),
    ),
    (
        "an id of one list only",
        birds(train_test_split="1 1\n"),
        (
            "Expected {here}/birds/images.txt and {here}/birds/train_test_split.txt to have the "
            "same ids, but 2 is in images.txt and not in train_test_split.txt. Fetch CUB-200-2011"
            " again."
        ),
    ),
    (
        "an id twice",
        birds(classes="1 001.Auk\n1 002.Owl\n"),
        (
            "Expected {here}/birds/classes.txt to hold each id once, but got 1 twice. Fetch "
            "CUB-200-2011 again."
        ),
    ),
    (
        "a label out of range",
        birds(image_class_labels="".join(f"{k} 3\n" for k in range(1, 7))),
        (
            "Expected {here}/birds/image_class_labels.txt to hold class ids from 1 to 2, but got "
            "'3'. Fetch CUB-200-2011 again."
        ),
    ),
    (
        "half a line",
        birds(train_test_split="1\n"),
        (
            "Expected {here}/birds/train_test_split.txt to hold lines of the form '<image_id> "
            "<is_training>', but got '1'. Fetch CUB-200-2011 again."
        ),
    ),
    (
        "a way out",
        birds(images="".join(f"{k} ../../../etc/{k}.png\n" for k in range(1, 7))),
        (
            "Expected '{here}/birds/images/../../../etc/1.png' to lie in {here}/birds, but it is "
            "or leads elsewhere. Put the file itself there, or name the folder that has it."
        ),
    ),
    (
        "a whole path",
        birds(images="".join(f"{k} /etc/{k}.png\n" for k in range(1, 7))),
        (
            "Expected '/etc/1.png' to lie in {here}/birds, but it is or leads elsewhere. Put the "
            "file itself there, or name the folder that has it."
        ),
    ),
    (
        "a null character",
        birds(images="".join(f"{k} \0{k}.png\n" for k in range(1, 7))),
        (
            "Expected every image that the lists of CUB-200-2011 name, but "
            + ", ".join(f"{{here}}/birds/images/\\x00{k}.png" for k in range(1, 7))
            + " are missing. Get CUB_200_2011.tgz from "
            "https://www.vision.caltech.edu/datasets/cub_200_2011/."
        ),
    ),
    (
        "a link out",
        with_birds(lambda: link(OWL, "elsewhere/1.png")),
        (
            "Expected '{here}/birds/images/002.O/3.png' to lie in {here}/birds, but it is or "
            "leads elsewhere. Put the file itself there, or name the folder that has it."
        ),
    ),
    (
        "a corrupt image in the middle",
        with_birds(lambda: Path(OWL).write_bytes(b"")),
        (
            "Expected {here}/birds/images/002.O/3.png to be a whole image, but got "
            "UnidentifiedImageError: cannot identify image file "
            "'{here}/birds/images/002.O/3.png'. Replace the file, or set on_corrupt to skip to "
            "leave damaged images out."
        ),
    ),
    (
        "a bomb",
        with_birds(lambda: image(OWL, (9500, 9500), "1")),
        (
            "Expected {here}/birds/images/002.O/3.png to be a whole image, but got ValueError: "
            "Image size (90250000 pixels) exceeds limit of 89478485 pixels, could be "
            "decompression bomb DOS attack. Replace the file, or set on_corrupt to skip to leave "
            "damaged images out."
        ),
    ),
]
BIRDS = "--data EightDatasets --data.root . --data.sets [birds] --data.expect_counts false"
BIRDS += " --data.image_size 8 --data.resize 8 --model.mask task"
COUNTS = [
    (
        "a wrong count",
        birds(),
        (
            "Expected CUB-200-2011 in {here}/birds to have 200 classes, but got 2. Fetch the set "
            "again, or set expect_counts to false to use what is there."
        ),
    )
]
EXPECT = BIRDS.replace("expect_counts false", "expect_counts true")


def mnist(_: object) -> None:
    folder = Path("set/MNIST/raw")
    folder.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        # It says that it has 2**32 - 1 images of as many pixels.
        (folder / f"{name}-ubyte").write_bytes(bytes([0, 0, 8, int(name[-1])]) + b"\xff" * 12)


def odd_label(_: object) -> None:
    """Whole files, whose last label is no digit."""
    folder = Path("set/MNIST/raw")
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 28 * 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 10]))


def cifar(_: object) -> None:
    folder = Path("set/cifar-10-batches-py")
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Payload()))


MNIST = [
    (
        "sizes of no file",
        mnist,
        (
            "Expected the images of MNIST in {here}/set, but could not get them. Tried: the "
            "folders {here}/set/mnist/{train,test}/<class> (there are none); torchvision's files "
            "in {here}/set/MNIST/raw (damaged: train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte); nothing was downloaded, as download"
            " is off. Name the folder that has them with `--data.init_args.root DIR` or `export "
            "BPN_DATA=DIR`, or fetch them from https://ossci-datasets.s3.amazonaws.com/mnist/ "
            "into {here}/set/MNIST/raw. Delete damaged files to have them fetched again."
        ),
    ),
    (
        "a label that is no digit",
        odd_label,
        (
            "Expected MNIST in {here}/set to be images of (1, 28, 28) (channels, height, width) with "
            "a label below 10 each, but got 2 of (1, 28, 28) with 2 labels up to 10. Delete the "
            "files, and let them be fetched again."
        ),
    ),
]
MNIST_LINE = "--data SplitMNIST --data.root set --data.download false"
CIFAR = [
    (
        "pickles of somebody else",
        cifar,
        (
            "Expected the images of CIFAR-10 in {here}/set, but could not get them. Tried: the "
            "folders {here}/set/cifar10/{train,test}/<class> (there are none); torchvision's "
            "files in {here}/set/cifar-10-batches-py (damaged: data_batch_1, data_batch_2, "
            "data_batch_3, data_batch_4, data_batch_5, test_batch, batches.meta); nothing was "
            "downloaded, as download is off. Name the folder that has them with "
            "`--data.init_args.root DIR` or `export BPN_DATA=DIR`, or fetch them from "
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz into "
            "{here}/set/cifar-10-batches-py. Delete damaged files to have them fetched again."
        ),
    )
]
CIFAR_LINE = "--data SplitCIFAR10 --data.root set --data.download false"


def checkpoint(content: Any) -> Prepare:
    return lambda _: torch.save(content, "x.ckpt")


CHECKPOINTS: list[tuple[str, Prepare, str]] = [
    (
        "a pickle",
        lambda _: Path("x.ckpt").write_bytes(pickle.dumps(Payload())),
        (
            "Expected x.ckpt to be a checkpoint, but it cannot be read: File is not a zip file. "
            "Start afresh with --overwrite in the place of --ckpt_path."
        ),
    ),
    (
        "a payload",
        checkpoint({"state_dict": {}, "callbacks": Payload()}),
        (
            "Expected x.ckpt to be a checkpoint, but it cannot be read: it holds more than "
            "tensors and plain values, perhaps a program. Start afresh with --overwrite in the place of --ckpt_path."
        ),
    ),
    (
        "a list",
        checkpoint([1, 2]),
        (
            "Expected x.ckpt to be a checkpoint, but it cannot be read: it holds a list. Start "
            "afresh with --overwrite in the place of --ckpt_path."
        ),
    ),
    (
        "nothing",
        lambda _: Path("x.ckpt").write_bytes(b""),
        (
            "Expected x.ckpt to be a checkpoint, but it cannot be read: File is not a zip file. "
            "Start afresh with --overwrite in the place of --ckpt_path."
        ),
    ),
    (
        "a network",
        checkpoint(torch.nn.Linear(1, 1)),
        (
            "Expected x.ckpt to be a checkpoint, but it cannot be read: it holds more than "
            "tensors and plain values, perhaps a program. Start afresh with --overwrite in the place of --ckpt_path."
        ),
    ),
]
RESUME = "--ckpt_path x.ckpt"


def poisoned_download(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TORCH_HOME", "home")
    Path("home/hub/checkpoints").mkdir(parents=True)
    torch.save(Payload(), "home/hub/checkpoints/resnet18-f37072fd.pth")


NET = "--model.backbone bpn_lightning.nn.torchvision_backbone --model.backbone.name resnet18"
WEIGHTS: list[tuple[str, Prepare, str]] = [
    (
        "a payload",
        checkpoint(Payload()),
        (
            "Expected weights_file to be a file of weights, but reading x.ckpt ended with "
            "UnpicklingError: it holds more than tensors and plain values, perhaps a program. "
            "Name a file that torch.save(torchvision.models.resnet18().state_dict(), ...) wrote."
        ),
    ),
    (
        "a list",
        checkpoint([1]),
        (
            "Expected x.ckpt to hold the weights of resnet18, but got another network's: "
            "'bn1.bias' is missing, unknown or of another shape. Name a file that "
            "torch.save(torchvision.models.resnet18().state_dict(), ...) wrote."
        ),
    ),
    (
        "another network",
        checkpoint({"a": torch.zeros(1)}),
        (
            "Expected x.ckpt to hold the weights of resnet18, but got another network's: 'a' is "
            "missing, unknown or of another shape. Name a file that "
            "torch.save(torchvision.models.resnet18().state_dict(), ...) wrote."
        ),
    ),
]
WEIGHTS_FILE = f"{NET} --model.backbone.weights_file x.ckpt"
DOWNLOADS = [
    (
        "a poisoned download",
        poisoned_download,
        (
            "Expected to fetch the weights of resnet18 from "
            "https://download.pytorch.org/models/resnet18-f37072fd.pth, but got UnpicklingError: "
            "it holds more than tensors and plain values, perhaps a program. Fetch them by other "
            "means and name the file with weights_file, or set weights to null for random ones."
        ),
    )
]
DOWNLOAD = f"{NET} --model.backbone.weights IMAGENET1K_V1"

DATA = [
    (f"{title}: {name}", flags, prepare, message)
    for title, flags, rows in (
        ("folders", IMAGES, FOLDERS),
        ("arrays", ARCHIVE, ARRAYS),
        ("lists", BIRDS, LISTS),
        ("counts", EXPECT, COUNTS),
        ("mnist", MNIST_LINE, MNIST),
        ("cifar", CIFAR_LINE, CIFAR),
        ("checkpoints", RESUME, CHECKPOINTS),
        ("weights", WEIGHTS_FILE, WEIGHTS),
        ("downloads", DOWNLOAD, DOWNLOADS),
    )
    for name, prepare, message in rows
]
DATA_LINE = ["--config", "digits_inc.yaml", "--trainer.accelerator", "cpu"]


@pytest.mark.parametrize(
    ("flags", "prepare", "message"), [row[1:] for row in DATA], ids=[row[0] for row in DATA]
)
def test_a_file(
    flags: str, prepare: Prepare, message: str, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch)
    assert (
        refused(cli, [*DATA_LINE, *flags.split()], capsys) == f"bpn-fit: error: {filled(message)}"
    )


# --- results and checkpoints, read by functions --------------------------------------------------


def read_json(text: str) -> Any:
    Path("results.json").write_text(text)
    return results.read_results(Path("results.json"))


def whole(**change: Any) -> str:
    """A results.json that is read, but for what changes."""
    accuracy = {"average": 0.5, "first_task": 0.5, "per_task": [0.5], "bwt": None, "fwt": None}
    host = {"name": "n", "platform": "p", "cpu": "c", "gpu": None, "threads": 1}
    found = {
        "schema_version": 2,
        "experiment": "e",
        "method": "m",
        "seed": 0,
        "tasks": [{"id": 0, "classes": ["a"], "epochs": 1}],
        "tasks_learned": [0],
        "tasks_not_learned": [],
        "accuracy": {**accuracy, "forgetting": None},
        "accuracy_without_oracle": None,
        "accuracy_after_learning": {"average": 0.5, "per_task": [0.5]},
        "unsettled_tasks": [],
        "metrics": {},
        "bytes_per_task": {"measured": 0, "paper": None},
        "bytes_held": {"training": 0, "inference": 0},
        "extra": {},
        "provenance": {"seconds": 1.0, "date": "d", "versions": {}, "commit": None, "host": host},
    }
    return json.dumps(found | change)


AGAIN = " Run again with --overwrite true."
RESULTS: list[tuple[str, str]] = [
    (
        "",
        "results.json to be JSON in UTF-8, but got: Expecting value: line 1 column 1 (char 0)."
        + AGAIN,
    ),
    (
        whole(schema_version=1),
        (
            "schema_version of results.json to be 2, but got 1. Read it with the release of "
            "bpn_lightning that wrote it, or run again."
        ),
    ),
    (whole(seed="0"), f"seed of results.json to be of type int, but got '0'.{AGAIN}"),
    (whole(seed=True), f"seed of results.json to be of type int, but got True.{AGAIN}"),
    (whole(tasks={}), f"tasks of results.json to be a list, but got {{}}.{AGAIN}"),
    (whole(tasks=[3]), f"tasks[0] of results.json to be an object, but got 3.{AGAIN}"),
    (whole(accuracy={}), f"accuracy.average of results.json to be there, but got nothing.{AGAIN}"),
    (whole(extra=None), f"extra of results.json to be an object, but got None.{AGAIN}"),
    (whole(bytes_held=[1]), f"bytes_held of results.json to be an object, but got [1].{AGAIN}"),
]


@pytest.mark.parametrize(("text", "message"), RESULTS)
def test_results_that_are_wrong(text: str, message: str) -> None:
    read_json(whole())
    with pytest.raises(ResultsError) as caught:
        read_json(text)
    assert str(caught.value) == f"Expected {message}"


MATRIX = "Expected {} of matrix.csv to hold a moment from 0 to 1 and 1 accuracies, but got: {}."
MATRICES: list[tuple[str, str]] = [
    ("a,b\n", "Expected matrix.csv to begin with after_task,task_1,task_2,..., but got 'a,b'."),
    ("after_task,task_1\n7,0.5\n", MATRIX.format("line 2", "'7,0.5'")),
    ("after_task,task_1\n1,0.5,1\n", MATRIX.format("line 2", "'1,0.5,1'")),
    (
        "after_task,task_1\n0,.5\n1,half\n",
        MATRIX.format("line 3", "could not convert string to float: 'half'"),
    ),
]


@pytest.mark.parametrize(("text", "message"), MATRICES)
def test_a_matrix_that_is_wrong(text: str, message: str) -> None:
    Path("matrix.csv").write_text(text)
    with pytest.raises(ResultsError) as caught:
        results.read_matrix_csv(Path("matrix.csv"))
    assert str(caught.value) == message


UNREADABLE = "Expected x.ckpt to be a checkpoint, but it cannot be read: {}."
LOADED: list[tuple[str, Prepare, str]] = [
    (
        "a payload",
        checkpoint({"state_dict": Payload()}),
        UNREADABLE.format("it holds more than tensors and plain values, perhaps a program"),
    ),
    (
        "a pickle",
        lambda _: Path("x.ckpt").write_bytes(pickle.dumps(Payload())),
        UNREADABLE.format("File is not a zip file"),
    ),
    ("a list", checkpoint([1]), UNREADABLE.format("it holds a list")),
    (
        "another module's",
        checkpoint({"state_dict": {}}),
        (
            "Expected x.ckpt to be a checkpoint of a ContinualModule with these arguments, but got "
            "KeyError: 'continual'."
        ),
    ),
]
REMEDY = "Pass one from a run's checkpoints folder, and what that run's module was made of."


@pytest.mark.parametrize(
    ("prepare", "said"), [row[1:] for row in LOADED], ids=[row[0] for row in LOADED]
)
def test_load_from_checkpoint(prepare: Prepare, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        ContinualModule.load_from_checkpoint("x.ckpt", backbone=MLP([4]))
    assert str(caught.value) == f"{said} {REMEDY}"


# --- nothing is lost -----------------------------------------------------------------------------

SHORT = "--config digits_inc.yaml --method finetune --trainer.accelerator cpu --data.num_tasks 1"
SHORT += " --data.epochs_per_task 1"
FOLDER = Path("runs/digits_inc/finetune/seed_0")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_that_cannot_begin_costs_no_earlier_results(
    capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(SHORT.split()) == 0
    capsys.readouterr()
    for flags in (
        "--data SplitArrays --data.path nowhere.npz",
        "--data.num_tasks 6",
        "--model.optimizer.lr -1",
        "--trainer.max_epochs 7",
        "--method ewc --strategies.ewc.update proximal --model.optimizer Adam",
    ):
        assert "Expected" in refused(cli, f"{SHORT} --overwrite true {flags}", capsys)
    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_atomically", full)
        assert cli.main([*SHORT.split(), "--runs", "full"]) == 2
    here = Path("full", *FOLDER.parts[1:])
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"bpn-fit: error: Expected to write the run's results into {here}, but got: [Errno 28] No "
        "space left on device. Make room or give write access, then resume the run from its last "
        "checkpoint."
    )
    assert {name: text for name, text in files().items() if not name.startswith("full")} == before
    assert not (here / "results.json").exists()
    assert cli.main([*SHORT.split(), "--runs", "full", "--ckpt_path", "last"]) == 0
    assert results.read_results(here)["accuracy"] == results.read_results(FOLDER)["accuracy"]


def test_a_full_disk_leaves_an_earlier_report(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("kept").mkdir()
    Path("kept/cells.json").write_text(cells())
    found = collection.read_collection(Path("kept"))
    monkeypatch.setattr(collection, "write_atomically", full)
    before = files()
    with pytest.raises(ResultsError) as caught:
        collection.write_collection(found, Path("kept"))
    assert str(caught.value) == (
        "Expected to write kept/cells.json, but got: [Errno 28] No space left on device. Make room "
        "or give write access; `bpn-bench collect` makes it without running anything."
    )
    assert files() == before


@pytest.mark.parametrize(
    "place", ["runs/digits_inc", "runs/digits_inc/finetune/seed_0/metrics.csv"]
)
def test_a_run_never_writes_out_of_its_root(place: str, capsys: Said) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/metrics.csv").write_text("kept")
    link = Path(place)
    link.parent.mkdir(parents=True)
    target = Path("elsewhere", "metrics.csv" if link.suffix else "").absolute()
    link.symlink_to(target)
    shown = link if link.suffix else FOLDER
    inside = target if link.suffix else target / "finetune/seed_0"
    wanted = (
        f"Expected {shown} to lie in runs, but a link leads to {inside}. Remove the link, or name the "
        "other place with --runs."
    )
    assert refused(cli, SHORT, capsys) == f"bpn-fit: error: {wanted}"
    Path("g.yaml").write_text("experiments: [{config: digits_inc, methods: [finetune]}]")
    assert refused(bench, "g.yaml --runs runs", capsys) == f"bpn-bench: error: {wanted}"


def test_the_root_may_be_a_link(capsys: Said) -> None:
    Path("disk").mkdir()
    Path("runs").symlink_to("disk")
    assert cli.main(SHORT.split()) == 0
    assert Path("disk/digits_inc/finetune/seed_0/results.json").is_file()


def test_there_are_more_than_eighty_rows() -> None:
    tables = (LINES, CONFIGS, GRIDS, REPORTS, CHECKS, DATA, RESULTS, MATRICES, LOADED)
    assert sum(map(len, tables)) > 180
