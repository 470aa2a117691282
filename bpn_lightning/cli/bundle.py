"""The command ``bpn-bundle``: change and check a bundle, write its model card again, push and pull it."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpn_lightning.checks import check_positive_int
from bpn_lightning.cli.entry_point import entry_point
from bpn_lightning.cli.trust import add_trusted_names
from bpn_lightning.errors import CheckpointError, ConfigurationError, did_you_mean
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.terminal import printable

if TYPE_CHECKING:
    from bpn_lightning.modes.bundle import Bundle

__all__ = ["main"]


@entry_point("bpn-bundle", interrupted="The bundle is as it was, or as it was to become.")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0, 2 on a usage error, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    if arguments.verb in _ON_THE_HUB:
        lines = _ON_THE_HUB[arguments.verb](arguments)
    else:
        folder = Path(arguments.bundle)
        from bpn_lightning.modes.changing import changing  # slow: imports torch

        with nullcontext() if arguments.verb == "check" else changing(folder):
            lines = _DO[arguments.verb](folder, _read(folder), arguments)
    for line in lines:
        print(printable(line))
    return 0


def _read(folder: Path) -> "Bundle":
    from bpn_lightning.modes.bundle import explained, read_bundle, structure_of
    from bpn_lightning.modes.card import model_card

    with explained(folder):
        bundle = read_bundle(folder)
        structure_of(bundle, compact=True)
        model_card(bundle)  # which is written after a change
    return bundle


def _add(folder: Path, bundle: "Bundle", arguments: argparse.Namespace) -> list[str]:
    from bpn_lightning.modes.bundle import GATE, explained, read_task, with_task
    from bpn_lightning.modes.calibration import uncalibrated
    from bpn_lightning.modes.card import write_card
    from bpn_lightning.modes.changing import add_files, replace_files, write_formats
    from bpn_lightning.modes.snapshot import Snapshot

    source = Path(arguments.task)
    with explained(source, task=True):
        one = read_task(source, bundle.record)
    one = replace(one, name=arguments.name or source.resolve().name)
    changed = with_task(bundle, one)
    if bundle.record["network"] is not None:
        # A task that does not fit would take the bundle's others with it.
        with explained(source, task=True):
            Snapshot(changed, trust=arguments.trust)
    dropped = _drop_training_state(folder)
    made = add_files(folder, bundle, one)
    newer = _with_newer_temperatures(source, changed)
    if newer is not None:
        gates = {GATE: newer.files[GATE]} if GATE in newer.files else {}
        replace_files(folder, changed, gates, gates=newer.record["gates"])
    write_card(folder, changed)
    write_formats(folder, arguments.trust)
    stale = [
        f"the temperature of {name} was not chosen with {', '.join(late)}; export a run of all tasks to choose it again"
        for name, late in uncalibrated(changed).items()
    ]
    return [str(made), *stale, *dropped]


def _with_newer_temperatures(source: Path, bundle: "Bundle") -> "Bundle | None":
    """The bundle that a task comes from, if its gates were calibrated with all tasks; None if not, or if it is alone."""
    from bpn_lightning.modes.bundle import TASKS, explained, read_bundle
    from bpn_lightning.modes.calibration import has_newer_temperatures

    place = source.resolve()
    if place.parent.name != TASKS or not bundle.record["gates"]:
        return None
    try:
        with explained(place):
            other = read_bundle(place.parents[1])
            return other if has_newer_temperatures(other, bundle) else None
    except CheckpointError:  # the task alone was asked for, and is whole
        return None


def _remove(folder: Path, bundle: "Bundle", arguments: argparse.Namespace) -> list[str]:
    from bpn_lightning.files.untrusted import read_json
    from bpn_lightning.modes.bundle import CONFIG, TASKS
    from bpn_lightning.modes.card import write_card
    from bpn_lightning.modes.changing import write_formats

    name, common = arguments.task, bundle.record["structure"]["preparation"]
    one = bundle.tasks.get(name)
    if one is None or len(bundle.tasks) == 1:
        known = ", ".join(bundle.tasks)
        rule = "not to be the only one" if one else f"to be one of {known}"
        remedy = "Delete the bundle instead." if one else did_you_mean(name, [*bundle.tasks])
        raise ConfigurationError(f"Expected task {rule}, but got {name!r}. {remedy}".rstrip())
    record = read_json(folder / CONFIG, within=folder)
    gone = {**one.record(common), "progress": "learned"}
    others = [each for each in record["forgotten"] if each["task"]["id"] != one.task.id]
    hidden = folder / TASKS / f".{os.getpid()}.removed"
    left = {key: each for key, each in bundle.tasks.items() if key != name}
    dropped = _drop_training_state(folder)
    # A number that is forgotten and has a folder is known: an interruption leaves the task.
    content = json.dumps({**record, "forgotten": [*others, gone]}, indent=1).encode()
    write_atomically(folder / CONFIG, content)
    (folder / TASKS / name).rename(hidden)
    shutil.rmtree(hidden)
    write_card(folder, replace(bundle, tasks=left))
    write_formats(folder, arguments.trust)
    return [
        f"{name} is removed; the shared weights, where they were trained on it, are as they were",
        *dropped,
    ]


def _drop_training_state(folder: Path) -> list[str]:
    """Remove what is of other tasks than the bundle is going to have, and may hold samples of one that goes."""
    from bpn_lightning.modes.training_state import FOLDER, remove_training_state

    if not remove_training_state(folder):
        return []
    return [f"{FOLDER} is removed, as it was of the tasks before; bpn-export writes another"]


def _check(folder: Path, bundle: "Bundle", arguments: argparse.Namespace) -> list[str]:
    from bpn_lightning.modes import load
    from bpn_lightning.modes.bundle import explained
    from bpn_lightning.modes.training_state import check_training_state, training_state_parts

    with explained(folder):
        check_training_state(folder, bundle)
        training = training_state_parts(folder)
    lines = [
        f"{name}: task {one.task.id}, {one.task.num_classes} classes, {_size(one):,} bytes, {one.progress}"
        for name, one in bundle.tasks.items()
    ]
    lines.append(f"shared by all tasks: {bundle.shared_bytes:,} bytes, {bundle.base}")
    lines += [f"training state of {one.name}: {one.bytes:,} bytes" for one in training]
    if bundle.record["network"] is None:
        return [
            *lines,
            "every file is the one that was written; it names no network to put them into",
        ]
    load(folder, trust=arguments.trust)
    return [*lines, "every file is the one that was written, and fits the network"]


def _size(one: Any) -> int:
    return sum(v.nbytes for v in (*one.tensors.values(), *one.gate_tensors.values()))


def _card(folder: Path, bundle: "Bundle", arguments: argparse.Namespace) -> list[str]:
    from bpn_lightning.modes.card import write_card

    write_card(folder, bundle)
    return [str(folder / "README.md")]


def _push(arguments: argparse.Namespace) -> list[str]:
    from bpn_lightning.modes.hub import push

    done = push(
        arguments.bundle,
        arguments.repository,
        revision=arguments.revision,
        private=not arguments.public,
        message=arguments.message,
        training_state=arguments.training_state,
    )
    return [done]


def _pull(arguments: argparse.Namespace) -> list[str]:
    from bpn_lightning.modes.hub import MAX_BYTES, pull

    most = MAX_BYTES if arguments.max_bytes is None else arguments.max_bytes
    check_positive_int("max_bytes", most)
    folder, left = pull(
        arguments.repository,
        arguments.folder,
        revision=arguments.revision,
        max_bytes=most,
        training_state=arguments.training_state,
    )
    if left:
        note = f"{len(left)} other files were left there, such as {left[0]}"
        print(f"bpn-bundle: {printable(note)}", file=sys.stderr)
    return [str(folder)]


_DO = {"add": _add, "remove": _remove, "check": _check, "card": _card}
_ON_THE_HUB = {"push": _push, "pull": _pull}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bpn-bundle",
        description="Add and remove tasks of a bundle of bpn-export, check it, write its model card again, and send "
        "it to and take it from Hugging Face's hub.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=help, description=help)
        made.add_argument("bundle", metavar="BUNDLE", help="the folder that bpn-export wrote")
        return made

    add = verb("add", "copy a task's folder into a bundle of the same shared weights")
    add.add_argument("task", metavar="FOLDER", help="tasks/NAME of another bundle, or a copy of it")
    add.add_argument("--name", help="of the task in this bundle; by default the folder's")
    remove = verb("remove", "take a task out, with its biases and rows of the head")
    remove.add_argument("task", metavar="NAME", help="of the task")
    check = verb("check", "read every file, compare hashes, and put the weights into the network")
    for one in (add, remove, check):
        add_trusted_names(one)
    verb("card", "write README.md anew")
    needs = "needs pip install 'bpn_lightning[hub]'"
    push = verb("push", f"send it to Hugging Face's hub; {needs}")
    pull = verbs.add_parser("pull", help=(does := f"take one from Hugging Face's hub; {needs}"))
    pull.description = does
    for one in (push, pull):
        one.add_argument("repository", metavar="REPO", help="OWNER/NAME of a repository of models")
        one.add_argument("--revision", help="of the repository; by default main")
        one.add_argument(
            "--training_state",
            action="store_true",
            help="with what learning goes on from, which may hold samples of the training data",
        )
    push.add_argument("--public", action="store_true", help="if the repository has to be made")
    push.add_argument("--message", help="of the commit")
    pull.add_argument(
        "folder", metavar="DIR", help="a new folder, which appears when it is checked"
    )
    pull.add_argument("--max_bytes", metavar="N", type=int, help="of all files; by default 16 GiB")
    return parser


if __name__ == "__main__":
    sys.exit(main())
