"""Tasks that a run learns, added to a bundle that may be served meanwhile: ``bpn-fit --to``.

What all tasks share has to be frozen: then a new task is one more folder, and those that are there answer bit
for bit as before. A method that trains shared weights has no such folder; it is exported again.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.export.exporting import bundle_of, task_names, write_training_state_of
from bpn_lightning.model.extending import extension_of
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.modes.bundle import (
    ACCURACY,
    GATE,
    Bundle,
    TaskFiles,
    explained,
    read_bundle,
    structure_of,
    with_task,
)
from bpn_lightning.modes.card import write_card
from bpn_lightning.modes.changing import (
    add_files,
    changing,
    formats_of,
    replace_files,
    write_formats,
)
from bpn_lightning.modes.layout import layout_of
from bpn_lightning.modes.training_state import has_training_state, remove_training_state
from bpn_lightning.nn.sharding import check_whole
from bpn_lightning.tasks import Task

__all__ = ["AddToBundle"]


class AddToBundle(Callback):
    """Adds each task to a bundle when it is learned and evaluated, in one rename.

    Tasks that a bundle has already, from this run before it was interrupted, are not added again; nor are those that
    were removed from it since. Accuracies, what gates share, and a training state that was there become those
    of the run.

    Args:
        folder: of a bundle with the shared weights that the run continues from.
        names: of the new tasks in it, in order; by default ``task_<number>``.
        training_state: whether the bundle has one when the run ends; None: if it has one when the run begins.

    State: ``past_tasks``, how many tasks were learned before, for a run that is resumed when the bundle has
    more.
    """

    def __init__(
        self, folder: Path, names: Sequence[str] | None = None, training_state: bool | None = None
    ) -> None:
        self.folder = folder
        self.names = names
        self.training_state = training_state
        self._first = 0
        self._closed: int | None = None  # the last task that was looked at
        self._name_of: dict[int, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed finds in its checkpoint."""
        return {"past_tasks": self._first, "training_state": bool(self.training_state)}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what could not be added, before anything is trained."""
        module = cast(ContinualModule, pl_module)
        self._first = cast(Any, module.host.stream).first_task
        new = module.tasks[self._first :]
        numbers = [task.id for task in new]
        self._name_of = dict(zip(numbers, task_names(numbers, self.names), strict=True))
        self._check_frozen(module, new)
        bundle = self._read()
        if self.training_state is None:
            self.training_state = has_training_state(self.folder)
        wanted = _wanted(bundle, new)
        for one in self._files(self._own(module, bundle), bundle, wanted) if wanted else ():
            bundle = with_task(bundle, one)
        if formats_of(self.folder) and wanted:
            from bpn_lightning.modes import load

            load(self.folder)  # their files are made of it again
        if trainer.is_global_zero:
            with changing(self.folder):  # whether it can be written
                pass

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the tasks that were closed since."""
        self._add(trainer, cast(ContinualModule, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the last one, and put the training state next to all of them."""
        if stage == "fit":
            self._add(trainer, cast(ContinualModule, pl_module), ended=True)

    # --- what has to be so -----------------------------------------------------------------------

    def _check_frozen(self, module: ContinualModule, new: Sequence[Task]) -> None:
        core = module.host.core
        if all(core.freezes(task.id) or not task.epochs for task in new):  # of gates alone: 0
            return
        raise ConfigurationError(
            f"Expected train to be 'modes' or 'head' where tasks are added to {self.folder}, since its tasks answer "
            f"with the shared weights that are in it, but got {core.train!r}, which trains them. Set train to "
            "'modes' with a method that can (docs/frozen_core.md), or learn without adding, and export the "
            "run to a new folder."
        )

    def _read(self) -> Bundle:
        with explained(self.folder):
            bundle = read_bundle(self.folder)
            structure_of(bundle, compact=True)
        return bundle

    # --- adding ----------------------------------------------------------------------------------

    def _add(self, trainer: Trainer, module: ContinualModule, ended: bool = False) -> None:
        if module.closed == self._closed and not ended:  # an epoch of the same task
            return
        self._closed = module.closed
        closed = module.tasks[self._first : module.closed + 1]
        complete = ended and module.closed + 1 == len(module.tasks)
        checkpoint = None
        if complete and self.training_state:  # all processes give what is theirs
            checkpoint = extension_of(module).training_state()
        if not trainer.is_global_zero or not closed:
            return
        with changing(self.folder):
            bundle = self._read()
            wanted = _wanted(bundle, closed)
            if wanted:
                own = self._own(module, bundle)
                for one in self._files(own, bundle, wanted):
                    bundle = with_task(bundle, one)
                    add_files(self.folder, bundle, one)
                self._take_over(own, bundle)
            if wanted or checkpoint is not None:
                self._replace_training_state(module, bundle, checkpoint)
                write_card(self.folder, bundle)
            if wanted:
                write_formats(self.folder)

    def _own(self, module: ContinualModule, bundle: Bundle) -> Bundle:
        """What an export of a module would hold, as far as it is compared with a bundle and put into it.

        Raises:
            CheckpointError: the bundle's shared weights are others.
        """
        check_whole(module.network.backbone)
        own = bundle_of(module, include_pretrained=not bundle.record["pretrained"])
        own.record["layout"] = layout_of([one.tensors for one in own.tasks.values()])
        if own.base != bundle.base:
            raise CheckpointError(
                f"Expected {self.folder} to have the shared weights that the run goes on with, whose hash is "
                f"{own.base}, but got {bundle.base}. Continue from {self.folder} itself, or from the run that it "
                "was exported from; else export this run to a new folder."
            )
        return own

    def _files(self, own: Bundle, bundle: Bundle, tasks: Sequence[Task]) -> list[TaskFiles]:
        """The folders of some tasks."""
        files = {one.task.id: one for one in own.tasks.values()}
        return [
            replace(
                files[task.id], name=self._name_of[task.id], base=bundle.base, progress="learned"
            )
            for task in tasks
        ]

    def _take_over(self, own: Bundle, bundle: Bundle) -> None:
        """Replace what is of all tasks and not of their base: accuracies, and what gates share."""
        found = {name: own.files[name] for name in (GATE, ACCURACY) if name in own.files}
        replace_files(self.folder, bundle, found, gates=own.record["gates"])

    def _replace_training_state(
        self, module: ContinualModule, bundle: Bundle, checkpoint: dict[str, Any] | None
    ) -> None:
        """Nothing goes on from the middle of a stream, nor from what holds a task that was removed."""
        known = module.network.structure.known(range(len(module.tasks)))
        if checkpoint and [one.task.id for one in bundle.tasks.values()] == known:
            write_training_state_of(module, bundle, checkpoint, self.folder)
        else:
            remove_training_state(self.folder)


def _wanted(bundle: Bundle, tasks: Sequence[Task]) -> list[Task]:
    """Those that a bundle neither has nor has had."""
    there = {one["task"]["id"] for one in bundle.record.get("forgotten", [])}
    there |= {one.task.id for one in bundle.tasks.values()}
    return [task for task in tasks if task.id not in there]
