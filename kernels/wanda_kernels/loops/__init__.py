"""The outer loops that all backends share: each takes the functions of a backend that work on one block."""
