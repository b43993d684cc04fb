"""`retrace dashboard`: trackio's page of the runs that log to it, live, for this machine alone."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from retrace.core.mirrors import load_trackio

HOST = "127.0.0.1"


@contextlib.contextmanager
def serving(*, port: int) -> Any:
    """The page's address, while the block runs; nobody on another machine can open it.

    Raises ValueError where no run has logged to trackio yet, or the port is taken.
    """
    trackio = load_trackio()
    database = Path(trackio.TRACKIO_DIR)
    if not list(database.glob("*.db")):
        raise ValueError(
            f"{database}: no run has logged there; start some with `retrace run ... tracking=trackio`, and this again"
        )
    # It prints the token that lets its bearer change runs: nobody needs it, and it stays out of logs.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            server, url, *_ = trackio.show(
                host=HOST, server_port=port, share=False, mcp_server=False, open_browser=False, block_thread=False
            )
        except OSError:
            raise ValueError(f"--port {port}: taken, or not yours to use; give another, such as {port + 1}") from None
    try:
        yield url
    finally:
        server.close(verbose=False)
