"""
Time this port against PyTorch nanoGPT on this machine: alternate whole runs of both scripts, and
print tables. Both checkouts need data/shakespeare_char, but not for the cases gpt2 and generate.
$ python -m tools.compare --nanogpt=../nanoGPT --torch_python=../torch-env/bin/python
$ python -m tools.compare --nanogpt=../nanoGPT --case=gpt2,shakespeare_loss --device=cuda
$ python -m tools.compare --nanogpt=../nanoGPT --case=generate,sample
"""

import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from nanogpt_jax.errors import UserError, report_user_error
from tools import print_table

sys.excepthook = report_user_error
# -----------------------------------------------------------------------------
nanogpt = '../nanoGPT' # the checkout of nanoGPT
torch_python = 'python' # a Python that has torch
case = 'readme_cpu' # or shakespeare_char, readme_loss, shakespeare_loss, gpt2, generate, sample; or
                    # several, with commas
rounds = 3 # runs of each contender
max_iters = 0 # iterations of readme_cpu and shakespeare_char; 0: enough to time them
torch_compile = 'both' # 'eager', 'compile' (torch.compile), or 'both'
device = 'cpu' # of both projects: 'cpu' or 'cuda'
micro_batches = '12,24,32,48,64' # gpt2: the micro-batch sizes to try
loss_seeds = '1337,1338,1339' # readme_loss and shakespeare_loss: one run per seed
logs = '' # a folder for the output of these runs, for tools.plot; '' for none
from configurator import configure
configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.stdout.reconfigure(line_buffering=True)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
contenders = ['JAX', *(f'PyTorch {mode}' for mode in ('eager', 'compile')
                       if torch_compile in (mode, 'both'))]
if rounds < 1:
    raise UserError(f'rounds is {rounds}; it must be at least 1')
if not os.path.exists(os.path.join(nanogpt, 'train.py')):
    raise UserError(f'{nanogpt} is not a checkout of nanoGPT; give its folder with --nanogpt')


def run(contender, script, *args, seed=1337):
    """(output, seconds) of a whole process: nanoGPT's script, or ours of the same name."""
    if contender == 'JAX':
        ours = os.path.join(ROOT, script.replace('.py', '_jax.py'))
        command, folder = [sys.executable, ours, f'--seed={seed}'], None
    else:  # nanoGPT's training seed is not a flag
        code = (f"exec(compile(open('{script}').read().replace('1337', '{seed}'), '{script}', "
                "'exec'))")
        compiled = contender == 'PyTorch compile'
        command, folder = [torch_python, '-c', code, f'--compile={compiled}'], nanogpt
    return process([*command, f'--device={device}', *args], folder)


def train(contender, *args, seed=1337):
    """As run, of a training run with an out_dir of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return run(contender, 'train.py', *args, f'--out_dir={folder}/run', seed=seed)


def process(command, folder):
    """(output, seconds) of a command, run in a folder. Raises UserError if it fails."""
    t0 = time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        command = ' '.join(' '.join(command).split())
        raise UserError(f'{command} failed: {" ".join(result.stderr.split())[-400:]}')
    return result.stdout, time.perf_counter() - t0


def report(head, rows):
    print()
    print_table(head, rows, markdown=True)
    print()


def medians_of(numbers):
    return {contender: statistics.median(each) for contender, each in numbers.items()}


def joined(numbers, digits):
    return ', '.join(f'{x:.{digits}f}' for x in numbers)


# -----------------------------------------------------------------------------
# training

README_CPU = ['config/train_shakespeare_char.py', '--eval_iters=20', '--log_interval=1',
              '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4', '--n_embd=128',
              '--lr_decay_iters=2000', '--dropout=0.0']
TIMED = {  # flags, and enough iterations to time them
    'readme_cpu': (README_CPU, 500),
    'shakespeare_char': (['config/train_shakespeare_char.py', '--log_interval=1'], 8),
}


def timed(name):
    """Milliseconds per iteration: the median over runs of each run's median, without evaluations
    and the first iterations."""
    flags, iters = TIMED[name]
    iters = max_iters or iters
    flags = [*flags, f'--max_iters={iters}', '--eval_interval=1000000', '--eval_iters=1']
    times, walls = {c: [] for c in contenders}, {c: [] for c in contenders}
    for contender in contenders * rounds:
        out, wall = train(contender, *flags)
        ms = [float(t) for t in re.findall(r'^iter \d+: .* time ([\d.]+)ms', out, re.M)]
        times[contender].append(statistics.median(ms[max(2, iters // 10):]))
        walls[contender].append(wall)
        print(f'{name}, {contender}: {times[contender][-1]:.2f} ms per iteration, '
              f'{wall:.1f} s for the process')
    ms, seconds = medians_of(times), medians_of(walls)
    report([name, 'ms per iteration', 'each run', 'against JAX',
            f'whole process, {iters} iterations'],
           [(c, f'{ms[c]:.1f}', joined(times[c], 1), f'{ms[c] / ms["JAX"]:.2f}',
             f'{seconds[c]:.1f} s') for c in contenders])


LOSSES = {'readme_loss': [*README_CPU, '--eval_iters=500', '--max_iters=2000'],
          'shakespeare_loss': ['config/train_shakespeare_char.py']}


def best_losses(name):
    """The best validation loss, and the time of the whole process, for each seed."""
    rows = []
    for contender in contenders:
        for seed in loss_seeds.split(','):
            out, wall = train(contender, *LOSSES[name], seed=seed)
            if logs:
                os.makedirs(logs, exist_ok=True)
                log = pathlib.Path(logs, f'{contender}-{seed}.log'.replace(' ', '-'))
                log.write_text(out, encoding='utf-8')
            losses = re.findall(r'^step \d+: .* val loss ([\d.]+)', out, re.M)
            rows.append((contender, seed, min(map(float, losses)), f'{wall:.0f} s'))
            print(name, *rows[-1])
    report([name, 'seed', 'best validation loss', 'whole process'], rows)


def gpt2(name):
    """GPT-2 124M, one micro-batch per iteration: milliseconds for 12,288 tokens, at each size."""
    rows = []
    for size in micro_batches.split(','):
        for contender in contenders:
            times = []
            for _ in range(rounds):
                try:
                    out, _ = run(contender, 'bench.py', '--real_data=False', f'--batch_size={size}')
                except UserError as e:  # most likely out of memory; the others may fit
                    print(e)
                    break
                ms = float(re.findall(r'time per iteration: ([\d.]+)ms', out)[-1])
                times.append(ms * 12 / int(size))
                print(f'{name}, {contender}, micro-batch {size}: {times[-1]:.2f} ms per 12,288 '
                      'tokens')
            median = f'{statistics.median(times):.2f}' if times else 'failed'
            rows.append((contender, size, median, joined(times, 2)))
    report([name, 'micro-batch', 'ms per 12,288 tokens', 'each run'], rows)


# -----------------------------------------------------------------------------
# sampling

GENERATED = {  # shape of the model, number of samples, tokens of each
    '6 layers, 384 wide': (
        dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 10, 255),
    '4 layers, 128 wide': (
        dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 10, 500),
    'GPT-2 124M': (
        dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257), 1, 100),
}
TORCH_GENERATE = """
import contextlib, time, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(dropout=0.0, bias=False, **{shape})).eval().to('{device}')
idx = torch.zeros(({batch}, 1), dtype=torch.long, device='{device}')
on_gpu = '{device}' == 'cuda'
autocast = torch.amp.autocast('cuda', torch.bfloat16) if on_gpu else contextlib.nullcontext()
with torch.no_grad(), autocast:
    model.generate(idx, 5, top_k=65)
    t0 = time.perf_counter()
    for _ in range({n} // {batch}):
        model.generate(idx, {tokens}, top_k=65).tolist()
print('loop:', time.perf_counter() - t0, 's,')
"""


def generate(name):
    """Seconds of generate alone, after one token. This port draws all samples at once, nanoGPT's
    sample.py one by one, although its model can draw a batch too."""
    rows = []
    for model, (shape, n, tokens) in GENERATED.items():
        bench = [sys.executable, os.path.join(ROOT, 'bench_jax.py'), f'--device={device}',
                 f'--batch_size={n}', f'--max_new_tokens={tokens}',
                 *(f'--{key}={value}' for key, value in shape.items())]
        commands = {'JAX': (bench, None)} | {
            way: ([torch_python, '-c', TORCH_GENERATE.format(
                shape=shape, device=device, n=n, tokens=tokens, batch=batch)], nanogpt)
            for way, batch in {'PyTorch, a batch': n, 'PyTorch, one by one': 1}.items()}
        times = {way: [] for way in commands}
        for way in [*commands] * rounds:
            out, _ = process(*commands[way])
            times[way].append(float(re.search(r': ([\d.]+) s,', out)[1]))
            print(f'{name}, {model}, {way}: {times[way][-1]:.3f} s')
        ours, *theirs = medians_of(times).values()
        rows.append((model, f'{n} of {tokens}', *(f'{t:.2f} s' for t in (ours, *theirs)),
                     *(f'{t / ours:.1f}' for t in theirs), f'{n * tokens / ours:,.1f}'))
    report([name, 'samples', *commands, *(f'{way} / JAX' for way in [*commands][1:]),
            'tokens/s, JAX'], rows)


def sample(name):
    """Seconds of whole processes that draw 10 samples, with imports and compilation."""
    flags = [*README_CPU, '--max_iters=1', '--eval_interval=1', '--eval_iters=1',
             '--always_save_checkpoint=True']
    variants = {'JAX': ('JAX', ['--compilation_cache=False']), 'JAX, compiled before': ('JAX', []),
                'PyTorch eager': ('PyTorch eager', [])}
    walls = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        for contender in ('JAX', 'PyTorch eager'):
            run(contender, 'train.py', *flags, f'--out_dir={folder}/{contender}')
        for variant in [*variants] * (rounds + 1):
            contender, more = variants[variant]
            _, wall = run(contender, 'sample.py', f'--out_dir={folder}/{contender}', *more)
            walls[variant].append(wall)
            print(f'{name}, {variant}: {wall:.1f} s')
    walls = {variant: wall[1:] for variant, wall in walls.items()}  # the first fills the caches
    medians = medians_of(walls)
    report([name, 'whole process', 'each run', 'against JAX'],
           [(variant, f'{medians[variant]:.1f} s', joined(wall, 1),
             f'{medians[variant] / medians["JAX"]:.2f}') for variant, wall in walls.items()])


cases = {'readme_cpu': timed, 'shakespeare_char': timed,
         'readme_loss': best_losses, 'shakespeare_loss': best_losses,
         'gpt2': gpt2, 'generate': generate, 'sample': sample}
if unknown := [each for each in case.split(',') if each not in cases]:
    raise UserError(f'no case {unknown[0]!r}; there are {", ".join(cases)}')
for each in case.split(','):
    cases[each](each)
