"""Evaluation: start with steps.py, what is measured of a run; batch.py runs the steps, subject.py keeps the figures."""
