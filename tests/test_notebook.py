"""notebooks/quickstart.ipynb: it runs, and the outputs that are committed are fit to be shown."""

import json
import os
import re
import shutil
import sys

import pytest
from helpers import ENV, OPTIMIZED, ROOT, STEP

NOTEBOOK = os.path.join(ROOT, 'notebooks', 'quickstart.ipynb')


def read_notebook():
    with open(NOTEBOOK, encoding='utf-8') as f:
        return json.load(f)


def outputs(notebook):
    """The text that the code cells of a notebook have printed, a str for each cell."""
    cells = [cell['outputs'] for cell in notebook['cells'] if cell['cell_type'] == 'code']
    return [''.join(''.join(o.get('text', '')) for o in cell).replace('\r\n', '\n')
            for cell in cells]


def assert_ran(cells, iters):
    """Assert that each code cell did what the text above it says."""
    assert not [text for text in cells if re.search('^error|Traceback', text, re.M)], cells
    _, _, device, prepare, train, curve, sample, resume = cells
    assert re.search(r'^\d+\.\d+.* \[\w*Device\(', device)
    assert 'train has ' in prepare and 'val has ' in prepare
    train = re.sub('.*\r', '', train)  # the progress bar of a slow evaluation
    its = re.findall(r'^iter (\d+): loss \d', train, re.M)
    assert [*map(int, its)] == [*range(0, iters + 1, 100)]
    assert int(STEP.findall(train)[-1][0]) == iters // 250 * 250  # eval_interval
    assert '| out-quickstart ' in curve
    assert sample.count('\n---------------\n') == 2 and sample.count('The ') >= 2
    assert f'Resuming training from out-quickstart, from iteration {iters + 1}' in resume
    assert f'iter {iters // 4 * 5}: loss' in resume


@pytest.mark.slow
def test_the_notebook_runs_on_a_cpu(tmp_path, monkeypatch):
    nbclient = pytest.importorskip('nbclient', reason='nbclient is not installed')
    pytest.importorskip('ipykernel', reason='ipykernel is not installed')
    import nbformat
    folder = tmp_path / 'clone'
    left_out = shutil.ignore_patterns('.*', 'out*', 'tests', 'testdata', '*.bin', '*.pkl')
    shutil.copytree(ROOT, folder, ignore=left_out)
    for name, value in (ENV | OPTIMIZED).items():  # hundreds of iterations are computed
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('QUICKSTART_ITERS', '400')
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv('PIP_NO_INDEX', '1')  # what is installed must do: the tests need it too
    monkeypatch.setenv('PATH', os.path.dirname(sys.executable), prepend=os.pathsep)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name='python3', resources={
        'metadata': {'path': str(folder / 'notebooks')}}).execute()
    assert_ran(outputs(notebook), 400)
    images = [o for cell in notebook['cells'] for o in cell.get('outputs', ())
              if 'image/png' in o.get('data', {})]
    assert len(images) == 1
    assert (folder / 'out-quickstart' / '501').is_dir()


def test_the_outputs_that_are_committed_are_those_of_one_run_without_a_machines_names():
    notebook = read_notebook()
    counts = [cell['execution_count'] for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert counts == [*range(1, len(counts) + 1)]
    texts = outputs(notebook)
    assert_ran(texts, 2000)
    assert not re.search(r'/(home|root|tmp|work|Users|content|usr)/', '\n'.join(texts)), texts
    # a page is read: not every iteration of a run, and no redrawn progress bars
    assert max(text.count('\n') for text in texts) < 100
    assert not any('\r' in text or '\x1b' in text for text in texts)
    assert os.path.getsize(NOTEBOOK) < 300_000
