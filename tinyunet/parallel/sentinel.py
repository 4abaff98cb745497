"""Names a rank that was killed: a process for each node that outlives the ranks.

A rank that is killed (by a person, or by the system when memory is short) cannot report that, and its
launcher ends the others at once. So the first rank of each node starts one more process, and all ranks of the
node connect to it. A rank that ends by itself sends a message before; a connection that breaks without one
belongs to a killed rank. The connections of ranks that the launcher then kills break later, and ``epoll``
reports them in their order.

Any process of the node can find the address. So the sentinel asks Linux who connects, accepts only processes
of this user, and ignores messages that no rank would send.

It runs on Linux only, needs the standard library only, and ends with the ranks.
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

_PATIENCE = 3.0  # seconds until a sentinel without connections ends
_LONGEST = 50  # bytes of a message; it arrives as a whole, and a longer one is cut off and ignored
_LEAVING = b"leave"
_NAME = re.compile(rb"rank \d{1,9} \(process \d{1,9}", re.ASCII)
_NOBODY = b"a rank (process ?"


def start(address: str, program: str, ranks: int) -> None:
    """Start the process; when this returns, ranks may connect to it.

    ``address`` is a name that nobody else on this node uses, ``ranks`` the number of ranks here. The sentence
    begins with the name of the ``program``.
    """
    if sys.platform == "linux":
        # The program started forks and ends: the process that stays is no child of this rank.
        command = [sys.executable, "-I", "-S", __file__, address, program, str(ranks)]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)


class Line:
    """The connection of a rank to the process of its node, if there is one at the address."""

    def __init__(self, address: str, rank: int) -> None:
        self._socket: socket.socket | None = None
        with contextlib.suppress(OSError):
            self._socket = _new_socket()
            self._socket.connect(f"\0{address}")
            self._socket.sendall(f"rank {rank} (process {os.getpid()}".encode())

    def leave(self) -> None:
        """Report that this rank ends by itself, and so may all others."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the process has ended already, or never was
                self._socket.sendall(_LEAVING)
            self._socket.close()


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def main() -> None:
    """Listen; then, as a process of its own, print which rank is killed."""
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
    """Wait for the first connection of a rank that breaks; return nothing if a rank says that it leaves."""
    lines: dict[int, socket.socket] = {}
    names: dict[int, bytes] = {}  # of the connections that have said that they are ranks
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
        message = lines[at].recv(_LONGEST)
        if at in names and message == _LEAVING:
            return b""
        if at in names and not message:
            # A rank that had not connected yet may have been killed first.
            return names[at] if len(names) == ranks else _NOBODY
        if at not in names and not _NAME.fullmatch(message):
            lines.pop(at).close()  # no rank
        else:
            names.setdefault(at, message)
    return b""


def _is_ours(line: socket.socket) -> bool:
    """Whether a process of this user connects."""
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.geteuid())


if __name__ == "__main__":
    main()
