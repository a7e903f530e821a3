"""configurator.py, by itself."""

import pytest

from configurator import configure


def settings():
    return {'batch_size': 12, 'learning_rate': 1e-3, 'bias': False, 'out_dir': 'out', '_private': 1, 'module': pytest}


def test_values_take_the_type_of_the_default():
    script = settings()
    config, given = configure(script, ['--batch_size=3', '--learning_rate=1', '--bias=True', '--out_dir=7'])
    assert config == {'batch_size': 3, 'learning_rate': 1.0, 'bias': True, 'out_dir': '7'}
    assert type(script['learning_rate']) is float and given == set(config)


def test_a_value_may_hold_an_equals_sign_and_quotes():
    assert configure(settings(), ['--out_dir=a=b'])[0]['out_dir'] == 'a=b'
    assert configure(settings(), ['--out_dir="a b"'])[0]['out_dir'] == 'a b'
    assert configure(settings(), ['--out_dir='])[0]['out_dir'] == ''


def test_what_is_not_given_is_not_named():
    assert configure(settings(), ['--batch_size=12'])[1] == {'batch_size'}  # set to its default, but set
    assert configure(settings(), [])[1] == set()


def test_a_config_file_is_python_and_what_it_assigns_counts_as_given(tmp_path, capsys):
    path = tmp_path / 'c.py'
    path.write_text('import time\nbatch_size = batch_size * 2\nfor i in [1]:\n    out_dir = f"x{i}"\n_hidden = 5\n')
    config, given = configure(settings(), [str(path), '--out_dir=last'])
    assert config['batch_size'] == 24 and config['out_dir'] == 'last' and given == {'batch_size', 'out_dir'}
    out = capsys.readouterr().out
    assert f'Overriding config with {path}:\nimport time\n' in out and 'Overriding: out_dir = last' in out
    assert 'WARNING' in out and 'sets i,' in out and '_hidden,' not in out


def test_a_config_file_may_set_what_another_script_knows(tmp_path, capsys):
    (tmp_path / 'c.py').write_text('max_iters = 5\nnum_samples = 2\n')  # train_jax.py's and sample_jax.py's
    assert configure(settings(), [str(tmp_path / 'c.py')])[1] == set()
    assert 'WARNING' not in capsys.readouterr().out


@pytest.mark.parametrize('source, words', [
    ('batch_size = "3"', ["batch_size expects int, got '3' (str)"]),
    ('a = 1\nb = a +', ['line 2', 'SyntaxError']),
    ('a = 1\n\nb = c', ['line 3', 'NameError', "'c'"]),
])
def test_a_broken_config_file_is_named_with_its_line(tmp_path, source, words):
    path = tmp_path / 'c.py'
    path.write_text(source)
    with pytest.raises(SystemExit) as e:
        configure(settings(), [str(path)])
    assert all(word in str(e.value) for word in words), e.value


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
def test_a_mistake_is_named(arg, words):
    with pytest.raises(SystemExit) as e:
        configure(settings(), [arg])
    assert all(word in str(e.value) for word in words), e.value
