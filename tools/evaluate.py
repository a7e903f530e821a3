"""
Evaluate a model on tasks of EleutherAI's harness (pip install lm_eval): print its table, and write
its JSON beside the checkpoint.
$ python -m tools.evaluate --out_dir=out-gpt2 --tasks=hellaswag,lambada_openai
$ python -m tools.evaluate --init_from=gpt2 --tasks=hellaswag --limit=100
$ python -m tools.evaluate --tasks=my_task --include_path=my_tasks
"""

import json
import os
import sys
from collections import defaultdict
from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_train_utils import load_model
from nanogpt_jax import run_dir
from nanogpt_jax.checkpoint import quiet_orbax
from nanogpt_jax.devices import compute_dtype, enable_compilation_cache, select_devices
from nanogpt_jax.errors import UserError, optional_import, report_user_error
from nanogpt_jax.sampling import Continuation, Sampler, stream_tokens
from nanogpt_jax.sharding import make_mesh, shard_batch
from nanogpt_jax.tokenizer import (
    end_of_text, get_tokenizer, gpt2_encoding, make_tokenizer,
)

sys.excepthook = report_user_error
quiet_orbax()
# -----------------------------------------------------------------------------
tasks = '' # names of the harness's tasks, or of your own in include_path: a,b
init_from = 'resume' # 'resume' (a run's out_dir), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl',
                     # or a folder with GPT-2 weights
out_dir = 'out_jax' # the run to evaluate, if init_from is 'resume'
checkpoint = 'auto' # 'latest', 'best', an iteration, or 'auto', as in sample_jax.py
include_path = '' # a folder with tasks of your own, as YAML files
limit = 0 # items of each task to evaluate; 0: all
num_fewshot = -1 # examples before each item; -1: the task's own number
log_samples = False # also write each item with the model's answers
batch_size = 16 # sequences per device in a forward pass
seed = 1337 # for tasks that sample
device = 'auto' # 'auto', 'cpu', 'gpu' or 'cuda', 'cuda:1', 'tpu'; all such devices are used
dtype = 'bfloat16' # compute dtype: 'float32', 'bfloat16' or 'float16'; a CPU computes in float32
compilation_cache = True # cache compiled programs in the user's cache folder: faster next start
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

if not tasks:
    raise UserError('give --tasks, as in --tasks=hellaswag,lambada_openai')
if batch_size < 1:
    raise UserError(f'batch_size is {batch_size}; it must be at least 1')
optional_import('lm_eval') # a folder of that name does not count
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from tqdm import tqdm


def end_of_document(vocabulary):
    """The id that separates documents: the end of text, or of a line for characters."""
    if vocabulary is None:
        return gpt2_encoding().eot_token
    if isinstance(vocabulary, list):
        return vocabulary.index('\n') if '\n' in vocabulary else 0
    return end_of_text(make_tokenizer(vocabulary, "the model's tokenizer")[0]) or 0


def padded_length(n, block_size):
    """The first of 16, 24, 32, 48, 64, 96, ... that holds n tokens, or block_size."""
    lengths = (size * 2 ** k for k in range(32) for size in (16, 24))
    return min(block_size, next(length for length in lengths if length >= n))


@partial(jax.jit, static_argnames='graphdef')
def score(graphdef, params, idx, targets):
    """(log-probability of each target, whether it is the most likely token) of ids idx (B, T).

    targets: int (B, T). Returns float32 (B, T) and bool (B, T), 0 and True for targets of -1.
    """
    logits = nnx.merge(graphdef, params)(idx, targets)[0].astype(jnp.float32)  # (B, T, V)
    chosen = jnp.take_along_axis(logits, targets.clip(0)[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    ignored = targets == -1
    return jnp.where(ignored, 0, logprobs), ignored | (logits.argmax(-1) == targets)


class Adapter(TemplateLM):
    """A model with the harness's interface. Its batches have few shapes, and use all devices."""

    def __init__(self, model, vocabulary, mesh):
        super().__init__()
        model.eval()
        self.model, self.mesh, self.block_size = model, mesh, model.config.block_size
        self.graphdef, self.params = nnx.split(model, nnx.Param)
        self.encode, self.make_decode, self.n_vocab = get_tokenizer(vocabulary)
        self.end = end_of_document(vocabulary)
        # characters have no end of text
        self.stops = [] if isinstance(vocabulary, list) else [
            self.make_decode([])([self.end]).decode()]

    def get_model_info(self):
        return {'settings': config}  # into the results' JSON

    @property
    def eot_token_id(self):
        return self.end

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """(sum of the log-probabilities of the continuation's tokens, whether all are the most
        likely) of each (_, context's ids, continuation's ids); cuts the context on the left."""
        rows = [(context + end)[-self.block_size - 1:] for _, context, end in requests]
        counts = [len(end) for *_, end in requests]
        if max(counts, default=0) > self.block_size:
            raise UserError(f'a task has a continuation of {max(counts)} tokens, and the model '
                            f'sees only block_size = {self.block_size}: leave out this task')
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the slowest first
        B, answers = batch_size * self.mesh.size, {}
        for first in tqdm(range(0, len(order), B), 'scoring', disable=disable_tqdm):
            part = order[first:first + B]
            T = padded_length(len(rows[part[0]]) - 1, self.block_size)
            idx, targets = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
            for b, i in enumerate(part):
                n = len(rows[i]) - 1
                idx[b, :n] = rows[i][:-1]
                targets[b, n - counts[i]:n] = rows[i][1:][n - counts[i]:]
            logprobs, greedy = score(self.graphdef, self.params,
                                     *shard_batch(self.mesh, idx, targets))
            sums, greedy = np.asarray(logprobs, np.float64).sum(1), np.asarray(greedy).all(1)
            answers.update(zip(part, zip(sums.tolist(), greedy.tolist())))
        return [answers[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        windows = [[(None, *utils.make_disjoint_window(window))
                    for window in utils.get_rolling_token_windows(
                        self.encode(request.args[0]), self.end, self.block_size, 1)]
                   for request in requests]
        answers = iter(self._loglikelihood_tokens([*chain(*windows)], disable_tqdm))
        return [sum(next(answers)[0] for _ in own) for own in windows]

    def generate_until(self, requests, disable_tqdm=False):
        texts, groups = {}, defaultdict(list)
        for i, request in enumerate(requests):
            context, how = request.args
            how = normalize_gen_kwargs(how, 256)  # as many tokens as the harness's own models
            ids = self.encode(context)[-max(1, self.block_size - how['max_gen_toks']):]
            groups[len(ids), json.dumps(how, sort_keys=True)].append((i, ids or [self.end]))
        with tqdm(total=len(requests), desc='generating', disable=disable_tqdm) as bar:
            for (_, how), group in sorted(groups.items(), reverse=True):
                for first in range(0, len(group), batch_size):
                    part = group[first:first + batch_size]
                    texts.update(zip((i for i, _ in part),
                                     self.generate([ids for _, ids in part], json.loads(how))))
                    bar.update(len(part))
        return [texts[i] for i in range(len(requests))]

    def generate(self, prompts, how):
        """The continuations of prompts of the same length, each up to the first stop."""
        stops = how['until'] + self.stops
        texts = [Continuation(self.make_decode(ids)) for ids in prompts]
        # rows of padding, so that all batches have one shape
        idx = np.array(prompts + prompts[:1] * (batch_size - len(prompts)), np.int32)
        sampler = Sampler(how.get('temperature', 0.0), how.get('top_k'), how.get('top_p', 1.0),
                          self.n_vocab)
        for tokens in stream_tokens(self.model, idx, how['max_gen_toks'], sampler,
                                    jax.random.key(seed), chunk=16):
            for text, ids in zip(texts, tokens.tolist()):
                text.add(ids)
            if all(any(stop in text.text for stop in stops) for text in texts):
                break
        for text in texts:
            text.close()
        return [postprocess_generated_text(text.text, stops, None) for text in texts]


class Tasks(TaskManager):

    def load(self, tasks):
        try:
            return super().load(tasks)
        except Exception as e:  # no such task, no network, no such file: many types
            reason = ' '.join(str(e).split())[:200]
            raise UserError(
                f'cannot load {", ".join(tasks)} ({type(e).__name__}: {reason}): check the name, '
                'or --include_path, and that the data is cached or the network reachable') from e


devices = select_devices(device)
if compilation_cache:
    enable_compilation_cache()
mesh = make_mesh(devices)
names = tasks.split(',')
manager = Tasks(include_path=include_path or None)
model, vocabulary, step = load_model(
    init_from, out_dir, checkpoint, mesh, compute_dtype(dtype, devices, 'dtype' in given))
if step is not None:
    print(f'evaluating iteration {step} of {out_dir}')
results = simple_evaluate(
    Adapter(model, vocabulary, mesh), tasks=names, limit=limit or None, task_manager=manager,
    num_fewshot=None if num_fewshot < 0 else num_fewshot, log_samples=log_samples)
print(utils.make_table(results))
if results.get('groups'):
    print(utils.make_table(results, 'groups'))
folder = out_dir if init_from == 'resume' else init_from if os.path.isdir(init_from) else '.'
path = run_dir.join(folder, '-'.join(['lm_eval', *[str(step)] * (step is not None),
                                      f'{"+".join(names):.100}.json']))
with run_dir.open_file(path, 'w') as f:
    json.dump(results, f, indent=1, default=utils.handle_non_serializable)
print(f'results are in {path}')
