"""Replicas of a model under `mlx.launch`: every rank serves all of it, and rank 0 is the front of them."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence

from lfm_mlx.distributed import Link
from lfm_mlx.errors import RankError
from lfm_mlx.server import HttpServer, bind


def share_key(link: Link) -> str:
    """A key that only the ranks of this run know; all of them call it."""
    if not link.is_leader:
        return str(link.expect("key"))
    key = secrets.token_urlsafe(32)
    link.send({"key": key})
    return key


@contextlib.contextmanager
def serving_rank(link: Link, server: HttpServer) -> Iterator[Sequence[str]]:
    """Serve this rank's replica beside what the block does; all ranks enter it, and go on together.

    Args:
        link: to the other ranks.
        server: serves this rank's model.

    Yields:
        On rank 0 the URLs of all ranks' replicas, on the others nothing.

    Raises:
        RankError: the server did not start.
    """
    host = "127.0.0.1" if link.is_leader else link.peers[0].own_host
    with bind(host, 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="lfm-replica")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RankError(f"the server of rank {link.world.rank} did not start; its log says why")
                time.sleep(0.01)
            name = f"[{host}]" if ":" in host else host
            url = f"http://{name}:{listening.getsockname()[1]}"
            if link.is_leader:
                yield [url, *link.hear("replica")]
            else:
                link.tell({"replica": url})
                yield []
        finally:
            server.should_exit = True
            thread.join()
