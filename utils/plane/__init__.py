"""The rate plane: start with cells.py; advice, slopes, compare analyse, report shows."""
