"""The command line: commands, flags, tables, progress."""
