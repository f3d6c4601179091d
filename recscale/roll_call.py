"""A roll call before jax is started on several processes: all are there, or each of them says in one line who is not.

jax ends the whole process, from native code and with a stack trace, where one of the others does not come; two groups
on one port tear each other down. So process 0 first listens on the coordinator's port itself, hears number and run of
every other process, and lets all go on together. The port is free again when jax takes it.
"""

import json
import selectors
import socket
import time
from typing import Any

from recscale.cluster import Place

PORT_PATIENCE = 10.0  # seconds in which a group before this one may still leave the port
PAUSE = 0.2
LONGEST_LINE = 1 << 16


class RendezvousError(ConnectionError):
    """The processes of a run did not come together."""


def roll_call(place: Place, run: str, seconds: float) -> None:
    """Returns when all `place.count` processes of `run` are here; raises RendezvousError after at most `seconds`.

    run: a name that all processes of one run share and no other run has.
    """
    deadline = time.monotonic() + seconds
    if place.index == 0:
        _Desk(place, run, seconds, deadline).hold()
    else:
        _answer(place, run, seconds, deadline)


class _Desk:
    """Process 0 of a roll call."""

    def __init__(self, place: Place, run: str, seconds: float, deadline: float):
        self.place, self.run, self.seconds, self.deadline = place, run, seconds, deadline
        self.members: dict[int, socket.socket] = {}
        self.heard: dict[socket.socket, bytes] = {}
        self.left: set[int] = set()

    def hold(self) -> None:
        with _listen(self.place, self.deadline) as listener, selectors.DefaultSelector() as ready:
            listener.setblocking(False)
            ready.register(listener, selectors.EVENT_READ)
            try:
                while len(self.members) < self.place.count - 1:
                    left = self.deadline - time.monotonic()
                    if left <= 0:
                        self._give_up()
                    for key, _ in ready.select(min(left, 1.0)):
                        if key.fileobj is listener:
                            self._welcome(listener, ready)
                        elif not self._listen_to(key.fileobj):
                            ready.unregister(key.fileobj)
                            self._drop(key.fileobj)
                for connection in self.members.values():
                    _say(connection, {"go": True})
                for connection in self.members.values():  # who closes last keeps no trace of it on the port
                    connection.settimeout(2.0)
                    _silence(connection)
            finally:
                for connection in self.heard:
                    connection.close()

    def _welcome(self, listener: socket.socket, ready: selectors.BaseSelector) -> None:
        try:
            connection = listener.accept()[0]
        except OSError:
            return  # it left before it was let in
        connection.setblocking(False)
        self.heard[connection] = b""
        ready.register(connection, selectors.EVENT_READ)

    def _listen_to(self, connection: Any) -> bool:
        """Whether to keep this connection, having heard what it has to say."""
        try:
            chunk = connection.recv(4096)
        except OSError:
            return False
        self.heard[connection] += chunk
        if not chunk or len(self.heard[connection]) > LONGEST_LINE:
            return False
        if b"\n" not in self.heard[connection] or connection in self.members.values():
            return True
        try:
            words = json.loads(self.heard[connection])
            index, problem = int(words["index"]), self._problem(words)
        except (ValueError, KeyError, TypeError):  # something else that found the port
            return False
        if problem:
            _say(connection, {"refused": problem})
            return False
        self.members[index] = connection
        self.left.discard(index)
        return True

    def _problem(self, words: dict[str, Any]) -> str:
        place = self.place
        if (words["run"], words["group"]) != (self.run, place.group):
            return (
                f"{place.coordinator} is process 0 of {_named(self.run, place.group)}, and this is a process of "
                f"{_named(words['run'], words['group'])}: two runs share one port; give each its own "
                "(--coordinator, RECSCALE_COORD or JAX_COORDINATOR_PORT)"
            )
        if words["count"] != place.count or not 0 < words["index"] < place.count:
            return (
                f"this is process {words['index']} of {words['count']}, but process 0 at {place.coordinator} was told "
                f"of {place.count} processes: give all the same number"
            )
        if words["index"] in self.members:
            return (
                f"two processes say that they are number {words['index']} of {place.count}: give each its own number "
                "(--process or RECSCALE_PROC), and each run its own port"
            )
        return ""

    def _drop(self, connection: Any) -> None:
        """Forget who left or was refused; it may come again."""
        self.left |= {index for index, other in self.members.items() if other is connection}
        self.members = {index: other for index, other in self.members.items() if other is not connection}
        del self.heard[connection]
        connection.close()

    def _give_up(self) -> None:
        missing = [i for i in range(1, self.place.count) if i not in self.members]
        never = [i for i in missing if i not in self.left]
        parts = (
            [f"{len(never)} of {self.place.count} processes (number {_listed(never)}) did not come"] if never else []
        )
        if self.left:
            parts.append(f"number {_listed(sorted(self.left))} came and left again")
        reason = (
            f"{'; '.join(parts)} (to {self.place.coordinator}, within {self.seconds:.0f} s, places as told by "
            f"{self.place.source}): look for the error of those that ended, start all at once, or raise "
            "RECSCALE_RENDEZVOUS_SECONDS"
        )
        for connection in self.members.values():
            _say(connection, {"refused": reason})
        raise RendezvousError(reason)


def _listen(place: Place, deadline: float) -> socket.socket:
    """A socket on the coordinator's port, on all addresses of this machine as jax takes it."""
    _, port = place.address
    until = min(deadline, time.monotonic() + PORT_PATIENCE)
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
            return socket.create_server(("", port), backlog=4096)
        except OSError as error:
            if time.monotonic() >= until:
                raise RendezvousError(
                    f"process 0 cannot listen on port {port} of this machine ({error.strerror or error}): another run "
                    "or step has it; choose a free one, the same for all processes (--coordinator, RECSCALE_COORD or "
                    "JAX_COORDINATOR_PORT)"
                ) from error
            time.sleep(PAUSE)


def _answer(place: Place, run: str, seconds: float, deadline: float) -> None:
    """Any process but the first: tell process 0 who this is, wait for its word, try again until the deadline."""
    words = {"run": run, "group": place.group, "count": place.count, "index": place.index}
    problem = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(place.address, timeout=min(left, 5.0)) as connection:
                _say(connection, words)
                connection.settimeout(max(deadline - time.monotonic(), PAUSE))
                answer = _hear(connection)
            if "go" in answer:
                return
            raise RendezvousError(answer["refused"])
        except RendezvousError:
            raise
        except socket.gaierror as error:
            problem = f"the name {place.address[0]} does not resolve ({error.strerror}): name it in DNS or /etc/hosts"
        except ConnectionRefusedError:
            problem = "nothing listens there: see that process 0 was started, on that host and with that port"
        except TimeoutError:
            problem = "process 0 cannot be reached (firewall?), or waits for others that did not come: see its output"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"what listens there does not speak as process 0 of a run ({error}): choose another port"
        time.sleep(PAUSE)
    raise RendezvousError(
        f"process {place.index} of {place.count} found no process 0 at {place.coordinator} (told by {place.source}) "
        f"within {seconds:.0f} s: {problem}{_loopback(place)}"
    )


def _loopback(place: Place) -> str:
    """A warning where the coordinator's name means this very machine."""
    host, _ = place.address
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return ""
    own = sorted(str(address) for address in found if str(address).startswith("127.") or address == "::1")
    if not own:
        return ""
    return f"; {host} is {own[0]}, this machine itself: if process 0 runs on another host, correct DNS or /etc/hosts"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _named(run: str, group: str) -> str:
    return " ".join(part for part in (run or "a run", f"({group})" if group else "") if part)


def _say(connection: socket.socket, words: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(words).encode() + b"\n")
    except OSError:
        return  # it left meanwhile; its own process says why


def _hear(connection: socket.socket) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n") and len(line) <= LONGEST_LINE:
        chunk = connection.recv(4096)
        if not chunk:
            raise ConnectionResetError("it closed the connection")
        line += chunk
    return json.loads(line)


def _silence(connection: socket.socket) -> None:
    """Wait for the other side to close."""
    try:
        while connection.recv(4096):
            pass
    except OSError:
        return
