"""Who was killed: a process that outlives the ranks of its node, and says it.

A rank that is killed (by a person, or by the system when memory is short) cannot say so, and its
launcher ends the others at once. So the first rank of each node starts one more process, to which all
ranks of the node hold a line. A line that breaks is a rank that was killed: one that ends of its own
accord says so before. The lines of those that the launcher then kills break later, and ``epoll`` gives
them in their order.

Any process of the node can find the address. So Linux is asked who calls, other users are not listened
to, and what no rank would say counts for nothing.

It runs on Linux only. It computes nothing, and ends with the ranks.
"""

import contextlib
import os
import platform
import re
import select
import socket
import struct
import subprocess
import sys

# Seconds after which a process to which nobody has a line ends.
_PATIENCE = 3.0
# Of messages, each of which arrives as a whole; what is longer is cut off, and no rank's.
_LONGEST = 50
_LEAVING = b"leave"
_NAME = re.compile(rb"rank \d{1,9} \(process \d{1,9}", re.ASCII)
_NOBODY = b"a rank (process ?"


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
        self._socket: socket.socket | None = None
        with contextlib.suppress(OSError):
            self._socket = _new_socket()
            self._socket.connect(f"\0{address}")
            self._socket.sendall(f"rank {rank} (process {os.getpid()}".encode())

    def leave(self) -> None:
        """Tell that this rank ends of its own accord, and so may all others."""
        if self._socket is None:
            return
        with contextlib.suppress(OSError):  # the process has ended already, or never was
            self._socket.sendall(_LEAVING)
        self._socket.close()


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def main() -> None:
    """Start to listen; then, as a process of its own, tell which rank is killed."""
    address, program, ranks = sys.argv[1:]
    server = _new_socket()
    server.bind(f"\0{address}")
    server.listen()
    if os.fork():
        return
    os.setsid()
    killed = _first_killed(server, int(ranks))
    if killed:
        sentence = f"{program}: {killed.decode()} on {platform.node()})"
        print(sentence, "was killed, perhaps for want of memory; all ranks end", file=sys.stderr)


def _first_killed(server: socket.socket, ranks: int) -> bytes:
    """Wait for the first line of a rank that breaks; return nothing if one says that it leaves."""
    lines: dict[int, socket.socket] = {}
    names: dict[int, bytes] = {}  # of those lines that ranks hold
    epoll = select.epoll()
    epoll.register(server, select.EPOLLIN)
    while events := epoll.poll(None if names else _PATIENCE, maxevents=1):
        at, _ = events[0]
        if at == server.fileno():
            line, _ = server.accept()
            if _is_ours(line):
                lines[line.fileno()] = line
                epoll.register(line, select.EPOLLIN)
            else:
                line.close()
            continue
        said = lines[at].recv(_LONGEST)
        if at in names and said == _LEAVING:
            return b""
        if at in names and not said:
            # Of those that had no line yet it may have been the first.
            return names[at] if len(names) == ranks else _NOBODY
        if at not in names and not _NAME.fullmatch(said):
            lines.pop(at).close()  # no rank
        else:
            names.setdefault(at, said)
    return b""


def _is_ours(line: socket.socket) -> bool:
    """Whether this user's process is at the other end."""
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.geteuid())


if __name__ == "__main__":
    main()
