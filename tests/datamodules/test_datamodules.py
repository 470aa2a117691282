"""The room's front door: its table, its laziness, and the flags that the command line shows."""

import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from inspect import Parameter, isabstract, signature

import lightning as L
import pytest
from jsonargparse import ArgumentParser

from bpn_lightning import datamodules
from bpn_lightning.datamodules import DATAMODULES, ClassIncrementalDataModule, ContinualDataModule

WHOLE = {"seed": 9, "reset_optimizer": "never", "task_id_at_inference": False}
COMMON = WHOLE | {
    "epochs_per_task": [1, 2, 3],
    "batch_size": 16,
    "eval_batch_size": 50,
    "validation_fraction": 0.25,
    "evaluation_split": "val",
}
CLASSES = {
    "num_tasks": 3,
    "classes_per_task": 4,
    "class_order": ["ant", 2],
    "class_order_seed": 5,
    "domain_incremental": True,
    "blurry": 0.0,
    "augment": True,
    "channels": 3,
}
TRANSFORMED = {
    "root": "here",
    "download": False,
    "padding": 2,
    "num_tasks": 3,
    "train_samples": 20,
    "test_samples": 10,
    "augment": True,
    "channels": 3,
}
OWN = {
    "SplitDigits": {},
    "SplitMNIST": {"root": "here", "download": False, "padding": 2},
    "SplitFashionMNIST": {"root": "here", "download": False, "padding": 1},
    "SplitCIFAR10": {"root": "here", "download": False},
    "SplitCIFAR100": {"root": "here", "download": False},
    "SplitImageFolder": {"root": "here", "image_size": 32, "channels": 1},
    "SplitArrays": {"path": "a.npz", "standardize": False, "own_validation": False},
}
OWN = {name: COMMON | CLASSES | own for name, own in OWN.items()}
OWN["PermutedMNIST"] = COMMON | TRANSFORMED | {"permute_first_task": False}
OWN["RotatedMNIST"] = COMMON | TRANSFORMED | {"max_angle": 90.0}
OWN["Gaussians"] = (
    COMMON
    | {"deviation": 1.0, "train_samples": 5, "test_samples": 6, "augment": False}
    | {"centers": [[0.0, 0.0], [1.0, 1.0], [2.0, 1.0], [3.0, 0.0]]}
)
OWN["StreamOf"] = WHOLE | {"streams": [], "shared_columns": True}
SIMPLE = [name for name in DATAMODULES if name in OWN and name != "StreamOf"]


def test_importing_the_room_imports_nothing_heavy() -> None:
    code = (
        "import sys, bpn_lightning.datamodules as d; d.DATAMODULES;"
        "print({'torch', 'lightning', 'numpy', 'PIL', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there_and_the_table_is_true() -> None:
    for name, place in DATAMODULES.items():
        module, attribute = place.split(":")
        stream = getattr(import_module(module), attribute)
        assert stream is getattr(datamodules, name)
        assert stream.__name__ == name
        assert issubclass(stream, ContinualDataModule)
        assert not isabstract(stream)
    assert set(datamodules.__all__) == {
        "DATAMODULES",
        "ClassIncrementalDataModule",
        "ContinualDataModule",
        "ImageData",
        "Samples",
        "SamplesOfTasks",
        *DATAMODULES,
    }
    assert set(datamodules.__all__) <= set(dir(datamodules))
    with pytest.raises(AttributeError, match="SplitNothing"):
        datamodules.SplitNothing  # noqa: B018


def test_the_bases_are_abstract() -> None:
    assert isabstract(ContinualDataModule)
    assert isabstract(ClassIncrementalDataModule)


@pytest.mark.parametrize("name", OWN)
def test_every_argument_is_explicit_and_documented(name: str) -> None:
    stream = getattr(datamodules, name)
    parameters = signature(stream).parameters
    assert set(parameters) == OWN[name].keys()
    assert {p.kind for p in parameters.values()} <= {
        Parameter.KEYWORD_ONLY,
        Parameter.POSITIONAL_OR_KEYWORD,
    }
    parser = ArgumentParser()
    parser.add_class_arguments(stream, "data")
    helps = {action.dest.removeprefix("data."): action.help for action in parser._actions}
    assert [key for key in parameters if not helps[key]] == []


@pytest.mark.parametrize("name", SIMPLE)
def test_every_argument_goes_from_the_command_line_to_the_stream(name: str) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    arguments = OWN[name]
    line = [f"--data={DATAMODULES[name].replace(':', '.')}"]
    line += [f"--data.{key}={value}" for key, value in arguments.items()]
    if "class_order" in arguments:
        line += ["--data.class_order=[ant, 2]"]
    stream = parser.instantiate(parser.parse_args(line)).data
    assert type(stream) is getattr(datamodules, name)
    assert {key: getattr(stream, key) for key in arguments} == arguments


def test_what_is_not_given_stays_out_of_the_constructor() -> None:
    computed = {field.name for field in fields(ContinualDataModule) if not field.init}
    assert computed == {
        *("tasks", "num_classes", "input_shape", "input_dtype"),
        *("has_validation", "normalization"),
    }


def test_one_positional_argument_says_where_the_data_are() -> None:
    assert datamodules.SplitCIFAR100("data", num_tasks=10).root == "data"
    assert datamodules.SplitArrays("a.npz").path == "a.npz"


def test_a_value_of_the_wrong_type_is_refused() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    for key, value in {"seed": "x", "num_tasks": "1.5", "reset_optimizer": "maybe"}.items():
        with pytest.raises(Exception, match=key):
            parser.parse_args(
                ["--data=bpn_lightning.datamodules.digits.SplitDigits", f"--data.{key}={value}"]
            )
