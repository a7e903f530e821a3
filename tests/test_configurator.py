"""configurator.py: config files and flags over a script's settings."""

import ast
import difflib
import glob
import io
import os
import sys

import pytest
from helpers import ROOT

from configurator import config_block, configure, override
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


def test_a_flag_without_a_value_means_true_where_true_or_false_is_expected(tmp_path):
    config, given = configure(settings(), ['--bias', '--batch_size=3'])
    assert config['bias'] is True and given == {'bias', 'batch_size'}
    with pytest.raises(UserError, match='config file False .* --key=value'):
        configure(settings(), ['--bias', 'False'])


def test_a_character_that_the_terminal_lacks_is_printed_as_a_question_mark(tmp_path, monkeypatch):
    (tmp_path / 'c.py').write_text('batch_size = 3 # \u20ac\n', encoding='utf-8')
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', terminal)
    configure(settings(), [str(tmp_path / 'c.py'), '--out_dir=caf\u00e9'])
    terminal.flush()
    assert b'batch_size = 3 # ?' in terminal.buffer.getvalue()


def test_help_has_the_docstring_and_the_settings_with_their_comments(monkeypatch, capsys):
    script = {'__doc__': '\nTrain a GPT on every device', '__file__': f'{ROOT}/train_jax.py'}
    with pytest.raises(SystemExit):
        configure(script, ['--help'])
    printed = capsys.readouterr().out
    assert printed.startswith('Train a GPT on every device') and 'batch_size = 12 #' in printed
    # sample_jax.py prints to standard error: its help stays on standard output
    monkeypatch.setattr(sys, '__stdout__', io.StringIO())
    monkeypatch.setattr(sys, 'stdout', sys.stderr)
    with pytest.raises(SystemExit):
        configure(script, ['--help'])
    assert sys.__stdout__.getvalue() == printed


def test_given_names_what_was_set_even_to_its_default():
    assert configure(settings(), ['--batch_size=12'])[1] == {'batch_size'}
    assert configure(settings(), [])[1] == set()


def test_override_sets_the_settings_of_a_script_from_a_dict():
    script = settings()
    override(script, {'batch_size': 3, 'learning_rate': 1, 'module': 2, 'other': 4})
    assert script == settings() | {'batch_size': 3, 'learning_rate': 1.0}
    with pytest.raises(UserError, match="batch_size expects int, got 'x'"):
        override(script, {'batch_size': 'x'})


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


def test_a_config_file_sees_the_script_flags_and_earlier_config_files(tmp_path):
    (tmp_path / 'a.py').write_text('steps = 5\ndef twice(n):\n    return 2 * n\n'
                                   'batch_size = twice(batch_size)\n')
    (tmp_path / 'b.py').write_text('out_dir = os.path.join(out_dir, str(batch_size + steps))\n'
                                   'exec("learning_rate = 2e-3")\n')
    script = settings() | {'os': os}
    config, given = configure(script, ['--batch_size=7', str(tmp_path / 'a.py'), '--out_dir=x',
                                       str(tmp_path / 'b.py')])
    assert config['out_dir'] == os.path.join('x', '19') and config['learning_rate'] == 2e-3
    assert given == {'batch_size', 'out_dir', 'learning_rate'}


def test_a_config_file_can_change_nothing_but_settings(tmp_path):
    (tmp_path / 'c.py').write_text('os = 1\nprint = 2\nbatch_size = 3\n_private = 4\n'
                                   'def helper():\n    pass\ndel module\n__builtins__ = {}\n')
    script = settings() | {'os': os}
    before = dict(script)
    configure(script, [str(tmp_path / 'c.py')])
    assert script == before | {'batch_size': 3}


@pytest.mark.parametrize('content', ['\ufeffbatch_size = 3', 'batch_size: int = 3',
                                     'batch_size = 3e0', 'globals().update(batch_size=3)'])
def test_a_config_file_may_have_a_byte_order_mark_and_set_in_any_way(tmp_path, content):
    (tmp_path / 'c.py').write_text(content, encoding='utf-8')
    config, given = configure(settings(), [str(tmp_path / 'c.py')])
    assert config['batch_size'] == 3 and type(config['batch_size']) is int
    assert given == {'batch_size'}


@pytest.mark.parametrize('content, words', [
    (b'x = 1 # caf\xe9', ['not UTF-8']), (bytes(99), ['null bytes'])])
def test_what_is_no_config_file_is_refused_before_it_is_printed(tmp_path, capsys, content, words):
    (tmp_path / 'train.bin').write_bytes(content)
    with pytest.raises(UserError) as e:
        configure(settings(), [str(tmp_path / 'train.bin')])
    assert all(word in str(e.value) for word in words), e.value
    assert not capsys.readouterr().out


def test_a_config_file_that_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'c.py')  # would be waited for
    for path in (tmp_path / 'c.py', tmp_path, '', 'a\0b.py', 'a' * 5000, 'absent.py'):
        with pytest.raises(UserError, match='^the config file .*does not exist, or is not a file'):
            configure(settings(), [str(path)])


def test_a_name_in_a_config_file_that_is_nearly_a_setting_is_a_warning(tmp_path, capsys):
    path = tmp_path / 'mine.py'
    path.write_text('bach_size = 5\n')
    assert configure(settings(), [str(path)])[1] == set()
    warning = f'WARNING: {path} sets bach_size, which is not a setting; did you mean batch_size?'
    assert warning in capsys.readouterr().out.splitlines()
    # settings of train_jax.py and of sample_jax.py, and names of the file's own
    (tmp_path / 'c.py').write_text('max_iters = 5\nnum_samples = 2\ntokens = 7\n_hidden = 8\n')
    assert configure(settings(), [str(tmp_path / 'c.py')])[1] == set()
    assert 'WARNING' not in capsys.readouterr().out


def settings_by_script():
    """{path: names of the settings} of every script and tool that calls configure."""
    found = {}
    for path in glob.glob(f'{ROOT}/*.py') + glob.glob(f'{ROOT}/tools/*.py'):
        with open(path, encoding='utf-8') as f:
            if '\nfrom configurator import configure' not in f.read():
                continue
        nodes = ast.parse(config_block(path)).body
        found[os.path.relpath(path, ROOT)] = {
            target.id for node in nodes if isinstance(node, ast.Assign) for target in node.targets}
    return found


def test_no_setting_of_one_script_is_nearly_one_of_another():
    # so that a config file for several scripts causes no warning in any of them
    found = settings_by_script()
    assert len(found) == 9 and all(found.values())
    near = [(one, name, other, close) for one in found for other in found
            for name in sorted(found[one] - found[other])
            if (close := difflib.get_close_matches(name, found[other], 1, 0.85))]
    assert not near


@pytest.mark.parametrize('source, words', [
    ('batch_size = "3"', ["batch_size expects int, got '3' (str)"]),
    ('a = 1\nb = a +', ['line 2', 'SyntaxError']),
    ('a = 1\n\nb = c', ['line 3', 'NameError', "'c'"]),
    ('del batch_size', ['batch_size expects int, got None']),
    ('import math as learning_rate', ['learning_rate expects float', '(module)']),
    ('learning_rate = 1e400', ['learning_rate is inf']),
])
def test_an_error_in_a_config_file_names_its_line_or_setting(tmp_path, source, words):
    path = tmp_path / 'c.py'
    path.write_text(source)
    with pytest.raises(UserError) as e:
        configure(settings(), [str(path)])
    assert all(word in str(e.value) for word in [*words, str(path)]), e.value
    assert not str(e.value).startswith('error')


# -----------------------------------------------------------------------------
# flags

@pytest.mark.parametrize('arg, words', [
    ('--bach_size=3', ['--bach_size', 'did you mean --batch_size?']),
    ('--_private=3', ['unknown flag --_private']),
    ('--module=3', ['unknown flag --module']),
    ('--batch_size=True', ['batch_size expects int, got True (bool)']),
    ('--learning_rate=fast', ["learning_rate expects float, got 'fast' (str)"]),
    ('--learning_rate=nan', ["learning_rate expects float, got 'nan' (str)"]),
    ('--learning_rate=1e400', ['learning_rate is inf: nan and inf are not allowed']),
    ('--batch_size=' + '(' * 9999, ["got '(((", '...']),
    ('--batch_size', ['--key=value']),
    ('--batch-size=3', ['did you mean --batch_size?']),
    ('-b=3', ['-b=3', '--key=value']),
])
def test_a_wrong_flag_is_named_with_what_is_allowed(arg, words):
    with pytest.raises(UserError) as e:
        configure(settings(), [arg])
    assert all(word in str(e.value) for word in words), e.value
    assert not str(e.value).startswith('error')
