"""The commands that change nothing: one file per command."""
