"""Requirements on Lightning's Trainer: flags, callbacks, optimizers and processes."""
