"""Complete runs of train_jax.py from the command line."""

import os
import pickle
import re
import sys

import jax
import numpy as np
import pytest
from helpers import ITER, ROOT, STEP, TINY, one_line_error, run, run_inside, saved, train

import jax_train_utils as utils
from nanogpt_jax import metrics
from nanogpt_jax.checkpoint import steps_on_disk
from nanogpt_jax.devices import cpu_key
from nanogpt_jax.errors import UserError, optional_import, report_user_error
from test_jax_transformer import make_step, tiny, tokens

EIGHT_DEVICES = '--xla_force_host_platform_device_count=8'


# -----------------------------------------------------------------------------
# a run

def test_log_lines_are_nanogpts_and_the_loss_falls(folder):
    # --compile and --backend are nanoGPT's; float16 must be accepted on a CPU
    out = train(folder, '--max_iters=20', '--compile=False', '--backend=gloo', '--dtype=float16')
    iters, steps = ITER.findall(out), STEP.findall(out)
    assert [int(i[0]) for i in iters] == list(range(21))
    assert [int(s[0]) for s in steps] == [0, 4, 8, 12, 16, 20]
    assert {i[3] for i in iters} == {'nan'}  # a CPU's peak is not known
    # log(20) = 3.0 falls towards log(2) = 0.7
    assert float(steps[-1][2]) < float(steps[0][2]) - 0.3
    for line in ('platform: cpu, devices: 1 (cpu)', 'tokens per iteration will be: 128',
                 'found vocab_size = 20 (inside data/tiny/meta.pkl)',
                 'Initializing a new model from scratch', 'number of parameters: 0.01M',
                 'num decayed parameter tensors: 6, with 13,440 parameters',
                 'num non-decayed parameter tensors: 3, with 96 parameters',
                 'saving checkpoint to out_jax', '--compile has no counterpart here',
                 '--backend has no counterpart here',
                 'computing in float32, as nanoGPT does on this device, not in float16',
                 'TFLOP/s, the float32 matmul rate measured on this CPU'):
        assert line in out, line
    assert len(re.findall(r'^compiled in \d+\.\d s$', out, re.M)) == 1
    # the state after the last iteration is saved, as a line says, and the best checkpoint is kept
    assert out.count('saving checkpoint to out_jax') == len(steps[1:]) + 1
    best = min(steps[1:], key=lambda s: float(s[2]))
    assert set(steps_on_disk(folder / 'out_jax')) == {int(best[0]), 21}


def test_log_interval_prints_every_nth_iteration(folder):
    out = train(folder, '--max_iters=6', '--log_interval=3', '--eval_interval=100')
    assert [int(i[0]) for i in ITER.findall(out)] == [0, 3, 6]


class Loss(float):
    """A loss as a step returns it: computed already, or not."""

    def __new__(cls, ready):
        loss = super().__new__(cls, 1.0)
        loss.is_ready = lambda: ready
        return loss


def step_log(max_iters=9, eval_interval=100):
    return metrics.StepLog(0, max_iters, eval_interval, tokens_per_iter=128,
                           estimate_mfu=lambda dt: 0.0, schedule=lambda it: 1e-3,
                           metrics_file=None, describe_valid=None)


def test_a_log_line_has_the_mean_time_since_the_last_one_without_pauses(monkeypatch, capsys):
    now, step = 0.0, {'loss': Loss(ready=False)}
    monkeypatch.setattr(metrics.time, 'time', lambda: now)
    log = step_log()
    log.queue(0, step)
    now = 2.0
    log.flush()
    now = 3.0
    log.pause()
    now = 100.0
    log.resume()
    log.queue(3, step)
    now = 108.0
    log.flush()
    times = [float(i[2]) for i in ITER.findall(capsys.readouterr().out)]
    assert times == [2000.0, (1000.0 + 8000.0) / 3]


def test_a_step_that_is_computed_as_it_is_queued_has_its_own_time(monkeypatch, capsys):
    # as on a CPU; the last step of a run is printed at once, with no other step between
    now, step = 0.0, {'loss': Loss(ready=True)}
    monkeypatch.setattr(metrics.time, 'time', lambda: now)
    log = step_log()
    for it, seconds in enumerate([7.0, 3.0, 4.0]):
        now += seconds # while the step is started, and computed
        log.flush()
        log.queue(it, step)
    now += 0.001
    log.flush()
    times = [float(i[2]) for i in ITER.findall(capsys.readouterr().out)]
    assert times == [7000.0, 3000.0, 4000.0]


@pytest.mark.parametrize('terminal', [True, False])
def test_the_time_left_is_estimated_at_the_third_iteration_and_after_evaluations(
        monkeypatch, capsys, terminal):
    now, step = 0.0, {'loss': Loss(ready=False)}
    monkeypatch.setattr(metrics.time, 'time', lambda: now)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
    log = step_log(max_iters=8, eval_interval=4)
    log.pause()
    now += 60 # an evaluation at iteration 0, as at 4 and 8
    log.resume()
    for it in range(4):
        log.queue(it, step)
        now += 10.0 if it else 500.0
        log.flush()
        left = [line for line in capsys.readouterr().out.splitlines() if ' left, ' in line]
        # 6 iterations and 2 evaluations
        assert [line[:7] for line in left] == ['0:03:00'] * (terminal and it == 2), it
    # by the mean of all that ran, 590 s for 4, for the 5 iterations from 4 to 8
    log.evaluated(4, {'train': 1.0, 'val': 1.0})
    assert ('0:12:18 left' in capsys.readouterr().out) is terminal
    now = 0.3
    log.evaluated(8, {'train': 1.0, 'val': 1.0}) # nothing is left
    assert capsys.readouterr().out == ''


def test_lines_come_in_nanogpts_order(folder):
    # although a step's loss is read only once the next step is queued
    out = train(folder, '--max_iters=9', '--log_interval=3')
    assert re.findall(r'^(step|iter) (\d+)', out, re.M) == [
        ('step', '0'), ('iter', '0'), ('iter', '3'), ('step', '4'), ('iter', '6'), ('step', '8'),
        ('iter', '9')]


def test_compiled_programs_are_cached_unless_turned_off(folder):
    # without the cache that the tests share, which has precedence
    env = {'XDG_CACHE_HOME': str(folder / 'cache'), 'JAX_COMPILATION_CACHE_DIR': ''}
    train(folder, '--eval_only=True', '--compilation_cache=False', **env)
    assert not (folder / 'cache').exists()
    train(folder, '--max_iters=0', '--out_dir=one', **env)
    cache = folder / 'cache' / 'nanogpt-jax' / cpu_key()
    cached = sorted(cache.glob('*train_step*-cache'))
    assert len(cached) == 1
    train(folder, '--max_iters=0', '--out_dir=two', **env)
    assert cached == sorted(cache.glob('*train_step*-cache'))
    # a folder that cannot be created costs the cache, not the run
    (folder / 'file').write_text('')
    env['XDG_CACHE_HOME'] = str(folder / 'file')
    out = train(folder, '--eval_only=True', **env)
    assert 'compiled programs are not cached for the next start' in out


@pytest.mark.parametrize('error, words', [
    (MemoryError('Unable to allocate 7 TiB'), ['out of memory (Unable to allocate 7 TiB)']),
    (MemoryError(), ['out of memory']),
    (UserError('cannot read a\nb.bin'), ['cannot read a b.bin']),
])
def test_an_error_is_one_line_whatever_its_text(capsys, error, words):
    report_user_error(type(error), error, None)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and all(word in line for word in words)


def test_running_out_of_memory_is_one_line_that_names_flags_that_help(capsys):
    error = jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nand much more')
    report_user_error(type(error), error, None)
    line, = capsys.readouterr().err.splitlines()
    for word in ('allocating 99 bytes', '--batch_size', '--gradient_accumulation_steps',
                 '--remat=True'):
        assert word in line


def test_without_always_save_checkpoint_only_improvements_and_the_end_are_saved(folder):
    # with a learning rate of 0 nothing improves after the first evaluation
    out = train(folder, '--max_iters=8', '--always_save_checkpoint=False', '--learning_rate=0.0',
                '--min_lr=0.0')
    assert out.count('saving checkpoint') == 1 and steps_on_disk(folder / 'out_jax') == [9]


def test_a_second_run_does_not_overwrite_the_first(folder):
    train(folder, '--max_iters=4')
    before = sorted(os.listdir(folder / 'out_jax'))
    one_line_error(run_inside(folder, 'train_jax.py', *TINY), '--init_from=resume')
    assert sorted(os.listdir(folder / 'out_jax')) == before


def test_resuming_on_other_characters_is_refused(folder):
    train(folder, '--max_iters=2')
    meta = pickle.loads((folder / 'data' / 'tiny' / 'meta.pkl').read_bytes())
    meta['itos'] = dict(enumerate(reversed(meta['itos'].values())))
    (folder / 'data' / 'tiny' / 'meta.pkl').write_bytes(pickle.dumps(meta))
    result = run_inside(folder, 'train_jax.py', *TINY, '--init_from=resume', '--max_iters=5')
    one_line_error(result, 'other characters')


def test_a_meta_file_without_characters_trains_but_cannot_be_sampled(folder):
    (folder / 'data' / 'tiny' / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 24}))
    assert 'found vocab_size = 24' in train(folder, '--max_iters=2')
    one_line_error(run_inside(folder, 'sample_jax.py', '--device=cpu'), 'itos')


def test_later_config_files_and_flags_override_earlier_ones(folder):
    (folder / 'mine.py').write_text('import math\nmax_iters = 2\n'
                                    'learning_rate = 1 # an int\nmax_itres = 3\n')
    out = train(folder, '--max_iters=1', 'mine.py', '--log_interval=2')
    assert [int(i[0]) for i in ITER.findall(out)] == [0, 2]
    warning = 'mine.py sets max_itres, which is no setting; did you mean max_iters?'
    assert f'WARNING: {warning}' in out


@pytest.mark.parametrize('name', sorted(os.listdir(os.path.join(ROOT, 'config'))))
def test_the_config_files_set_nothing_unknown(folder, name):
    result = run_inside(folder, 'train_jax.py', os.path.join(ROOT, 'config', name),
                        '--dataset=absent', '--out_dir=out')
    assert 'WARNING' not in result.stdout
    one_line_error(result, 'data/absent/train.bin does not exist')


def test_wandb_logs_offline_a_resumed_run_keeps_its_id_and_an_error_is_one_line(folder):
    pytest.importorskip('wandb', reason='wandb is not installed')
    env = dict(WANDB_MODE='offline', WANDB_SILENT='true')
    train(folder, '--max_iters=4', '--wandb_log=True', '--wandb_project=p', **env)
    train(folder, '--init_from=resume', '--max_iters=6', '--wandb_log=False', **env)
    train(folder, '--init_from=resume', '--max_iters=8', '--wandb_log=True', **env)
    diverging = ['--learning_rate=1e38', '--min_lr=1e38', '--max_iters=50']
    result = run(folder, 'train_jax.py', '--init_from=resume', '--device=cpu', *diverging, **env)
    one_line_error(result, 'not a finite number', alone=True)
    runs = [name for name in os.listdir(folder / 'wandb') if name.startswith('offline-run-')]
    assert len(runs) == 3 and len({name.split('-')[-1] for name in runs}) == 1


def test_wandb_without_a_key_is_one_line_with_the_ways_out(folder, monkeypatch):
    pytest.importorskip('wandb', reason='wandb is not installed')
    for name in [name for name in os.environ if name.startswith('WANDB_')]:
        monkeypatch.delenv(name)
    nobody = dict(HOME=str(folder), NETRC=str(folder / 'none'), WANDB_CONFIG_DIR=str(folder))
    result = run(folder, 'train_jax.py', *TINY, '--wandb_log=True', **nobody)
    one_line_error(result, 'No API key', '`wandb login`', 'WANDB_MODE=offline', '--wandb_log=False')
    assert 'Initializing' not in result.stdout and not (folder / 'out_jax').exists()


def test_a_folder_named_as_a_package_is_not_that_package(tmp_path, monkeypatch):
    (tmp_path / 'absent_package' / 'run-1').mkdir(parents=True)  # as wandb/ with the logs of runs
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('absent_package', 'another_package'):
        with pytest.raises(UserError, match=f'pip install {name}'):
            optional_import(name)
    monkeypatch.setitem(sys.modules, 'wandb', None)  # not installed
    with pytest.raises(UserError, match='pip install wandb, or give --wandb_log=False'):
        metrics.check_wandb()


# -----------------------------------------------------------------------------
# resume and evaluation

@pytest.mark.parametrize('stop, always', [(7, True), (6, False)])
def test_a_resumed_run_ends_with_the_same_bits(folder, stop, always):
    # stopped between evaluations, and just before one: its result, the best of the run, belongs
    # to the checkpoint that is there already
    args = ['--dropout=0.2', f'--always_save_checkpoint={always}', '--eval_interval=3',
            '--learning_rate=0.1', '--min_lr=0.1']
    uninterrupted = train(folder, *args, '--max_iters=8', '--out_dir=uninterrupted')
    first = train(folder, *args, f'--max_iters={stop - 1}', '--out_dir=parts')
    # no other flags: the settings come from the checkpoint
    result = run(folder, 'train_jax.py', '--init_from=resume', '--out_dir=parts', '--device=cpu',
                 '--max_iters=8')
    assert result.returncode == 0, result.stderr
    assert f'differs from the checkpoint: max_iters {stop - 1} -> 8\n' in result.stdout
    losses = {i[0]: i[1] for out in (first, result.stdout) for i in ITER.findall(out)}
    assert losses == {i[0]: i[1] for i in ITER.findall(uninterrupted)}
    # no iteration is skipped or repeated
    assert [int(i[0]) for i in ITER.findall(result.stdout)] == list(range(stop, 9))
    state, meta = saved(folder, 'uninterrupted', 9)
    again, meta_again = saved(folder, 'parts', 9)
    np.testing.assert_equal(state, again)
    assert meta['best_val_loss'] == meta_again['best_val_loss']
    assert sorted(os.listdir(folder / 'uninterrupted')) == sorted(os.listdir(folder / 'parts'))


def test_dropout_depends_on_the_seed():
    x = tokens(2, 1, 16)
    losses = []
    for seed in (0, 1):
        step, state = make_step(tiny(dropout=0.5), seed=seed)
        losses.append(float(step(state, x, x, 3)[1]['loss']))
    assert losses[0] != losses[1]


def test_evaluation_does_not_disturb_training(folder):
    args = ['--max_iters=5', '--dropout=0.2']
    train(folder, *args, '--eval_interval=2', '--out_dir=often')
    train(folder, *args, '--eval_interval=100', '--eval_iters=1', '--out_dir=rarely')
    np.testing.assert_equal(saved(folder, 'often', 6)[0], saved(folder, 'rarely', 6)[0])


def test_eval_only_evaluates_once_and_writes_nothing(folder):
    out = train(folder, '--max_iters=4')
    before = sorted(os.listdir(folder / 'out_jax'))
    evaluated = train(folder, '--init_from=resume', '--eval_only=True', '--seed=7')
    again = train(folder, '--init_from=resume', '--eval_only=True')
    assert STEP.findall(evaluated) == STEP.findall(again)  # whatever the seed
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
    assert 'block_size 16 -> 8' in out and 'n_layer 1 (kept' in out
    state, meta = saved(folder, 'out_jax', 4)
    assert meta['model_args']['block_size'] == 8
    assert state['params']['transformer']['wpe']['embedding'].shape == (8, 32)
    result = run_inside(folder, 'train_jax.py', '--init_from=resume', '--device=cpu',
                        '--block_size=16')
    one_line_error(result, 'block_size=16 is larger')


# -----------------------------------------------------------------------------
# several devices

def test_devices_across_which_the_batch_does_not_divide_are_left_out(folder):
    out = train(folder, '--max_iters=1', '--batch_size=3', '--gradient_accumulation_steps=1',
                XLA_FLAGS=EIGHT_DEVICES)
    assert ('using 3 of 8 devices: a global batch of 3 sequences does not divide evenly '
            'across more') in out


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
    (['--learning_rate=nan'], ['learning_rate is nan', 'nan and inf are not allowed']),
    (['--beta2=1.0'], ['beta2 is 1.0', 'below 1']),
    (['--beta2=0.999999999'], ['beta2 is 0.999999999', 'below 1 in float32']),
    # numbers that no machine can use
    (['--learning_rate=1e39'], ['learning_rate is 1e+39', 'below 3.40282e+38 in float32']),
    (['--batch_size=1000000000'], ['2 * 1000000000 * 16', '256 GB of memory', 'has']),
    (['--gradient_accumulation_steps=1000000000'], ['1000000000 * 4 * 16', '512 GB']),
    (['--eval_iters=1000000000'], ['eval_iters', '512 GB']),
    (['--warmup_iters=2147483648'], ['warmup_iters is 2147483648', 'below 2147483648']),
    (['--lr_decay_iters=2147483648'], ['lr_decay_iters is 2147483648']),
    (['--max_iters=2147483648'], ['max_iters is 2147483648']),
    (['--n_layer=9999', '--n_head=1', '--n_embd=60000'], ['two moments of AdamW', 'GB of memory']),
    (['--n_layer=10000'], ['n_layer is 10000', 'below 10000']),
    (['--out_dir="a\\0b"'], ['out_dir', 'NUL']),
    (['--seed=-1'], ['seed is -1']),
    (['--seed=4294967296'], ['seed is 4294967296', 'below']),
    (['--dtype=bf16'], ["'bf16'", 'bfloat16']),
    (['--n_head=0'], ['n_head is 0']),
    (['--n_embd=0'], ['n_embd is 0']),
    (['--attention=flash'], ["'flash'", 'auto, cudnn, splash or xla']),
    (['--attention=cudnn'], ['NVIDIA', '--attention=xla']),
    (['--attention=splash'], ['TPU', '--attention=xla']),
    (['--n_layer=-2'], ['n_layer is -2']),
    (['--block_size=0'], ['block_size is 0']),
    (['--init_from=scrach'], ["'scrach'", 'scratch', 'resume', 'gpt2-xl']),
])
def test_a_mistake_is_one_line_and_creates_no_folder(folder, args, words):
    result = run_inside(folder, 'train_jax.py', *TINY, *args)
    one_line_error(result, *words, alone=True)
    assert not (folder / 'absent').exists() and not (folder / 'out_jax').exists()


@pytest.mark.parametrize('content, words', [
    (b'', ['val.bin has 0 bytes', '17']),
    (b'\0' * 101, ['val.bin has 101 bytes', 'two bytes each']),
    (b'\0\0' * 99 + b'\x14\0', ['val.bin has the token id 20', 'ends at 19']),
    (None, ['val.bin is no file', 'prepare.py']),
])
def test_unusable_data_is_one_line_and_creates_no_folder(folder, content, words):
    path = folder / 'data' / 'tiny' / 'val.bin'
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    one_line_error(run_inside(folder, 'train_jax.py', *TINY), *words, alone=True)
    assert not (folder / 'out_jax').exists()


@pytest.mark.parametrize('split, args', [('train', []), ('val', []), ('val', ['--eval_only=True'])])
def test_an_id_past_the_part_that_is_checked_at_the_start_ends_the_run_before_it_is_used(
        folder, monkeypatch, split, args):
    monkeypatch.setattr(utils, 'TOKENS_AT_START', 16)
    ids = np.zeros(4000, np.uint16)
    ids[17:] = 20
    ids.tofile(folder / 'data' / 'tiny' / f'{split}.bin')
    result = run_inside(folder, 'train_jax.py', *TINY, *args)
    one_line_error(result, f'{split}.bin has the token id 20', 'ends at 19')
    assert 'iter 0' not in result.stdout and 'step 0' not in result.stdout
    if split == 'train':  # the first batch is read before the step is compiled
        assert 'compiled in' not in result.stdout


def test_a_batch_that_divides_into_small_micro_batches_only_says_what_it_costs(folder):
    # 2 ** 18 elements of an activation: 8 sequences of 128 tokens, 256 wide
    flags = [*TINY, '--block_size=128', '--n_embd=256', '--gradient_accumulation_steps=1']
    line = ('each device computes its 37 sequences in 37 micro-batches of 1, since they do not '
            'divide into larger ones of at most 8, which is slower: a global batch of 40 would '
            'take 5')
    for batch_size in (37, 36):  # 36 in 6 micro-batches of 6, one more than needed: no line
        result = run_inside(folder, 'train_jax.py', *flags, f'--batch_size={batch_size}',
                            '--init_from=nowhere')
        assert (line in result.stdout.splitlines()) == (batch_size == 37), result.stdout
        assert 'micro-batches' not in result.stdout.replace(line, '')


@pytest.mark.parametrize('content, words', [
    (b'no pickle', ['meta.pkl', 'prepare.py']),
    (pickle.dumps({'vocab_size': 2 ** 31}), ['vocab_size is 2147483648', 'from 1 to 65536']),
    (pickle.dumps({'vocab_size': 0}), ['vocab_size is 0']),
    (pickle.dumps({'vocab_size': '20'}), ["vocab_size is '20'"]),
    (pickle.dumps({'vocab_size': 2, 'itos': {0: 'a', 1: 2}}), ['itos', 'string']),
    (pickle.dumps({'vocab_size': 1, 'itos': {0: 'a', 1: 'b'}}), ['itos', 'at most 1']),
    (b'cos\nsystem\n(S"touch executed"\ntR.', ['os.system', 'only plain Python data']),
])
def test_a_meta_file_that_is_not_plain_data_is_refused_and_runs_no_code(folder, content, words):
    (folder / 'data' / 'tiny' / 'meta.pkl').write_bytes(content)
    one_line_error(run_inside(folder, 'train_jax.py', *TINY), *words, alone=True)
    assert not (folder / 'executed').exists()
