"""How ranks exchange gradients and statistics: what can be chosen.

Imports no kernels, so that a command can check its options before they are loaded.
"""

from typing import NamedTuple

from tinyunet.common.errors import AgreedError

ALLREDUCES = ("mpi", "ring", "recursive-halving")
COMPRESSIONS = ("none", "bf16")
#: With fewer patches a rank than this, batch norm's statistics are synchronised unless told otherwise.
FEW_PATCHES = 4


class Exchange(NamedTuple):
    """The choices of a training.

    Attributes
    ----------
    bucket_mb : float
        MB of gradients that are summed at once, at most.
    allreduce : str
        One of ``ALLREDUCES``: see :mod:`tinyunet.parallel.algorithms`. With "mpi" ranks that share
        memory add in it (:mod:`tinyunet.parallel.shared_sum`), and MPI sums between nodes.
    compression : {"none", "bf16"}
        What travels: float32, or bfloat16 with error feedback.
    synchronize : bool
        Whether batch norm takes the statistics of all ranks' patches together.
    """

    bucket_mb: float = 4.0
    allreduce: str = "mpi"
    compression: str = "none"
    synchronize: bool = False

    def check(self) -> None:
        """Check that the choices go together.

        Raises
        ------
        AgreedError
            Compression has an algorithm of its own, and another one was asked for.
        """
        if self.compression != "none" and self.allreduce != "mpi":
            raise AgreedError(
                f"--allreduce: {self.allreduce} together with --compression {self.compression}, "
                "which has an algorithm of its own; expected one of the two"
            )
