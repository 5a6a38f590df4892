"""Training: start with loop.py; schedule.py decides which cells train together, engine.py optimises the step."""
