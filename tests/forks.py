"""Scripts of train/ in processes that are forked from one with their imports behind it: they start at once.

`python script.py` imports for seconds before it does anything, and the tests start a hundred. This file is both sides: what
the tests call, and, run as a script, the process that is forked. Each fork is a process of its own, which may be killed, run
out of disk or patch what it likes.
"""

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # that a script may take


def run(script: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)`."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        outputs = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        for output in outputs:
            os.mkfifo(output)  # not a file, of which a script on a full disk could not write the end
        told = [pool.submit(Path(output).read_text) for output in outputs]
        order = {"script": str(script), "arguments": arguments, "environment": environment, "outputs": outputs}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise TimeoutError(f"{script} {arguments} takes more than {SECONDS} s")
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([str(script), *arguments], code, *(text.result() for text in told))


@lru_cache
def _server() -> subprocess.Popen:
    """Of this process of the tests. It ends with it, as nothing is left to read then."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )


def serve() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "train")]
    import evaluate  # noqa: F401
    import publish  # noqa: F401
    import run  # noqa: F401
    import sample  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            become(order)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(order: dict) -> None:
    """Never returns."""
    for target, source in enumerate([os.devnull, *order["outputs"]]):
        os.dup2(os.open(source, os.O_RDONLY if target == 0 else os.O_WRONLY), target)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [order["script"], *order["arguments"]]
    sys.path[0] = str(Path(order["script"]).parent)
    code = 0
    try:
        runpy.run_path(order["script"], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
