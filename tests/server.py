"""The demo as visitors meet it: `python app.py` in a process of its own, and its API as curl would use it."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


class Server:
    """Starts `python app.py [arguments]`; `with` waits until it answers, and ends it.

    Its log, the files that visitors send and its (empty) Hub cache lie in `folder`. `environment` is added to ours.
    """

    def __init__(self, folder: Path, *arguments, root: Path = ROOT, **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", folder / "log.txt"
        own = {
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(folder / "gradio"),
            "HF_HOME": str(folder / "hub"),
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "app.py", *map(str, arguments)],
                cwd=root, env={**os.environ, **own, **environment}, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait(self, seconds: float = 90) -> "Server":
        """Returns once the server answers. Raises with its log if it ends or takes too long."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            try:
                if urllib.request.urlopen(f"{self.url}/config", timeout=5).status == 200:
                    return self
            except OSError:
                time.sleep(0.1)
        code = self.process.poll()
        raise RuntimeError(f"app.py {'did not answer' if code is None else f'ended with {code}'}:\n{self.log}")

    def refused(self, seconds: float = 90) -> str:
        """Waits for a server that must not start; the log that it ended with."""
        assert self.process.wait(seconds) != 0, self.log
        return self.log

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> "Server":
        try:
            return self.wait()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_) -> None:
        self.stop()

    def memory(self, field: str) -> int:
        """A field of /proc/PID/status, in bytes: VmRSS, or VmHWM, its peak since `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split(f"{field}:")[1].split()[0])

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


def _end_with_parent() -> None:
    """In a new process: SIGTERM when the one that started it has ended, be it without a word (a test that hung)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Listener:
    """A port of this machine that counts who connects to it and, unless it is `silent`, hangs up at once."""

    def __init__(self, silent: bool = False):
        self.connections = 0
        self._kept = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._listen, args=[silent], daemon=True).start()

    def _listen(self, silent: bool) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            self.connections += 1
            if silent:
                self._kept.append(connection)
            else:
                connection.close()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()
        for connection in self._kept:
            connection.close()


def copy_of_app(folder: Path) -> Path:
    """app.py and what it needs, to be damaged."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "app.py", folder)
    for part in ("imtx", "assets"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def call(url: str, task: str, data: list | str) -> list[tuple[str, object]]:
    """POST /gradio_api/call/<task>, then all of its events as (event, data). A str is sent as the body itself."""
    body = data if isinstance(data, str) else json.dumps({"data": data})
    request = urllib.request.Request(
        f"{url}/gradio_api/call/{task}", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        event_id = json.load(answer)["event_id"]
    events = []
    with urllib.request.urlopen(f"{url}/gradio_api/call/{task}/{event_id}", timeout=120) as stream:
        for line in stream.read().decode().splitlines():
            kind, _, rest = line.partition(": ")
            if kind == "event":
                events.append([rest, None])
            elif kind == "data" and rest:
                events[-1][1] = json.loads(rest)
    return [tuple(event) for event in events if event[0] != "heartbeat"]


def upload(url: str, name: str, content: bytes) -> dict:
    """POST /gradio_api/upload, as `curl -F files=@name`: what `call` takes as a picture."""
    head = f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    request = urllib.request.Request(
        f"{url}/gradio_api/upload", head + content + b"\r\n--cut--\r\n",
        {"Content-Type": "multipart/form-data; boundary=cut"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return {"path": json.load(answer)[0], "meta": {"_type": "gradio.FileData"}}


def drawn(value: dict) -> int:
    """Generated pixels of each sample in a canvas's value (imtx/demo/canvas.py)."""
    return len(value["hex"]) // 6 // value["count"]


def pictures_in(value: dict) -> np.ndarray:
    """What a canvas shows: (count, size, size, 3) uint8, 0 where nothing is drawn yet."""
    count, size, given = value["count"], value["size"], value["given"]
    order = np.array(value["order"] or range(size * size))
    shown = np.zeros((count, size * size, 3), np.uint8)
    shown[:, order[:given]] = colours(value["base"])[:given]
    new = colours(value["hex"]).reshape(-1, count, 3).swapaxes(0, 1)
    shown[:, order[given : given + new.shape[1]]] = new
    return shown.reshape(count, size, size, 3)


def reference(value: dict, caption: str) -> np.ndarray | None:
    """The fixed picture of that caption beside the samples: (h, w, 3) uint8."""
    for name, side, pixels in value["reference"]:
        if name == caption:
            return colours(pixels).reshape(-1, side, 3)
    return None


def colours(pixels: str) -> np.ndarray:
    """ "rrggbb..." -> (N, 3) uint8."""
    return np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(-1, 3)
