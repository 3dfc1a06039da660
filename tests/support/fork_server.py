"""A process that has imported what commands import, and forks for each that a test starts.

Importing torch, Lightning and the package is most of what a short command takes. The server has
done it once. What it forks is a process like any other: its own id, files, folder, environment,
session and signals, and a child of whoever asked, so that `subprocess.Popen` waits for it and kills
it, and whose death makes it an orphan. It runs `lightning_sft` as `python -m` does, and what it
starts in its turn (Lightning its ranks, `verify-resume` its runs) is forked too.

Not shown is what happens while Python starts. Of variables that are read then, a process gets
OMP_NUM_THREADS=1 and a `sitecustomize` in PYTHONPATH; the others are the server's. Where that
matters a test takes a new process: `spawn(…, forked=False)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IS_POSSIBLE = sys.platform == "linux"  # the only one where a process may adopt its grandchildren
PR_SET_CHILD_SUBREAPER = 36
SETTINGS = {"OMP_NUM_THREADS": "1"}  # more threads than one do not survive a fork


class ForkServer:
    """Starts processes as children of this one.

    Args:
        channel: The socket to a process, itself started by this one, that runs `serve`.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        # The server's own child dies at once, and this process adopts what that one started.
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")

    @classmethod
    def launch(cls) -> ForkServer:
        """A new server; it imports while the caller goes on."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = os.environ | SETTINGS
            subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        return cls(ours)

    def start(self, request: dict[str, Any], files: list[int]) -> int:
        """Have a process forked.

        Args:
            request: What `_become` and `_run` read.
            files: Descriptors of its stdin, stdout and stderr.

        Returns:
            Its id.
        """
        content = json.dumps(request).encode()
        socket.send_fds(self._channel, [len(content).to_bytes(4, "big")], files)
        self._channel.sendall(content)
        answer = self._channel.recv(16)
        if not answer:
            raise RuntimeError("the fork server has died; its stderr says why")
        return int(answer)


class ForkedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` that has its server fork what `python -m lightning_sft` would start."""

    server: ForkServer

    def _execute_child(self, args: Any, executable: Any, *others: Any) -> None:  # type: ignore[override]
        preexec_fn, _, pass_fds, cwd, env = others[:5]
        pipes, new_session = others[8:14], others[19]
        settings = {name: (env or os.environ).get(name) for name in SETTINGS}
        is_ours = isinstance(args, list) and args[:2] == [sys.executable, "-m"]
        is_ours = is_ours and args[2].removesuffix(".__main__") == "lightning_sft"
        if not is_ours or settings != SETTINGS or preexec_fn or pass_fds:
            super()._execute_child(args, executable, *others)  # type: ignore[misc]
            return
        sys.audit("subprocess.Popen", sys.executable, args, cwd, env)
        request = {
            "arguments": list(map(str, args[3:])),
            "folder": str(cwd or Path.cwd()),
            "environment": dict(env or os.environ),
            "new_session": bool(new_session),
        }
        theirs = (pipes[0], pipes[3], pipes[5])
        files = [own if pipe == -1 else pipe for own, pipe in enumerate(theirs)]
        self.pid = self.server.start(request, files)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork for each request, until nobody is left to ask.

    Returns:
        None in the server. In a process that it forked, the request, with `files` in it.
    """
    while True:
        header, files, _, _ = socket.recv_fds(channel, 4, 3)
        if not header:
            return None
        content = b""
        while len(content) < int.from_bytes(header, "big"):
            content += channel.recv(1 << 16)
        read, write = os.pipe()
        if (parent := os.fork()) == 0:
            parent = os.getpid()
            if (forked := os.fork()) != 0:
                os.write(write, str(forked).encode())
                os._exit(0)
            os.close(read)
            os.close(write)
            channel.close()
            while os.getppid() == parent:  # until it is adopted
                time.sleep(0.0005)
            return json.loads(content) | {"files": files}
        os.close(write)
        os.waitpid(parent, 0)
        answer = os.read(read, 16)
        for file in (read, *files):
            os.close(file)
        channel.sendall(answer)


def _become(request: dict[str, Any]) -> socket.socket | None:
    """Turn this forked process into the one that was asked for.

    Returns:
        None. In one more process, which is the server of this one, its channel.
    """
    if request["new_session"]:
        os.setsid()
    for place, file in enumerate(request["files"]):
        os.dup2(file, place)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        with open(os.devnull, "r+b", buffering=0) as nothing:  # noqa: PTH123
            for place in range(3):  # whoever reads what that process writes must see it end
                os.dup2(nothing.fileno(), place)
        return theirs
    theirs.close()
    ForkedPopen.server = ForkServer(ours)
    subprocess.Popen = ForkedPopen  # type: ignore[misc]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return None


def _run(request: dict[str, Any], known_path: str) -> None:
    """`python -m lightning_sft`, from where Python has started to its end."""
    from lightning.fabric.utilities import rank_zero

    # Was read from the environment as Lightning was imported.
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    sys.path[0] = request["folder"]
    path = os.environ.get("PYTHONPATH", "")
    if path != known_path:
        sys.path[1:1] = path.split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        if importlib.util.find_spec("sitecustomize") is not None:
            importlib.import_module("sitecustomize")
    sys.argv = ["lightning_sft", *request["arguments"]]
    runpy.run_module("lightning_sft", run_name="__main__", alter_sys=True)


def main() -> None:
    """Import, and serve whoever holds the other end of the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who run the tests
    from torch.utils import tensorboard  # noqa: F401

    for name in ("commands.training", "training.plots", "reporting.report", "serving.serve"):
        importlib.import_module(f"lightning_sft.{name}")
    with contextlib.suppress(ImportError):
        import matplotlib.backends.backend_agg  # noqa: F401
    os.fsync = lambda descriptor: None  # as in the tests' own process
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208
        raise RuntimeError("an import has started a thread, which no fork would have")
    gc.collect()
    gc.freeze()  # so that collecting does not copy the pages that are shared
    known_path = os.environ.get("PYTHONPATH", "")
    channel: socket.socket | None = socket.socket(fileno=int(sys.argv[1]))
    while channel is not None:
        request = serve(channel)
        if request is None:
            return
        channel = _become(request)
    assert request is not None
    _run(request, known_path)


if __name__ == "__main__":
    main()
