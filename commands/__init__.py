"""The command line's parts: shared options, stages of a run, and groups of commands."""
