"""A stand-in for code-judge: HTTP in front, a queue, workers that start a plain interpreter for every call.

It leaves out what the original spends on its queue server, so that a comparison flatters it.
"""

import json
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_LIMITS = "import resource, signal\nsignal.alarm(10)\nresource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"


def main(arguments: list[str]) -> None:
    """Arguments: how many workers, and the folder of the packages. Prints the port, then serves for ever."""
    workers, packages = int(arguments[0]), arguments[1]
    waiting: queue.Queue[tuple[str, Future[bool]]] = queue.Queue()
    for _ in range(workers):
        threading.Thread(target=_work, args=(waiting, packages), daemon=True).start()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            done: Future[bool] = Future()
            waiting.put((request["code"], done))
            body = json.dumps({"success": done.result()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def _work(waiting: queue.Queue[tuple[str, Future[bool]]], packages: str) -> None:
    while True:
        code, done = waiting.get()
        source = f"import sys\nsys.path.append({packages!r})\n{_LIMITS}{code}"
        ended = subprocess.run([sys.executable, "-c", source], capture_output=True, start_new_session=True)
        done.set_result(ended.returncode == 0)
