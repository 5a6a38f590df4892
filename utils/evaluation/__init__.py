"""Evaluation: start with steps.py, which defines the metrics; batch.py runs the steps, subject.py stores them."""
