"""What a training does with signals."""

import signal

from tinyunet.parallel.communicator import Communicator
from tinyunet.training.pauses import Pauses


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with Pauses(Communicator(), None) as pauses:
            signal.raise_signal(signal.SIGINT)
            assert not pauses.asked
            signal.raise_signal(signal.SIGTERM)
            assert pauses.agree().signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
