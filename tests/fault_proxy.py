"""A proxy in front of a real S3 server that spoils its answers: by chance, by number, or not at all.

    proxy = FaultProxy(server_port)
    os.environ["AWS_ENDPOINT_URL"] = proxy.url          # the Host header, which is signed, names the proxy; it is passed on as it is
    proxy.spoil({"cut": 0.1, "reset": 0.1})             # of the GETs of objects, each with this probability
    proxy.spoil({"stall": 1.0}, at_most=2)              # the first two
    proxy.injected                                      # Counter({"cut": 3, ...})

One connection carries one request, so that each fault meets exactly one request.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

KINDS = {
    "503": "an error that botocore repeats at once",
    "slow down": "503 with the code SlowDown, which it repeats later",
    "refused": "a reset before any answer",
    "reset": "a reset in the middle of the body",
    "cut": "a body that ends early, politely",
    "stall": "`stall_s` of silence in the middle of the body",
    "trickle": "up to 64 kB of the body in chunks of `trickle_bytes`, one every `trickle_s`, or as soon as the last one was read",
    "flip": "one wrong bit in the body; not twice in the same object",
    "expired": "400 with the code ExpiredToken",
    "unanswered": "a reset instead of the answer, after the call was carried out",
}
_ERRORS = {"503": (503, "ServiceUnavailable"), "slow down": (503, "SlowDown"), "expired": (400, "ExpiredToken")}
_BLOCK = 1 << 16
ALL_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


class FaultProxy:
    """See the top of this file.

    Attributes:
        injected: faults by kind.
        gets: GETs of objects that came in, with faults and all: (path, Range header).
        sent: bytes of bodies handed to the clients.
        trickled: chunks of trickles handed to the clients.
        trickle_s: seconds between two chunks; None: the next one goes when the client has read the last.
    """

    def __init__(self, target_port: int) -> None:
        self._lock, self._target_port = threading.Lock(), target_port
        self.reset()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self, seed: int = 0) -> None:
        """Begin anew: nothing spoiled, nothing counted. One proxy for many tests lets them keep their S3 client."""
        self.injected: Counter[str] = Counter()
        self.gets: list[tuple[str, str]] = []
        self.sent = self.trickled = 0
        self.stall_s, self.trickle_bytes = 10.0, 8192
        self.trickle_s: float | None = 0.05
        self.on_fault: Callable[[str], None] = lambda kind: None
        self._kinds: Mapping[str, float] = {}
        self._left = 0
        self._methods: tuple[str, ...] = ("GET",)
        self._awake = threading.Event()
        self._flipped: set[str] = set()
        self._dice, self._positions = random.Random(seed), random.Random(seed)

    def spoil(self, kinds: Mapping[str, float], at_most: int = 1 << 30, methods: tuple[str, ...] = ("GET",)) -> None:
        """From now on spoil GETs of objects, or other calls as well: a probability for each of the ``KINDS``, ``at_most`` in all."""
        assert set(kinds) <= set(KINDS) and sum(kinds.values()) <= 1
        self._kinds, self._left, self._methods = kinds, at_most, methods

    def spoil_all(self, probability: float) -> None:
        """From now on let calls of every kind fail with this probability, half of them unanswered; 0: none."""
        self.spoil({"503": probability / 2, "refused": probability / 2}, methods=ALL_METHODS)

    def wake(self) -> None:
        """End all stalls."""
        self._awake.set()

    def close(self) -> None:
        _hang_up(self._listener)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:  # a client may leave at any time
            head, rest = _read_head(client)
            method, path = head.decode("latin-1").split(" ", 2)[:2]
            kind = self._choose(method, path, head)
            if kind in _ERRORS:
                client.sendall(_error(*_ERRORS[kind]))
            elif kind == "refused":
                _reset(client)
            else:
                self._forward(client, method, path, head + rest, kind)

    def _choose(self, method: str, path: str, head: bytes) -> str:
        if method not in self._methods or (self._methods == ("GET",) and (path.count("/") < 2 or "list-type" in path)):
            return ""
        with self._lock:
            fields = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
            self.gets.append((path, next((value.strip().decode() for name, _, value in fields if name.lower() == b"range"), "")))
            dice = self._dice.random()
            for kind, probability in self._kinds.items():
                dice -= probability
                if dice < 0 and self._left and not (kind == "flip" and path in self._flipped):
                    self._left -= 1
                    self._flipped |= {path} if kind == "flip" else set()
                    self.injected[kind] += 1
                    self.on_fault(kind)
                    return kind
        return ""

    def _forward(self, client: socket.socket, method: str, path: str, request: bytes, kind: str) -> None:
        with socket.create_connection(("127.0.0.1", self._target_port)) as server:
            server.sendall(request)
            if method in ("PUT", "POST"):
                threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            head, rest = _read_head(server)
            while head.startswith(b"HTTP/1.1 100"):
                client.sendall(head)
                head, rest = _read_head(server, rest)
            if kind == "unanswered":
                return _reset(client)
            client.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
            length = 0 if method == "HEAD" else int(fields.get(b"content-length", 0))
            # Not at the very edge: something has to have come, and something to be missing.
            at = self._positions.randrange(1, length) if kind and length > 1 else length
            self._relay(server, client, rest, length, at, kind)

    def _relay(self, server: socket.socket, client: socket.socket, rest: bytes, length: int, at: int, kind: str) -> None:
        """Pass a body of ``length`` bytes on, and spoil it at byte ``at``."""
        passed = 0
        while passed < length and (data := rest or server.recv(_BLOCK)):
            rest = b""
            if kind and passed <= at < passed + len(data):
                before, data = data[: at - passed], data[at - passed :]
                self._send(client, before)
                passed += len(before)
                if kind == "reset":
                    _until_read(client)  # a reset also takes back what the client has not read yet
                    return _reset(client)
                if kind == "cut":
                    return None
                if kind == "stall":
                    self._awake.wait(self.stall_s)
                if kind == "flip":
                    data = bytes([data[0] ^ 4]) + data[1:]
                if kind == "trickle":
                    for start in range(0, len(data), self.trickle_bytes):
                        self._send(client, data[start : start + self.trickle_bytes])
                        self.trickled += 1
                        if self.trickle_s is None:
                            _until_read(client)
                        else:
                            time.sleep(self.trickle_s)
                    passed, data = passed + len(data), b""
            self._send(client, data)
            passed += len(data)
        return None

    def _send(self, client: socket.socket, data: bytes) -> None:
        client.sendall(data)
        with self._lock:
            self.sent += len(data)


def _read_head(source: socket.socket, data: bytes = b"") -> tuple[bytes, bytes]:
    """The head of a message, and what of its body has come with it."""
    while b"\r\n\r\n" not in data:
        more = source.recv(_BLOCK)
        if not more:
            raise ConnectionResetError
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _error(status: int, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    head = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError, ValueError):
        while data := source.recv(_BLOCK):
            target.sendall(data)


def _until_read(end: socket.socket) -> None:
    """Wait until the other end, of this machine, has taken all that was sent (or has closed): no queue of either socket holds anything."""
    names = {
        f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}" for host, port in (end.getsockname(), end.getpeername())
    }
    calm = 0
    while calm < 2:  # twice: a look may miss a line while others come and go
        time.sleep(0.02)
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        queues = [queue for fields in sockets if set(fields[1:3]) == names for queue in fields[4].split(":")]
        calm = 0 if any(int(queue, 16) for queue in queues) else calm + 1


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def _hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
