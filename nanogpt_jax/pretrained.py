"""
GPT-2's weights: the shapes of its four sizes, and reading them from the Hugging Face hub or from a
folder with config.json and model.safetensors into arrays under nanoGPT's names. No torch.
"""

import json
import os

import numpy as np

from nanogpt_jax.errors import UserError, optional_import

GPT2_SHAPES = {  # n_layer, n_head, n_embd
    'gpt2': (12, 12, 768),  # 124M
    'gpt2-medium': (24, 16, 1024),  # 350M
    'gpt2-large': (36, 20, 1280),  # 774M
    'gpt2-xl': (48, 25, 1600),  # 1558M
}
# stored (in, out) on the hub; nanoGPT's Linear is (out, in)
CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')

# allowed values in config.json, where it has them: all others belong to other models
REQUIRED = dict(model_type=('gpt2',), activation_function=('gelu_new', 'gelu'),
                layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,),
                scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
                tie_word_embeddings=(True,))


def find_folder(model_type_or_path):
    """The local folder of a model's files; downloads a model of the hub into the hub's cache."""
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


def read_config(folder):
    """(GPTConfig's arguments, name of the activation function) from a Hugging Face config.json."""
    path = os.path.join(folder, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            hf = json.load(f)
        # some files say n_ctx instead of n_positions
        args = dict(block_size=hf.get('n_positions', hf.get('n_ctx', 1024)),
                    vocab_size=hf['vocab_size'], n_layer=hf['n_layer'], n_head=hf['n_head'],
                    n_embd=hf['n_embd'], bias=True)
        wrong = [f'{name} is {hf[name]!r}' for name, allowed in REQUIRED.items()
                 if name in hf and hf[name] not in allowed]
        if hf.get('n_inner') not in (None, 4 * args['n_embd']):
            wrong.append(f'n_inner is {hf["n_inner"]!r}')
    except (OSError, KeyError, ValueError, AttributeError) as e:
        raise UserError('cannot read a GPT-2 configuration from '
                        f'{path}: {type(e).__name__}: {e}') from e
    if wrong:
        raise UserError(f'{path} describes another model than GPT-2: {", ".join(wrong)}')
    return args, hf.get('activation_function', 'gelu_new')


class TensorInFile:
    """A tensor of an open safetensors file, read from disk each time it is converted to an array.

    transposed: the file has it (in, out), torch's Linear (out, in).
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
            with open(index, encoding='utf-8') as f:
                names = sorted(set(json.load(f)['weight_map'].values()))
            paths = [os.path.join(folder, os.path.basename(name)) for name in names]
        for path in paths:
            file = safetensors.safe_open(path, framework='numpy')
            for name in file.keys():
                if name.endswith(('.attn.bias', '.attn.masked_bias')):
                    continue  # buffers with the causal mask, not parameters
                prefix = '' if name.startswith(('transformer.', 'lm_head.')) else 'transformer.'
                weights[prefix + name] = TensorInFile(file, name, name.endswith(CONV1D))
    except (OSError, KeyError, ValueError, AttributeError, safetensors.SafetensorError) as e:
        raise UserError(f'cannot read weights from {path}: {e}') from e
    return weights
