"""The HTTP server of one process, in a thread of its own with its own event loop. Owns the socket.

The only module that knows uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import uvicorn

from remora_agent.serving.address import Address, TcpAddress, UnixAddress
from remora_agent.serving.descriptors import max_connections
from remora_agent.serving.openai.app import AppOptions, make_app
from remora_agent.serving.openai.protocol import BoundedProtocol
from remora_agent.serving.openai.settings import OpenAiOptions, check_exposure
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.tls import read_pem
from remora_contract.errors import DocumentInvalid, InternalFault, Refused, RemoraError

log = logging.getLogger(__name__)
_WORKERS = 2
_SOCKET_MODE = 0o660
_MAX_HEAD_BYTES = 32 << 10
_BACKLOG = 1024
_FAREWELL_S = 1  # for what is still being sent when the models are drained
_KEEP_ALIVE_S = 30


class OpenAiServer:
    """Started once, stopped once, from any thread."""

    def __init__(self, router: Router[ServedModel], options: OpenAiOptions) -> None:
        """Raises Refused off loopback without TLS or keys, DocumentInvalid (a PEM file)."""
        check_exposure(options)
        self._options = options
        self._workers = ThreadPoolExecutor(_WORKERS, "remora-http-text")
        app_options = AppOptions(options.keys, options.adapter_directory)
        app = make_app(router, self._workers, app_options, lambda: uuid.uuid4().hex, time.time)
        self._server = uvicorn.Server(_config(app, options))
        self._thread = threading.Thread(target=self._run, name="remora-http")
        self._socket: socket.socket | None = None

    def start(self) -> Address:
        """Listens; port 0 becomes the one that was free. Raises Refused when it is taken."""
        try:
            self._socket, bound = listening(self._options.address)
        except RemoraError:
            self._workers.shutdown(wait=False)
            raise
        self._thread.start()
        log.info("http.listening", extra={"address": bound.target()})
        return bound

    def stop(self) -> None:
        """Ends exchanges that still run and frees the address. Drain the models before."""
        if self._socket is not None:
            self._server.should_exit = True
            self._thread.join()
            self._socket.close()
            self._socket = None
            if isinstance(self._options.address, UnixAddress):
                Path(self._options.address.path).unlink(missing_ok=True)
        self._workers.shutdown(wait=False)

    def _run(self) -> None:
        """No except clause: the traceback of a bug goes to threading.excepthook as it is."""
        if self._socket is None:
            raise InternalFault("the HTTP server has no socket")
        asyncio.run(self._server.serve(sockets=[self._socket]))


def listening(address: Address) -> tuple[socket.socket, Address]:
    """A bound socket and where. Raises Refused."""
    try:
        if isinstance(address, UnixAddress):
            return _unix(address), address
        return _tcp(address)
    except OSError as e:
        raise Refused(
            f"cannot listen on {address.target()}: it is taken or not an address of this machine "
            f"({e.strerror or e})"
        ) from e


def _unix(address: UnixAddress) -> socket.socket:
    path = Path(address.path)
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(address.path) == 0:
            raise Refused(f"cannot listen on {address.target()}: another process does")
    if path.is_socket():
        path.unlink()  # of one that was killed
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(address.path)
        path.chmod(_SOCKET_MODE)  # before anybody can connect
    except OSError:
        made.close()
        raise
    return made


def _tcp(address: TcpAddress) -> tuple[socket.socket, Address]:
    family, kind, proto, _, to = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    )[0]
    made = socket.socket(family, kind, proto)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(to)
        made.listen(_BACKLOG)  # taken from now on; answered as soon as the loop runs
    except OSError:
        made.close()
        raise
    return made, TcpAddress(address.host, made.getsockname()[1])


def _config(app: object, options: OpenAiOptions) -> uvicorn.Config:
    tls = options.tls
    if tls is not None:
        read_pem(tls.certificate)
        read_pem(tls.key)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="asyncio",
        http=partial(  # type: ignore[arg-type]
            BoundedProtocol,
            allowed_users=options.allowed_users,
            max_connections=max_connections(),
        ),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,  # what is no HTTP or asks for an upgrade fills no log
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        backlog=min(_BACKLOG, max_connections()),  # as many are taken at a time
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FAREWELL_S,
        ssl_certfile=str(tls.certificate) if tls is not None else None,
        ssl_keyfile=str(tls.key) if tls is not None else None,
    )
    try:
        config.load()
    except OSError as e:  # ssl.SSLError is one
        raise DocumentInvalid(f"the TLS certificate and key cannot be used: {e}") from e
    return config
