"""A network whose mode follows the task: one backbone, one wide head, and bias units on its layers."""

import torch
from torch import Tensor, nn

from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
from bpn_lightning.nn.answering import AnsweringNetwork
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.head import draw_rows, grow_head
from bpn_lightning.nn.structure import check_reserved
from bpn_lightning.tasks import ContinualStream, Mask, Task

__all__ = ["ContinualNetwork"]


class ContinualNetwork(AnsweringNetwork):
    """All that answers: plain torch, without a trainer, a stream or a strategy.

    Checkpoints and exports hold its ``state_dict`` and its ``structure``; ``copy.deepcopy`` copies it.

    Args:
        backbone: maps ``(batch, *input_shape)`` to features ``(batch, features)``.
        front: what turns prepared inputs into the features that the network takes; None: they are the same.
        mask: the output units of the head that take part: ``all``, ``seen`` (those of the tasks opened so
            far), ``task`` (the mode's own) or ``shared`` (every task has the same).
        reserve_classes: output units of the head, if more than the stream has classes, with the mask
            ``all``: so that classes of later streams take part from the start.

    Attributes:
        structure: what it consists of besides the backbone; checkpoints and exports hold it.
        head: one linear layer over all classes, of which it computes the open ones; its rows are drawn
            by the stream's seed and their columns. None before the stream is known.
        accuracy_matrix: accuracies of every task before training and after each task; absent before the
            stream is known.
        opened: the task that was opened last, -1 before the first.
        closed: the last task that is learned, consolidated and evaluated, -1 before the first.
        mode: the task whose mode holds, or ``(batch,)`` one of each sample.

    Raises:
        ConfigurationError: the mask is unknown, or classes are reserved with another than ``all``.
    """

    accuracy_matrix: AccuracyMatrix

    def __init__(
        self,
        backbone: nn.Module,
        mask: Mask = "all",
        front: Front | None = None,
        reserve_classes: int | None = None,
    ) -> None:
        check_reserved(reserve_classes, mask)
        super().__init__(backbone, mask, front)
        self.reserve_classes = reserve_classes

    # --- structure -------------------------------------------------------------------------------

    def build_for(self, stream: ContinualStream, device: torch.device, grow: bool = False) -> None:
        """Build the head for a stream on the first call, check the fit on later ones.

        Args:
            stream: after its ``setup``.
            device: that the backbone lies on.
            grow: whether a network that has learned all of its tasks grows for a stream that begins with
                them and goes on.

        Raises:
            ConfigurationError: the backbone's output is no feature matrix, the mask and the stream's
                classes do not fit, or the network was built for another stream.
        """
        tasks, shape, dtype = list(stream.tasks), tuple(stream.input_shape), stream.input_dtype
        self.structure.check_mask_fits(tasks)
        if self.front is not None:
            shape, dtype = (self.front.width(shape),), torch.float32
        if grow and self.head is not None and self.structure.is_continued_by(tasks, self.closed):
            size = self.structure.with_reserved(stream.num_classes, self.reserve_classes)
            self._grow(tasks, size, stream.seed)
        self.build(tasks, stream.num_classes, shape, dtype, device, stream.seed)
        self.structure.set_preparations(stream.preparations())

    def build(
        self,
        tasks: list[Task],
        num_classes: int,
        input_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """Make head and accuracy matrix, with one dry forward through the backbone.

        Args:
            tasks: of the stream.
            num_classes: output units of the head.
            input_shape: of one input of the network.
            dtype: of its inputs.
            device: that the backbone lies on.
            seed: of the head's rows.

        Raises:
            ConfigurationError: the backbone's output is no feature matrix, or the network was built for
                a stream of other sizes.
        """
        structure = self.structure
        num_classes = structure.with_reserved(num_classes, self.reserve_classes)
        if self.head is not None:
            structure.check_stream(tasks, num_classes, input_shape, dtype)
            structure.tasks = tasks
            return
        super().build(tasks, num_classes, input_shape, dtype, device)
        draw_rows(self.built_head, seed, range(num_classes))
        self.accuracy_matrix = AccuracyMatrix(len(tasks))

    def bytes_built(self, num_tasks: int) -> int:
        """Of the accuracy matrix."""
        return 8 * num_tasks * (num_tasks + 1)

    def _grow(self, tasks: list[Task], num_classes: int, seed: int) -> None:
        if num_classes > self.built_head.out_features:
            grow_head(self.built_head, num_classes, seed)
        for part in self.task_modules():
            part.grow(len(tasks))
        self.accuracy_matrix = self.accuracy_matrix.grown(len(tasks))
        self.structure.tasks, self.structure.num_classes = tasks, num_classes
        self.switch(self.mode)

    def open_part(self, name: str, tensor: Tensor) -> Tensor:
        """What a tensor shaped like a parameter has of the open columns, contiguous.

        For what reduces over a whole tensor, such as a norm: its last bits would depend on how many
        columns are closed, although nothing is there but zeros.

        Args:
            name: of the parameter, such as ``head.weight``.
            tensor: of its shape, such as its gradient.

        Returns:
            The tensor itself where the parameter has nothing by column, or all are open; a view where
            the columns are its rows.
        """
        head = self.built_head
        if not self.has_closed_columns or not name.startswith("head."):
            return tensor
        if name == "head.bias_units.W":
            return tensor[:, : self.num_open].contiguous()
        by_column = name.removeprefix("head.") in dict(head.named_parameters(recurse=False))
        return tensor[: self.num_open] if by_column else tensor

    def shared_parameters(self, include_head: bool) -> dict[str, nn.Parameter]:
        """The trainable parameters that tasks share, by name; never those of bias units."""
        own = {id(p) for part in self.task_modules() for p in part.parameters()}
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and id(parameter) not in own
            and (include_head or not name.startswith("head."))
        }
