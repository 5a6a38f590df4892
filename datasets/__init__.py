"""The data sets. Start with table.py, which says what each is; loading.py reads one, batches.py makes batches of it."""
