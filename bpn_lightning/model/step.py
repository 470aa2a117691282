"""One update of a network: the loss, the strategies' hooks in their order, and the optimizer."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bpn_lightning.metrics.settling import Settling
from bpn_lightning.model.host import Host
from bpn_lightning.model.optimization import Optimization
from bpn_lightning.nn.execution import differentiable
from bpn_lightning.nn.inference import closed_columns_added
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.sharding import is_sharded
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch
from bpn_lightning.trainer.optimizers import check_repeated_evaluation

if TYPE_CHECKING:
    from bpn_lightning.datamodules.loading import TrainLoader

__all__ = ["Step"]

GRADIENT_EDITS = ("penalty_grad", "project_grad")
GRADIENT_HOOKS = ("capture_grad", *GRADIENT_EDITS, "consume_grad")
LOSS_HOOKS = ("training_batch", "task_losses", "loss_terms")
STEP_HOOKS = (*LOSS_HOOKS, *GRADIENT_HOOKS, "correct_step", "observe_step", "logs")


class Step:
    """What an update needs, gathered when a phase begins: nothing is looked up twice.

    Args:
        host: of the network that is trained.
        optimization: counts the losses that a scheduler waits for.
        settling: counts the right answers.
    """

    def __init__(self, host: Host, optimization: Optimization, settling: Settling) -> None:
        self.host = host
        self.network = host.network
        self.optimization = optimization
        self.settling = settling
        self._hooks: dict[str, list[Callable[..., Any]]] = {name: [] for name in STEP_HOOKS}
        self._optimizer: Optimizer | None = None  # that has the step's hooks
        self._handles: list[RemovableHandle] = []
        self._steps_under_way = 0  # a step may call the one of the class it is derived from
        self._parameters: dict[str, nn.Parameter] = {}
        self._frozen: list[nn.Parameter] = []
        # Of the head: parameters, which rows, and what stays in them.
        self._frozen_rows: list[tuple[nn.Parameter, Tensor | slice, Tensor]] = []
        self._outside: list[nn.Parameter] = []  # of the optimizer
        self._columns = (0, 0)
        self._world_size = 1
        self._evaluated = False  # whether this update's gradients were asked for before
        self._batch: Batch | None = None  # that a strategy made of the stream's
        self._prepared_epoch = -1

    def find_hooks(self) -> None:
        """Look up the hooks that the host's strategies override."""
        self._hooks = {name: _overridden(self.host.strategies, name) for name in STEP_HOOKS}

    def forget_optimizer(self) -> None:
        """Gather anew what an update needs: the task, the phase or the optimizer is another one."""
        self._optimizer = None

    def is_prepared(self, epoch: int) -> bool:
        """Whether :meth:`prepare` was called for this epoch and the current optimizer."""
        current = self.host.trainer.optimizers[0]
        return self._optimizer is current and self._prepared_epoch == epoch

    def prepare(self, epoch: int) -> None:
        """Put the step's hooks on the current optimizer, whichever way it came to be current."""
        self._prepared_epoch = epoch
        host, network = self.host, self.network
        optimizer = host.trainer.optimizers[0]
        if self._optimizer is optimizer:
            return
        for handle in self._handles:
            handle.remove()
        self._steps_under_way = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
        ]
        self._optimizer = optimizer
        host.param_groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        self._outside = [p for p in network.parameters() if id(p) not in host.param_groups]
        self._columns = network.columns(network.opened)
        self._world_size = host.trainer.world_size
        self._parameters = network.shared_parameters(include_head=True)
        head = list(network.built_head.parameters(recurse=False))
        self._frozen, self._frozen_rows = [], []
        if host.phase.trains == "head":
            own = {id(parameter) for parameter in head}
            self._frozen = [p for p in network.parameters() if id(p) not in own]
            self._parameters = {name: p for name, p in self._parameters.items() if id(p) in own}
        rows = self._rows_at_rest()
        if rows is not None:
            self._frozen_rows = [(p, rows, p.detach()[rows].clone()) for p in head]

    def _rows_at_rest(self) -> Tensor | slice | None:
        """Output units of the head that belong to none of the tasks that are trained on.

        Those of tasks to come rest with every mask: weight decay would move them too.
        """
        network = self.network
        if not self.host.trains_own_rows_only:
            return slice(network.num_open, None) if network.has_closed_columns else None
        tasks = self.host.head_tasks(network.opened)
        learning = {row for task in tasks for row in range(*network.tasks[task].columns)}
        rows = [row for row in range(network.built_head.out_features) if row not in learning]
        return torch.tensor(rows, device=self.host.device, dtype=torch.long)

    def clear_optimizer_state(self) -> None:
        """Where the optimizer goes on: forget what it knows of bias units and of new rows of the head.

        Of what is frozen by now it keeps nothing.
        The head's counts of steps are not by row; frozen rows do not move whatever it knows.
        """
        network, optimizer = self.network, self.host.trainer.optimizers[0]
        state = optimizer.state
        fresh = [p for part in network.task_modules() for p in part.parameters()]
        head = list(network.built_head.parameters(recurse=False))
        if network.mask == "task":
            fresh += head
        for group in optimizer.param_groups if self.host.core.frozen else ():
            fresh += [p for p in group["params"] if not p.requires_grad]
            group["params"] = [p for p in group["params"] if p.requires_grad]
        for parameter in fresh:
            state.pop(parameter, None)
        if network.mask != "seen":
            return
        opened = network.opened
        before = network.structure.open_columns(0, opened - 1) if opened else 0
        new = slice(before, network.num_open)
        for parameter in head:  # a frozen row collects the momentum of its weight decay
            for value in state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[new] = 0

    def loss(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss on the active columns, and the strategies' terms.

        The slice's sum is divided by the size of the batch over all processes, so that any number of
        processes follows the same gradient, on uneven slices too.
        """
        host, network = self.host, self.network
        weight = self._accumulation_weight(batch, batch_index)
        batch = self._trained_on(batch)
        scale = self._world_size / batch.global_size
        if host.phase.trains == "strategy":
            return self._strategy_loss(batch, scale) * weight
        # In a batch of several tasks each sample has its own mode, and -inf outside its columns.
        several = isinstance(batch.task, Tensor)
        first, stop = (0, network.num_open) if several else self._columns
        logits = self._training_logits(batch.inputs, batch.task if several else None)
        if network.structure.forgotten:
            logits = network.mask_forgotten(logits)
        active, targets = logits, batch.targets
        if (first, stop) != (0, logits.shape[1]):
            active, targets = logits[:, first:stop], targets - first
        added = self._hooks["task_losses"] or self._hooks["loss_terms"]
        whole = closed_columns_added(logits, network.built_head.out_features) if added else logits
        if self._hooks["task_losses"]:
            (losses,) = self._hooks["task_losses"]
            loss = losses(host, batch, whole).sum() * scale
        elif host.sample_loss.loss is None:
            loss = F.cross_entropy(active, targets, reduction="sum") * scale
        else:
            task = batch.task if several else network.opened
            loss = host.losses(logits, batch.targets, task).sum() * scale
        right = None
        if self.settling.counting and not self._evaluated:
            right = (active.detach().argmax(1) == targets).sum()
            self.settling.add(right, batch.global_size)
        terms = {"loss/task": loss}
        for hook in self._hooks["loss_terms"]:
            for name, term in hook(host, batch, whole).items():
                terms[f"loss/{name}"] = term.sum() * scale
        loss = torch.stack(list(terms.values())).sum() if len(terms) > 1 else loss
        if not self._evaluated:
            self.optimization.add_loss(loss, scale)
        if self._is_logged():
            if right is None:
                right = (active.detach().argmax(1) == targets).sum()
            self._log(loss, right * self._world_size / batch.global_size, terms)
        return loss if weight == 1 else loss * weight

    def _trained_on(self, batch: Batch) -> Batch:
        """What a strategy makes of a batch; the same again where an optimizer asks for gradients again."""
        hooks = self._hooks["training_batch"] if self.host.phase.trains == "network" else []
        for hook in hooks:
            if not self._evaluated or self._batch is None:
                self._batch = hook(self.host, batch)
            batch = self._batch
        return batch

    def _is_logged(self) -> bool:
        flags: Any = self.host.trainer  # set dynamically, invisible to type checkers
        every: int = flags.log_every_n_steps
        return bool(every) and (flags.global_step + 1) % every == 0

    def _log(self, loss: Tensor, accuracy: Tensor, terms: dict[str, Tensor]) -> None:
        """Log means over processes, each of which has the whole batch's size in its scale."""
        module = self.host.module
        for hook in self._hooks["logs"]:
            terms.update(hook(self.host))
        module.log_dict({name: term.detach() for name, term in terms.items()}, sync_dist=True)
        whole = {"train/loss": loss.detach(), "train/accuracy": accuracy}
        module.log_dict(whole, prog_bar=True, sync_dist=True)
        module.log("stream/task", float(self.network.opened + 1))

    def _accumulation_weight(self, batch: Batch, batch_index: int) -> float:
        """What makes an update the mean over all its samples where gradients accumulate; else 1.

        Lightning divides the loss by ``accumulate_grad_batches``, also in an epoch's last update, which
        may have fewer batches and whose last batch may have fewer samples.
        """
        trainer = self.host.trainer
        several: int = trainer.accumulate_grad_batches
        if several == 1:
            return 1.0
        first = batch_index // several * several
        stop = min(first + several, trainer.num_training_batches)
        loader = cast("TrainLoader", trainer.train_dataloader)
        return several * batch.global_size / loader.count(first, int(stop))

    def _training_logits(self, inputs: Tensor, tasks: "int | Tensor | None") -> Tensor:
        """Of the open output units; on features that stay as they are where only the head trains."""
        host, network = self.host, self.network
        fixed = host.phase.trains == "head"
        mode = evaluation_mode(network.backbone) if fixed else nullcontext()
        host.in_step_forward = True
        try:
            with mode, differentiable(network.backbone) if fixed else nullcontext():
                if tasks is None:
                    return network.open_logits(inputs)
                return cast(Tensor, network(inputs, task=tasks))
        finally:
            host.in_step_forward = False

    def _strategy_loss(self, batch: Batch, scale: float) -> Tensor:
        """The loss of a phase in which only the strategy that declared it learns."""
        host, network = self.host, self.network
        with evaluation_mode(network), differentiable(network):
            loss = host.phase_owner.phase_loss(host, host.phase, batch).sum() * scale
        if self._is_logged():
            host.module.log(f"loss/{host.phase.name}", loss.detach(), prog_bar=True, sync_dist=True)
            host.module.log("stream/task", float(network.opened + 1))
        return loss

    def begin_batch(self) -> None:
        """No gradients of the update that this batch ends were asked for yet."""
        self._evaluated = False

    def reduce_gradients(self) -> None:
        """The mean over processes of what DDP does not take: a strategy's own parameters, and where the core is sharded all.

        Before a scaler looks whether to skip the update on this process.
        """
        host = self.host
        if self._world_size == 1:
            return
        if host.phase.trains == "strategy":
            groups = host.trainer.optimizers[0].param_groups
            parameters = [p for group in groups for p in group["params"]]
        elif is_sharded(self.network.backbone):
            parameters = [p for p in self.network.parameters() if p.grad is not None]
        else:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in parameters if p.grad is not None]
        for same in _by_kind(gradients):  # one operation for many small tensors
            flat = torch.cat([gradient.flatten() for gradient in same])
            mean_of_all = host.all_reduce(flat) / self._world_size
            means = torch.split(mean_of_all, [one.numel() for one in same])
            for gradient, mean in zip(same, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def edit_gradients(self, optimizer: Optimizer) -> None:
        """Capture, penalize, project, consume: after unscaling and reducing, before clipping.

        An optimizer may ask for the gradients several times in one update, at other weights (LBFGS;
        sharpness-aware ones). It gets them penalized and projected each time; what is captured and
        consumed are the first ones, at the weights from which the update starts.

        Raises:
            ConfigurationError: it asks again for the gradient of one batch where gradients accumulate.
        """
        host = self.host
        again, self._evaluated = self._evaluated, True
        if again:
            check_repeated_evaluation(host.trainer, optimizer)
        if host.phase.trains == "strategy":
            return
        for parameter in self._outside if again else ():
            parameter.grad = None  # nobody else does
        for parameter in self._frozen:
            parameter.grad = None
        for parameter, rows, _ in self._frozen_rows:  # not captured, not in the norm
            if parameter.grad is not None and isinstance(rows, Tensor):  # closed rows have none
                parameter.grad[rows] = 0
        for name in GRADIENT_EDITS if again else GRADIENT_HOOKS:
            for hook in self._hooks[name]:
                hook(host, self._parameters)

    def _before_optimizer_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._steps_under_way += 1

    def _after_optimizer_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Called by the optimizer itself, so never for an update that a scaler skipped."""
        self._steps_under_way -= 1
        host = self.host
        if host.phase.trains == "strategy" or self._steps_under_way:
            return
        host.cursor.count_update()
        for hook in self._hooks["correct_step"]:
            hook(host, self._parameters)
        for parameter, rows, values in self._frozen_rows:
            with torch.no_grad():
                parameter[rows] = values
        for hook in self._hooks["observe_step"]:
            hook(host, self._parameters)


def _overridden(strategies: Sequence[ContinualStrategy], hook: str) -> list[Callable[..., Any]]:
    """A hook's methods, of the strategies that override it: the others cost nothing."""
    base = getattr(ContinualStrategy, hook)
    return [getattr(s, hook) for s in strategies if getattr(type(s), hook) is not base]


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors that can be concatenated."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(found.values())
