"""Pure functions of arrays: the mathematics."""
