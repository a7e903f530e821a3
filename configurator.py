"""
Config files and --key=value, applied in the order given to a script's globals:
$ python train_jax.py config/override_file.py --batch_size=32
A config file is the user's own Python and is executed, as in nanoGPT. Here this is a function,
which explains what it refuses and returns the names that were set.
"""

import ast
import difflib
import math
import os
import reprlib
import sys
import traceback

from nanogpt_jax.errors import UserError

PLAIN = (int, float, bool, str)


def configure(script, argv=None):
    """Override the settings among `script`, a script's globals(), from argv.

    argv: default sys.argv[1:]. Returns (config, given): the final value of each setting, and the
    set of names that argv or a config file set. Raises UserError for a mistake.
    """
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')  # prints ? for a character that a terminal lacks
    # config files run in a copy: they can use all names of the script, and change its settings only
    names, given = dict(script), set()
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('-h', '--help'):
            print_help(script)
        elif arg.startswith('-'):
            key, value = read_flag(arg, settings_of(script))
            print(f'Overriding: {key} = {value}')
            script[key] = value
            given.add(key)
        else:
            names |= settings_of(script)
            values = run_config_file(arg, settings_of(script), names)
            script.update(values)
            given |= values.keys()
    return settings_of(script), given


def settings_of(script):
    """{name: value} of the settings among a script's globals: those with plain values."""
    return {key: value for key, value in script.items()
            if not key.startswith('_') and type(value) in PLAIN}


def override(script, values):
    """Set the settings in `script` (a script's globals()) to those in `values`, such as those of a
    checkpoint. Raises UserError for a value of another type."""
    for key, default in settings_of(script).items():
        if key in values:
            script[key] = checked(key, values[key], default)


def checked(key, value, default, where=''):
    """value in the type of default. Raises UserError for another type, for nan and for inf.

    where: the beginning of the message.
    """
    expected = type(default)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        hint = '; write True or False' if expected is bool else ''
        raise UserError(f'{where}{key} expects {expected.__name__}, got {reprlib.repr(value)} '
                        f'({type(value).__name__}){hint}')
    if expected is float and not math.isfinite(value):
        raise UserError(f'{where}{key} is {value}: nan and inf are not allowed')
    if expected is str and ('\0' in value or value.encode(errors='replace').decode() != value):
        raise UserError(f'{where}{key} is {value!r:.100}, which is not UTF-8 text without NUL')
    return value


# -----------------------------------------------------------------------------
# flags

def read_flag(arg, settings):
    """(key, value) of --key=value; a bare --key is True."""
    key, equals, text = arg.removeprefix('--').partition('=')  # a value can contain another =
    if not arg.startswith('--'):
        raise UserError(f'{arg} is not a flag; flags are written --key=value')
    if key not in settings:
        close = difflib.get_close_matches(key, settings, 1)
        hint = f'did you mean --{close[0]}?' if close else '--help lists them all'
        raise UserError(f'unknown flag --{key}; {hint}')
    default = settings[key]
    if not equals and type(default) is not bool:
        raise UserError(f'{arg} has no value; flags are written --key=value, as in {arg}={default}')
    value = parse(text) if equals else True
    if type(default) is str and type(value) is not str:
        value = text  # --wandb_run_name=7 is the string '7'
    return key, checked(key, value, default)


def parse(text):
    """The plain value that a flag's text writes in Python; other text needs no quotes."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text
    return value if type(value) in PLAIN else text


# -----------------------------------------------------------------------------
# config files

def run_config_file(path, settings, names):
    """Execute a config file in `names`; returns {name: value} of the settings that it assigned."""
    source = read_config_file(path)
    try:
        tree = ast.parse(source, path)
        code = compile(tree, path, 'exec')
        print(f'Overriding config with {path}:')
        print(source)
        exec(code, names)
    except Exception as e:
        lines = [getattr(e, 'lineno', None) or '?'] + [
            frame.lineno for frame in traceback.extract_tb(e.__traceback__)
            if frame.filename == path]
        raise UserError(f'the config file {path} failed in line {lines[-1]}: '
                        f'{type(e).__name__}: {e}') from e
    assigned = {node.id for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for key in sorted(assigned - settings.keys()):
        # only a likely misspelling: a config file may serve several scripts
        if close := difflib.get_close_matches(key, settings, 1, cutoff=0.85):
            print(f'WARNING: {path} sets {key}, which is not a setting; did you mean {close[0]}?')
    values = {}
    for key, old in settings.items():
        value = names.get(key)
        if type(old) is int and type(value) is float and value.is_integer():
            value = int(value)  # max_iters = 5e3 works in nanoGPT's config files
        if key in assigned or value is not old:  # import, exec() and globals() set names too
            values[key] = checked(key, value, old, f'the config file {path}: ')
    return values


def read_config_file(path):
    if not os.path.isfile(path):  # reading a FIFO may never end
        hint = '' if path.endswith('.py') else (
            '; if it is the value of a flag, write --key=value')
        raise UserError(f'the config file {path} does not exist, or is not a file{hint}')
    try:
        with open(path, encoding='utf-8-sig') as f:  # Windows' editors write a byte order mark
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'cannot read the config file {path} as UTF-8 text: {e}') from e


# -----------------------------------------------------------------------------
# --help

def config_block(path):
    """The source of a script's settings: from the first ruled line to this module's import."""
    with open(path, encoding='utf-8') as f:
        return f.read().split('# ' + '-' * 77 + '\n')[1].split('from configurator')[0]


def print_help(script):
    """Print the script's docstring and its config block, which documents every flag, and exit."""
    # sample_jax.py keeps standard output for the samples
    out = sys.__stdout__ if sys.stdout is sys.stderr else sys.stdout
    print(script['__doc__'].strip(), 'Every setting below is a flag, --key=value:',
          config_block(script['__file__']).strip(), sep='\n\n', file=out)
    raise SystemExit(0)
