"""Calibration and evaluation inputs."""
