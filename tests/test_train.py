"""Whole runs of train_jax.py from the command line."""

import os
import pickle
import re

import jax
import numpy as np
import pytest
from conftest import ITER, ROOT, STEP, TINY, one_line_error, run, saved, train

import jax_devices
from jax_checkpoint import steps_on_disk
from test_jax_transformer import make_step, tiny, tokens


# -----------------------------------------------------------------------------
# a run

def test_log_lines_are_nanogpts_and_the_loss_falls(folder):
    # --compile and --backend are nanoGPT's; float16 must be accepted on a CPU
    out = train(folder, '--max_iters=20', '--compile=False', '--backend=gloo', '--dtype=float16')
    iters, steps = ITER.findall(out), STEP.findall(out)
    assert [int(i[0]) for i in iters] == list(range(21))
    assert [int(s[0]) for s in steps] == [0, 4, 8, 12, 16, 20]
    assert all(i[3] == '-100.00' for i in iters[:5]) and all(float(i[3]) >= 0 for i in iters[5:])
    assert float(steps[-1][2]) < float(steps[0][2]) - 0.3  # log(20) = 3.0 falls towards log(2) = 0.7
    for line in ('platform: cpu, devices: 1 (cpu)', 'tokens per iteration will be: 128',
                 'found vocab_size = 20 (inside data/tiny/meta.pkl)', 'Initializing a new model from scratch',
                 'number of parameters: 0.03M', 'num decayed parameter tensors: 10, with 25,728 parameters',
                 'num non-decayed parameter tensors: 5, with 160 parameters', 'saving checkpoint to out_jax',
                 '--compile has no counterpart here', '--backend has no counterpart here',
                 'computing in float32, as nanoGPT does on the cpu, not in float16'):
        assert line in out, line
    assert len(re.findall(r'^compiled in \d+\.\d s$', out, re.M)) == 1
    # the latest is the state after the last iteration; the best is kept beside it
    steps_kept = set(steps_on_disk(folder / 'out_jax'))
    best = min(steps[1:], key=lambda s: float(s[2]))
    assert steps_kept == {int(best[0]), 21}


def test_log_interval_prints_the_mean_time_of_what_it_skipped(folder):
    out = train(folder, '--max_iters=6', '--log_interval=3', '--eval_interval=100')
    assert [int(i[0]) for i in ITER.findall(out)] == [0, 3, 6]


def test_lines_come_in_nanogpts_order(folder):
    # though a step's loss is read only once the next step is queued
    out = train(folder, '--max_iters=9', '--log_interval=3')
    lines = re.findall(r'^(step|iter) (\d+)', out, re.M)
    assert lines == [('step', '0'), ('iter', '0'), ('iter', '3'), ('step', '4'), ('iter', '6'), ('step', '8'), ('iter', '9')]


def test_compiled_programs_are_kept_and_one_flag_turns_that_off(folder):
    # a cache that the tests share would win
    env = {'XDG_CACHE_HOME': str(folder / 'cache'), 'JAX_COMPILATION_CACHE_DIR': ''}
    train(folder, '--max_iters=0', '--compilation_cache=False', '--out_dir=one', **env)
    assert not (folder / 'cache').exists()
    train(folder, '--max_iters=0', '--out_dir=two', **env)
    kept = sorted((folder / 'cache' / 'nanogpt-jax' / jax_devices.cpu_key()).glob('*train_step*-cache'))
    assert len(kept) == 1
    train(folder, '--max_iters=0', '--out_dir=three', **env)
    assert kept == sorted(kept[0].parent.glob('*train_step*-cache'))
    # where the folder cannot be made the run goes on without
    (folder / 'file').write_text('')
    assert 'are not kept for the next start' in train(folder, '--max_iters=0', '--out_dir=four', **env | {
        'XDG_CACHE_HOME': str(folder / 'file')})


def test_no_memory_is_one_line_that_names_what_helps(capsys):
    error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nand much more')
    jax_devices.report_user_error(type(error), error, None)
    line, = capsys.readouterr().err.splitlines()
    for word in ('allocating 99 bytes', '--batch_size', '--gradient_accumulation_steps', '--remat=True'):
        assert word in line


def test_only_improvements_are_kept_when_asked(folder):
    # a learning rate of 0 leaves the loss where it is: nothing improves after the first evaluation
    out = train(folder, '--max_iters=8', '--always_save_checkpoint=False', '--learning_rate=0.0', '--min_lr=0.0')
    assert 'saving checkpoint' not in out and steps_on_disk(folder / 'out_jax') == [9]


def test_a_second_run_does_not_overwrite_the_first(folder):
    train(folder, '--max_iters=4')
    before = sorted(os.listdir(folder / 'out_jax'))
    result = run(folder, 'train_jax.py', *TINY)
    assert result.returncode == 1 and '--init_from=resume' in result.stderr and sorted(os.listdir(folder / 'out_jax')) == before


def test_resuming_on_other_characters_is_refused(folder):
    train(folder, '--max_iters=2')
    meta = pickle.loads((folder / 'data' / 'tiny' / 'meta.pkl').read_bytes())
    meta['itos'] = dict(enumerate(reversed(meta['itos'].values())))
    (folder / 'data' / 'tiny' / 'meta.pkl').write_bytes(pickle.dumps(meta))
    result = run(folder, 'train_jax.py', *TINY, '--init_from=resume', '--max_iters=5')
    assert result.returncode == 1 and 'other characters' in result.stderr


def test_a_meta_file_without_characters_trains_but_cannot_be_sampled(folder):
    (folder / 'data' / 'tiny' / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 24}))
    assert 'found vocab_size = 24' in train(folder, '--max_iters=2')
    one_line_error(run(folder, 'sample_jax.py', '--device=cpu'), 'itos')


def test_config_files_and_flags_win_in_their_order(folder):
    (folder / 'mine.py').write_text('import math\nmax_iters = 2\nlearning_rate = 1 # an int\nmax_itres = 3\n')
    out = train(folder, '--max_iters=1', 'mine.py', '--log_interval=2')
    assert [int(i[0]) for i in ITER.findall(out)] == [0, 2]
    assert 'WARNING: mine.py sets max_itres, which no script knows; did you mean max_iters?' in out


@pytest.mark.parametrize('name', sorted(os.listdir(os.path.join(ROOT, 'config'))))
def test_the_configs_set_nothing_unknown(folder, name):
    result = run(folder, 'train_jax.py', os.path.join(ROOT, 'config', name), '--dataset=absent', '--out_dir=out')
    assert 'WARNING' not in result.stdout and 'data/absent/train.bin does not exist' in result.stderr


def test_wandb_logs_offline_and_a_resumed_run_keeps_its_id(folder):
    pytest.importorskip('wandb', reason='wandb is not installed')
    env = dict(WANDB_MODE='offline', WANDB_SILENT='true')
    train(folder, '--max_iters=4', '--wandb_log=True', '--wandb_project=p', **env)
    train(folder, '--init_from=resume', '--max_iters=6', '--wandb_log=False', **env)
    train(folder, '--init_from=resume', '--max_iters=8', '--wandb_log=True', **env)
    runs = [name for name in os.listdir(folder / 'wandb') if name.startswith('offline-run-')]
    assert len(runs) == 2 and len({name.split('-')[-1] for name in runs}) == 1  # resumed under its own id


# -----------------------------------------------------------------------------
# resume and evaluation

@pytest.mark.parametrize('stop, always', [(7, True), (6, False)])
def test_a_resumed_run_ends_with_the_same_bits(folder, stop, always):
    # stopped between evaluations, and just before one, whose result, the best of the run, belongs to its checkpoint
    args = ['--dropout=0.2', f'--always_save_checkpoint={always}', '--eval_interval=3', '--learning_rate=0.1', '--min_lr=0.1']
    whole = train(folder, *args, '--max_iters=8', '--out_dir=whole')
    first = train(folder, *args, f'--max_iters={stop - 1}', '--out_dir=parts')
    # nothing else is given: the settings come from the checkpoint
    result = run(folder, 'train_jax.py', '--init_from=resume', '--out_dir=parts', '--device=cpu', '--max_iters=8')
    assert result.returncode == 0, result.stderr
    assert f'differs from the checkpoint: max_iters {stop - 1} -> 8\n' in result.stdout
    losses = {**dict((i[0], i[1]) for i in ITER.findall(first)), **dict((i[0], i[1]) for i in ITER.findall(result.stdout))}
    assert losses == {i[0]: i[1] for i in ITER.findall(whole)}
    assert [int(i[0]) for i in ITER.findall(result.stdout)] == list(range(stop, 9))  # none skipped, none repeated
    state, meta = saved(folder, 'whole', 9)
    again, meta_again = saved(folder, 'parts', 9)
    np.testing.assert_equal(state, again)
    assert meta['best_val_loss'] == meta_again['best_val_loss']
    assert sorted(os.listdir(folder / 'whole')) == sorted(os.listdir(folder / 'parts'))


def test_dropout_follows_the_seed():
    x = tokens(2, 1, 16)
    losses = []
    for seed in (0, 1):
        step, state = make_step(tiny(dropout=0.5), seed=seed)
        losses.append(float(step(state, x, x, 3)[1]['loss']))
    assert losses[0] != losses[1]


def test_evaluation_does_not_disturb_training(folder):
    train(folder, '--max_iters=5', '--dropout=0.2', '--eval_interval=2', '--out_dir=often')
    train(folder, '--max_iters=5', '--dropout=0.2', '--eval_interval=100', '--eval_iters=1', '--out_dir=rarely')
    np.testing.assert_equal(saved(folder, 'often', 6)[0], saved(folder, 'rarely', 6)[0])


def test_eval_only_evaluates_once_and_writes_nothing(folder):
    out = train(folder, '--max_iters=4')
    before = sorted(os.listdir(folder / 'out_jax'))
    evaluated = train(folder, '--init_from=resume', '--eval_only=True', '--seed=7')
    assert STEP.findall(evaluated) == STEP.findall(train(folder, '--init_from=resume', '--eval_only=True'))  # whatever the seed
    assert not ITER.findall(evaluated) and len(STEP.findall(evaluated)) == 1
    assert sorted(os.listdir(folder / 'out_jax')) == before
    scratch = train(folder, '--eval_only=True', '--out_dir=none')
    assert STEP.findall(scratch)[0] == STEP.findall(out)[0] and not (folder / 'none').exists()


def test_a_finished_run_has_nothing_left_to_train(folder):
    train(folder, '--max_iters=2')
    out = train(folder, '--init_from=resume', '--max_iters=2')
    assert 'nothing left to train' in out and not ITER.findall(out)


def test_a_smaller_block_size_crops_on_resume_and_a_larger_is_refused(folder):
    train(folder, '--max_iters=2')
    out = train(folder, '--init_from=resume', '--block_size=8', '--max_iters=3', '--n_layer=5')
    assert 'block_size 16 -> 8' in out and 'n_layer 2 (kept' in out
    state, meta = saved(folder, 'out_jax', 4)
    assert meta['model_args']['block_size'] == 8
    assert state['params']['transformer']['wpe']['embedding'].shape == (8, 32)
    result = run(folder, 'train_jax.py', '--init_from=resume', '--device=cpu', '--block_size=16')
    assert result.returncode == 1 and 'block_size=16 is larger' in result.stderr


# -----------------------------------------------------------------------------
# several devices

def test_eight_devices_train_like_one(folder):
    args = ['--max_iters=6', '--gradient_accumulation_steps=4']
    one = train(folder, *args, '--out_dir=one')
    eight = train(folder, *args, '--out_dir=eight', XLA_FLAGS='--xla_force_host_platform_device_count=8')
    assert 'devices: 8' in eight and 'tokens per iteration will be: 256' in eight
    a, b = (ITER.findall(out) + STEP.findall(out) for out in (one, eight))
    assert len(a) == len(b) == 7 + 2
    # sums over devices have another order; after 6 steps that is at most the last of the four printed digits
    np.testing.assert_allclose([float(line[1]) for line in a], [float(line[1]) for line in b], atol=1.01e-4)


def test_devices_that_rows_do_not_divide_are_left_out(folder):
    out = train(folder, '--max_iters=1', '--batch_size=3', '--gradient_accumulation_steps=1',
                XLA_FLAGS='--xla_force_host_platform_device_count=8')
    assert 'using 3 of 8 devices: 3 rows a step cannot be shared equally by more' in out


# -----------------------------------------------------------------------------
# a user's mistakes: one line, exit code 1, no traceback

@pytest.mark.parametrize('args, words', [
    (['--bach_size=3'], ['unknown flag --bach_size', 'did you mean --batch_size?']),
    (['--batch_size=3.5'], ['batch_size expects int, got 3.5 (float)']),
    (['--bias=1'], ['bias expects bool, got 1 (int)', 'True or False']),
    (['--batch_size', '3'], ['--batch_size has no value', '--key=value, as in --batch_size=12']),
    (['config/absent.py'], ['config/absent.py']),
    (['--dataset=absent'], ['data/absent/train.bin does not exist', 'data/absent/prepare.py']),
    (['--block_size=4000'], ['train.bin', '4001']),
    (['--n_head=3'], ['n_embd (32) must be a multiple of n_head (3)']),
    (['--device=mps'], ['mps', '--device=cpu']),
    (['--device=tpu'], ["'tpu'", '--device=cpu', 'requirements_jax.txt']),
    (['--init_from=resume', '--out_dir=absent'], ['absent does not exist']),
    (['--batch_size=0'], ['batch_size is 0', 'at least 1']),
    (['--gradient_accumulation_steps=-1'], ['gradient_accumulation_steps is -1']),
    (['--eval_interval=0'], ['eval_interval is 0']),
    (['--log_interval=0'], ['log_interval is 0']),
    (['--eval_iters=0'], ['eval_iters is 0']),
    (['--max_iters=-1'], ['max_iters is -1']),
    (['--learning_rate=-1.0'], ['learning_rate is -1.0']),
    (['--learning_rate=1e400'], ['learning_rate is inf']),
    (['--beta2=1.0'], ['beta2 is 1.0', 'below 1']),
    (['--seed=-1'], ['seed is -1']),
    (['--seed=4294967296'], ['seed is 4294967296', 'below']),
    (['--dtype=bf16'], ["'bf16'", 'bfloat16']),
    (['--n_head=0'], ['n_head is 0']),
    (['--n_embd=0'], ['n_embd is 0']),
    (['--attention=flash'], ["'flash'", 'auto, cudnn or xla']),
    (['--attention=cudnn'], ['NVIDIA', '--attention=xla']),
    (['--n_layer=-2'], ['n_layer is -2']),
    (['--block_size=0'], ['block_size is 0']),
    (['--out_dir=data/tiny/train.bin'], ['cannot write to data/tiny/train.bin', '--out_dir']),
    (['--init_from=scrach'], ["'scrach'", 'scratch', 'resume', 'gpt2-xl']),
])
def test_a_mistake_is_one_line(folder, args, words):
    result = run(folder, 'train_jax.py', *TINY, *args)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith('error: '), result.stderr
    for word in words:
        assert word in result.stderr
    assert not (folder / 'absent').exists() and not (folder / 'out_jax').exists()


@pytest.mark.parametrize('content, words', [
    (b'', ['val.bin has 0 bytes', '17']),
    (b'\0' * 101, ['val.bin has 101 bytes', 'two bytes each']),
    (b'\0\0' * 99 + b'\x14\0', ['val.bin holds the token id 20', 'ends at 19']),
])
def test_unusable_data_is_one_line(folder, content, words):
    (folder / 'data' / 'tiny' / 'val.bin').write_bytes(content)
    result = run(folder, 'train_jax.py', *TINY)
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert not (folder / 'out_jax').exists()


@pytest.mark.parametrize('content, words', [
    (b'no pickle', ['meta.pkl', 'prepare.py']),
    (b'cos\nsystem\n(S"touch executed"\ntR.', ['os.system', 'only plain Python data']),
])
def test_a_meta_file_that_is_no_plain_data_is_refused(folder, content, words):
    (folder / 'data' / 'tiny' / 'meta.pkl').write_bytes(content)
    result = run(folder, 'train_jax.py', *TINY)
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert not (folder / 'executed').exists()
