"""A local HTTP server that stands in for the hosts of the data, faults included."""

import threading
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Host:
    """Serves a folder. `faults[path]` lists what the next requests for a path get instead.

    A fault is a status (404, 503), or one of: "wrong" (other bytes), "short" (the connection ends
    before the announced length), "cut" (the same, no length announced), "silent" (nothing, until
    the host is closed), "no ranges" (all of it, also where a part was asked for), or ("to", path):
    a redirect. When the list is used up, the file comes. A fault that is no list lasts for ever.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict = {}
        self.requests: Counter[str] = Counter()
        self.resumed: dict[str, int] = {}  # from which byte a path was asked for last
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def next_fault(self, path: str):
        with self.lock:
            self.requests[path] += 1
            fault = self.faults.get(path)
            if isinstance(fault, list):
                return fault.pop(0) if fault else None
            return fault

    def handler(host):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                with suppress(ConnectionError):  # the client gave up, as it should
                    self.answer(host.next_fault(self.path.lstrip("/")))

            def answer(self, fault):
                path = host.root / self.path.lstrip("/")
                if isinstance(fault, tuple):
                    self.send_response(302)
                    self.send_header("Location", f"/{fault[1]}")
                    self.end_headers()
                    return
                if isinstance(fault, int) or not path.is_file():
                    self.send_error(fault if isinstance(fault, int) else 404)
                    return
                data = path.read_bytes()
                if fault == "silent":
                    host.closing.wait()
                    return
                if fault == "wrong":
                    data = b"<html>sign in to this network</html>"
                first = int((self.headers.get("Range") or "=0-").split("=")[1][:-1])
                if first and fault != "no ranges":
                    host.resumed[self.path.lstrip("/")] = first
                    if first >= len(data):
                        self.send_error(416)
                        return
                    data = data[first:]
                    self.send_response(206)
                else:
                    self.send_response(200)
                if fault != "cut":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault in ("short", "cut"):
                    data = data[: len(data) // 2]
                self.wfile.write(data)

        return Handler


@contextmanager
def serve(root: Path):
    host = Host(root)
    thread = threading.Thread(target=host.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield host
    finally:
        host.closing.set()
        host.server.shutdown()
        host.server.server_close()
        thread.join()
