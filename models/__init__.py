"""The models. Start with hvae.py, which has the equations in the order of the paper; build.py builds a model."""
