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


def configured(content, tmp_path, script=None):
    """configure with a config file of this content."""
    path = tmp_path / 'c.py'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return configure(script or settings(), [str(path)])


# -----------------------------------------------------------------------------
# flags

def test_values_take_the_type_of_the_default_and_given_has_the_names_that_were_set():
    script = settings()
    config, given = configure(
        script, ['--batch_size=3', '--learning_rate=1', '--bias', '--out_dir=7'])
    assert config == {'batch_size': 3, 'learning_rate': 1.0, 'bias': True, 'out_dir': '7'}
    assert type(script['learning_rate']) is float and given == set(config)
    assert configure(settings(), ['--batch_size=12'])[1] == {'batch_size'}  # its default
    # a string may contain an equals sign, be quoted, or be empty
    for text, value in (('a=b', 'a=b'), ('"a b"', 'a b'), ('', '')):
        assert configure(settings(), [f'--out_dir={text}'])[0]['out_dir'] == value


@pytest.mark.parametrize('arg, words', [
    ('--bach_size=3', ['--bach_size', 'did you mean --batch_size?']),
    ('--_private=3', ['unknown flag --_private']),
    ('--module=3', ['unknown flag --module']),
    ('--batch_size=True', ['batch_size expects int, got True (bool)']),
    ('--learning_rate=fast', ["learning_rate expects float, got 'fast' (str)"]),
    ('--learning_rate=1e400', ['learning_rate is inf: nan and inf are not allowed']),
    ('--batch_size=' + '(' * 9999, ["got '(((", '...']),
    ('--batch_size', ['--key=value']),
    ('-b=3', ['-b=3', '--key=value']),
])
def test_the_error_for_a_wrong_flag_names_it_and_a_right_one(arg, words):
    with pytest.raises(UserError) as e:
        configure(settings(), [arg])
    assert all(word in str(e.value) for word in words), e.value
    assert not str(e.value).startswith('error')


def settings_by_script():
    """{path: names of the settings} of every script and tool that calls configure."""
    found = {}
    for path in glob.glob(f'{ROOT}/*.py') + glob.glob(f'{ROOT}/tools/*.py'):
        with open(path, encoding='utf-8') as f:
            if '\nfrom configurator import configure' not in f.read():
                continue
        nodes = ast.parse(config_block(path)).body
        found[path] = {target.id for node in nodes if isinstance(node, ast.Assign)
                       for target in node.targets}
    return found


def test_help_is_the_docstring_and_the_settings_with_their_comments(monkeypatch, capsys):
    for path in settings_by_script():
        script = {'__doc__': '\nTrain a GPT', '__file__': path}
        with pytest.raises(SystemExit) as e:
            configure(script, ['--help'])
        printed = capsys.readouterr().out
        assert not e.value.code and printed.startswith('Train a GPT\n')
        assert 'import' not in printed
        assert '\n\nEvery setting below is a flag, --key=value:\n\n' in printed
    # sample_jax.py prints to standard error: its help stays on standard output
    monkeypatch.setattr(sys, '__stdout__', io.StringIO())
    monkeypatch.setattr(sys, 'stdout', sys.stderr)
    with pytest.raises(SystemExit):
        configure(script, ['--help'])
    assert sys.__stdout__.getvalue() == printed


def test_no_setting_of_one_script_is_nearly_one_of_another():
    # so that a config file for several scripts causes no warning in any of them
    found = settings_by_script()
    assert all(found.values())
    assert {os.path.basename(path) for path in found} >= {'train_jax.py', 'sizing.py'}
    near = [(one, name, other, close) for one in found for other in found
            for name in sorted(found[one] - found[other])
            if (close := difflib.get_close_matches(name, found[other], 1, 0.85))]
    assert not near


def test_override_sets_the_settings_of_a_script_from_a_dict():
    script = settings()
    override(script, {'batch_size': 3, 'learning_rate': 1, 'module': 2, 'other': 4})
    assert script == settings() | {'batch_size': 3, 'learning_rate': 1.0}
    with pytest.raises(UserError, match="batch_size expects int, got 'x'"):
        override(script, {'batch_size': 'x'})


# -----------------------------------------------------------------------------
# config files

def test_a_config_file_sees_the_script_flags_and_earlier_config_files(tmp_path, capsys):
    (tmp_path / 'a.py').write_text('steps = 5\ndef twice(n):\n    return 2 * n\n'
                                   'batch_size = twice(batch_size)\n')
    (tmp_path / 'b.py').write_text('out_dir = os.path.join(out_dir, str(batch_size + steps))\n'
                                   'exec("learning_rate = 2e-3")\n')
    config, given = configure(settings() | {'os': os}, [
        '--batch_size=7', str(tmp_path / 'a.py'), '--out_dir=x', str(tmp_path / 'b.py'), '--bias'])
    assert config == {'batch_size': 14, 'learning_rate': 2e-3, 'bias': True,
                      'out_dir': os.path.join('x', '19')}
    assert given == {'batch_size', 'out_dir', 'learning_rate', 'bias'}
    out = capsys.readouterr().out
    assert f'Overriding config with {tmp_path}/a.py:\nsteps = 5\n' in out
    assert 'Overriding: out_dir = x' in out and 'WARNING' not in out


def test_a_config_file_can_change_nothing_but_settings(tmp_path):
    script = settings() | {'os': os}
    before = dict(script)
    configured('os = 1\nprint = 2\nbatch_size = 3\n_private = 4\ndef helper():\n    pass\n'
               'del module\n__builtins__ = {}\n', tmp_path, script)
    assert script == before | {'batch_size': 3}


@pytest.mark.parametrize('content', ['\ufeffbatch_size = 3', 'batch_size: int = 3',
                                     'batch_size = 3e0', 'globals().update(batch_size=3)'])
def test_a_config_file_may_have_a_byte_order_mark_and_set_in_any_way(tmp_path, content):
    config, given = configured(content, tmp_path)
    assert config['batch_size'] == 3 and type(config['batch_size']) is int
    assert given == {'batch_size'}


def test_a_character_that_the_terminal_lacks_is_printed_as_a_question_mark(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', terminal)
    configured('batch_size = 3 # \u20ac\n', tmp_path)
    terminal.flush()
    assert b'batch_size = 3 # ?' in terminal.buffer.getvalue()


@pytest.mark.parametrize('content, words', [
    ('batch_size = "3"', ["batch_size expects int, got '3' (str)"]),
    ('a = 1\nb = a +', ['line 2', 'SyntaxError']),
    ('a = 1\n\nb = c', ['line 3', 'NameError', "'c'"]),
    ('del batch_size', ['batch_size expects int, got None']),
    ('learning_rate = 1e400', ['learning_rate is inf']),
    ("out_dir = 'a\\0b'", ['out_dir is', 'without NUL']),
    ("out_dir = '\\ud800'", ['out_dir is', 'not UTF-8 text']),
    (b'x = 1 # caf\xe9', ['as UTF-8 text']), (bytes(99), ['null bytes'])])
def test_an_error_in_a_config_file_names_its_line_or_setting(tmp_path, capsys, content, words):
    with pytest.raises(UserError) as e:
        configured(content, tmp_path)
    assert all(word in str(e.value) for word in [*words, 'c.py']), e.value
    assert not isinstance(content, bytes) or not capsys.readouterr().out


def test_a_config_file_that_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'fifo.py')  # would be waited for
    for path in (tmp_path / 'fifo.py', tmp_path, '', 'a\0b.py', 'a' * 5000, 'False'):
        with pytest.raises(UserError, match='^the config file .*does not exist, or is not a file'):
            configure(settings(), [str(path)])


def test_a_name_in_a_config_file_that_is_nearly_a_setting_is_a_warning(tmp_path, capsys):
    assert configured('bach_size = 5\n', tmp_path)[1] == set()
    warning = (f'WARNING: {tmp_path}/c.py sets bach_size, which is not a setting; '
               'did you mean batch_size?')
    assert warning in capsys.readouterr().out.splitlines()
    # settings of train_jax.py and of sample_jax.py, and names of the file's own
    assert configured('max_iters = 5\nnum_samples = 2\ntokens = 7\n_hidden = 8\n', tmp_path)[1] \
        == set()
    assert 'WARNING' not in capsys.readouterr().out
