"""Who was killed: a process that outlives the ranks of its node, and says it.

A rank that is killed (by a person, or by the system when memory is short) cannot say so, and its
launcher ends the others at once. So the first rank of each node starts one more process, to which all
ranks of the node hold a line. A line that breaks is a rank that was killed: one that ends of its own
accord says so before. The lines of those that the launcher then kills break later, and ``epoll`` gives
them in their order.

It runs on Linux only. It computes nothing, and ends with the ranks.
"""

import contextlib
import os
import platform
import select
import socket
import subprocess
import sys

# Seconds after which a process to which nobody has a line ends.
_PATIENCE = 3.0
_LEAVING = b"leave"


def start(address: str, program: str, ranks: int) -> None:
    """Start the process; when this returns, ranks may connect to it.

    Parameters
    ----------
    address : str
        Some name that nobody else on this node uses.
    program : str
        What its sentence begins with.
    ranks : int
        Ranks of this node.
    """
    if sys.platform == "linux":
        # What is started forks and ends: the process that stays is no child of this rank.
        command = [sys.executable, "-I", "-S", __file__, address, program, str(ranks)]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)


class Line:
    """A rank's line to the process of its node, if there is one.

    Parameters
    ----------
    address : str
        Where it was started.
    rank : int
        Of this process.
    """

    def __init__(self, address: str, rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            self._socket.connect(f"\0{address}")
            self._socket.sendall(f"rank {rank} (process {os.getpid()}".encode())

    def leave(self) -> None:
        """Tell that this rank ends of its own accord, and so may all others."""
        with contextlib.suppress(OSError):  # the process has ended already, or never was
            self._socket.sendall(_LEAVING)
        self._socket.close()


def main() -> None:
    """Wait for the first line that breaks, or for a rank that says that it leaves."""
    address, program, ranks = sys.argv[1:]
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0{address}")
    server.listen()
    if os.fork():
        return
    os.setsid()
    lines: dict[int, socket.socket] = {}
    names: dict[int, str] = {}
    epoll = select.epoll()
    epoll.register(server, select.EPOLLIN)
    while events := epoll.poll(None if lines else _PATIENCE, maxevents=1):
        at, _ = events[0]
        if at == server.fileno():
            line, _ = server.accept()
            lines[line.fileno()] = line
            epoll.register(line, select.EPOLLIN)
            continue
        said = lines[at].recv(100)
        if said.endswith(_LEAVING):
            return
        if not said:
            # Of those that had no line yet it may have been the first.
            who = names[at] if len(names) == int(ranks) else "a rank (process ?"
            sentence = f"{program}: {who} on {platform.node()})"
            print(
                sentence, "was killed, perhaps for want of memory; all ranks end", file=sys.stderr
            )
            return
        names[at] = said.decode()


if __name__ == "__main__":
    main()
