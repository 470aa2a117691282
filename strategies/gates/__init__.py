"""What names the task of an input: one paper, one file."""
