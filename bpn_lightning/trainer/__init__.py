"""What a stream asks of Lightning's Trainer: rules for its flags, callbacks, optimizers and processes."""
