"""What is measured over a stream: the matrix of accuracies, metrics per task, tasks that did not settle."""

from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix

__all__ = ["AccuracyMatrix"]
