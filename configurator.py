"""
Config files and --key=value, in the order they are given, over a script's globals:
$ python train_jax.py config/override_file.py --batch_size=32
A config file is the user's own Python, and runs as such. nanoGPT's configurator.py is the origin
of the idea; this one is a function, names what it refuses, and returns which keys were set.
"""

import ast
import difflib
import glob
import os
import symtable
import sys

PLAIN = (int, float, bool, str)


def configure(script, argv=None):
    """Override the plain settings among `script` (a script's globals()) from argv, default sys.argv[1:].

    Returns (config, given): every setting's final value, and the set of names that argv or a config file
    set. A mistake ends the process with one line and exit code 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults = {k: v for k, v in script.items() if not k.startswith('_') and type(v) in PLAIN}
    given = set()
    for arg in argv:
        if arg in ('-h', '--help'):
            print_help(script)
        elif '=' in arg and arg.startswith('--'):
            key, text = arg[2:].split('=', 1)  # at the first =, so that a value can hold one
            if key not in defaults:
                close = difflib.get_close_matches(key, defaults, 1)
                fail(f'unknown flag --{key}' + (f'; did you mean --{close[0]}?' if close else '; --help lists them all'))
            script[key] = checked(key, parse(text), text, defaults[key])
            given.add(key)
            print(f'Overriding: {key} = {script[key]}')
        elif arg.startswith('-'):
            fail(f'{arg} has no value; flags are written --key=value, as in {arg}={defaults.get(arg.strip("-"), "...")}')
        else:
            given |= run_config_file(arg, script, defaults)
    return {k: script[k] for k in defaults}, given


def run_config_file(path, script, defaults):
    """Run a config file in the script's globals; returns the settings that it assigned."""
    try:
        with open(path, encoding='utf-8') as f:
            source = f.read()
    except (OSError, UnicodeDecodeError) as e:
        known = ', '.join(sorted(glob.glob('config/*.py')))
        fail(f'cannot read the config file {path} ({type(e).__name__})' + (f'; there are {known}' if known else ''))
    print(f'Overriding config with {path}:')
    print(source)
    try:
        exec(compile(source, path, 'exec'), script)
        symbols = symtable.symtable(source, path, 'exec').get_symbols()
    except Exception as e:
        line = getattr(e, 'lineno', None) or last_line(e.__traceback__, path)
        fail(f'the config file {path} failed in line {line}: {type(e).__name__}: {e}')
    assigned = {s.get_name() for s in symbols if s.is_assigned()}
    known = defaults.keys() | settings_of_all_scripts()
    for key in sorted(assigned):
        if key in defaults:
            value = script[key]
            if type(defaults[key]) is int and type(value) is float and value.is_integer():
                value = int(value)  # max_iters = 5e3 works in nanoGPT's config files
            script[key] = checked(key, value, value, defaults[key])
        elif key not in known and not key.startswith('_') and type(script.get(key)) in PLAIN:
            close = difflib.get_close_matches(key, known, 1)
            print(f'WARNING: {path} sets {key}, which no script knows' + (f'; did you mean {close[0]}?' if close else ''))
    return assigned & defaults.keys()


def parse(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text  # a plain string needs no quotes


def checked(key, value, text, default):
    """value in the type of default, or the end of the process. text: what was written, the value of a string setting."""
    want = type(default)
    if want is str and not isinstance(value, str):
        value = text  # --wandb_run_name=7 is the string '7'
    if want is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if type(value) is not want:
        hint = '; write True or False' if want is bool else ''
        fail(f'{key} expects {want.__name__}, got {value!r} ({type(value).__name__}){hint}')
    return value


def config_block(path):
    """The source of a script's settings with their comments: from the first ruled line to this module's import."""
    with open(path, encoding='utf-8') as f:
        return f.read().split('# ' + '-' * 77 + '\n')[1].split('from configurator')[0]


def settings_of_all_scripts():
    """The settings of the scripts beside this file; a config file may serve several."""
    scripts = glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), '*_jax.py'))
    nodes = [node for path in scripts for node in ast.parse(config_block(path)).body]
    return {target.id for node in nodes if isinstance(node, ast.Assign) for target in node.targets}


def last_line(traceback, path):
    lines = []
    while traceback:
        if traceback.tb_frame.f_code.co_filename == path:
            lines.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    return lines[-1] if lines else '?'


def print_help(script):
    """Print the script's docstring and its config block, which documents every flag, and end the process."""
    print(script['__doc__'].strip(), 'Every setting below is a flag, --key=value:', config_block(script['__file__']).strip(),
          sep='\n\n', file=sys.__stdout__)  # wherever else the script prints
    raise SystemExit(0)


def fail(message):
    raise SystemExit(f'error: {message}')
