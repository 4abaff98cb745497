"""What the modules of the engine (``autograd``, ``nn``, ``optim``, ...) share."""
