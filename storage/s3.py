"""One client of s3:// for each process and its options, which threads share.

Beam's S3IO makes a session and a client of boto3 at every call: 0.25 s of CPU, mostly the parsing
of the service's model, for each object that is opened, asked for, listed or deleted.
"""

from __future__ import annotations

import threading
from typing import Any

_CONNECTIONS = 64  # kept open: four bundles of sixteen reads; boto3's ten would be noisy on stderr


class SharedClients:
    """What Beam calls as `boto3`: its clients, one for each way to ask for one."""

    def __init__(self) -> None:
        self._clients: dict[tuple[tuple[str, Any], ...], Any] = {}
        self._making = threading.Lock()  # sessions are not for threads, clients are
        self.session = self

    def Session(self) -> SharedClients:
        """The session, which is not made before a client is."""
        return self

    def client(self, **how: Any) -> Any:
        """The client for the arguments `how` of boto3's `Session.client`."""
        import boto3
        from botocore.config import Config

        key = tuple(sorted(how.items()))
        with self._making:
            if key not in self._clients:
                config = Config(max_pool_connections=_CONNECTIONS)
                self._clients[key] = boto3.session.Session().client(**how, config=config)
            return self._clients[key]


def share() -> None:
    """Let Beam's s3:// use shared clients from now on in this process."""
    from apache_beam.io.aws.clients.s3 import boto3_client

    if not isinstance(boto3_client.boto3, SharedClients):
        boto3_client.boto3 = SharedClients()
