"""The endpoint's API key: where it is read from, the digest that travels in its place, and the ASGI middleware that asks for it.

Called by stages/serve.py (digest), stages/serve_app.py (middleware, in Serve's ingress replicas) and the command line (reading).
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True)
class KeyDigest:
    """A salted sha256 of the key: what travels to the ingress replica in place of the key, which Ray would write into its logs and dashboard."""

    salt: str
    digest: str

    @classmethod
    def of(cls, key: str, salt: str | None = None) -> "KeyDigest":
        salt = salt or secrets.token_hex(16)
        return cls(salt, hashlib.sha256(f"{salt}:{key}".encode()).hexdigest())

    def accepts(self, key: str) -> bool:
        """Compared in constant time."""
        return hmac.compare_digest(self.of(key, self.salt).digest, self.digest)


def read_key(api_key_env: str) -> str | None:
    """The key in the environment variable, or in the file (a mounted secret) that `<variable>_FILE` names; None where neither is set."""
    key = os.environ.get(api_key_env)
    path = os.environ.get(f"{api_key_env}_FILE")
    if not key and path:
        with open(path, encoding="utf-8") as file:
            key = file.read()
    return (key or "").strip() or None


class BearerKey:
    """ASGI middleware: every HTTP request without `Authorization: Bearer <key>` gets 401 in OpenAI's error shape; websockets are closed."""

    def __init__(self, app: ASGIApp, *, key: KeyDigest | None, api_key_env: str) -> None:
        self.app = app
        if key is None:
            value = read_key(api_key_env)
            if value is None:
                raise ValueError(missing_key(api_key_env))
            key = KeyDigest.of(value)
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._accepts(scope["headers"])):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _accepts(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        values = [value for name, value in headers if name.lower() == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, token = values[0].decode("latin-1").partition(" ")
        return scheme.lower() == "bearer" and self.key.accepts(token.strip())


def missing_key(api_key_env: str) -> str:
    return (
        f"the endpoint has no API key: set the environment variable {api_key_env} (or {api_key_env}_FILE to a file holding it) to the key that clients "
        "must send; `--insecure` serves without a key, on a loopback host only"
    )


async def _refuse(send: Send) -> None:
    message = "Incorrect or missing API key: send it as `Authorization: Bearer <key>`."
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
