"""The operations that users call: check the operands, choose a backend, run."""
