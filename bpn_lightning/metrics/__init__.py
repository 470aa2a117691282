"""Metrics of a stream: the accuracy matrix, metrics per task, tasks that did not converge."""
