"""The report of a run: its contents, the warnings in it, and how it is shown."""
