"""
Sample from a trained model.
$ python sample_jax.py --out_dir=out-pydoc --start="The "
$ python sample_jax.py --init_from=gpt2-xl --start="FILE:prompt.txt" --num_samples=5
$ python sample_jax.py --out_dir=out-pydoc --interactive=True --stream=True
"""

import os
import sys
import time

import jax
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__))) # python -P and -I leave it out
from jax_train_utils import check_settings, load_model
from nanogpt_jax.checkpoint import quiet_orbax, steps_on_disk
from nanogpt_jax.devices import compute_dtype, enable_compilation_cache, select_devices
from nanogpt_jax.errors import UserError, report_user_error
from nanogpt_jax.launch import keep_stdout_for_samples
from nanogpt_jax.sampling import (
    Continuation, Sampler, check_sampling_memory, check_sampling_settings, stream_tokens,
)
from nanogpt_jax.sharding import make_mesh
from nanogpt_jax.tokenizer import get_tokenizer, read_prompt

sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
# standard output is for the samples; everything else goes to standard error
samples_out = keep_stdout_for_samples()
quiet_orbax()
# -----------------------------------------------------------------------------
init_from = 'resume' # 'resume' (a run's out_dir), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl',
                     # or a folder with GPT-2 weights
out_dir = 'out_jax' # the run to sample from, if init_from is 'resume'
checkpoint = 'auto' # 'latest', 'best', an iteration, or 'auto': the best if the run saved
                    # improvements only, else the latest
start = '\n' # the prompt; 'FILE:prompt.txt' reads it from a file
num_samples = 10 # drawn in one batch
interactive = False # continue each line of standard input; num_samples is then 0, unless given
stream = False # print each token at once, one sample after the other
max_new_tokens = 500 # tokens in each sample, after the prompt
stop = '' # a sample ends before this text, for instance '<|endoftext|>'
temperature = 0.8 # 1.0: the model's distribution; lower: less random; 0.0: the most likely token
top_k = 200 # sample from the top_k most likely tokens only
top_p = 1.0 # of these, only the most likely ones that together have this probability
seed = 1337 # the same seed gives the same text
device = 'auto' # 'auto', 'cpu', 'gpu' or 'cuda', 'cuda:1', 'tpu'; of several devices one is used
dtype = 'bfloat16' # compute dtype: 'float32', 'bfloat16' or 'float16'; a CPU computes in float32
compilation_cache = True # cache compiled programs in the user's cache folder: faster next start
compile = False # no effect: XLA always compiles
from configurator import configure
config, given = configure(globals()) # all settings, and the names of those that were given
# -----------------------------------------------------------------------------

if interactive and 'num_samples' not in given:
    num_samples = 0
if num_samples < 0 or num_samples == 0 and not interactive:
    raise UserError(f'num_samples is {num_samples}; it must be at least 1, '
                    'or 0 with --interactive=True')
check_settings(config)
check_sampling_settings(max_new_tokens, Sampler(temperature, top_k, top_p))
if 'compile' in given:
    print('--compile has no effect: XLA always compiles')
devices = select_devices(device)
if compilation_cache:
    enable_compilation_cache()
compute_type = compute_dtype(dtype, devices, 'dtype' in given)

# model
model, vocabulary, step = load_model(
    init_from, out_dir, checkpoint, make_mesh(devices[:1]), compute_type)
if step is not None:
    newer = checkpoint == 'auto' and steps_on_disk(out_dir)[-1] > step
    print(f'sampling from iteration {step} of {out_dir}'
          + (', the best; --checkpoint=latest samples a later one' if newer else ''))
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')

encode, make_decode, n_vocab = get_tokenizer(vocabulary) # ids from n_vocab on are padding
if n_vocab > model.config.vocab_size:
    raise UserError(f'the tokenizer has {n_vocab} tokens, the model only '
                    f'{model.config.vocab_size}: it was trained with another tokenizer')

sampler = Sampler(temperature, top_k, top_p, n_vocab)

def say(text):
    print(text, end='', file=samples_out, flush=True)

def read_lines():
    """Yield the lines of standard input that are not empty."""
    sys.stdin.reconfigure(errors='replace')
    while True:
        if sys.stdin.isatty():
            print('> ', end='', flush=True)
        line = sys.stdin.readline()
        if not line:
            if sys.stdin.isatty():
                print() # ends the line of the prompt
            return
        if line.strip('\r\n'):
            yield line.strip('\r\n')

def sample(prompt, key, first, n):
    """Print n continuations of a prompt, numbered from `first`; with --stream n is 1.

    Returns (n, total tokens, seconds).
    """
    t0 = time.perf_counter()
    ids = np.array(encode(prompt), np.int32)
    check_sampling_memory(model.config, n, len(ids), max_new_tokens)
    idx = np.tile(ids, (n, 1)) # (n, T)
    texts = [Continuation(make_decode(ids), stop) for _ in range(n)]
    if stream:
        say(prompt)
    chunk = 1 if stream else 16 if stop else None # tokens between checks for the end of all texts
    for tokens in stream_tokens(model, idx, max_new_tokens, sampler, key, chunk, first):
        new = [text.add(ids) for text, ids in zip(texts, tokens.tolist())]
        if stream:
            say(new[0])
        if all(text.ended for text in texts):
            break
    for text in texts:
        rest = text.close()
        say((rest if stream else prompt + text.text) + '\n---------------\n')
    return n, sum(text.n_tokens for text in texts), time.perf_counter() - t0

key = jax.random.key(seed)
done = [] # results of sample()
if num_samples:
    prompt = read_prompt(start)
    for first in range(num_samples) if stream else [0]:
        done.append(sample(prompt, key, first, 1 if stream else num_samples))
refused = False
if interactive and sys.stdin.isatty():
    print('the first continuation takes some seconds longer, to compile')
for number, prompt in enumerate(read_lines(), start=1) if interactive else ():
    try:
        done.append(sample(prompt, jax.random.fold_in(key, number), 0, 1))
    except UserError as e: # the next prompt may be fine
        print(f'error: {e}')
        refused = True
n_texts, n_tokens, seconds = map(sum, zip(*done, (0, 0, 0.0)))
if n_tokens:
    print(f'{n_texts} sample{"s" * (n_texts != 1)}, {n_tokens:,} tokens in {seconds:.2f} s: '
          f'{n_tokens / seconds:.1f} tokens/s, compilation included')
sys.exit(refused)
