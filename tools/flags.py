"""
Write docs/flags.md: the settings of every script as tables, from the same block that --help prints.
$ python -m tools.flags > docs/flags.md
"""

import ast
import os
import re

from configurator import config_block

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ['train_jax.py', 'sample_jax.py', 'bench_jax.py', 'convert_jax.py',
           *(f'tools/{name}.py' for name in ('sizing', 'plan', 'compare', 'plot'))]
INTRODUCTION = """# Flags

All flags of all scripts, as `--help` prints them too. What a value may be, and how config files set
them, is said [in the guide](../JAX_README.md#flags-and-config-files). This page is written from the
settings in the scripts, by `python -m tools.flags > docs/flags.md`.
"""
SETTING = re.compile(r'(\w+) = ([^#]*[^# ])(?: *# (.*))?')


def purpose(path):
    """A script's docstring, up to its examples."""
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        docstring = ast.get_docstring(ast.parse(f.read()))
    return re.split(r'\n\n|\n\$', docstring)[0]


def entries(block):
    """[name, default, meaning] of each setting; [heading] of a comment on lines of its own."""
    found = []
    for line in block.strip().splitlines():
        if setting := SETTING.fullmatch(line):
            name, default, meaning = setting.groups('')
            if ' * ' in default:
                default = eval(default)  # 5 * 8 as 40, but 6e-4 and '\n' as they are written
            found.append([name, default, meaning])
        elif line.startswith(' '):
            found[-1][-1] += ' ' + line.strip(' #')
        else:
            found.append([line.strip('# ')])
    return found


def cell(text, names):
    """A comment as Markdown: quoted values and names of settings as code, | and < escaped."""
    code = re.compile(rf"(?<!\w)'([^']+)'|\b({'|'.join(names)})\b")
    parts = code.split(text)  # text, quoted or None, name or None, text, ...
    parts = [part and (f'`{part}`' if i % 3 else part.replace('<', '&lt;')) or ''
             for i, part in enumerate(parts)]
    return ''.join(parts).replace('|', r'\|')


def table(path):
    settings = entries(config_block(os.path.join(ROOT, path)))
    names = [name for name, *rest in settings if rest and '_' in name]
    yield '| flag | default | meaning |\n| --- | --- | --- |'
    for name, *rest in settings:
        if rest:
            yield f'| `--{name}` | `{rest[0]}` | {cell(rest[1], names)} |'
        else:
            yield f'| **{name}** | | |'


if __name__ == '__main__':
    print(INTRODUCTION)
    for script in SCRIPTS:
        name = script.removesuffix('.py').replace('/', '.') if '/' in script else script
        print(f'## {name}\n\n{purpose(script)}\n', *table(script), '', sep='\n')
