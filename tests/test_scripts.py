"""sample_jax.py, bench_jax.py and tools.compare from the command line."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ENV, ROOT, TINY, one_line_error, run, save_model

from jax_transformer import GPTConfig
from nanogpt_jax.errors import UserError
from nanogpt_jax.sampling import check_sampling_memory
from nanogpt_jax.tokenizer import read_prompt

SCRIPTS = ['train_jax.py', 'sample_jax.py', 'bench_jax.py', 'convert_jax.py']
TOOLS = ['tools.plan', 'tools.plot', 'tools.sizing', 'tools.compare']


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS + TOOLS)
def test_a_mistake_ends_every_script_in_one_line(folder, script):
    # a script finds its modules even if Python leaves out its folder, as with -P and -I
    path = {'PYTHONSAFEPATH': '1', 'PYTHONPATH': ROOT if script in TOOLS else ''}
    one_line_error(run(folder, script, '--nope=1', **path), 'unknown flag --nope', alone=True)


# -----------------------------------------------------------------------------
# sample_jax.py

CHARS = [*'abcdefghijklmnopqrs\n']
MODEL = GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=32)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A working directory with a checkpoint in out_jax, and no data."""
    folder = tmp_path_factory.mktemp('trained')
    save_model(folder, MODEL, CHARS)
    return folder


def sample(folder, *args, **kwargs):
    return run(folder, 'sample_jax.py', '--device=cpu', *args, **kwargs)


def texts(result):
    """The samples of a run that printed nothing else."""
    *samples, rest = result.stdout.split('\n---------------\n')
    assert rest == '', result.stderr
    return samples


def test_samples_continue_a_prompt_as_a_batch_one_by_one_and_for_each_line_of_stdin(trained):
    (trained / 'prompt.txt').write_text('ab\ncd')
    flags = ['--num_samples=3', '--max_new_tokens=40', '--start=FILE:prompt.txt']  # past block_size
    result = sample(trained, *flags)
    full = texts(result)
    assert result.returncode == 0, result.stderr
    assert [len(t) for t in full] == [45] * 3 and len(set(full)) == 3
    assert all(t.startswith('ab\ncd') and set(t) <= set(CHARS) for t in full)

    # streamed until a stop string; then two lines, the first of which the model cannot continue
    stop = full[0][9:12]
    result = sample(trained, *flags, f'--stop={stop}', '--stream=True', '--interactive',
                    stdin='x\n\nabc')
    cut = texts(result)
    assert cut[:3] == ['ab\ncd' + t[5:].split(stop)[0] for t in full] and len(cut[0]) == 9
    assert len(cut) == 4 and cut[3].startswith('abc')
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and errors[0].startswith("error: the model never saw")
    assert re.search(r'^4 samples, [\d,]+ tokens in \d+\.\d\d s: \d+\.\d tokens/s, '
                     'compilation included$', result.stderr, re.M)


@pytest.mark.slow
def test_a_closed_pipe_or_a_full_disk_ends_sampling_without_a_traceback(trained):
    def sample_to(output):
        command = (f'{sys.executable} {ROOT}/sample_jax.py --device=cpu --max_new_tokens=200 '
                   f'--stream=True {output}')
        return subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True,
                              env=os.environ | ENV)
    result = sample_to('| head -c 1')
    assert result.stdout == '\n', result.stderr
    assert 'Traceback' not in result.stderr and 'BrokenPipe' not in result.stderr, result.stderr
    one_line_error(sample_to('> /dev/full'), 'No space left')


@pytest.mark.slow
@pytest.mark.parametrize('args, words', [
    (['--start=xyz'], ["['x', 'y', 'z']", 'abcdef']), (['--out_dir=absent'], ['does not exist']),
    (['--checkpoint=3'], ["'3'", 'latest']), (['--num_samples=0'], ['num_samples is 0']),
    (['--seed=4294967296'], ['seed is 4294967296', 'below 4294967296']),
    (['--top_k=0'], ['top_k is 0'])])
def test_a_mistake_in_sampling_is_one_line(trained, args, words):
    one_line_error(sample(trained, '--start=a', *args), *words)


def test_a_prompt_that_cannot_be_read_or_held_is_refused(trained):
    (trained / 'latin1.txt').write_bytes(b'caf\xe9')
    for start, words in (('', 'prompt is empty'), ('FILE:absent.txt', 'absent.txt'),
                         (f'FILE:{trained}/latin1.txt', 'latin1.txt.*utf-8')):
        with pytest.raises(UserError, match=words):
            read_prompt(start)
    with pytest.raises(UserError, match='GB of memory.*--stream=True'):
        check_sampling_memory(MODEL, 10 ** 9, 1, 500)


# -----------------------------------------------------------------------------
# bench_jax.py

SMALL = [*TINY[:7], '--vocab_size=20']


def test_bench_prints_nanogpts_line_and_what_a_step_needs(folder):
    flags = ['--gradient_accumulation_steps=3', '--remat=True', '--dropout=0.1']
    result = run(folder, 'bench_jax.py', *SMALL, *flags)
    assert result.returncode == 0, result.stderr
    time, _ = re.search(r'^time per iteration: (\d+\.\d{4})ms, MFU: (\d+\.\d\d)%$',
                          result.stdout, re.M).groups()
    tokens = re.search(r'^tokens per second: ([\d,]+)$', result.stdout, re.M)[1].replace(',', '')
    # 12 sequences of 16 tokens; both are rounded
    assert abs(float(tokens) * float(time) / 1000 / (12 * 16) - 1) < 0.01
    for line in (r'compiled in \d+\.\d s',
                 r'memory by the compiled program: \d+\.\d\d GiB of state and batch, '
                 r'\d+\.\d\d GiB while it runs',
                 r'mfu is counted against \S+ TFLOP/s, the float32 matmul rate .*',
                 r'host time per iteration \(batch and dispatch\): \d+\.\d\dms'):
        assert re.search(f'^{line}$', result.stdout, re.M), line
    assert result.stdout.count('/10 loss: ') == 10 and result.stdout.count('/20 loss: ') == 20


@pytest.mark.slow
def test_bench_times_sampling_beside_reading_the_weights_and_writes_a_profile(folder):
    result = run(folder, 'bench_jax.py', *SMALL, '--max_new_tokens=20')
    assert result.returncode == 0, result.stderr
    seconds, rate = re.search(r'^4 samples of 20 tokens: (\d+\.\d{3}) s, '
                              r'([\d,.]+) tokens per second$', result.stdout, re.M).groups()
    # seconds are rounded to milliseconds, the rate to a tenth
    assert abs(80 / float(rate.replace(',', '')) - float(seconds)) < 0.00051
    assert re.search(r'^time per token of each: \d+\.\d\dms; '
                     r'reading the 0\.1 MB of weights once: \d+\.\d\dms$', result.stdout, re.M)
    result = run(folder, 'bench_jax.py', *SMALL, '--profile=True', '--real_data=False')
    assert result.returncode == 0, result.stderr
    assert list(folder.glob('bench_log/**/*.xplane.pb'))


@pytest.mark.slow
@pytest.mark.parametrize('args, words', [
    (['--vocab_size=5'], ['token id 19', 'ends at 4']),
    (['--real_data=False', '--n_layer=9999', '--n_head=1', '--n_embd=60000'], ['GB of memory']),
    (['--max_new_tokens=-1'], ['max_new_tokens'])])
def test_a_mistake_in_a_benchmark_is_one_line(folder, args, words):
    one_line_error(run(folder, 'bench_jax.py', *SMALL, *args), *words, alone=True)


# -----------------------------------------------------------------------------
# tools.compare

# prints nanoGPT's lines: iterations of 10 ms eager and 20 ms compiled, except for the first
FAKE_TRAIN = """
import sys
ms = 20 if '--compile=True' in sys.argv else 10
for i in range(5):
    print(f'iter {i}: loss 4.0000, time {ms if i else 999}.00ms, mfu 0.01%')
"""


def compare(folder, torch_train, *args):
    """stdout of tools.compare with this as nanoGPT's train.py."""
    (folder / 'nanoGPT').mkdir()
    (folder / 'nanoGPT' / 'train.py').write_text(torch_train)
    result = run(folder, 'tools.compare', '--nanogpt=nanoGPT', f'--torch_python={sys.executable}',
                 *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(out):
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in out.splitlines() if line.startswith('|')]


@pytest.mark.slow
def test_compare_alternates_and_prints_the_ratio_of_the_times(folder):
    (folder / 'data' / 'tiny').rename(folder / 'data' / 'shakespeare_char')
    shutil.copytree(os.path.join(ROOT, 'config'), folder / 'config')
    out = compare(folder, FAKE_TRAIN, '--rounds=2', '--max_iters=4')
    ran = re.findall(r'^readme_cpu, (.*): [\d.]+ ms per iteration', out, re.M)
    assert ran == ['JAX', 'PyTorch eager', 'PyTorch compile'] * 2
    times = {row[0]: row[1:] for row in rows(out) if len(row) == 5}
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
    out = compare(folder, "print('step 0: train loss 4.0, val loss', 1337)", '--case=readme_loss',
                  '--loss_seeds=7,8', '--torch_compile=compile', '--logs=logs')
    logs = {path.name: path.read_text().split()[-1] for path in (folder / 'logs').iterdir()}
    assert logs == {'JAX-7.log': '8', 'JAX-8.log': '9', 'PyTorch-compile-7.log': '7',
                    'PyTorch-compile-8.log': '8'}
    assert [row[:3] for row in rows(out)[2:]] == [
        ['JAX', '7', '8.0'], ['JAX', '8', '9.0'], ['PyTorch compile', '7', '7.0'],
        ['PyTorch compile', '8', '8.0']]


@pytest.mark.slow
@pytest.mark.parametrize('args, words', [
    (['--nanogpt=absent'], ['absent', '--nanogpt']),
    (['--nanogpt=nanoGPT', '--rounds=0'], ['rounds is 0']),
    (['--nanogpt=nanoGPT', '--case=gpt3'], ["'gpt3'", 'readme_cpu']),
    (['--nanogpt=nanoGPT', '--torch_compile=eager'], ['train_shakespeare_char.py']),
])
def test_a_mistake_in_a_comparison_is_one_line(folder, args, words):
    (folder / 'nanoGPT').mkdir()
    (folder / 'nanoGPT' / 'train.py').write_text('')
    one_line_error(run(folder, 'tools.compare', *args), *words, alone=True)
