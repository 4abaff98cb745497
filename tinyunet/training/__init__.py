"""The main job: from a folder of images to a trained, tested network and its pictures.

``run``             from beginning to end: start here
``settings``        what a user can choose
``start``           the data; ``compilation`` the kernels
``samples``         which patches a rank gets
``loop``            an epoch; ``step`` the gradients of a step, ``pauses`` between two steps
``validate``        whole volumes scored
``folder``          the files of a run; ``resume`` how it goes on
``progress``        what a user sees
"""
