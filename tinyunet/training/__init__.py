"""The main job: from a folder of images to a trained, tested network and its pictures.

``run``             from beginning to end: start here
``settings``        what can be chosen
``start``           the data; ``compilation`` the kernels
``resume``          where to go on; ``state`` what ranks have in common and for themselves
``samples``         which patches a rank is given
``loop``            an epoch; ``step`` the gradients of a step, ``pauses`` between two of them
``validate``        whole volumes scored
``folder``, ``report``, ``progress``   what is kept, said and shown
"""
