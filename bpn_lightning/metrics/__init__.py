"""What is measured over a stream: the matrix of accuracies, metrics per task, tasks that did not settle."""
