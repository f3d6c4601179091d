"""A roll call lets all processes of a run go on together, or tells each of them in one line what is wrong."""

import socket
import threading
import time

import pytest

from recscale import roll_call as module
from recscale.cluster import Place
from recscale.roll_call import RendezvousError, roll_call


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def together(places: list[Place], seconds: float = 5.0, runs: list[str] | None = None, late: float = 0.0) -> list[str]:
    """What each process of the places says, "" where it goes on; the last one comes `late` seconds after the others."""
    said = ["?"] * len(places)

    def one(i: int) -> None:
        try:
            time.sleep(late if i == len(places) - 1 else 0.0)
            roll_call(places[i], runs[i] if runs else "run", seconds)
            said[i] = ""
        except RendezvousError as error:
            said[i] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any("\n" in words for words in said)
    return said


def places(address: str, count: int, numbers: list[int] | None = None, group: str = "") -> list[Place]:
    return [Place(address, count, i, "a test", group) for i in (range(count) if numbers is None else numbers)]


@pytest.mark.parametrize("count", [2, 7])
def test_all_go_on_when_all_are_there(address, count):
    assert together(places(address, count)) == [""] * count
    assert together(places(address, count)) == [""] * count  # and leave no trace on the port


@pytest.mark.parametrize("order", [[0, 2, 1], [1, 2, 0]], ids=["another", "the first"])
def test_a_late_process_is_waited_for(address, order):
    began = time.monotonic()
    assert together(places(address, 3, order), late=0.7) == ["", "", ""]
    assert time.monotonic() - began > 0.7


def test_all_that_came_hear_who_did_not(address):
    said = together(places(address, 4, [0, 2]), seconds=1.0)
    assert "2 of 4 processes (number 1, 3) did not come" in said[0] and "within 1 s" in said[0]
    assert said[1] == said[0] or "waits for others that did not come" in said[1]


def test_who_lost_patience_first_is_not_blamed(address):
    place, other = places(address, 3, [0, 1])
    impatient = threading.Thread(target=together, args=([other], 0.3))
    impatient.start()
    (said,) = together([place], seconds=0.9)
    impatient.join()
    assert "1 of 3 processes (number 2) did not come; number 1 came and left again" in said


def test_who_left_and_came_again_is_there(address):
    place, other = places(address, 3, [0, 1])
    again = threading.Thread(target=lambda: (together([other], 0.3), together([other], 5.0)))
    again.start()
    (said,) = together([place], seconds=1.2)
    again.join()
    assert "1 of 3 processes (number 2) did not come (" in said and "left again" not in said


def test_without_process_0_the_others_say_where_they_looked(address):
    (said,) = together(places(address, 2, [1]), seconds=0.5)
    assert address in said and "nothing listens there" in said
    assert "127.0.0.1 is 127.0.0.1, this machine itself" in said  # the trap of a name that means every host


def test_a_name_that_does_not_resolve():
    (said,) = together(places("no-such-host.invalid:1234", 2, [1]), seconds=0.5)
    assert "the name no-such-host.invalid does not resolve" in said and "/etc/hosts" in said


def test_a_port_that_another_has(address, monkeypatch):
    monkeypatch.setattr(module, "PORT_PATIENCE", 0.3)
    with socket.create_server(("", int(address.split(":")[1]))):
        said = together(places(address, 2), seconds=1.0)
    assert "cannot listen on port" in said[0] and "another run or step has it" in said[0]
    assert said[1]


def test_a_port_that_a_group_before_is_leaving(address):
    with socket.create_server(("", int(address.split(":")[1]))) as other:
        threading.Timer(0.5, other.close).start()
        assert together(places(address, 2)) == ["", ""]


def test_another_program_on_the_port_is_told_apart(address):
    with socket.create_server(("", int(address.split(":")[1]))) as other:

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"\x00\x00\x12\x04 not for you\n")

        thread = threading.Thread(target=greet)
        thread.start()
        (said,) = together(places(address, 2, [1]), seconds=0.15)
        thread.join()
    assert "does not speak as process 0 of a run" in said


def test_two_runs_on_one_port_are_told_apart(address):
    said = together(places(address, 2), seconds=0.5, runs=["a", "b"])
    assert "is process 0 of a, and this is a process of b: two runs share one port" in said[1]
    assert "number 1) did not come" in said[0]
    first, second = places(address, 2, group="step 1.0")[0], places(address, 2, group="step 1.1")[1]
    said = together([first, second], seconds=0.5)
    assert "run (step 1.0), and this is a process of run (step 1.1)" in said[1]


def test_two_processes_with_one_number(address):
    said = together(places(address, 3, [0, 1, 1]), seconds=0.9, late=0.3)
    assert "two processes say that they are number 1 of 3" in said[2] and "number 2) did not come" in said[0]


def test_processes_that_were_told_of_different_counts(address):
    said = together([*places(address, 2, [0]), *places(address, 3, [1])], seconds=0.5)
    assert "process 1 of 3, but process 0" in said[1] and "was told of 2 processes" in said[1]


def test_who_leaves_may_come_again_and_noise_is_ignored(address):
    """A process killed while it waits, one that connects and says nothing, one that says nonsense."""
    host, port = address.split(":")
    said: list[list[str]] = []
    desk = threading.Thread(target=lambda: said.append(together(places(address, 4, [0, 1]))))
    desk.start()
    with _connected(host, int(port)) as silent, _connected(host, int(port)) as noise:
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with _connected(host, int(port)) as killed:
            module._say(killed, {"run": "run", "group": "", "count": 4, "index": 2})
            time.sleep(0.2)
        time.sleep(0.2)
        assert together(places(address, 4, [2, 3])) == ["", ""]
        silent.close()
    desk.join()
    assert said == [["", ""]]


def _connected(host: str, port: int) -> socket.socket:
    for _ in range(50):
        try:
            return socket.create_connection((host, port))
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}")
