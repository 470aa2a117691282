"""The commands: parsing of the command line, allowed imports, and exit codes."""
