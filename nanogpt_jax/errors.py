"""Errors that a user can fix, and how the scripts print them. Imports nothing of this project."""

import importlib
import os
import sys

process_label = ''  # ' in process 3' once start_processes has connected several processes


class UserError(ValueError):
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

    For what is certain to fail, and only after a long time: the kernel grants memory that is not
    there, and kills the process once it is written.
    """
    try:
        has = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, OSError, ValueError):
        return  # not known on Windows: NumPy or JAX raise once they get no memory
    if n_bytes > has:
        raise UserError(f'{what} need {n_bytes / 1e9:,.0f} GB of memory at least, and this machine '
                        f'has {has / 1e9:,.0f} GB: {hint}')


def report_user_error(kind, error, traceback):
    """sys.excepthook of the scripts: one line for a UserError, for a lack of memory and for a lost
    process, none for Ctrl-C and a closed pipe, and the traceback for everything else.

    One of several processes exits at once: a normal exit would wait for the others.
    """
    text = ' '.join(str(error).split())
    first_line = next(iter(str(error).splitlines()), 'no reason given')
    if issubclass(kind, UserError):
        line = ' '.join(str(error).splitlines())  # a path may have line breaks
        print(f'error{process_label}: {line}', file=sys.stderr)
    elif 'RESOURCE_EXHAUSTED' in text or issubclass(kind, MemoryError):
        print(f'error{process_label}: out of memory ({first_line}). '
              'Use a smaller --batch_size with a larger --gradient_accumulation_steps (the same '
              'tokens per iteration), or --remat=True', file=sys.stderr)
    elif process_label and kind.__name__ == 'JaxRuntimeError':
        print(f'error{process_label}: lost the connection to the other processes, most likely '
              f'because one of them has exited (...{text[-150:]}). Restart all of them with '
              '--init_from=resume', file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at exit does not fail too
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    if process_label:
        sys.stderr.flush()
        os._exit(1)
