"""The main job: from a folder of images to a trained, tested network and its pictures.

``run``             from beginning to end: start here
``settings``        the choices of a user
``start``           the data; ``compilation`` the kernels
``samples``         which patches a rank gets
``loop``            an epoch; ``step`` the gradients of a step, ``pauses`` between two steps
``validate``        whole volumes scored
``folder``          the files of a run; ``resume`` how it goes on
``progress``        lines and a bar on the terminal
"""
