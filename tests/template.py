"""Python processes that start in a third of the time: forked from a template that has imported JAX and other packages.

The template imports nothing of RingRL, so a forked process imports it as a new one does, from its own PYTHONPATH.
Processes that need other flags of Python or settings of JAX start the usual way.
"""

import array
import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "cyclopts", "flax.nnx", "grain", "gymnasium", "h5py", "jaxtyping", "jax.experimental.multihost_utils", "mujoco",
    "optax", "orbax.checkpoint", "rich.console", "scipy.stats", "tensorboardX", "yaml",
)  # fmt: skip
# What `ringrl` sets for itself: JAX's defaults.
DEFAULTS = {"JAX_ENABLE_X64": "0", "JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}
SUBREAPER, LONGEST = 36, 200_000
usual = multiprocessing.util.spawnv_passfds
template: tuple[socket.socket, dict[str, str]] | None = None  # the socket and the environment of the template


def run(
    arguments: Sequence[Any],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **more: Any,
) -> subprocess.CompletedProcess[Any]:
    """Do what `subprocess.run` does, with `Popen` of this file."""
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(arguments, **more) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` that forks the template if it can."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        executable, start, _, pass_fds, folder, environment, _, _, shell, *pipes = rest
        its, ours = (pipes[0], pipes[3], pipes[5]), (pipes[1], pipes[2], pipes[4])
        files = {number: number if end == -1 else end for number, end in enumerate(its)}
        self.pid = 0
        if executable is None and start is None and not pass_fds and not shell and not isinstance(args, str):
            self.pid = fork(args, files, dict(os.environ if environment is None else environment), folder)
        if not self.pid:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        self._child_created = True
        null = getattr(self, "_devnull", -1)
        for end in {end for end, other in zip(its, ours, strict=True) if -1 not in (end, other)} - {null} | {null} - {
            -1
        }:
            os.close(end)


def is_worker(process: int) -> bool:
    """Return whether a process was started by `multiprocessing`."""
    folder = Path(f"/proc/{process}")
    return b"spawn_main" in (folder / "cmdline").read_bytes() + (folder / "comm").read_bytes()


def fork_workers() -> None:
    """Fork the processes that `multiprocessing` spawns, too. The processes of a forked process do so anyway."""
    multiprocessing.util.spawnv_passfds = _spawn


def _spawn(path: Any, arguments: Sequence[Any], files: Sequence[int]) -> int:
    words = [os.fsdecode(word) for word in arguments]
    if "--multiprocessing-fork" not in words:  # the resource tracker
        return usual(path, arguments, files)
    words = [words[0], *words[words.index("-c") :]]
    return fork(words, {n: n for n in (0, 1, 2, *files)}, dict(os.environ)) or usual(path, arguments, files)


def fork(arguments: Sequence[Any], files: dict[int, int], environment: dict[str, str], folder: Any = None) -> int:
    """Return the id of a forked child that runs a Python program, 0 if the program has to start the usual way.

    `files`: its descriptors, and ours for them.
    """
    global template
    words = [os.fspath(word) for word in arguments]
    if words[0] == sys.executable:
        words.pop(0)
        is_plain = words[:1] == ["-c"] or (words != [] and not words[0].startswith("-"))
    else:  # the script that pip installs
        is_plain = words[0] == str(Path(sys.executable).with_name("ringrl"))
    if not is_plain or not sys.platform.startswith("linux") or sum(map(len, words)) > LONGEST:
        return 0
    if template is None:
        template = _start()
    ours, its = template
    if _fixed(environment) != _fixed(its):
        return 0
    request = {"words": words, "files": [*files], "environment": environment, "folder": os.fspath(folder or Path.cwd())}
    sources = array.array("i", files.values())
    become_reaper = ctypes.CDLL(None).prctl
    become_reaper(SUBREAPER, 1, 0, 0, 0)  # the child of a child that has ended is now ours
    ours.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sources)])
    process = int(ours.recv(16))
    become_reaper(SUBREAPER, 0, 0, 0, 0)
    return process


def _fixed(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that JAX and Python read once, in the template, without those that `_become` reads again."""
    read_again = {"JAX_PLATFORMS", "PYTHONPATH", "PYTHONSAFEPATH", *DEFAULTS.items()}
    found = {name: value for name, value in environment.items() if name.startswith(("JAX_", "PYTHON", "LD_"))}
    return {name: value for name, value in found.items() if not read_again & {name, (name, value)}}


def _start() -> tuple[socket.socket, dict[str, str]]:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import template; template.main()"
        environment = dict(os.environ)
        subprocess.Popen([sys.executable, "-c", code], stdin=its, env=environment)
    return ours, environment


def main() -> None:
    """Import the packages and serve requests on standard input."""
    gc.disable()
    before = dict(os.environ)
    for name in PACKAGES:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)  # as in conftest.py
    imported = {name: value for name, value in os.environ.items() if before.get(name) != value}
    own = {str(Path(__file__).parent), "", *before.get("PYTHONPATH", "").split(os.pathsep)}
    paths = [path for path in sys.path if path not in own]
    del sys.modules["template"]
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    _serve(requests, imported, paths)


def _serve(requests: socket.socket, imported: dict[str, str], paths: list[str]) -> None:
    """Fork a child for each request, and run the request in it. End when the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        data, received, _, _ = requests.recvmsg(2 * LONGEST, 4096)
        if not data:
            os._exit(0)
        numbers = array.array("i")
        for _, _, part in received:
            numbers.frombytes(part)
        reading, writing = os.pipe()
        middle = os.fork()
        if not middle:
            if child := os.fork():
                os.write(writing, str(child).encode())
                os._exit(0)
            requests.detach()
            _become(json.loads(data), numbers.tolist(), imported, paths)
            return
        os.waitpid(middle, 0)
        requests.send(os.read(reading, 16))
        for number in (reading, writing, *numbers):
            os.close(number)


def _become(request: dict[str, Any], received: list[int], imported: dict[str, str], paths: list[str]) -> None:
    """Turn this process into the requested one, and run its program."""
    global template
    files, environment, words = request["files"], request["environment"], request["words"]
    free = max(2, *files, *received) + 1
    sources = [fcntl.fcntl(number, fcntl.F_DUPFD, free) for number in received]
    os.closerange(3, free)
    for number, source in zip(files, sources, strict=True):
        if number > 2:
            os.dup2(source, number)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():  # the template of this process's own children
        ours.close()
        for number in {*files, *sources} - {0, 1, 2}:
            os.close(number)
        _serve(its, imported, paths)
        return
    its.close()
    for number, source in zip(files, sources, strict=True):
        os.dup2(source, number)
        os.close(source)
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # as Python opens them, for files of other kinds
        errors, mode = getattr(sys, name).errors, "w" if number else "r"
        stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        stream.reconfigure(line_buffering=number == 2 or stream.isatty())
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(imported | environment)
    template = ours, environment
    fork_workers()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, ignores it
    sys.modules["jax"].config.update("jax_platforms", environment.get("JAX_PLATFORMS"))
    is_text = words[0] == "-c"
    file, sys.argv = Path(words[0]).absolute(), words[:1] + words[1 + is_text :]
    first = [] if environment.get("PYTHONSAFEPATH") else ["" if is_text else str(file.parent)]
    sys.path[:] = [*first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *paths]
    if "--multiprocessing-fork" in words:
        Path("/proc/self/comm").write_text("spawn_main")
    names = vars(sys.modules["__main__"])
    for name in set(names) - {"__name__", "__builtins__"}:
        del names[name]
    names |= {"__spec__": None} | ({} if is_text else {"__file__": str(file)})
    exec(compile(words[1], "<string>", "exec") if is_text else compile(file.read_bytes(), str(file), "exec"), names)
