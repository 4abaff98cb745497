"""Training on many processes: what they say to each other, and how they wait for it.

``communicator``    the ranks, and how they wait
``algorithms``      three ways to sum an array over them; ``compression`` the same in bfloat16
``buckets``         gradients summed while backward goes on; ``options`` what can be chosen
``batch_norm``      statistics over the batches of all ranks
``crew``            memory that the ranks of a node share, and ``shared_sum``, a sum in it
``stall``, ``sentinel``   who is waited for, and who was killed
``timeline``, ``recording``   when what ran; all ranks to one clock
``scaling``         what a step costs on N ranks, on paper
"""
