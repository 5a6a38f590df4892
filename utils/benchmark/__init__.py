"""How fast it is, measured here and now: `python -m utils.benchmark grid|step|layers|streams|loader|...`."""
