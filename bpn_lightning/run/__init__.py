"""What a run shows and leaves: console, loggers, metrics.csv, checkpoints, results and figures."""
