"""What ``python -m tinyunet.bench`` measures: one module a table."""
