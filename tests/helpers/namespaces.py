"""Two network namespaces with a cable between them: two hosts on one machine, with names and addresses of their own."""

import ctypes
import os
import socket
import subprocess
from dataclasses import dataclass

_NETWORK, _NAME = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS


@dataclass(frozen=True)
class Host:
    """A host: its namespace, its address, and its end of the cable."""

    namespace: str
    name: str
    address: str
    interface: str

    def enter(self) -> None:
        """Be on this host from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(f"/var/run/netns/{self.namespace}", os.O_RDONLY)
        for result in (libc.setns(descriptor, _NETWORK), libc.unshare(_NAME)):
            if result:
                raise OSError(ctypes.get_errno(), "a namespace cannot be entered")
        os.close(descriptor)
        socket.sethostname(self.name)

    def unplug(self) -> None:
        ip("-n", self.namespace, "link", "set", self.interface, "down")


def make(prefix: str) -> list[Host]:
    """Two hosts that reach each other and nothing else. Raises `OSError` or `CalledProcessError` where that may not be."""
    hosts = [Host(f"{prefix}{n}", f"node{n}", f"10.213.7.{n + 1}", f"{prefix}v{n}") for n in (0, 1)]
    for host in hosts:
        ip("netns", "add", host.namespace)
    first, second = hosts
    ends = (first.interface, "netns", first.namespace, "type", "veth", "peer", "name", second.interface)
    ip("link", "add", *ends, "netns", second.namespace)
    for host in hosts:
        ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
        for interface in ("lo", host.interface):
            ip("-n", host.namespace, "link", "set", interface, "up")
    return hosts


def remove(prefix: str) -> None:
    for number in (0, 1):
        subprocess.run(["ip", "netns", "delete", f"{prefix}{number}"], capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
