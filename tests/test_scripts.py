"""Sampling, benchmarks and the comparison, from the command line; --help of every script."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ENV, ROOT, TINY, one_line_error, run, run_inside, train, with_data

from nanogpt_jax import devices
from nanogpt_jax.errors import UserError

SCRIPTS = ['train_jax.py', 'sample_jax.py', 'bench_jax.py', 'convert_jax.py']
TOOLS = ['tools.plan', 'tools.plot', 'tools.sizing', 'tools.compare']


# -----------------------------------------------------------------------------
# all of them

@pytest.mark.parametrize('script', SCRIPTS + TOOLS)
def test_a_mistake_ends_the_process_as_it_ends_run_inside(folder, script):
    # so that all other mistakes can be tested without a process of their own
    result, inside = (f(folder, script, '--nope=1') for f in (run, run_inside))
    one_line_error(result, 'unknown flag --nope')
    assert (inside.stdout, inside.stderr) == (result.stdout, result.stderr)
    assert inside.returncode == 1


def test_scripts_find_their_modules_where_python_leaves_their_folder_out(folder):
    # as python -P and -I do
    for script in SCRIPTS:
        with open(os.path.join(ROOT, script), encoding='utf-8') as f:
            assert '\nsys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))' in f.read()
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    subprocess.run([sys.executable, '-P', os.path.join(ROOT, SCRIPTS[0]), '--help'], cwd=folder,
                   check=True, stdout=subprocess.DEVNULL, env=env | ENV)


@pytest.mark.parametrize('script', SCRIPTS + TOOLS)
def test_help_is_the_settings_with_their_comments(folder, script):
    result = run_inside(folder, script, '--help')
    assert result.returncode == 0 and 'import' not in result.stdout, result.stderr
    assert 'Every setting below is a flag' in result.stdout
    if script in ('train_jax.py', 'sample_jax.py', 'bench_jax.py'):
        assert "device = 'auto' # 'auto', 'cpu'" in result.stdout
    assert os.listdir(folder) == ['data']


# -----------------------------------------------------------------------------
# sample_jax.py

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A working directory with a checkpoint in out_jax."""
    folder = with_data(tmp_path_factory.mktemp('trained'))
    train(folder, '--max_iters=8')
    return folder


def sample(folder, *args, **kwargs):
    """stdout of a run of sample_jax.py that must succeed."""
    result = run_inside(folder, 'sample_jax.py', '--device=cpu', *args, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def texts(out):
    """The samples of an output that has nothing else in it."""
    *samples, rest = out.split('\n---------------\n')
    assert rest == ''
    return samples


def test_samples_continue_the_prompt_past_block_size_and_repeat_with_the_seed(trained):
    flags = ['--max_new_tokens=40', '--start=abc']
    out = sample(trained, '--num_samples=3', *flags)
    assert [len(t) for t in texts(out)] == [43] * 3
    assert all(t.startswith('abc') for t in texts(out))
    assert texts(out) == texts(sample(trained, '--num_samples=3', *flags))
    assert texts(out)[:1] == texts(sample(trained, '--num_samples=1', *flags))
    assert texts(out) != texts(sample(trained, '--num_samples=3', *flags, '--seed=1'))
    assert texts(sample(trained, '--num_samples=1', *flags, '--max_new_tokens=0')) == ['abc']


def test_a_prompt_can_come_from_a_file(trained):
    (trained / 'prompt.txt').write_text('ab\ncd')
    out = sample(trained, '--num_samples=1', '--max_new_tokens=3', '--start=FILE:prompt.txt')
    assert texts(out)[0].startswith('ab\ncd')


def test_samples_of_temperature_zero_are_equal_with_any_seed(trained):
    flags = ['--num_samples=2', '--max_new_tokens=9', '--start=abc', '--temperature=0.0']
    greedy = texts(sample(trained, *flags))
    assert len(set(greedy)) == 1 and greedy == texts(sample(trained, *flags, '--seed=9'))


def test_streamed_samples_are_those_of_one_batch_and_stderr_counts_them(trained):
    args = ['--num_samples=3', '--max_new_tokens=40', '--start=abc']
    streamed = run(trained, 'sample_jax.py', '--device=cpu', '--stream=True', *args)
    assert streamed.stdout == sample(trained, *args)
    assert re.search(r'^3 samples, 120 tokens in \d+\.\d\d s: \d+\.\d tokens/s, '
                     'compilation included$', streamed.stderr, re.M)


@pytest.mark.parametrize('stream', [True, False])
def test_a_sample_ends_before_the_stop_string(trained, stream):
    args = ['--num_samples=3', '--max_new_tokens=40', '--start=ab']
    full = texts(sample(trained, *args))
    stop = full[0][5:8]
    cut = texts(sample(trained, *args, f'--stop={stop}', f'--stream={stream}'))
    assert cut == ['ab' + text[2:].split(stop)[0] for text in full] and len(cut[0]) == 5


def test_each_line_of_stdin_is_a_prompt_and_a_wrong_one_does_not_end_sampling(trained):
    args = ['--interactive', '--max_new_tokens=5']
    out = texts(sample(trained, *args, stdin='abc\n\nbcd\nabc'))
    assert [t[:3] for t in out] == ['abc', 'bcd', 'abc'] and [len(t) for t in out] == [8] * 3
    result = run_inside(trained, 'sample_jax.py', '--device=cpu', *args, '--num_samples=1',
                        '--start=a', stdin='x\nabc\n')
    assert result.returncode == 1 and [t[:3] for t in texts(result.stdout)][1:] == ['abc']
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert errors[0].startswith('error: the model never saw')
    assert 'Traceback' not in result.stderr and '2 samples, 10 tokens' in result.stderr


def test_on_a_terminal_the_first_prompt_and_the_summary_are_lines_of_their_own(
        trained, monkeypatch):
    class Terminal(io.BytesIO):
        def isatty(self):
            return True
    args = 'sample_jax.py', '--device=cpu', '--interactive', '--max_new_tokens=5'
    piped = run_inside(trained, *args, stdin='abc\n').stderr
    assert 'compiled\n' not in piped and '> ' not in piped
    monkeypatch.setattr(io, 'BytesIO', Terminal)
    assert re.search(r'^the first continuation takes some seconds more: it is compiled\n'
                     r'> > \n1 sample, 5 tokens in ',
                     run_inside(trained, *args, stdin='abc\n').stderr, re.M)


def test_a_closed_pipe_ends_sampling_without_a_traceback(trained):
    command = (f'{sys.executable} {ROOT}/sample_jax.py --device=cpu --max_new_tokens=200 '
               '--stream=True | head -c 1')
    result = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True,
                            env=os.environ | ENV)
    assert result.stdout == '\n', result.stderr
    assert 'Traceback' not in result.stderr and 'BrokenPipe' not in result.stderr, result.stderr


def test_the_vocabulary_comes_from_the_checkpoint(trained):
    meta = trained / 'data' / 'tiny' / 'meta.pkl'
    meta.rename(meta.with_suffix('.away'))
    try:
        out = sample(trained, '--num_samples=1', '--max_new_tokens=3', '--start=abc')
        assert texts(out)[0].startswith('abc')
    finally:
        meta.with_suffix('.away').rename(meta)


@pytest.mark.parametrize('args, words', [
    (['--start=xyz'], ["['x', 'y', 'z']", 'abcdef']),
    (['--start='], ['prompt is empty']),
    (['--start=FILE:absent.txt'], ['absent.txt']),
    (['--out_dir=absent'], ['absent does not exist']),
    (['--checkpoint=3'], ["'3'", 'latest']),
    (['--top_k=0'], ['top_k is 0']),
    (['--top_p=0.0'], ['top_p is 0']),
    (['--start=FILE:latin1.txt'], ['latin1.txt', 'utf-8']),
    (['--num_samples=0'], ['num_samples is 0']),
    # numbers that no machine can use
    (['--max_new_tokens=100000000000'], ['max_new_tokens is 100000000000', 'below 2147483648']),
    (['--num_samples=1000000000'], ['GB of memory', '--stream=True']),
    (['--seed=4294967296'], ['seed is 4294967296', 'below 4294967296']),
    (['--temperature=1e-40'], ['temperature is 1e-40', '1e-30']),
])
def test_a_mistake_in_sampling_is_one_line(trained, args, words):
    (trained / 'latin1.txt').write_bytes(b'caf\xe9')
    result = run_inside(trained, 'sample_jax.py', '--device=cpu', '--start=a', *args)
    one_line_error(result, *words)


def test_a_tokenizer_that_cannot_be_downloaded_is_one_line(folder):
    from flax import nnx
    from test_weights import write_hf

    from jax_transformer import GPT, GPTConfig, export_torch_weights
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
    write_hf(folder / 'hf', export_torch_weights(GPT(config, rngs=nnx.Rngs(0))))
    unreachable = {name: 'http://127.0.0.1:9' for name in ('https_proxy', 'HTTPS_PROXY')}
    unreachable['TIKTOKEN_CACHE_DIR'] = str(folder / 'empty')
    # a process of its own: in this one tiktoken may have loaded the tokenizer before
    result = run(folder, 'sample_jax.py', '--device=cpu', '--init_from=hf', **unreachable)
    one_line_error(result, 'TIKTOKEN_CACHE_DIR')


# -----------------------------------------------------------------------------
# bench_jax.py

SMALL = [a for a in TINY if a.split('=')[0] not in
         ('--gradient_accumulation_steps', '--eval_iters', '--eval_interval', '--max_iters',
          '--warmup_iters', '--lr_decay_iters', '--learning_rate', '--min_lr')]
SMALL += ['--vocab_size=20']


@pytest.mark.parametrize('args, words', [
    (['--dataset=absent'], ['absent/prepare.py']),
    (['--vocab_size=5'], ['token id 19', 'ends at 4']),
    (['--attention=flash'], ["'flash'", 'auto, cudnn, splash or xla']),
    (['--attention=cudnn'], ['NVIDIA', '--attention=xla']),
    (['--dropout=1.0'], ['dropout is 1.0']),
    (['--real_data=False', '--n_layer=9999', '--n_head=1', '--n_embd=60000'], ['GB of memory']),
    (['--n_layer=10000'], ['n_layer is 10000']), (['--max_new_tokens=-1'], ['max_new_tokens']),
])
def test_a_mistake_in_a_benchmark_is_one_line(folder, args, words):
    one_line_error(run_inside(folder, 'bench_jax.py', *SMALL, *args), *words, alone=True)


@pytest.mark.parametrize('script', ['train_jax.py', 'bench_jax.py', 'sample_jax.py'])
def test_a_script_says_whether_dtype_was_given(folder, monkeypatch, script):
    def compute_dtype(dtype, _, given):
        raise UserError(f'{dtype}, {given}')
    monkeypatch.setattr(devices, 'compute_dtype', compute_dtype)
    (folder / 'half.py').write_text("dtype = 'float16'")
    for args, words in (([], 'bfloat16, False'), (['--dtype=bfloat16'], 'bfloat16, True'),
                        (['half.py'], 'float16, True')):
        one_line_error(run_inside(folder, script, '--device=cpu', *args), words)


@pytest.mark.parametrize('real_data', [True, False])
def test_bench_prints_nanogpts_line_and_what_a_step_needs(folder, real_data):
    flags = ['--gradient_accumulation_steps=3', '--remat=True', '--dropout=0.1']
    result = run(folder, 'bench_jax.py', *SMALL, *flags * real_data, f'--real_data={real_data}')
    assert result.returncode == 0, result.stderr
    time, _ = re.search(r'^time per iteration: (\d+\.\d{4})ms, MFU: (\d+\.\d\d)%$',
                          result.stdout, re.M).groups()
    tokens = re.search(r'^tokens per second: ([\d,]+)$', result.stdout, re.M)[1].replace(',', '')
    sequences = 12 if real_data else 4
    # both are rounded
    assert abs(float(tokens) * float(time) / 1000 / (sequences * 16) - 1) < 0.01
    for line in (r'compiled in \d+\.\d s',
                 r'memory by the compiled program: \d+\.\d\d GiB of state and batch, '
                 r'\d+\.\d\d GiB while it runs',
                 r'mfu is counted against \S+ TFLOP/s, the float32 matmul rate .*',
                 r'host time per iteration \(batch and dispatch\): \d+\.\d\dms'):
        assert re.search(f'^{line}$', result.stdout, re.M), line
    assert result.stdout.count('/10 loss: ') == 10 and result.stdout.count('/20 loss: ') == 20


def test_bench_times_sampling_beside_reading_the_weights(folder):
    result = run_inside(folder, 'bench_jax.py', *SMALL, '--max_new_tokens=20')
    assert result.returncode == 0, result.stderr
    seconds, rate = re.search(r'^4 samples of 20 tokens: (\d+\.\d{3}) s, '
                              r'([\d,.]+) tokens per second$', result.stdout, re.M).groups()
    # seconds are rounded to milliseconds, the rate to a tenth
    assert abs(80 / float(rate.replace(',', '')) - float(seconds)) < 0.00051
    assert re.search(r'^time per token of each: \d+\.\d\dms; '
                     r'reading the 0\.1 MB of weights once: \d+\.\d\dms$', result.stdout, re.M)


def test_bench_writes_a_profile(folder):
    result = run(folder, 'bench_jax.py', *SMALL, '--profile=True', '--real_data=False')
    assert result.returncode == 0, result.stderr
    assert list(folder.glob('bench_log/**/*.xplane.pb'))


# -----------------------------------------------------------------------------
# tools.compare

# prints nanoGPT's lines: iterations of 10 ms eager and 20 ms compiled, except for the first
FAKE_TRAIN = """
import sys
ms = 20 if '--compile=True' in sys.argv else 10
for i in range(5):
    print(f'iter {i}: loss 4.0000, time {ms if i else 999}.00ms, mfu 0.01%')
"""


def test_compare_alternates_and_prints_the_ratio_of_the_times(folder):
    (folder / 'nanoGPT').mkdir()
    (folder / 'nanoGPT' / 'train.py').write_text(FAKE_TRAIN)
    (folder / 'data' / 'tiny').rename(folder / 'data' / 'shakespeare_char')
    shutil.copytree(os.path.join(ROOT, 'config'), folder / 'config')
    result = run(folder, 'tools.compare', '--nanogpt=nanoGPT', f'--torch_python={sys.executable}',
                 '--rounds=2', '--max_iters=4')
    assert result.returncode == 0, result.stderr
    ran = re.findall(r'^readme_cpu, (.*): [\d.]+ ms per iteration', result.stdout, re.M)
    assert ran == ['JAX', 'PyTorch eager', 'PyTorch compile'] * 2
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in result.stdout.splitlines() if line.startswith('|')]
    times = {row[0]: row[1:] for row in rows if len(row) == 5}
    ours = float(times['JAX'][0])
    for name, ms in (('PyTorch eager', 10), ('PyTorch compile', 20)):
        assert times[name][:2] == [f'{ms:.1f}', f'{ms:.1f}, {ms:.1f}']
        assert abs(float(times[name][2]) - ms / ours) < 0.01


def test_compare_keeps_the_output_of_each_seed_for_plots(folder):
    # scripts that train nothing, ours in a copy of the tools
    shutil.copytree(os.path.join(ROOT, 'tools'), folder / 'tools')
    (folder / 'train_jax.py').write_text("""
import sys
print('step 0: train loss 4.0, val loss', 1 + int(sys.argv[1].removeprefix('--seed=')))""")
    (folder / 'nanoGPT').mkdir()
    (folder / 'nanoGPT' / 'train.py').write_text("print('step 0: train loss 4.0, val loss', 1337)")
    result = run(folder, 'tools.compare', '--nanogpt=nanoGPT', f'--torch_python={sys.executable}',
                 '--case=readme_loss', '--loss_seeds=7,8', '--torch_compile=compile', '--logs=logs')
    assert result.returncode == 0, result.stderr
    logs = {path.name: path.read_text().split()[-1] for path in (folder / 'logs').iterdir()}
    assert logs == {'JAX-7.log': '8', 'JAX-8.log': '9', 'PyTorch-compile-7.log': '7',
                    'PyTorch-compile-8.log': '8'}
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in result.stdout.splitlines() if line.startswith('|')]
    assert [row[:3] for row in rows[2:]] == [
        ['JAX', '7', '8.0'], ['JAX', '8', '9.0'], ['PyTorch compile', '7', '7.0'],
        ['PyTorch compile', '8', '8.0']]


@pytest.mark.parametrize('args, words', [
    (['--nanogpt=absent'], ['absent', '--nanogpt']),
    (['--nanogpt=nanoGPT', '--rounds=0'], ['rounds is 0']),
    (['--nanogpt=nanoGPT', '--case=gpt3'], ["'gpt3'", 'readme_cpu']),
    (['--nanogpt=nanoGPT', '--torch_compile=eager'], ['train_shakespeare_char.py']),
])
def test_a_mistake_in_a_comparison_is_one_line(folder, args, words):
    (folder / 'nanoGPT').mkdir()
    (folder / 'nanoGPT' / 'train.py').write_text('')
    one_line_error(run_inside(folder, 'tools.compare', *args), *words, alone=True)
