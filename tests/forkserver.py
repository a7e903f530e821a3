"""A process that has imported JAX, Flax, Optax and Orbax, and forks itself for each run of a test.

Importing them takes 1.5 s of processor time, a fork some milliseconds. JAX starts no threads before
its first use, so a fork is as good as a new process: its environment is read after it, nothing of
this repository is imported before it, and it ends as the interpreter ends. Linux only; helpers.py,
which starts this file, starts a new interpreter elsewhere.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys

import jax
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
from flax import nnx  # noqa: F401
from jax.experimental import multihost_utils  # noqa: F401

STREAMS = (0, 1, 2)


def wait_for_request(requests):
    """Fork for each request; returns (request, its stdin, stdout and stderr) in the forks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, whose end ends this
    signal.signal(signal.SIGCHLD, reap)
    while True:
        message, fds, *_ = socket.recv_fds(requests, 2 ** 20, 4)
        if not message:
            os._exit(0)
        *streams, report = fds
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if fork_and_report(streams, report):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return json.loads(message), streams
        for fd in fds:
            os.close(fd)


def reap(*_):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def fork_and_report(streams, report):
    """Fork; returns True in the fork, and never in this process, which writes the fork's id and
    exit code to the pipe `report`."""
    pid = os.fork()
    if pid == 0:
        os.close(report)
        return True
    for fd in streams:
        os.close(fd)
    os.write(report, f'{pid}\n'.encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(report, f'{code}\n'.encode())
    os._exit(0)


def become(request, streams):
    """Make this process what a new one would be with the request's folder, environment, cores."""
    for fd, stream in zip(STREAMS, streams):
        os.dup2(stream, fd)
        os.close(stream)
    os.chdir(request['folder'])
    os.sched_setaffinity(0, request['cores'])
    changed = {name: value for name, value in request['env'].items()
               if name.startswith('JAX_') and value != os.environ.get(name)}
    os.environ.clear()
    os.environ.update(request['env'])
    for name, value in changed.items():  # what JAX read when it was imported
        name = name.lower()
        if name in jax.config.values:
            kind = type(jax.config.values[name])
            jax.config.update(name, value.lower() in ('true', '1') if kind is bool else
                              kind(value) if kind in (int, float) else value)
    encoding = os.environ.get('PYTHONIOENCODING')
    sys.stdin = sys.__stdin__ = open(0, encoding=encoding)
    sys.stdout = sys.__stdout__ = open(1, 'w', encoding=encoding)
    sys.stderr = sys.__stderr__ = open(2, 'w', buffering=1, encoding=encoding,
                                       errors='backslashreplace')
    sys.path[0:1] = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))


if __name__ == '__main__':
    gc.freeze()  # the collector need not look at, and so copy, what all forks share
    # below, as at the top level of a script: it ends by the interpreter's own rules
    request, streams = wait_for_request(socket.socket(fileno=int(sys.argv[1])))
    become(request, streams)
    kind, *sys.argv = request['command']
    if kind == '-c':
        sys.path.insert(0, '')
        code, sys.argv[0] = sys.argv[0], '-c'
        exec(compile(code, '<string>', 'exec'), {'__name__': '__main__'})
    elif kind == '-m':
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv.insert(0, kind)
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name='__main__')
