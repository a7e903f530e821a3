"""The layout of the repository: what files may import. Ruff checks how long they may be."""

import ast
import glob
import os
import subprocess
import sys

from helpers import ROOT


BASE = ['nanogpt_jax/errors.py', 'nanogpt_jax/ops.py']
LEVELS = ['nanogpt_jax/__init__.py', 'base', 'nanogpt_jax/run_dir.py', 'leaf',
          'jax_transformer.py', 'jax_train_utils.py', 'script', 'tool']


def level(path):
    """The number of a file's level: it may import from lower ones only, tools from tools too."""
    if path in LEVELS:
        return LEVELS.index(path)
    if path in BASE:
        return LEVELS.index('base')
    if path == 'configurator.py' or path.startswith('nanogpt_jax/'):
        return LEVELS.index('leaf')
    return LEVELS.index('tool' if path.startswith('tools/') else 'script')


def import_graph():
    """{path: paths that it imports, anywhere in the file} of scripts, library and tools."""
    files = {path for folder in ('', 'nanogpt_jax/', 'tools/')
             for path in glob.glob(f'{folder}*.py', root_dir=ROOT) if not path.startswith('test_')}
    graph = {}
    for path in files:
        names = set()
        with open(os.path.join(ROOT, path), encoding='utf-8') as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f'{path} has a relative import'
                names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
        paths = {name.replace('.', '/') for name in names}
        graph[path] = files & {p + end for p in paths for end in ('.py', '/__init__.py')}
    return graph


def test_every_file_imports_from_lower_levels_only():
    graph = import_graph()
    assert {level(path) for path in graph} == set(range(len(LEVELS)))
    assert 'nanogpt_jax/errors.py' in graph['jax_train_utils.py']
    tool = LEVELS.index('tool')
    assert not [(path, other) for path, others in graph.items() for other in sorted(others)
                if level(other) >= level(path) and not level(other) == level(path) == tool]


def test_no_imports_form_a_circle():
    graph, done = import_graph(), set()

    def visit(path, above):
        assert path not in above, [*above, path]
        if path not in done:
            for other in graph[path]:
                visit(other, [*above, path])
            done.add(path)
    for path in graph:
        visit(path, [])


def test_preparing_data_does_not_import_jax():
    code = 'import sys, common; sys.exit("jax" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=os.path.join(ROOT, 'data'), check=True)
