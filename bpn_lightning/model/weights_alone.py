"""A module that goes on without its training state: one that was loaded from an export, or a copy.

It holds the network and what gates answer by. That is all the past of a method without a training state of
its own, such as BD on a frozen core, as long as each task has an optimizer of its own. The network grows in
place when the fit is set up; nothing is loaded.
"""

from collections.abc import Sequence
from typing import Any

from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.model.growth import grown_history
from bpn_lightning.model.history import History
from bpn_lightning.model.host import Host
from bpn_lightning.run.identity import differences
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream
from bpn_lightning.trainer.lightning import set_epochs_done

__all__ = ["WeightsAlone"]


class WeightsAlone:
    """The past of a module that has learned, as it holds it itself.

    Args:
        host: of the module.

    Attributes:
        past: what a stream that goes on needs to know of it.

    Raises:
        CheckpointError: the module does not know the run that learned its tasks.
    """

    def __init__(self, host: Host) -> None:
        run, structure = host.learned_by, host.network.structure
        if run is None:
            raise CheckpointError(
                "Expected a module that knows the seed and the strategies of its run, but this one does "
                "not. Export the run again with this version, or load one of its checkpoints."
            )
        self.host = host
        self.strategies = list(run.strategies)
        self.past = run.past(structure, host.network.closed)
        self._gates = {gate.state_key: gate.inference_state() for gate in host.gates.values()}

    def check(self, strategies: Sequence[ContinualStrategy], stream: ContinualStream) -> None:
        """Refuse a run that needs more of the past, before anything grows.

        Raises:
            CheckpointError: the strategies are others, or one of them has a training state.
            ConfigurationError: the optimizer is to go on.
        """
        found = [strategy.state_key for strategy in strategies]
        different = differences({"strategies": found}, {"strategies": self.strategies})
        if different:
            raise CheckpointError(
                f"Expected the strategies that learned the module's tasks, but they differ: {different[0]}. "
                "Pass the same ones, or start a new run."
            )
        remedy = (
            "continue from the run's folder or one of its checkpoints, or export it with its training state: "
            "bpn-export --training_state."
        )
        for strategy in strategies:
            lacking = strategy.training_state()
            if not lacking and strategy.state_dict() and strategy.state_key not in self._gates:
                lacking = "state"
            if lacking:
                raise CheckpointError(
                    f"Expected the training state of the run, but an export holds no {lacking}: "
                    f"{type(strategy).__name__} cannot continue from it. Leave the export, and {remedy}"
                )
        if stream.reset_optimizer == "never":
            raise ConfigurationError(
                "Expected reset_optimizer to be 'always' where an export goes on, which holds no state of "
                f"an optimizer, but got 'never'. Set it to 'always', or {remedy}"
            )

    def resume(self, history: History) -> None:
        """Go on behind the last learned task, in a network that has grown.

        Args:
            history: of the module.
        """
        host, learned = self.host, len(self.past.tasks)
        for strategy in host.strategies:
            if strategy.state_key in self._gates:
                strategy.load_state_dict(self._gates[strategy.state_key])
            strategy.on_stream_growth(host, host.network.tasks[learned:])
        kept: dict[str, Any] = history.state_dict(right=0)
        history.load_state_dict(grown_history(kept, learned, len(host.network.tasks)))
        host.cursor.skip(learned)
        set_epochs_done(host.trainer, host.cursor.checked_epochs)
