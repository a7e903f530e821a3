"""Errors that a user can fix, and how the scripts print them. Imports nothing of this project."""

import contextlib
import errno
import importlib
import os
import re
import sys
import time

# of one of several processes, once start_processes has connected them
process_label = ''  # ' in process 3'
client = None  # of jax.distributed

# what JAX, Gloo and NCCL say when another process has gone; the types of these errors differ
LOST_CONNECTION = re.compile(
    'gloo|remote process exited|nccl.*system error|coordination ?service|heartbeat'
    '|barrier timed out', re.I)


class UserError(Exception):
    """A mistake that the user can fix: the scripts print it as one line, without a traceback."""


def optional_import(name):
    """Import a package that only some commands need. Raises UserError if it is not installed."""
    package = name.split('.')[0]
    try:
        module = importlib.import_module(name)
        if importlib.import_module(package).__file__ is None:  # a folder, as wandb's with its logs
            raise ImportError(f'{package} is a folder without a package')
    except ImportError as e:
        raise UserError(f'this needs the package {package}: pip install {package}') from e
    return module


def check_memory(n_bytes, what, hint):
    """Raise UserError if something needs more memory than this machine has.

    Otherwise the kernel would kill the process, after a long time.
    """
    if not hasattr(os, 'sysconf'):
        return  # Windows: NumPy or JAX raise when memory runs out
    has = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    if n_bytes > has:
        raise UserError(f'{what} need {n_bytes / 1e9:,.0f} GB of memory at least, and this machine '
                        f'has {has / 1e9:,.0f} GB: {hint}')


def report_user_error(kind, error, traceback):
    """sys.excepthook of the scripts: one line for a UserError, a lack of memory, a full disk and a
    lost process, none for Ctrl-C and a closed pipe, and the traceback for everything else.

    One of several processes exits at once, since a normal exit would wait for the others.
    """
    text = ' '.join(str(error).split())  # a path may have line breaks
    if issubclass(kind, UserError):
        report(' '.join(str(error).splitlines()))
    elif issubclass(kind, MemoryError):
        report(f'out of memory ({text or "no reason given"})')
    elif kind.__name__ == 'JaxRuntimeError' and 'RESOURCE_EXHAUSTED' in text:
        report(f'out of memory ({str(error).splitlines()[0]}). In training, use a smaller '
               '--batch_size with a larger --gradient_accumulation_steps (the same tokens per '
               'iteration), or --remat=True')
    elif process_label and LOST_CONNECTION.search(text):
        report('lost the connection to the other processes, most likely because one of them has '
               f'exited (...{text[-150:]}). Restart all of them with --init_from=resume')
    elif issubclass(kind, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at exit does not fail too
        if error.errno == errno.ENOSPC:
            report(text)
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    if process_label:
        sys.stderr.flush()
        if issubclass(kind, UserError):
            tell_other_processes()
        os._exit(1)


def report(line):
    print(f'error{process_label}: {line}', file=sys.stderr, flush=True)


def tell_other_processes():
    """End the others with one line each: see launch.end_with_others."""
    with contextlib.suppress(Exception):  # another process has failed before
        client.key_value_set('failed', process_label)
    if process_label == ' in process 0':
        time.sleep(2)  # the others read it from this process
