"""Benchmarks of training and evaluation: `python -m utils.benchmark plane|step|evaluate|gpu`."""
