"""A scripted OpenAI-compatible server on loopback: a judge or a model whose every answer a test decides."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DROPPED = 0  # the status of a connection that is closed without an answer
# (status, body or text, headers, seconds to wait first) for a request and how often the same request came before
Script = Callable[[dict[str, object], int], tuple[int, object, dict[str, str], float]]


class Server:
    """What a scripted server saw."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, object]] = []
        self.authorizations: list[str | None] = []
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()


def completion(text: str) -> dict[str, object]:
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }


@contextmanager
def scripted(script: Script) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def do_GET(self) -> None:
            self._answer({"get": self.path})

        def _answer(self, body: dict[str, object]) -> None:
            with server.lock:
                before = server.seen[json.dumps(body)]
                server.seen[json.dumps(body)] += 1
                server.requests.append(body)
                server.authorizations.append(self.headers["authorization"])
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            status, answer, headers, wait = script(body, before)
            time.sleep(wait)
            with server.lock:
                server.at_once -= 1
            if status == DROPPED:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            try:
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up waiting: the time-out tests want that

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def say(text: str, status: int = 200, wait: float = 0.0, **headers: str) -> tuple[int, object, dict[str, str], float]:
    body = completion(text) if status == 200 else {"error": {"message": text, "type": "t", "code": status}}
    return status, body, headers, wait
