"""How ranks exchange gradients and statistics: what a user can choose.

Imports no kernels, so that a command can check its options before they are loaded.
"""

from typing import NamedTuple

from tinyunet.common.errors import AgreedError

ALLREDUCES = ("mpi", "ring", "recursive-halving")
COMPRESSIONS = ("none", "bf16")
#: With fewer patches a rank than this, batch norm's statistics are synchronised by default.
FEW_PATCHES = 4


class Exchange(NamedTuple):
    """The choices of a training.

    Attributes
    ----------
    bucket_mb : float
        MB of gradients in a bucket, at most.
    allreduce : str
        One of ``ALLREDUCES``: see :mod:`tinyunet.parallel.algorithms`. With "mpi" ranks that share memory add
        in it, and MPI sums between nodes.
    compression : {"none", "bf16"}
        Send float32, or bfloat16 with error feedback.
    synchronize : bool
        Whether batch norm takes the statistics over all ranks' patches.
    """

    bucket_mb: float = 4.0
    allreduce: str = "mpi"
    compression: str = "none"
    synchronize: bool = False

    def check(self) -> None:
        """Raise AgreedError if an algorithm is chosen beside compression, which has its own."""
        if self.compression != "none" and self.allreduce != "mpi":
            raise AgreedError(
                f"--allreduce: {self.allreduce} together with --compression {self.compression}, "
                "which has an algorithm of its own; expected one of the two"
            )
