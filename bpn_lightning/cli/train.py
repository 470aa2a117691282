"""The part of ``bpn-fit`` that needs torch: instantiate, train, and handle the end of training."""

import errno
import os
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from typing import TextIO

import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from bpn_lightning.cli.command import Command
from bpn_lightning.cli.entry_point import INTERRUPTED
from bpn_lightning.cli.fit import ContinualCLI
from bpn_lightning.cli.output import notify, quiet_lightning
from bpn_lightning.cli.resume import how_to_resume, last_checkpoint, previous_checkpoint
from bpn_lightning.costs import bytes_held, bytes_per_task
from bpn_lightning.errors import ResultsError
from bpn_lightning.files.untrusted import read_text
from bpn_lightning.nn.pretrained import with_origin
from bpn_lightning.run.console import final_table, gate_table
from bpn_lightning.run.dashboards import close_adapters, upload_artifacts
from bpn_lightning.run.folder import written_files
from bpn_lightning.run.gates import gate_results
from bpn_lightning.run.identity import setup_name
from bpn_lightning.run.provenance import collect_provenance
from bpn_lightning.run.results import write_results
from bpn_lightning.run.scenarios import scenarios
from bpn_lightning.run.schema import Conditions, FrontRecord, PretrainedRecord

__all__ = ["fit"]

TERMINATED = 143  # the exit status that shells use for SIGTERM

#: Error codes of the operating system for a full disk or quota.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fit(command: Command) -> int:
    """Run the training of a command line, and write and show its results.

    Args:
        command: read by :func:`bpn_lightning.cli.command.read_command`.

    Returns:
        The exit status.

    Raises:
        BPNLightningError: a usage error.
    """
    for notice in command.notices:
        notify(notice)
    _skip_gpu_checks()
    with quiet_lightning():
        try:
            cli = ContinualCLI(command)
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):  # --help and --print_config
                return end.code or 0
            raise  # a class of the user's ends the process with a sentence
        out = sys.stdout
        # Libraries and plugins may print; standard output contains only the document.
        try:
            with redirect_stdout(sys.stderr) if cli.config.json else nullcontext():
                return _train(cli, out)
        finally:
            cli.close()


def _skip_gpu_checks() -> None:
    """Without a GPU, keep optimizers from searching for NVIDIA's library at every update.

    Adam and others check for a GPU; an environment variable that Lightning sets makes this check load the
    library, which is slow if it is missing.
    """
    if not torch.cuda.is_available():
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def _train(cli: ContinualCLI, out: TextIO) -> int:
    started = time.perf_counter()
    status = 1
    try:
        cli.trainer.fit(
            cli.model,
            datamodule=cli.datamodule,
            ckpt_path=cli.checkpoint,
            weights_only=True,
        )
        if cli.trainer.is_global_zero:
            _finish(cli, out, seconds=time.perf_counter() - started)
        status = 0
    except SIGTERMException:
        notify(f"Terminated. {how_to_resume(cli.folder, cli.config.overwrite)}")
        status = TERMINATED
    except SystemExit:
        if cli.trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        # Lightning ignores the signal from here on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        notify(f"Interrupted. {how_to_resume(cli.folder, cli.config.overwrite)}")
        status = INTERRUPTED
    except KeyboardInterrupt:  # while the results are written
        notify(f"Interrupted. {how_to_resume(cli.folder, cli.config.overwrite)}")
        status = INTERRUPTED
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise ResultsError(
            f"No space left for the files of {cli.folder}: {error}. Free some. "
            f"{how_to_resume(cli.folder, cli.config.overwrite)}"
        ) from error
    finally:
        if cli.trainer.is_global_zero:
            close_adapters(cli.trainer.loggers, status)
    return status


def _finish(cli: ContinualCLI, out: TextIO, seconds: float) -> None:
    config, module = cli.config, cli.model
    stored = bytes_per_task(module.host.strategies, module.host)
    held = bytes_held(module.host.strategies, module.host)
    front, conditions = _front(cli), _conditions(cli)
    results = write_results(
        cli.folder,
        experiment=config.experiment,
        method=config.method,
        seed=config.seed_everything,
        matrix=module.accuracy_matrix,
        curve=module.curve,
        tasks=module.tasks,
        bytes_per_task=stored,
        bytes_held=held,
        conditions=conditions,
        class_counts=module.history.class_counts,
        validation=module.history.validation,
        unsettled=module.unsettled,
        metrics=module.task_metrics,
        gate_scores=module.gate_scores,
        front=front,
        provenance=collect_provenance(seconds, cli.continues, _pretrained(cli)),
        extra={"curve": module.curve} if module.history.evaluate_every == "epoch" else {},
    )
    if module.closed + 1 == len(module.tasks):  # complete, so there is nothing to resume
        previous_checkpoint(cli.folder).unlink(missing_ok=True)
    if config.log_artifacts:
        name = f"{config.experiment}-{cli.folder.parent.name}-seed_{config.seed_everything}"
        try:
            upload_artifacts(
                cli.trainer.loggers, name, written_files(cli.folder), last_checkpoint(cli.folder)
            )
        except Exception as error:  # a logger's client may raise any exception
            raise ResultsError(
                f"Expected the loggers to upload the run's files, but got: {error}. Its results are "
                f"complete in {cli.folder}: upload them manually."
            ) from error
    if config.json:
        out.write(read_text(results))
    if config.quiet or config.json:
        return
    gates = gate_results(module.gate_scores)
    setup = setup_name(config.method, gates, front and front["name"])
    title = f"{config.experiment}, {setup}, seed {config.seed_everything}"
    summary = module.accuracy_matrix.summary()
    final_table(
        Console(),
        title,
        module.tasks,
        summary,
        stored,
        held,
        results.parent,
        module.unsettled,
        module.overtaken,
        conditions["scenarios"],
    )
    if gates:
        gate_table(Console(), gates, front, summary["average"])


def _conditions(cli: ContinualCLI) -> Conditions:
    """What a comparison of the run with others depends on."""
    module, stream = cli.model, cli.datamodule
    measured = module.accuracy_matrix.summary()["task_agnostic"] is not None
    conditions: Conditions = {
        "scenarios": scenarios(module.network.mask, stream.task_id_at_inference, measured),
        "order": stream.order,
        "tuned_for": cli.command.tuned_for,
        "split": stream.evaluation_split,
        "updates": cli.trainer.global_step,
    }
    if cli.command.tuned is not None:
        classes = {name for task in module.tasks for name in task.class_names}
        conditions["tuned"] = cli.command.tuned.summary(classes)
    return conditions


def _pretrained(cli: ContinualCLI) -> list[PretrainedRecord]:
    """Where the weights of the network's parts come from, as they were before the run."""
    return [
        {
            "library": one.library,
            "version": one.version,
            "name": one.name,
            "weights": one.weights,
            "sha256": one.sha256,
        }
        for _, _, one in with_origin(cli.model.network)
    ]


def _front(cli: ContinualCLI) -> FrontRecord | None:
    """The run's front: its registered name, or that of its class, and its bytes."""
    front = cli.model.network.front
    if front is None:
        return None
    name = cli.config.front or type(front).__name__
    return {"name": name, "bytes": sum(one.nbytes for one in front.state_dict().values())}
