"""
GPT-2 in other projects, without torch: its four sizes, its parameters, and Hugging Face folders
(config.json, model.safetensors, tokenizer), read and written.
"""

import json
import math
import os

import numpy as np
from scipy.special import erf

from nanogpt_jax.errors import UserError, optional_import
from nanogpt_jax.run_dir import check_is_file, open_file

GPT2_SHAPES = {  # n_layer, n_head, n_embd
    'gpt2': (12, 12, 768),  # 124M
    'gpt2-medium': (24, 16, 1024),  # 350M
    'gpt2-large': (36, 20, 1280),  # 774M
    'gpt2-xl': (48, 25, 1600),  # 1558M
}
# stored (in, out) on the hub; nanoGPT's Linear is (out, in)
CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')

# allowed values in config.json; others mean another model
REQUIRED = dict(model_type=('gpt2',), activation_function=('gelu_new', 'gelu'),
                layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,),
                scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
                tie_word_embeddings=(True,))

SIZES = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'
GPT2_ARGS = *SIZES, 'bias', 'dropout'


def check_model_args(args, source):
    """Raise UserError if model_args of a file have wrong types or impossible sizes."""
    for name in SIZES:
        if type(args.get(name)) is not int or not 1 <= args[name] < 2 ** 31:
            raise UserError(f'{source}: {name} is {args.get(name)!r:.50}; it must be an int from 1 '
                            'to 2147483647')
    for name, kinds in (('dropout', (int, float)), ('bias', (bool,))):
        if name in args and type(args[name]) not in kinds:
            raise UserError(f'{source}: {name} is {args[name]!r:.50}; it must be a '
                            f'{kinds[-1].__name__}')


def check_n_layer(n_layer, weights, source):
    """Raise UserError if the weights have another number of blocks: building n_layer blocks first
    could take minutes."""
    blocks = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    if n_layer != len(blocks):
        raise UserError(f'{source}: n_layer is {n_layer}, but its weights have {len(blocks)} '
                        'blocks')


def gpt2_shapes(args):
    """{nanoGPT's name: shape in torch's layout} of a GPT-2's parameters without the tied head, in
    nanoGPT's order."""
    shapes, C = {}, args['n_embd']

    def add(module, *shape):
        shapes[f'transformer.{module}.weight'] = shape
        if args['bias'] and module not in ('wte', 'wpe'):
            shapes[f'transformer.{module}.bias'] = shape[:1]
    add('wte', args['vocab_size'], C)
    add('wpe', args['block_size'], C)
    for i in range(args['n_layer']):
        add(f'h.{i}.ln_1', C)
        add(f'h.{i}.attn.c_attn', 3 * C, C)
        add(f'h.{i}.attn.c_proj', C, C)
        add(f'h.{i}.ln_2', C)
        add(f'h.{i}.mlp.c_fc', 4 * C, C)
        add(f'h.{i}.mlp.c_proj', C, 4 * C)
    add('ln_f', C)
    return shapes


# -----------------------------------------------------------------------------
# reading a folder

def find_folder(model_type_or_path):
    """The local folder of a model; downloads GPT-2 into the hub's cache."""
    if os.path.isdir(model_type_or_path):
        return model_type_or_path
    if model_type_or_path not in GPT2_SHAPES:
        raise UserError(f'no pretrained model {model_type_or_path!r}: give one of '
                        f'{", ".join(GPT2_SHAPES)}, or a folder with config.json and '
                        'model.safetensors')
    hub = optional_import('huggingface_hub')
    try:
        return hub.snapshot_download(f'openai-community/{model_type_or_path}',
                                     allow_patterns=['config.json', 'model.safetensors'])
    except Exception as e:  # the hub's client raises a dozen types: no network, not cached, ...
        raise UserError(f'could not get {model_type_or_path} from the Hugging Face hub '
                        f'({type(e).__name__}): check the network, or give a local folder with '
                        'config.json and model.safetensors') from e


def read_json(path):
    with open_file(path) as f:
        return json.load(f)


def read_config(folder):
    """(GPTConfig's arguments, name of the activation function) from a Hugging Face config.json.

    Raises UserError for a model that is not a GPT-2, or that its weights contradict.
    """
    path = os.path.join(folder, 'config.json')
    try:
        hf = read_json(path)
        # some files say n_ctx instead of n_positions
        args = dict(block_size=hf.get('n_positions', hf.get('n_ctx', 1024)),
                    vocab_size=hf['vocab_size'], n_layer=hf['n_layer'], n_head=hf['n_head'],
                    n_embd=hf['n_embd'], bias=True)
        check_model_args(args, path)
        wrong = [f'{name} is {hf[name]!r:.50}' for name, allowed in REQUIRED.items()
                 if name in hf and hf[name] not in allowed]
        if hf.get('n_inner') not in (None, 4 * args['n_embd']):
            wrong.append(f'n_inner is {hf["n_inner"]!r:.50}')
    except (OSError, KeyError, ValueError, AttributeError, RecursionError) as e:
        raise UserError('cannot read a GPT-2 configuration from '
                        f'{path}: {type(e).__name__}: {e}') from e
    if wrong:
        raise UserError(f'{path} does not describe a GPT-2: {", ".join(wrong)}')
    check_n_layer(args['n_layer'], read_weights(folder), path)
    return args, hf.get('activation_function', 'gelu_new')


class TensorInFile:
    """A tensor of an open safetensors file; each conversion to an array reads it from disk.

    transposed: the file has (in, out), torch's Linear (out, in).
    """

    def __init__(self, file, name, transposed):
        self.file, self.name, self.transposed = file, name, transposed
        shape = tuple(file.get_slice(name).get_shape())
        self.shape = shape[::-1] if transposed else shape

    def __array__(self, dtype=None, copy=None):
        w = np.asarray(self.file.get_tensor(self.name), dtype)
        return w.T if self.transposed else w


def read_weights(folder):
    """{nanoGPT state_dict name: TensorInFile} of a folder's safetensors files."""
    safetensors = optional_import('safetensors')
    path, index = (os.path.join(folder, f'model.safetensors{end}') for end in ('', '.index.json'))
    weights = {}
    try:
        paths = [path]
        if not os.path.exists(path) and os.path.exists(index):  # a large model in several files
            names = sorted(set(read_json(index)['weight_map'].values()))
            paths = [os.path.join(folder, os.path.basename(name)) for name in names]
        for path in paths:
            check_is_file(path)
            file = safetensors.safe_open(path, framework='numpy')
            for name in file.keys():
                if name.endswith(('.attn.bias', '.attn.masked_bias')):
                    continue  # buffers with the causal mask
                prefix = '' if name.startswith(('transformer.', 'lm_head.')) else 'transformer.'
                weights[prefix + name] = TensorInFile(file, name, name.endswith(CONV1D))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError,
            safetensors.SafetensorError) as e:
        raise UserError(f'cannot read weights from {path}: {e}') from e
    return weights


# -----------------------------------------------------------------------------
# writing a folder

def gpt2_logits(weights, n_head, idx):
    """Logits (T, V) of a GPT-2 with these weights (nanoGPT's names) for ids idx (T,), in NumPy."""
    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return scaled(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5), name)

    def scaled(x, name):
        return x * weights[f'{name}.weight'] + weights.get(f'{name}.bias', 0)

    def linear(x, name):
        return x @ weights[f'{name}.weight'].T + weights.get(f'{name}.bias', 0)

    def attend(x):
        T, C = len(x), x.shape[1] // 3
        q, k, v = (a.reshape(T, n_head, -1).swapaxes(0, 1) for a in np.split(x, 3, axis=1))
        att = q @ k.swapaxes(1, 2) / math.sqrt(C // n_head)  # (nh, T, T)
        att = np.exp(np.where(np.tri(T, dtype=bool), att - att.max(-1, keepdims=True), -np.inf))
        return (att / att.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(T, C)

    wte = weights['transformer.wte.weight']
    x = wte[idx] + weights['transformer.wpe.weight'][:len(idx)]  # (T, C)
    for i in range(sum(name.endswith('.ln_1.weight') for name in weights)):
        block = f'transformer.h.{i}'
        y = attend(linear(norm(x, f'{block}.ln_1'), f'{block}.attn.c_attn'))
        x = x + linear(y, f'{block}.attn.c_proj')
        y = linear(norm(x, f'{block}.ln_2'), f'{block}.mlp.c_fc')
        x = x + linear(y * (1 + erf(y / math.sqrt(2))) / 2, f'{block}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ wte.T


def check_is_gpt2(weights, args, source, logits_of):
    """Raise UserError if a model is not a GPT-2, by its parameters and by its logits.

    logits_of: ids (1, T) to the model's float32 logits (1, T, V).
    """
    only = f'{source} is not a GPT-2, and only a GPT-2 can be written: '
    extra = [name for name, value in args.items() if name not in GPT2_ARGS and value]
    if extra:
        raise UserError(f'{only}its model_args have {", ".join(extra)}')
    shapes = gpt2_shapes(args)
    found = {name: w.shape for name, w in weights.items() if name != 'lm_head.weight'}
    differ = sorted(name for name in shapes.keys() | found.keys()
                    if shapes.get(name) != found.get(name))
    if differ:
        raise UserError(f'{only}{len(differ)} parameters differ, {", ".join(differ[:4])}')
    idx = np.random.default_rng(0).integers(args['vocab_size'], size=min(16, args['block_size']))
    want, got = gpt2_logits(weights, args['n_head'], idx), logits_of(idx[None])[0]
    # float32 in another order of operations; another norm or activation differs by far more
    if not np.allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max()):
        raise UserError(f'{only}its parameters have the same names, but it computes other logits')


def write_folder(folder, weights, args, tokenizer=None, end=None):
    """Write a GPT-2 as a folder for transformers.

    tokenizer: a tokenizers.Tokenizer. end: the id of its token that ends a text, if it has one.
    """
    tensors = {name: np.ascontiguousarray(weights[name].T) if name.endswith(CONV1D)
               else weights[name] for name in gpt2_shapes(args)}
    for name, shape in gpt2_shapes(args | {'bias': True}).items():
        tensors.setdefault(name, np.zeros(shape, np.float32))  # GPT-2 has all biases
    ends = dict(bos_token_id=end, eos_token_id=end)
    # gelu is the exact form; llama.cpp's converter reads n_ctx
    config = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu',
                  n_positions=args['block_size'], n_ctx=args['block_size'],
                  layer_norm_epsilon=1e-5, tie_word_embeddings=True, dtype='float32', **ends)
    config |= {name: args[name] for name in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
    config |= {f'{part}_pdrop': args['dropout'] for part in ('attn', 'embd', 'resid')}
    files = {'config.json': config, 'generation_config.json': ends | {
        'max_length': args['block_size']}}
    if tokenizer:
        n = 1 + max(tokenizer.get_vocab().values())
        padding = [*range(n, args['vocab_size'])]  # ids without text are never sampled
        files['generation_config.json'] |= {'suppress_tokens': padding} if padding else {}
        # a post-processor would add tokens to a text, and the training data has none of them
        files['tokenizer.json'] = json.loads(tokenizer.to_str()) | {'post_processor': None}
        token = None if end is None else tokenizer.id_to_token(end)
        files['tokenizer_config.json'] = dict(
            tokenizer_class='PreTrainedTokenizerFast', model_max_length=args['block_size'],
            clean_up_tokenization_spaces=False, bos_token=token, eos_token=token)
    os.makedirs(folder, exist_ok=True)
    optional_import('safetensors.numpy').save_file(
        tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    for name, values in files.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            json.dump(values, f, indent=1, ensure_ascii=False)
