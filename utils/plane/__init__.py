"""The rate plane: start with cells.py, which reads the results; advice.py and slopes.py analyse, report.py shows."""
