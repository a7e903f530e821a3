"""Whole runs of sample_jax.py and bench_jax.py from the command line."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import CACHE, ROOT, TINY, one_line_error, run, train, with_data


def sample(folder, *args, **kwargs):
    result = run(folder, 'sample_jax.py', '--device=cpu', *args, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = with_data(tmp_path_factory.mktemp('trained'))
    train(folder, '--max_iters=8')
    return folder


def texts(out):
    """The samples of an output, which is nothing else."""
    *samples, rest = out.split('\n---------------\n')
    assert rest == ''
    return samples


def test_samples_continue_the_prompt_past_block_size_and_repeat_with_the_seed(trained):
    out = sample(trained, '--num_samples=3', '--max_new_tokens=40', '--start=abc')
    assert [len(t) for t in texts(out)] == [43] * 3 and all(t.startswith('abc') for t in texts(out))
    assert texts(out) == texts(sample(trained, '--num_samples=3', '--max_new_tokens=40', '--start=abc'))
    assert texts(out)[:1] == texts(sample(trained, '--num_samples=1', '--max_new_tokens=40', '--start=abc'))
    assert texts(out) != texts(sample(trained, '--num_samples=3', '--max_new_tokens=40', '--start=abc', '--seed=1'))


def test_a_prompt_can_come_from_a_file(trained):
    (trained / 'prompt.txt').write_text('ab\ncd')
    assert texts(sample(trained, '--num_samples=1', '--max_new_tokens=3', '--start=FILE:prompt.txt'))[0].startswith('ab\ncd')


def test_temperature_zero_takes_the_most_likely_token_and_no_new_tokens_leave_the_prompt(trained):
    greedy = sample(trained, '--num_samples=2', '--max_new_tokens=9', '--start=abc', '--temperature=0.0')
    assert len(set(texts(greedy))) == 1 and texts(greedy) == texts(
        sample(trained, '--num_samples=2', '--max_new_tokens=9', '--start=abc', '--temperature=0.0', '--seed=9'))
    assert texts(sample(trained, '--num_samples=1', '--max_new_tokens=0', '--start=abc')) == ['abc']


def test_streamed_samples_are_those_of_one_batch_and_standard_error_counts_them(trained):
    args = ['--num_samples=3', '--max_new_tokens=40', '--start=abc']
    streamed = run(trained, 'sample_jax.py', '--device=cpu', '--stream=True', *args)
    assert streamed.stdout == sample(trained, *args)
    assert re.search(r'^3 samples, 120 tokens in \d+\.\d\d s: \d+\.\d tokens/s, compilation included$', streamed.stderr, re.M)


@pytest.mark.parametrize('stream', [True, False])
def test_a_sample_ends_before_the_stop_string(trained, stream):
    args = ['--num_samples=3', '--max_new_tokens=40', '--start=ab']
    whole = texts(sample(trained, *args))
    stop = whole[0][5:8]
    cut = texts(sample(trained, *args, f'--stop={stop}', f'--stream={stream}'))
    assert cut == ['ab' + text[2:].split(stop)[0] for text in whole] and len(cut[0]) == 5


def test_prompts_are_read_line_by_line_and_a_bad_one_does_not_end_it(trained):
    args = ['--interactive=True', '--max_new_tokens=5']
    out = texts(sample(trained, *args, stdin='abc\n\nbcd\nabc'))
    assert [t[:3] for t in out] == ['abc', 'bcd', 'abc'] and [len(t) for t in out] == [8] * 3
    result = run(trained, 'sample_jax.py', '--device=cpu', *args, '--num_samples=1', '--start=a', stdin='x\nabc\n')
    assert result.returncode == 1 and [t[:3] for t in texts(result.stdout)][1:] == ['abc']
    assert [line for line in result.stderr.splitlines() if line.startswith('error: ')][0].startswith('error: the model never saw')
    assert 'Traceback' not in result.stderr and '2 samples, 10 tokens' in result.stderr


def test_a_reader_that_leaves_ends_sampling_without_a_traceback(trained):
    command = f'{sys.executable} {ROOT}/sample_jax.py --device=cpu --max_new_tokens=200 --stream=True | head -c 1'
    result = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True, env=os.environ | CACHE)
    assert result.stdout == '\n' and 'Traceback' not in result.stderr and 'BrokenPipe' not in result.stderr, result.stderr


def test_the_vocabulary_comes_from_the_checkpoint(trained):
    meta = trained / 'data' / 'tiny' / 'meta.pkl'
    meta.rename(meta.with_suffix('.away'))
    try:
        assert texts(sample(trained, '--num_samples=1', '--max_new_tokens=3', '--start=abc'))[0].startswith('abc')
    finally:
        meta.with_suffix('.away').rename(meta)


@pytest.mark.parametrize('args, words', [
    (['--start=xyz'], ["['x', 'y', 'z']", 'abcdef']),
    (['--start='], ['prompt is empty']),
    (['--start=FILE:absent.txt'], ['absent.txt']),
    (['--out_dir=absent'], ['absent does not exist']),
    (['--which=3'], ["'3'", 'latest']),
    (['--top_k=0'], ['top_k is 0']),
    (['--top_p=0.0'], ['top_p is 0']),
    (['--start=FILE:latin1.txt'], ['latin1.txt', 'utf-8']),
    (['--num_samples=0'], ['num_samples is 0']),
    (['--max_new_tokens=-1'], ['max_new_tokens is -1']),
    (['--temperature=-0.5'], ['temperature is -0.5']),
    (['--num_sample=1'], ['--num_samples']),
])
def test_a_mistake_is_one_line(trained, args, words):
    (trained / 'latin1.txt').write_bytes(b'caf\xe9')
    one_line_error(run(trained, 'sample_jax.py', '--device=cpu', '--start=a', *args), *words)


def test_a_tokenizer_out_of_reach_is_one_line(folder):
    from flax import nnx
    from test_weights import write_hf

    from jax_transformer import GPT, GPTConfig, export_torch_weights
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32), rngs=nnx.Rngs(0))
    write_hf(folder / 'hf', export_torch_weights(model))
    unreachable = {name: 'http://127.0.0.1:9' for name in ('https_proxy', 'HTTPS_PROXY')}
    unreachable['TIKTOKEN_CACHE_DIR'] = str(folder / 'empty')
    one_line_error(run(folder, 'sample_jax.py', '--device=cpu', '--init_from=hf', **unreachable), 'TIKTOKEN_CACHE_DIR')


@pytest.mark.parametrize('args, words', [
    (['--batch_size=0'], ['batch_size is 0']), (['--seed=-1'], ['seed is -1']), (['--dataset=absent'], ['absent/prepare.py']),
    (['--vocab_size=5'], ['token id 19', 'ends at 4']), (['--attention=flash'], ["'flash'", 'auto, cudnn or xla']),
    (['--attention=cudnn'], ['NVIDIA', '--attention=xla']), (['--dropout=1.0'], ['dropout is 1.0']),
    (['--n_head=0'], ['n_head is 0']),
])
def test_a_mistake_in_a_benchmark_is_one_line(folder, args, words):
    result = run(folder, 'bench_jax.py', *SMALL, *args)
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


SMALL = [a for a in TINY if a.split('=')[0] not in
         ('--gradient_accumulation_steps', '--eval_iters', '--eval_interval', '--warmup_iters', '--lr_decay_iters',
          '--learning_rate', '--min_lr')] + ['--vocab_size=20']


@pytest.mark.parametrize('real_data', [True, False])
def test_bench_prints_nanogpts_line_and_what_the_step_takes(folder, real_data):
    flags = ['--gradient_accumulation_steps=3', '--remat=True', '--dropout=0.1'] if real_data else []
    result = run(folder, 'bench_jax.py', *SMALL, *flags, f'--real_data={real_data}')
    assert result.returncode == 0, result.stderr
    time, mfu = re.search(r'^time per iteration: (\d+\.\d{4})ms, MFU: (\d+\.\d{2})%$', result.stdout, re.M).groups()
    tokens = float(re.search(r'^tokens per second: ([\d,]+)$', result.stdout, re.M)[1].replace(',', ''))
    rows = 12 if real_data else 4
    assert abs(tokens * float(time) / 1000 / (rows * 16) - 1) < 0.01 and float(mfu) >= 0  # both are rounded
    for line in (r'compiled in \d+\.\d s',
                 r'memory by the compiled program: \d+\.\d\d GiB of state and batch, \d+\.\d\d GiB while it runs',
                 r'mfu is counted against 312 TFLOP/s, .* A100', r'host time per iteration \(batch and dispatch\): \d+\.\d\dms'):
        assert re.search(f'^{line}$', result.stdout, re.M), line
    assert result.stdout.count('/10 loss: ') == 10 and result.stdout.count('/20 loss: ') == 20


def test_bench_times_sampling_beside_reading_the_weights(folder):
    result = run(folder, 'bench_jax.py', *SMALL, '--max_new_tokens=20')
    assert result.returncode == 0, result.stderr
    line = re.search(r'^4 samples of 20 tokens: (\d+\.\d{3}) s, ([\d,.]+) tokens per second$', result.stdout, re.M)
    seconds, rate = line.groups()
    assert abs(float(rate.replace(',', '')) * float(seconds) / 80 - 1) < 0.1  # seconds are rounded
    assert re.search(r'^time per token of each: \d+\.\d\dms; reading the 0\.1 MB of weights once: \d+\.\d\dms$', result.stdout,
                     re.M)


def test_bench_writes_a_profile(folder):
    result = run(folder, 'bench_jax.py', *SMALL, '--profile=True', '--real_data=False')
    assert result.returncode == 0, result.stderr
    assert list(folder.glob('bench_log/**/*.xplane.pb'))


def test_compare_times_both_in_turns(folder):
    torch = folder / 'nanoGPT'
    torch.mkdir()
    # in place of nanoGPT: iterations of 10 ms eager and 20 ms compiled, but for the first, and its flags on standard error
    (torch / 'train.py').write_text("import sys\nms = 20 if '--compile=True' in sys.argv else 10\nfor i in range(5):\n"
                                    "    print(f'iter {i}: loss 4.0000, time {ms if i else 999}.00ms, mfu 0.01%')\n")
    (folder / 'data' / 'tiny').rename(folder / 'data' / 'shakespeare_char')
    shutil.copytree(os.path.join(ROOT, 'config'), folder / 'config')
    result = run(folder, 'compare_jax.py', '--nanogpt=nanoGPT', f'--torch_python={sys.executable}', '--rounds=2', '--max_iters=4')
    assert result.returncode == 0, result.stderr
    ran = re.findall(r'^readme_cpu, (.*): [\d.]+ ms per iteration', result.stdout, re.M)
    assert ran == ['JAX', 'PyTorch eager', 'PyTorch compile'] * 2
    rows = {row[0]: row[1:] for row in (line.strip('| ').split(' | ') for line in result.stdout.splitlines()) if len(row) == 5}
    ours = float(rows['JAX'][0])
    for name, ms in (('PyTorch eager', 10), ('PyTorch compile', 20)):
        assert rows[name][:2] == [f'{ms:.1f}', f'{ms:.1f}, {ms:.1f}'] and abs(float(rows[name][2]) - ms / ours) < 0.01


@pytest.mark.parametrize('args, words', [
    (['--nanogpt=absent'], ['absent', '--nanogpt']), (['--nanogpt=nanoGPT', '--case=gpt3'], ["'gpt3'", 'readme_cpu']),
    (['--nanogpt=nanoGPT', '--torch_compile=eager'], ['train_shakespeare_char.py']),
])
def test_a_mistake_in_a_comparison_is_one_line(folder, args, words):
    (folder / 'nanoGPT').mkdir()
    (folder / 'nanoGPT' / 'train.py').write_text('')
    result = run(folder, 'compare_jax.py', *args)
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize('script', ['train_jax.py', 'sample_jax.py', 'bench_jax.py'])
def test_help_lists_every_flag_with_its_comment(folder, script):
    result = run(folder, script, '--help')
    assert result.returncode == 0 and "device = 'auto' # 'auto', 'cpu'" in result.stdout and 'import' not in result.stdout
