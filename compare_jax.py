"""
Time this port against PyTorch nanoGPT on this machine: whole runs from the command line, in turns; prints tables.
nanoGPT's checkout needs the data of the case (data/shakespeare_char) as much as this one; gpt2 and generate need none.
$ python compare_jax.py --nanogpt=../nanoGPT --torch_python=../torch-env/bin/python
$ python compare_jax.py --nanogpt=../nanoGPT --case=gpt2,shakespeare_loss --device=cuda
$ python compare_jax.py --nanogpt=../nanoGPT --case=generate,sample
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

from jax_devices import report_user_error
from jax_transformer import UserError

# -----------------------------------------------------------------------------
nanogpt = '../nanoGPT' # the checkout of nanoGPT
torch_python = 'python' # a Python that has torch
case = 'readme_cpu' # one or more, with commas: readme_cpu, shakespeare_char, shakespeare_loss, gpt2, generate, sample
rounds = 3 # how often the turns go round
max_iters = 0 # iterations of a run, 0 for the case's own number
torch_compile = 'both' # 'eager', 'compile', or 'both' in turns
device = 'cpu' # for both, in the names they share: 'cpu' or 'cuda'
micro_batches = '12,24,32,48,64' # gpt2: the sizes tried
seeds = '1337,1338,1339' # shakespeare_loss
from configurator import configure
configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.excepthook = report_user_error
sys.stdout.reconfigure(line_buffering=True)
here = os.path.dirname(os.path.abspath(__file__))
README_CPU = ['config/train_shakespeare_char.py', '--eval_iters=20', '--log_interval=1', '--block_size=64', '--batch_size=12',
              '--n_layer=4', '--n_head=4', '--n_embd=128', '--lr_decay_iters=2000', '--dropout=0.0']
# the flags of a case, and the iterations that are enough to time it; evaluations are kept out of the way
TIMED = {'readme_cpu': (README_CPU, 500), 'shakespeare_char': (['config/train_shakespeare_char.py', '--log_interval=1'], 8)}
# who runs: the command's first words, by seed (nanoGPT's is no flag), and the folder to run in (None: this one)
contenders = {'JAX': (lambda script, seed: [
    sys.executable, os.path.join(here, script.replace('.py', '_jax.py')), f'--seed={seed}'], None)}
for mode in ('eager', 'compile'):
    if torch_compile in (mode, 'both'):
        contenders[f'PyTorch {mode}'] = (lambda script, seed, compiled=mode == 'compile': [
            torch_python, '-c', f"exec(compile(open('{script}').read().replace('1337', '{seed}'), '{script}', 'exec'))",
            f'--compile={compiled}'], nanogpt)
if not os.path.exists(os.path.join(nanogpt, 'train.py')):
    raise UserError(f'{nanogpt} is no checkout of nanoGPT; give its folder with --nanogpt')


def run(contender, script, *args, seed=1337):
    """(output, seconds) of a whole process: nanoGPT's script, or ours of the same name."""
    command, folder = contenders[contender]
    return process([*command(script, seed), f'--device={device}', *args], folder)


def process(command, folder):
    """(output, seconds) of a command run in a folder. Raises UserError if it fails."""
    t0 = time.time()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f'{" ".join(" ".join(command).split())} failed: {" ".join(result.stderr.split())[-400:]}')
    return result.stdout, time.time() - t0


def table(head, rows):
    print('\n| ' + ' | '.join(head) + ' |\n|' + ' --- |' * len(head))
    for row in rows:
        print('| ' + ' | '.join(str(cell) for cell in row) + ' |')
    print()


def joined(numbers, digits):
    return ', '.join(f'{x:.{digits}f}' for x in numbers)


def timed(name):
    """Milliseconds per iteration, the median of each run's own medians, without evaluations and the first iterations."""
    flags, iters = TIMED[name]
    iters = max_iters or iters
    flags = [*flags, f'--max_iters={iters}', '--eval_interval=1000000', '--eval_iters=1']
    times, walls = {c: [] for c in contenders}, {c: [] for c in contenders}
    for _ in range(rounds):
        for contender in contenders:
            with tempfile.TemporaryDirectory() as folder:
                out, wall = run(contender, 'train.py', *flags, f'--out_dir={folder}/run')
            ms = [float(t) for t in re.findall(r'^iter \d+: .* time ([\d.]+)ms', out, re.M)]
            times[contender].append(statistics.median(ms[max(2, iters // 10):]))
            walls[contender].append(wall)
            print(f'{name}, {contender}: {times[contender][-1]:.2f} ms per iteration, {wall:.1f} s in all')
    medians = {c: statistics.median(t) for c, t in times.items()}
    table([name, 'ms per iteration', 'each run', 'against JAX', f'whole process, {iters} iterations'],
          [(c, f'{medians[c]:.1f}', joined(t, 1), f'{medians[c] / medians["JAX"]:.2f}', f'{statistics.median(walls[c]):.1f} s')
           for c, t in times.items()])


def best_losses(name):
    """The best validation loss of config/train_shakespeare_char.py as it stands, and the wall time, for each seed."""
    rows = []
    for contender in contenders:
        for seed in seeds.split(','):
            with tempfile.TemporaryDirectory() as folder:
                flags = ['config/train_shakespeare_char.py', f'--out_dir={folder}/run']
                out, wall = run(contender, 'train.py', *flags, *[f'--max_iters={max_iters}'] * (max_iters > 0), seed=seed)
            best = min(float(loss) for loss in re.findall(r'^step \d+: .* val loss ([\d.]+)', out, re.M))
            rows.append((contender, seed, best, f'{wall:.0f} s'))
            print(name, *rows[-1])
    table([name, 'seed', 'best validation loss', 'whole process'], rows)


def gpt2(name):
    """GPT-2 124M, 1024 tokens a row, one micro-batch an iteration: milliseconds for 12,288 tokens, at each micro-batch."""
    rows = []
    for size in micro_batches.split(','):
        for contender in contenders:
            times = []
            for _ in range(rounds):
                try:
                    out, _ = run(contender, 'bench.py', '--real_data=False', f'--batch_size={size}')
                except UserError as e:  # out of memory, most likely: the others go on
                    print(e)
                    break
                times.append(float(re.findall(r'time per iteration: ([\d.]+)ms', out)[-1]) * 12 / int(size))
                print(f'{name}, {contender}, {size} rows: {times[-1]:.2f} ms per 12,288 tokens')
            if contender == 'JAX' and times:
                print('\n'.join(line for line in out.splitlines() if 'loss' not in line))
            rows.append((contender, size, f'{statistics.median(times):.2f}' if times else 'failed', joined(times, 2)))
    table([name, 'micro-batch', 'ms per 12,288 tokens', 'each run'], rows)


# the model's shape, samples, and tokens of each
GENERATED = {'6 layers, 384 wide': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 10, 255),
             '4 layers, 128 wide': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 10, 500),
             'GPT-2 124M': (dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257), 1, 100)}
TORCH_GENERATE = """
import contextlib, time, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(dropout=0.0, bias=False, **{shape})).eval().to('{device}')
idx = torch.zeros((1, 1), dtype=torch.long, device='{device}')
autocast = torch.amp.autocast('cuda', torch.bfloat16) if '{device}' == 'cuda' else contextlib.nullcontext()
with torch.no_grad(), autocast:
    model.generate(idx, 5, top_k=65)
    t0 = time.time()
    for _ in range({n}):
        model.generate(idx, {tokens}, top_k=65).tolist()
print('loop:', time.time() - t0, 's,')
"""


def generate(name):
    """Seconds for the loop of generate alone, from one token on: nanoGPT takes one sample after the other, we all at once."""
    rows = []
    for model, (shape, n, tokens) in GENERATED.items():
        ours = [sys.executable, os.path.join(here, 'bench_jax.py'), f'--device={device}', f'--batch_size={n}',
                f'--max_new_tokens={tokens}', *(f'--{key}={value}' for key, value in shape.items())]
        theirs = [torch_python, '-c', TORCH_GENERATE.format(shape=shape, device=device, n=n, tokens=tokens)]
        times = {'JAX': [], 'PyTorch': []}
        for _ in range(rounds):
            for contender, command, folder in (('JAX', ours, None), ('PyTorch', theirs, nanogpt)):
                out, _ = process(command, folder)
                times[contender].append(float(re.search(r': ([\d.]+) s,', out)[1]))
                print(f'{name}, {model}, {contender}: {times[contender][-1]:.3f} s')
        jax_time, torch_time = (statistics.median(t) for t in times.values())
        rows.append((model, f'{n} of {tokens}', f'{jax_time:.2f} s', f'{torch_time:.2f} s', f'{torch_time / jax_time:.1f}',
                     f'{n * tokens / jax_time:,.1f}', f'{n * tokens / torch_time:,.1f}'))
    table([name, 'samples', 'JAX', 'PyTorch', 'PyTorch against JAX', 'tokens/s, JAX', 'tokens/s, PyTorch'], rows)


def sample(name):
    """Whole processes of sample.py and sample_jax.py, imports and compilation included: 10 samples of 500 tokens."""
    flags = [*README_CPU, '--max_iters=1', '--eval_interval=1', '--eval_iters=1', '--always_save_checkpoint=True']
    turns = {'JAX': ('JAX', ['--compilation_cache=False']), 'JAX, compiled before': ('JAX', []),
             'PyTorch eager': ('PyTorch eager', [])}
    walls = {turn: [] for turn in turns}
    with tempfile.TemporaryDirectory() as folder:
        for contender in ('JAX', 'PyTorch eager'):
            run(contender, 'train.py', *flags, f'--out_dir={folder}/{contender}')
        for _ in range(rounds + 1):
            for turn, (contender, more) in turns.items():
                walls[turn].append(run(contender, 'sample.py', f'--out_dir={folder}/{contender}', *more)[1])
                print(f'{name}, {turn}: {walls[turn][-1]:.1f} s')
    medians = {turn: statistics.median(wall[1:]) for turn, wall in walls.items()} # the first round fills the caches
    table([name, 'whole process', 'each run', 'against JAX'],
          [(turn, f'{medians[turn]:.1f} s', joined(wall[1:], 1), f'{medians[turn] / medians["JAX"]:.2f}')
           for turn, wall in walls.items()])


cases = {'readme_cpu': timed, 'shakespeare_char': timed, 'shakespeare_loss': best_losses, 'gpt2': gpt2,
         'generate': generate, 'sample': sample}
for each in case.split(','):
    if each not in cases:
        raise UserError(f'no case {each!r}; there are {", ".join(cases)}')
for each in case.split(','):
    cases[each](each)
