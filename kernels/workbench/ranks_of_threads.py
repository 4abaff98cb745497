"""Ranks without MPI: each is a thread, and a network between them counts bytes and keeps a modelled clock.

A rank has the methods of ``mpi4py.MPI.Intracomm`` that an allreduce needs, so the same function runs on
``MPI.COMM_WORLD``. A send ends when the receiver takes the message, as MPI may do it with a long one: a
program in which all ranks send first and receive afterwards never ends, and is reported.

The clock of each rank is a model, not a measurement. A message takes ``latency + bytes * seconds_per_byte``;
a rank sends one message at a time, and receives one at a time, in the order in which it waits for them.
"""

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from kernels.workbench.verdict import Failure, place_of

ANY_TAG = -1
_SECONDS = 20.0  # after which ranks that neither wait nor end are given up


class Stopped(BaseException):
    """Another rank has failed, so this one ends; no ``except Exception`` of a student catches it."""


class Sent(NamedTuple):
    """What the ranks sent: bytes and messages of each, and the modelled seconds until the last one ended."""

    nbytes: list[int]
    messages: list[int]
    seconds: float


class _Message:
    def __init__(self, content: Any, tag: int, start: float) -> None:
        self.content, self.tag, self.start, self.taken = content, tag, start, False
        self.nbytes = content.nbytes if isinstance(content, np.ndarray) else len(pickle.dumps(content))


class _Receive:
    """A receive that has been posted."""

    def __init__(self, tag: int) -> None:
        self.tag, self.message = tag, cast("_Message | None", None)


class _Channel:
    """Messages from one rank to another that no receive has met yet, and the other way round."""

    def __init__(self) -> None:
        self.messages, self.receives = list[_Message](), list[_Receive]()

    def match(self) -> None:
        """Give each receive the first message of its tag."""
        for receive in [*self.receives]:
            message = next((m for m in self.messages if receive.tag in (m.tag, ANY_TAG)), None)
            if message is not None:
                receive.message, message.taken = message, True
                self.messages.remove(message)
                self.receives.remove(receive)


class _Network:
    """Messages between ranks, who waits for what, and the first failure."""

    def __init__(self, size: int, latency: float, seconds_per_byte: float) -> None:
        self.size, self.latency, self.seconds_per_byte = size, latency, seconds_per_byte
        self.changed = threading.Condition()
        self.channels = {(a, b): _Channel() for a in range(size) for b in range(size)}
        self.waits: dict[int, tuple[Callable[[], bool], str]] = {}
        self.running = set(range(size))
        self.failure: Failure | None = None
        self.nbytes, self.messages = [0] * size, [0] * size
        self.clocks, self.sends_until, self.receives_until = ([0.0] * size for _ in range(3))

    def seconds(self, message: _Message) -> float:
        """Return how long a message takes, by the model."""
        return self.latency + message.nbytes * self.seconds_per_byte

    def wait(self, rank: int, ready: Callable[[], bool], what: str) -> None:
        """Wait until something is so; holding the lock."""
        while not ready():
            self.waits[rank] = ready, what
            self._find_deadlock()
            if self.failure:
                raise Stopped
            self.changed.wait()
        self.waits.pop(rank, None)

    def end(self, rank: int, failure: Failure | None = None) -> None:
        """Let a rank be done, with its failure if there is one."""
        with self.changed:
            self.running.discard(rank)
            self.failure = self.failure or failure
            self._find_deadlock()
            self.changed.notify_all()

    def _find_deadlock(self) -> None:
        stuck = self.running and self.running <= self.waits.keys()
        if stuck and not any(self.waits[rank][0]() for rank in self.running) and not self.failure:
            words = [f"rank {rank} {self.waits[rank][1]}" for rank in sorted(self.running)]
            sends = all("send" in word for word in words)
            why = "\n  a long message is sent only when the other rank receives: use sendrecv, or isend"
            self.failure = Failure(f"all ranks wait for ever: {', '.join(words)}{why * sends}")
            self.changed.notify_all()


class Request:
    """A message under way, as mpi4py has it."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait, self._done, self._found = wait, False, None

    def wait(self) -> Any:
        """Wait for the end, and return what was received."""
        if not self._done:
            self._found, self._done = self._wait(), True
        return self._found

    Wait = wait


class Rank:
    """One rank: the part of ``mpi4py.MPI.Intracomm`` that an allreduce needs.

    ``send``, ``recv``, ``sendrecv``, ``isend`` and ``irecv`` take and return arrays (or any object);
    ``Send``, ``Recv``, ``Sendrecv``, ``Isend`` and ``Irecv`` write what is received into an array.
    """

    def __init__(self, network: _Network, rank: int) -> None:
        self._network, self.rank, self.size = network, rank, network.size

    def Get_rank(self) -> int:  # noqa: N802 - mpi4py's names
        """Return the number of this rank."""
        return self.rank

    def Get_size(self) -> int:  # noqa: N802
        """Return how many ranks there are."""
        return self.size

    def isend(self, obj: Any, dest: int, tag: int = 0) -> Request:
        """Begin to send."""
        net, me, dest = self._network, self.rank, self._checked(dest, "sends to")
        with net.changed:
            message = _Message(copy.deepcopy(obj), tag, max(net.clocks[me], net.sends_until[me]))
            net.nbytes[me] += message.nbytes
            net.messages[me] += 1
            end = net.sends_until[me] = message.start + net.seconds(message)
            net.channels[me, dest].messages.append(message)
            net.channels[me, dest].match()
            net.changed.notify_all()

        def wait() -> None:
            with net.changed:
                net.wait(me, lambda: message.taken, f"sends to rank {dest}")
                net.clocks[me] = max(net.clocks[me], end)

        return Request(wait)

    def irecv(self, buf: Any = None, source: int = -1, tag: int = ANY_TAG) -> Request:
        """Begin to receive; ``buf`` is not used."""
        net, me, source = self._network, self.rank, self._checked(source, "receives from")
        receive = _Receive(tag)
        with net.changed:
            net.channels[source, me].receives.append(receive)
            net.channels[source, me].match()
            net.changed.notify_all()

        def wait() -> Any:
            with net.changed:
                what = f"waits to receive from rank {source}"
                net.wait(me, lambda: receive.message is not None, what)
                message = cast(_Message, receive.message)
                end = max(message.start, net.receives_until[me]) + net.seconds(message)
                net.receives_until[me] = end
                net.clocks[me] = max(net.clocks[me], end)
                return message.content

        return Request(wait)

    def send(self, obj: Any, dest: int, tag: int = 0) -> None:
        """Send, and wait until the other rank receives."""
        self.isend(obj, dest, tag).wait()

    def recv(self, buf: Any = None, source: int = -1, tag: int = ANY_TAG) -> Any:
        """Wait for a message of a rank, and return it."""
        return self.irecv(buf, source, tag).wait()

    def sendrecv(
        self,
        sendobj: Any,
        dest: int,
        sendtag: int = 0,
        recvbuf: Any = None,
        source: int = -1,
        recvtag: int = ANY_TAG,
    ) -> Any:
        """Send to one rank and receive from another at the same time."""
        sent = self.isend(sendobj, dest, sendtag)
        found = self.recv(recvbuf, source, recvtag)
        sent.wait()
        return found

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request:  # noqa: N802
        """Begin to send an array."""
        return self.isend(np.asarray(buf), dest, tag)

    def Irecv(self, buf: Any, source: int = -1, tag: int = ANY_TAG) -> Request:  # noqa: N802
        """Begin to receive into an array."""
        request = self.irecv(None, source, tag)

        def wait() -> None:
            found = np.asarray(request.wait())
            if found.size != buf.size or found.dtype != buf.dtype:
                raise ValueError(
                    f"rank {self.rank} receives {found.size} numbers of {found.dtype} from rank {source} "
                    f"into an array of {buf.size} of {buf.dtype}"
                )
            buf[...] = found.reshape(buf.shape)

        return Request(wait)

    def Send(self, buf: Any, dest: int, tag: int = 0) -> None:  # noqa: N802
        """Send an array, and wait until the other rank receives."""
        self.Isend(buf, dest, tag).wait()

    def Recv(self, buf: Any, source: int = -1, tag: int = ANY_TAG) -> None:  # noqa: N802
        """Wait for a message of a rank, into an array."""
        self.Irecv(buf, source, tag).wait()

    def Sendrecv(  # noqa: N802
        self,
        sendbuf: Any,
        dest: int,
        sendtag: int = 0,
        recvbuf: Any = None,
        source: int = -1,
        recvtag: int = ANY_TAG,
    ) -> None:
        """Send an array to one rank and receive one from another at the same time."""
        sent = self.Isend(sendbuf, dest, sendtag)
        self.Recv(recvbuf, source, recvtag)
        sent.wait()

    def _checked(self, other: Any, what: str) -> int:
        if not isinstance(other, int | np.integer) or not 0 <= other < self.size or other == self.rank:
            raise Failure(
                f"rank {self.rank} of {self.size} {what} rank {other}; expected another rank, "
                f"0 to {self.size - 1}"
            )
        return int(other)


def run(
    functions: Sequence[Callable[[Rank], Any]], latency: float = 1e-5, seconds_per_byte: float = 1e-10
) -> tuple[list[Any], Sent]:
    """Call a function on each rank, all at the same time; return the results and what was sent.

    Parameters
    ----------
    functions : sequence of callable
        One for each rank; takes its `Rank`.
    latency, seconds_per_byte : float
        Of the modelled clock: the defaults are 10 us a message and 10 GB/s.

    Raises
    ------
    Failure
        A rank raises an error, all ranks wait for ever, or a message is never received.
    """
    network = _Network(len(functions), latency, seconds_per_byte)
    results: list[Any] = [None] * len(functions)

    def call(rank: int) -> None:
        failure = None
        try:
            results[rank] = functions[rank](Rank(network, rank))
        except Stopped:
            pass
        except Failure as found:
            failure = found
        except NotImplementedError:
            failure = Failure("the stub is still empty: replace the line that raises NotImplementedError")
        except Exception as error:
            words = f"raises {type(error).__name__} ({place_of(error)}): {error}"
            failure = Failure(f"rank {rank} {words}")
        network.end(rank, failure)

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(network.size)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(_SECONDS)
        if thread.is_alive() and not network.failure:
            network.end(rank, Failure(f"rank {rank} does not end within {_SECONDS:.0f} s"))
    if network.failure:
        raise network.failure
    for (source, target), channel in network.channels.items():
        if channel.messages:
            raise Failure(f"rank {target} never receives a message of rank {source}")
    return results, Sent(network.nbytes, network.messages, max(network.clocks))
