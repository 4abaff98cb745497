"""Training on many processes.

``communicator``     the ranks: their exchanges, and how one waits for the others
``algorithms``       ways to sum an array over ranks, and the user's choice; ``compression`` in bfloat16
``buckets``          gradients summed while backward goes on
``synchronized_norm``   batch norm's statistics over the batches of all ranks
``sentinel``, ``stall``   name a rank that was killed, and one that the others wait for
``timeline``         when each kernel ran, and each rank waited
``shared_memory``    memory that the ranks of a node share, for work that they divide (``local_ranks``)
"""
