"""The processes of one command, on one machine or several, find each other through torch's rendezvous."""

import ipaddress
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import psutil

from zi_experiments import environment
from zi_experiments.runtime.connection import Peer

_PREFIX = "zi_experiments"
_LOOK_S = 0.2
_SILENCE_S = 30.0  # of a machine whose network or power is gone: nothing closes the connection
_STEP_S = 10.0  # for what takes no time among processes that are there


class NobodyCameError(Exception):
    """Too few processes came to the endpoint in time, or nobody listens there."""

    def __init__(self, message: str, is_first: bool = False) -> None:
        super().__init__(message)
        self.is_first = is_first  # whether this process is the one that others were to come to


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """What each process says of itself to the first."""

    number: int
    local_number: int  # among those on its machine
    host: str
    command: list[str]
    code: dict[str, Any]  # versions


@dataclass(frozen=True, kw_only=True, slots=True)
class Met:
    """What a process has once it has met the others: connections to all of them if it is the first, else to the first."""

    number: int
    host: str  # of the endpoint
    interface: str | None  # network interface through which the connections go
    peers: list[Peer]
    hellos: list[Hello]  # of the peers; none if this is not the first


def meet(
    endpoint: str,
    processes: int,
    launched: environment.Launched | None,
    hello: Callable[[int], Hello],
    timeout_s: float,
    tell: Callable[[str], None],
) -> Met:
    """Wait for all processes at HOST:PORT, and return the connections to them.

    The first is the one that a launcher has numbered 0, else the one on whose machine HOST is. `hello` makes what this
    process says of itself from its number; `tell` gets a line when it begins to wait. Raises `NobodyCameError`.
    """
    host, port = split(endpoint)
    is_first = launched.number == 0 if launched else _is_free_here(host, port)
    tell(f"waiting at {endpoint} for {processes} processes")
    found: Future[Met] = Future()

    def act() -> None:
        try:
            found.set_result(_meet(host, port, is_first, processes, launched, hello, timeout_s))
        except Exception as error:  # torch's and the system's have many types
            found.set_exception(error)

    # torch waits for ever for a program that listens there and does not answer, and for no signal meanwhile
    threading.Thread(target=act, name="rendezvous", daemon=True).start()
    try:
        return found.result(timeout_s + _STEP_S)
    except TimeoutError:
        raise NobodyCameError(f"what listens at {endpoint} does not answer", is_first) from None
    except Exception as error:
        text = str(error) if isinstance(error, NobodyCameError) else f"{type(error).__name__}: {error}"
        raise NobodyCameError(text.splitlines()[0], is_first) from error


def _meet(
    host: str,
    port: int,
    is_first: bool,
    processes: int,
    launched: environment.Launched | None,
    hello: Callable[[int], Hello],
    timeout_s: float,
) -> Met:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    until, silence_s = time.monotonic() + timeout_s, min(_SILENCE_S, timeout_s)
    server = _store(host, port, is_first and not (launched and launched.has_store), until)
    store = PrefixStore(f"{_PREFIX}/{launched.attempt if launched else 0}", server)
    number, done = launched.number if launched else None, _nothing
    if number is None:
        number, done = _join(server, store, (host, port), is_first, processes, until)
    try:
        if number == 0:
            return _lead(store, host, processes, until, silence_s, hello(0))
        return _follow(store, host, hello(number), until, silence_s)
    finally:
        done()


_SERVERS: list[Any] = []  # others may still read what they have


def _store(host: str, port: int, listens: bool, until: float) -> Any:
    """Return torch's store at an endpoint, where this process listens or another one does."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if not listens:
        _wait_for_listener(host, port, until)
    within = timedelta(seconds=max(1.0, until - time.monotonic()))
    store = TCPStore(host, port, is_master=listens, wait_for_workers=False, timeout=within)
    if listens:
        _SERVERS.append(store)
    return store


def split(endpoint: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; an IPv6 address is in brackets there."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _nothing() -> None:
    pass


def _is_free_here(host: str, port: int) -> bool:
    """Return whether the host is this machine, and nobody listens at the port yet. Raises `NobodyCameError`."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise NobodyCameError(f"the host {host} is not known here ({error.strerror})") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _wait_for_listener(host: str, port: int, until: float) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=_STEP_S).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise NobodyCameError(f"nobody listens at {host}:{port} ({error.strerror or error})") from None
        time.sleep(_LOOK_S)


def _join(
    server: Any, store: Any, endpoint: tuple[str, int], listens: bool, nodes: int, until: float
) -> tuple[int, Callable[[], Any]]:
    """Return the number of this machine, by torch's elastic rendezvous, and what ends that; the listener's is 0."""
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    handler = DynamicRendezvousHandler.from_backend(
        _PREFIX,
        store,
        C10dRendezvousBackend(server, _PREFIX),
        min_nodes=nodes,
        max_nodes=nodes,
        local_addr=_address_towards(*endpoint),
        timeout=RendezvousTimeout(join=timedelta(seconds=max(1.0, until - time.monotonic()))),
    )
    try:
        info = handler.next_rendezvous()
    except RendezvousError:
        handler.shutdown()
        raise NobodyCameError(f"fewer than {nodes} machines have come") from None
    if listens:
        store.set("first", str(info.rank))
    first = int(store.get("first"))
    return (0 if listens else info.rank + (info.rank < first)), handler.shutdown


def _lead(store: Any, host: str, processes: int, until: float, silence_s: float, own: Hello) -> Met:
    """Wait for a connection from each other process."""
    secret = secrets.token_hex(16)
    connections: dict[int, tuple[Connection, Hello, str]] = {}
    with _listener() as listener:
        store.set("listener", f"{listener.getsockname()[1]} {secret}")
        listener.settimeout(_LOOK_S)
        while len(connections) < processes - 1:
            if time.monotonic() > until:
                raise NobodyCameError(f"{len(connections) + 1} of {processes} processes have come")
            with suppress(TimeoutError):
                accepted = listener.accept()[0]
                if found := _admit(accepted, secret, own.host):
                    connections[found[1].number] = found
    ordered = [connections[number] for number in sorted(connections)]
    interfaces = [name for _, _, address in ordered if (name := _interface(address))]
    return Met(
        number=0,
        host=host,
        interface=next((name for name in interfaces if name != "lo"), *interfaces[:1]),
        peers=[Peer(connection, each.number, each.host, silence_s) for connection, each, _ in ordered],
        hellos=[each for _, each, _ in ordered],
    )


def _follow(store: Any, host: str, own: Hello, until: float, silence_s: float) -> Met:
    """Connect to the first process."""
    store.set_timeout(timedelta(seconds=max(1.0, until - time.monotonic())))
    try:
        port, secret = store.get("listener").decode().split()
        made = socket.create_connection((host, int(port)), timeout=_STEP_S)
    except (OSError, RuntimeError) as error:  # torch's are RuntimeErrors
        raise NobodyCameError(f"the first process cannot be reached ({error})") from None
    made.settimeout(None)
    address = made.getsockname()[0]
    connection = Connection(made.detach())
    answer_challenge(connection, secret.encode())
    connection.send(own)
    first_host: str = connection.recv()
    return Met(
        number=own.number,
        host=host,
        interface=_interface(address),
        peers=[Peer(connection, 0, first_host, silence_s)],
        hellos=[],
    )


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _admit(accepted: socket.socket, secret: str, own_host: str) -> tuple[Connection, Hello, str] | None:
    """Return the connection of a process that knows the secret, what it says, and the address that it came to."""
    address = accepted.getsockname()[0]
    accepted.settimeout(None)
    connection = Connection(os.dup(accepted.fileno()))
    try:
        with accepted:
            _limit_waiting(accepted, int(_STEP_S))
            deliver_challenge(connection, secret.encode())
            hello = connection.recv()
            connection.send(own_host)
            _limit_waiting(accepted, 0)
        return connection, hello, address
    except Exception:  # any other program
        connection.close()
        return None


def _limit_waiting(connected: socket.socket, seconds: int) -> None:
    """Limit the time that reading from a connection may take; 0: no limit."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def _address_towards(host: str, port: int) -> str:
    """Return the address of this machine that others on the way to the host see; nothing is sent."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _interface(address: str) -> str | None:
    """Return the network interface that has an address."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    wanted = getattr(wanted, "ipv4_mapped", None) or wanted
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            with suppress(ValueError):
                if ipaddress.ip_address(each.address.partition("%")[0]) == wanted:
                    return name
    return "lo" if wanted.is_loopback else None
