"""The commands: what a command line means, what it may import, and how it ends."""
