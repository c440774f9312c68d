"""`tandem serve`: from options to a server that runs until it is stopped."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn

from tandem.errors import UserError
from tandem.inference.chat import Model, open_models
from tandem.inference.options import models_to_open
from tandem.inference.scheduler import Scheduler
from tandem.inference.worker import Worker, scheduler_next_to
from tandem.launch.stopping import stopping_signals
from tandem.launch.world import World
from tandem.logs import log
from tandem.server.app import LOCAL, Limits, build_app
from tandem.server.models import Served
from tandem.server.options import API_KEY_VARIABLE, ServeOptions
from tandem.server.service import Service


def serve(options: ServeOptions) -> None:
    """Answer requests until a signal stops the server. What runs then is finished.

    With several processes the first one answers, and the others compute with it.

    Raises:
        UserError: the address is taken, or a model cannot be opened.
    """
    world = World.from_environment()
    options.model.check_processes(world.size)
    if world.rank > 0:
        follow(options)
        return
    listener = bind(options.host, options.port)
    address = address_of(listener)
    log.info("> loading %s; %s/health tells when it is ready", options.model.load, address)
    if options.host not in LOCAL and options.key is None:
        log.warning("> whoever reaches %s can ask: --api-key or %s sets a key", address, API_KEY_VARIABLE)
    served: dict[str, Served] = {}
    models = models_to_open(options.model, options.compare, options.served_model_name)

    def open_all() -> dict[str, Model]:
        opened = open_models(models)
        served.update({name: Served(name, model) for name, model in opened.items()})
        return opened

    def when_open() -> None:
        log.info("> %s: ready. The page: %s/ OpenAI's protocol: %s/v1", ", ".join(models), address, address)

    def when_failed() -> None:
        server.should_exit = True

    worker = Worker(open_all, options.max_batch_size, when_open, when_failed)
    service = Service(worker, served, options.max_batch_size + options.max_waiting)
    limits = Limits(options.key, options.max_body_mb << 20, options.max_tokens, only_local=options.host in LOCAL)
    server = _Server(
        uvicorn.Config(
            build_app(service, limits),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=options.timeout_graceful_shutdown,
        )
    )
    worker.start()
    with stopping_signals(server.obey):
        server.run([listener])
    if worker.failure is not None:
        raise worker.failure


def follow(options: ServeOptions) -> None:
    """On other ranks than the first: compute what it asks for, until it ends. Signals are for the first one."""
    with stopping_signals(lambda number, frame: None):
        models = open_models(models_to_open(options.model, options.compare, options.served_model_name))
        schedulers = list[Scheduler]()
        for model in models.values():
            schedulers.append(scheduler_next_to(schedulers, model, len(models), options.max_batch_size))
        schedulers[0].follow()
        for scheduler in schedulers:
            scheduler.close()
        next(iter(models.values())).communicator.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; choose another --port, or 0 for a free one"
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server, which handles SIGTERM and SIGINT itself. It says what a signal does, and obeys others, too."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again = "; once more ends it at once" if sig == signal.SIGINT else ""
        log.info("> %s: finishing what runs%s", signal.Signals(sig).name, again)
        super().handle_exit(sig, frame)

    def obey(self, number: int, frame: FrameType | None) -> None:
        """What a signal does that uvicorn does not take. It also raises those again, that it has taken, at its end."""
        if not self.should_exit:
            self.handle_exit(number, frame)
