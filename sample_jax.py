"""
Sample from a trained model.
$ python sample_jax.py --out_dir=out-pydoc-char --start="The "
$ python sample_jax.py --init_from=gpt2-xl --start="FILE:prompt.txt" --num_samples=5 --max_new_tokens=100
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_checkpoint import Checkpoints
from jax_devices import compute_dtype, report_user_error, select_devices
from jax_train_utils import create_codec, read_prompt, split_model
from jax_transformer import GPT, GPTConfig, UserError

# -----------------------------------------------------------------------------
init_from = 'resume' # 'resume' (a run's out_dir), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with GPT-2 weights
out_dir = 'out_jax' # read where init_from is 'resume'
which = 'auto' # the checkpoint: 'latest', 'best', an iteration, or 'auto', best where the run kept improvements only, else latest
start = '\n' # the prompt; 'FILE:prompt.txt' reads it from a file
num_samples = 10
max_new_tokens = 500 # tokens in each sample, after the prompt
temperature = 0.8 # 1.0 samples from the model's own distribution, less is less random, 0.0 takes the most likely token
top_k = 200 # only so many of the most likely tokens can be drawn
top_p = 1.0 # and of these only the most likely that together have this probability
seed = 1337
device = 'auto' # 'auto', 'cpu', 'gpu' or 'cuda', 'cuda:1' for one of several, 'tpu'
dtype = 'bfloat16' # compute type: 'float32', 'bfloat16' or 'float16'; a CPU computes in float32
compile = False # no meaning here: XLA always compiles
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
sys.stdout.reconfigure(errors='replace') # a terminal that lacks a character gets ? for it
if num_samples < 1:
    raise UserError(f'num_samples is {num_samples}; it must be at least 1')
if 'compile' in given:
    print('--compile has no counterpart here and is ignored: XLA always compiles')
devices = select_devices(device)
compute_type = compute_dtype(dtype, devices)

# model
chars = None
if init_from == 'resume':
    checkpoints = Checkpoints(out_dir, read_only=True)
    step = checkpoints.find(which)
    saved = checkpoints.meta(step)
    chars = saved['chars']
    gptconf = GPTConfig(**saved['model_args'], dtype=compute_type)
    params = checkpoints.params(step, gptconf, jax.sharding.SingleDeviceSharding(devices[0]))
    model = nnx.merge(split_model(gptconf)[2], params)
    print(f'sampling from iteration {step} of {out_dir}')
else:
    model = GPT.from_pretrained(init_from, dict(dropout=0.0), dtype=compute_type)
    gptconf = model.config
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')

# prompt
encode, decode = create_codec(chars)
n_vocab = len(chars) if chars is not None else 50257 # ids past it are padding
prompt = encode(read_prompt(start))
x = jnp.asarray(np.tile(np.array(prompt, np.int32), (num_samples, 1)))  # (num_samples, T)

# all samples in one batch
y = model.generate(x, max_new_tokens, temperature, top_k, jax.random.key(seed), top_p, min(n_vocab, gptconf.vocab_size))
for tokens in np.asarray(y):
    print(decode(tokens.tolist()))
    print('---------------')
