"""
Config files and --key=value, applied in the order given to a script's globals:
$ python train_jax.py config/override_file.py --batch_size=32
A config file is the user's own Python and is executed. The idea is that of nanoGPT's
configurator.py; this one is a function, explains what it refuses, and returns which keys were set.
"""

import ast
import difflib
import glob
import symtable
import sys

from nanogpt_jax.errors import UserError

PLAIN = (int, float, bool, str)


def configure(script, argv=None):
    """Override the plain settings among `script` (a script's globals()) from argv.

    argv: default sys.argv[1:]. Returns (config, given): the final value of each setting, and the
    set of names that argv or a config file set. Raises UserError for a mistake.
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults = {k: v for k, v in script.items() if not k.startswith('_') and type(v) in PLAIN}
    given = set()
    for arg in argv:
        if arg in ('-h', '--help'):
            print_help(script)
        elif '=' in arg and arg.startswith('--'):
            key, text = arg[2:].split('=', 1)  # at the first =, so that a value can contain one
            if key not in defaults:
                close = difflib.get_close_matches(key, defaults, 1)
                hint = f'did you mean --{close[0]}?' if close else '--help lists them all'
                raise UserError(f'unknown flag --{key}; {hint}')
            script[key] = checked(key, parse(text), text, defaults[key])
            given.add(key)
            print(f'Overriding: {key} = {script[key]}')
        elif arg.startswith('-'):
            example = f'{arg}={defaults.get(arg.strip("-"), "...")}'
            raise UserError(f'{arg} has no value; flags are written --key=value, as in {example}')
        else:
            given |= run_config_file(arg, script, defaults)
    return {k: script[k] for k in defaults}, given


def run_config_file(path, script, defaults):
    """Execute a config file in the script's globals; returns the settings that it assigned."""
    try:
        with open(path, encoding='utf-8') as f:
            source = f.read()
    except (OSError, UnicodeDecodeError) as e:
        configs = ', '.join(sorted(glob.glob('config/*.py')))
        hint = f'; there are {configs}' if configs else ''
        raise UserError(f'cannot read the config file {path} ({type(e).__name__}){hint}') from e
    print(f'Overriding config with {path}:')
    print(source)
    try:
        exec(compile(source, path, 'exec'), script)
        symbols = symtable.symtable(source, path, 'exec').get_symbols()
    except Exception as e:
        line = getattr(e, 'lineno', None) or last_line(e.__traceback__, path)
        raise UserError(f'the config file {path} failed in line {line}: '
                        f'{type(e).__name__}: {e}') from e
    assigned = {s.get_name() for s in symbols if s.is_assigned()}
    for key in sorted(assigned):
        if key in defaults:
            value = script[key]
            if type(defaults[key]) is int and type(value) is float and value.is_integer():
                value = int(value)  # max_iters = 5e3 works in nanoGPT's config files
            script[key] = checked(key, value, value, defaults[key])
        # a config file may serve several scripts, so only what looks misspelt is worth a warning
        elif close := difflib.get_close_matches(key, defaults, 1, cutoff=0.85):
            print(f'WARNING: {path} sets {key}, which is no setting; did you mean {close[0]}?')
    return assigned & defaults.keys()


def parse(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text  # a plain string needs no quotes


def checked(key, value, text, default):
    """value in the type of default. text: what was written, the value of a string setting."""
    expected = type(default)
    if expected is str and not isinstance(value, str):
        value = text  # --wandb_run_name=7 is the string '7'
    if expected is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if type(value) is not expected:
        hint = '; write True or False' if expected is bool else ''
        raise UserError(f'{key} expects {expected.__name__}, got {value!r} '
                        f'({type(value).__name__}){hint}')
    return value


def config_block(path):
    """The source of a script's settings: from the first ruled line to this module's import."""
    with open(path, encoding='utf-8') as f:
        return f.read().split('# ' + '-' * 77 + '\n')[1].split('from configurator')[0]


def last_line(traceback, path):
    lines = []
    while traceback:
        if traceback.tb_frame.f_code.co_filename == path:
            lines.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    return lines[-1] if lines else '?'


def print_help(script):
    """Print the script's docstring and its config block, which documents every flag, and exit."""
    print(script['__doc__'].strip(), 'Every setting below is a flag, --key=value:',
          config_block(script['__file__']).strip(), sep='\n\n',
          file=sys.__stdout__)  # even if the script prints elsewhere
    raise SystemExit(0)
