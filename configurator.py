"""
Config files and --key=value, applied in the order given to a script's globals:
$ python train_jax.py config/override_file.py --batch_size=32
A config file is the user's own Python and is executed. The idea is that of nanoGPT's
configurator.py; this one is a function, explains what it refuses, and returns which keys were set.
"""

import ast
import difflib
import glob
import math
import reprlib
import symtable
import sys
import traceback

from nanogpt_jax.errors import UserError

PLAIN = (int, float, bool, str)
LARGEST_CONFIG = 2 ** 20  # characters; so that a wrong path, such as a train.bin, is not printed


def configure(script, argv=None):
    """Override the plain settings among `script` (a script's globals()) from argv.

    argv: default sys.argv[1:]. Returns (config, given): the final value of each setting, and the
    set of names that argv or a config file set. Raises UserError for a mistake.
    """
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')  # prints ? for a character that a terminal lacks
    argv = sys.argv[1:] if argv is None else argv
    defaults = {k: v for k, v in script.items() if not k.startswith('_') and type(v) in PLAIN}
    # config files run in a copy, so that they can use all that the script has, as in nanoGPT, and
    # the other names that they assign or delete stay theirs
    names, given = dict(script), set()
    for arg in argv:
        if arg in ('-h', '--help'):
            print_help(script)
        elif arg.startswith('-'):
            key, value = read_flag(arg, defaults)
            script[key] = value
            given.add(key)
            print(f'Overriding: {key} = {value}')
        else:
            names.update((key, script[key]) for key in defaults)
            given |= run_config_file(arg, script, defaults, names)
    return {k: script[k] for k in defaults}, given


def read_flag(arg, defaults):
    """(key, value) of --key=value; a bare --key is True."""
    key, equals, text = arg.removeprefix('--').partition('=')  # a value can contain another =
    if not arg.startswith('--'):
        raise UserError(f'{arg} is no flag; flags are written --key=value')
    if key not in defaults:
        close = difflib.get_close_matches(key, defaults, 1)
        hint = f'did you mean --{close[0]}?' if close else '--help lists them all'
        raise UserError(f'unknown flag --{key}; {hint}')
    if not equals and type(defaults[key]) is not bool:
        raise UserError(f'{arg} has no value; flags are written --key=value, as in '
                        f'{arg}={defaults[key]}')
    return key, checked(key, parse(text), text, defaults[key]) if equals else True


# -----------------------------------------------------------------------------
# config files

def run_config_file(path, script, defaults, names):
    """Execute a config file in `names`, and set the settings that it assigned in `script`; returns
    which."""
    source = read_config_file(path)
    try:
        code = compile(source, path, 'exec')
        symbols = symtable.symtable(source, path, 'exec').get_symbols()
        print(f'Overriding config with {path}:')
        print(source)
        exec(code, names)
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit too: no config file ends a script by intention
        is_syntax = isinstance(e, SyntaxError)
        line = is_syntax and e.lineno or last_line(e.__traceback__, path)
        reason = traceback.format_exception_only(e)[-1 if is_syntax else 0]
        raise UserError(f'the config file {path} failed in line {line}: {reason.strip()}') from e
    assigned = {s.get_name() for s in symbols if s.is_assigned()}
    for key in sorted(assigned - defaults.keys()):
        # a config file may serve several scripts, so only what looks misspelt is worth a warning
        if close := difflib.get_close_matches(key, defaults, 1, cutoff=0.85):
            print(f'WARNING: {path} sets {key}, which is no setting; did you mean {close[0]}?')
    if deleted := sorted(defaults.keys() - names.keys()):
        raise UserError(f'the config file {path} deletes {", ".join(deleted)}; '
                        'every setting needs a value')
    # a new value without an assignment to its name: by import, exec() or globals()
    given = {key for key in defaults if key in assigned or names[key] is not script[key]}
    for key in sorted(given):
        value = names[key]
        if hasattr(value, 'item') and getattr(value, 'ndim', None) == 0:
            value = value.item()  # a scalar of NumPy or JAX
        if type(defaults[key]) is int and type(value) is float and value.is_integer():
            value = int(value)  # max_iters = 5e3 works in nanoGPT's config files
        script[key] = checked(key, value, value, defaults[key], f'the config file {path}: ')
    return given


def read_config_file(path):
    try:
        with open(path, encoding='utf-8-sig') as f:  # Windows' editors write a byte order mark
            source = f.read(LARGEST_CONFIG)
    except UnicodeDecodeError as e:
        raise UserError(f'the config file {path} is not UTF-8 text ({e.reason}): save it as '
                        'UTF-8') from e
    except (OSError, ValueError) as e:  # ValueError: no path has a NUL character
        configs = ', '.join(sorted(glob.glob('config/*.py')))
        hint = f'; there are {configs}' if configs else ''
        if not path.endswith('.py'):
            hint = '; if it is the value of a flag, write --key=value'
        raise UserError(f'cannot read the config file {path} ({type(e).__name__}){hint}') from e
    if len(source) == LARGEST_CONFIG:
        raise UserError(f'{path} is no config file: it has {LARGEST_CONFIG:,} characters or more')
    return source


def last_line(tb, path):
    lines = []
    while tb:
        if tb.tb_frame.f_code.co_filename == path:
            lines.append(tb.tb_lineno)
        tb = tb.tb_next
    return lines[-1] if lines else '?'


# -----------------------------------------------------------------------------
# values

def parse(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text  # a plain string needs no quotes


def checked(key, value, text, default, where=''):
    """value in the type of default, if a machine can use it: finite, in 64 bits, or fit for a path.

    text: what was written, the value of a string setting. where: begins the error's message.
    """
    expected = type(default)
    if expected is str and not isinstance(value, str):
        value = text  # --wandb_run_name=7 is the string '7'
    if expected is float:
        value = as_float(value)
    if type(value) is not expected:
        hint = '; write True or False' if expected is bool else ''
        raise UserError(f'{where}{key} expects {expected.__name__}, got {shown(value)} '
                        f'({type(value).__name__}){hint}')
    if expected is float and not math.isfinite(value):
        raise UserError(f'{where}{key} is {value}: nan and inf are not allowed')
    if expected is int and not -2 ** 63 <= value < 2 ** 63:
        raise UserError(f'{where}{key} is {shown(value)}; it must fit 64 bits')
    if expected is str and not fits_path(value):
        raise UserError(f'{where}{key} is {shown(value)}; no name can contain a NUL or half a '
                        'surrogate pair')
    return value


def as_float(value):
    """An int as a float, and the strings nan and inf as these; all else as it is."""
    try:
        if type(value) is int or type(value) is str and not math.isfinite(float(value)):
            return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except ValueError:
        pass  # a string that is no number
    return value


def fits_path(text):
    try:
        text.encode('utf-8', 'surrogateescape')  # as Python reads file names that are not UTF-8
    except UnicodeEncodeError:
        return False
    return '\0' not in text


def shown(value):
    """repr(value), shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python prints
        return 'a number of thousands of digits'


# -----------------------------------------------------------------------------
# --help

def config_block(path):
    """The source of a script's settings: from the first ruled line to this module's import."""
    with open(path, encoding='utf-8') as f:
        return f.read().split('# ' + '-' * 77 + '\n')[1].split('from configurator')[0]


def print_help(script):
    """Print the script's docstring and its config block, which documents every flag, and exit."""
    with open(script['__file__'], encoding='utf-8') as f:
        docstring = ast.get_docstring(ast.parse(f.read()))  # python -OO has no __doc__
    print(docstring, 'Every setting below is a flag, --key=value:',
          config_block(script['__file__']).strip(), sep='\n\n',
          file=sys.__stdout__)  # even if the script prints elsewhere
    raise SystemExit(0)
