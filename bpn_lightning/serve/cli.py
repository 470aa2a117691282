"""The command ``bpn-serve``: a bundle over HTTP; tasks come and go with the folders of the bundle."""

import argparse
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from types import FrameType
from typing import Any

from bpn_lightning.checks import check_above_zero, check_number, check_positive_int
from bpn_lightning.cli.entry_point import entry_point
from bpn_lightning.cli.trust import add_trusted_names
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.terminal import printable

__all__ = ["main"]

NEEDED = ("litserve", "prometheus_client", "python_multipart")


@entry_point("bpn-serve", interrupted="Nothing was served yet.")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0 after Ctrl-C or SIGTERM, when requests that had begun are answered; 2 on a usage error.
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)
    with tempfile.TemporaryDirectory(prefix="bpn-serve-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        _serve(arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be refused is refused before anything is started."""
    for name in ("batch_size", "workers", "max_bytes", "max_pixels", "max_connections"):
        check_positive_int(name, getattr(arguments, name))
    check_number("batch_wait", arguments.batch_wait, "0 waits for nothing.", at_most=1)
    check_number("reject_below", arguments.reject_below, "0 rejects nothing.", at_most=1)
    check_above_zero("timeout", arguments.timeout, "Name seconds.")
    check_above_zero("every", arguments.every, "Name seconds.")
    if arguments.batch_wait >= arguments.timeout:
        raise ConfigurationError(
            f"Expected batch_wait to be below timeout, {arguments.timeout:g} s, but got "
            f"{arguments.batch_wait:g} s. Lower it."
        )
    if not 1024 <= arguments.port < 2**16:
        raise ConfigurationError(
            f"Expected port to be from 1024 to 65535, but got {arguments.port}. Name another one."
        )
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"Expected {missing[0]} to be installed, but it is missing. "
            "Install it: pip install 'bpn_lightning[serve]'"
        )
    _check_port(arguments.host, arguments.port)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"Expected port to be free, but {host}:{port} is not: {error.strerror}. Name another one "
                "with --port."
            ) from error


def _serve(arguments: argparse.Namespace) -> None:
    from bpn_lightning.modes import load  # slow: imports torch
    from bpn_lightning.serve.api import BundleAPI
    from bpn_lightning.serve.app import build_server
    from bpn_lightning.serve.reading import Limits

    # A bundle that cannot be served ends the command here, with one line.
    tasks = load(arguments.bundle, trust=arguments.trust).tasks
    api = BundleAPI(
        arguments.bundle,
        trust=arguments.trust,
        reject_below=arguments.reject_below,
        limits=Limits(arguments.max_bytes, arguments.max_pixels, arguments.timeout),
        every=arguments.every,
        batch_size=arguments.batch_size,
        batch_wait=arguments.batch_wait,
    )
    server = build_server(
        api,
        device=arguments.device,
        workers=arguments.workers,
        version=version("bpn_lightning"),
    )
    _stop_on_signals()
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"http://{shown}:{arguments.port} answers for {len(tasks)} tasks:", end=" ")
    print(printable(", ".join(tasks[:20]) + (", ..." if len(tasks) > 20 else "")), flush=True)
    server.run(
        host=arguments.host,
        port=arguments.port,
        generate_client_file=False,
        log_level="warning",
        limit_concurrency=arguments.max_connections,
    )


def _stop_on_signals() -> None:
    """Ctrl-C and SIGTERM end the server alike: it takes no requests, answers those it has, and stops."""
    server = os.getpid()

    def stop(number: int, frame: FrameType | None) -> Any:
        if os.getpid() != server:  # of a process that the server ends itself
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bpn-serve",
        description="Answer over HTTP from a bundle of bpn-export, requests for different tasks in one batch. "
        "Tasks are added and removed with their folders, while it runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="the folder that bpn-export wrote")
    add(
        "--host",
        choices=("127.0.0.1", "0.0.0.0", "::"),  # what LitServe takes
        default="127.0.0.1",
        help="127.0.0.1 is for this machine only",
    )
    add("--port", type=int, default=8000, help="from 1024")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="where it answers")
    add("--workers", metavar="N", type=int, default=1, help="processes that hold the network")
    add("--batch_size", metavar="N", type=int, default=64, help="inputs at a time, at most")
    add(
        "--batch_wait",
        metavar="S",
        type=float,
        default=0.005,
        help="seconds that a batch waits for more inputs",
    )
    add(
        "--every",
        metavar="S",
        type=float,
        default=1.0,
        help="seconds between two looks at the bundle's folder",
    )
    add(
        "--reject_below",
        metavar="P",
        type=float,
        default=0.0,
        help="confidence, from 0 to 1, below which an answer is marked as rejected",
    )
    add("--max_bytes", metavar="N", type=int, default=2**24, help="of a request")
    add("--max_pixels", metavar="N", type=int, default=2**24, help="of an image")
    add(
        "--max_connections",
        metavar="N",
        type=int,
        default=1000,
        help="beyond which requests get the status 503",
    )
    add(
        "--timeout",
        metavar="S",
        type=float,
        default=30.0,
        help="seconds until a request has arrived, and as many until it is its turn",
    )
    add_trusted_names(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
