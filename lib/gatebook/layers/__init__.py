"""Modules that more than one model uses."""
