"""The rate plane: start with cells.py, the table as cells; advice.py and slopes.py read them, report.py shows all."""
