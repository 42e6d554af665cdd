"""Data: generated tasks, text shipped with Python, and hub data sets with a local mirror."""
