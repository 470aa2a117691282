"""The run-time side of a trained network: read its files and answer in the modes of its tasks."""
