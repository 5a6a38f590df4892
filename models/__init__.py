"""The models. Start with hvae.py, the equations in the paper's order; build.py makes the model of a Config."""
