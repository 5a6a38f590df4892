"""Training: start with loop.py; schedule.py says which cells train together, engine.py makes the step fast."""
