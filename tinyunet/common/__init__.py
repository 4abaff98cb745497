"""Checks, errors, files, and text for a terminal, which all parts of the program use."""
