"""configurator.py: config files and flags over a script's settings."""

import ast
import difflib
import glob
import importlib.util
import os
import shutil

import pytest
from helpers import ROOT

import configurator
from configurator import config_block, configure
from nanogpt_jax.errors import UserError


def settings():
    return {'batch_size': 12, 'learning_rate': 1e-3, 'bias': False, 'out_dir': 'out',
            '_private': 1, 'module': pytest}


def test_values_take_the_type_of_the_default():
    script = settings()
    config, given = configure(
        script, ['--batch_size=3', '--learning_rate=1', '--bias=True', '--out_dir=7'])
    assert config == {'batch_size': 3, 'learning_rate': 1.0, 'bias': True, 'out_dir': '7'}
    assert type(script['learning_rate']) is float and given == set(config)


def test_a_string_may_contain_an_equals_sign_be_quoted_or_be_empty():
    assert configure(settings(), ['--out_dir=a=b'])[0]['out_dir'] == 'a=b'
    assert configure(settings(), ['--out_dir="a b"'])[0]['out_dir'] == 'a b'
    assert configure(settings(), ['--out_dir='])[0]['out_dir'] == ''


def test_given_names_what_was_set_even_to_its_default():
    assert configure(settings(), ['--batch_size=12'])[1] == {'batch_size'}
    assert configure(settings(), [])[1] == set()


# -----------------------------------------------------------------------------
# config files

def test_a_config_file_is_run_as_python_and_what_it_assigns_is_given(tmp_path, capsys):
    path = tmp_path / 'c.py'
    path.write_text('import time\nbatch_size = batch_size * 2\n'
                    'for i in [1]:\n    out_dir = f"x{i}"\n')
    config, given = configure(settings(), [str(path), '--out_dir=last'])
    assert config['batch_size'] == 24 and config['out_dir'] == 'last'
    assert given == {'batch_size', 'out_dir'}
    out = capsys.readouterr().out
    assert f'Overriding config with {path}:\nimport time\n' in out
    assert 'Overriding: out_dir = last' in out and 'WARNING' not in out


def test_a_name_in_a_config_file_that_is_nearly_a_setting_is_a_warning(tmp_path, capsys):
    path = tmp_path / 'mine.py'
    path.write_text('bach_size = 5\n')
    assert configure(settings(), [str(path)])[1] == set()
    warning = f'WARNING: {path} sets bach_size, which is no setting; did you mean batch_size?'
    assert warning in capsys.readouterr().out.splitlines()


def test_other_names_in_a_config_file_are_no_warning(tmp_path, capsys):
    # settings of train_jax.py and of sample_jax.py, and names of the file's own
    (tmp_path / 'c.py').write_text('max_iters = 5\nnum_samples = 2\ntokens = 7\n_hidden = 8\n')
    assert configure(settings(), [str(tmp_path / 'c.py')])[1] == set()
    assert 'WARNING' not in capsys.readouterr().out


def settings_by_script():
    """{path: names of the settings} of every script and tool that calls configure."""
    found = {}
    for path in glob.glob(f'{ROOT}/*.py') + glob.glob(f'{ROOT}/tools/*.py'):
        with open(path, encoding='utf-8') as f:
            if '\nfrom configurator import configure\n' not in f.read():
                continue
        nodes = ast.parse(config_block(path)).body
        found[os.path.relpath(path, ROOT)] = {
            target.id for node in nodes if isinstance(node, ast.Assign) for target in node.targets}
    return found


def test_no_setting_of_one_script_is_nearly_one_of_another():
    # so that a config file for several scripts causes no warning in any of them
    found = settings_by_script()
    assert len(found) == 8 and all(found.values())
    near = [(one, name, other, close) for one in found for other in found
            for name in sorted(found[one] - found[other])
            if (close := difflib.get_close_matches(name, found[other], 1, 0.85))]
    assert not near


def test_a_script_beside_it_without_settings_does_not_matter(tmp_path, capsys):
    shutil.copy(configurator.__file__, tmp_path / 'configurator.py')
    (tmp_path / 'x_jax.py').write_text('print(1)\n')
    (tmp_path / 'c.py').write_text('max_iters = 5\n')
    spec = importlib.util.spec_from_file_location('copied', tmp_path / 'configurator.py')
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.configure(settings(), [str(tmp_path / 'c.py'), '--batch_size=3'])[1] == {
        'batch_size'}
    assert 'WARNING' not in capsys.readouterr().out


@pytest.mark.parametrize('source, words', [
    ('batch_size = "3"', ["batch_size expects int, got '3' (str)"]),
    ('a = 1\nb = a +', ['line 2', 'SyntaxError']),
    ('a = 1\n\nb = c', ['line 3', 'NameError', "'c'"]),
])
def test_an_error_in_a_config_file_names_its_line_or_setting(tmp_path, source, words):
    path = tmp_path / 'c.py'
    path.write_text(source)
    with pytest.raises(UserError) as e:
        configure(settings(), [str(path)])
    assert all(word in str(e.value) for word in words), e.value
    assert not str(e.value).startswith('error')


# -----------------------------------------------------------------------------
# flags

@pytest.mark.parametrize('arg, words', [
    ('--bach_size=3', ['--bach_size', 'did you mean --batch_size?']),
    ('--_private=3', ['unknown flag --_private']),
    ('--module=3', ['unknown flag --module']),
    ('--batch_size=True', ['batch_size expects int, got True (bool)']),
    ('--learning_rate=fast', ["learning_rate expects float, got 'fast' (str)"]),
    ('--batch_size=' + '9' * 400 + '.0', ['inf (float)']),
    ('--learning_rate=' + '9' * 400, ['learning_rate expects float']),
    ('--batch_size', ['--key=value']),
    ('-b=3', ['-b=3', '--key=value']),
])
def test_a_wrong_flag_is_named_with_what_is_allowed(arg, words):
    with pytest.raises(UserError) as e:
        configure(settings(), [arg])
    assert all(word in str(e.value) for word in words), e.value
    assert not str(e.value).startswith('error')
