"""The measurements of ``python -m tinyunet.bench``: one module a table."""
