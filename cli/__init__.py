"""The command line: each command is a few lines over the library call of the same name."""
