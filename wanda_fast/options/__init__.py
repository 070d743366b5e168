"""Every option of a run, and the flags, signatures and docstrings that are made of the list."""
