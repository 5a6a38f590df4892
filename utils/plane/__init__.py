"""The rate plane: start with cells.py, which reads the results; advice, slopes, compare analyse, report shows."""
