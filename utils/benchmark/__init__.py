"""Benchmarks of training and evaluation: `python -m utils.benchmark grid|step|layers|streams|loader|...`."""
