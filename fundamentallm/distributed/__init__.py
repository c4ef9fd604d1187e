"""Processes and devices; the only place that configures accelerate."""
