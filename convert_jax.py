"""
Convert checkpoints from and to PyTorch: nanoGPT's ckpt.pt both ways, and a folder for Hugging Face
transformers. Only a ckpt.pt needs torch. Nothing at dst is overwritten.
$ python convert_jax.py --src=ckpt.pt --dst=out-converted
$ python convert_jax.py --src=out-shakespeare-char --dst=ckpt.pt --format=nanogpt
$ python convert_jax.py --src=out-shakespeare-char --dst=hf-shakespeare --format=hf
"""

import json
import os
import sys

import jax
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P and -I leave it out
from jax_train_utils import (
    Checkpoints, abstract_train_state, create_optimizer, create_train_state, split_model,
)
from jax_transformer import (
    GPTConfig, export_torch_weights, load_torch_weights, model_args as model_args_of,
)
from nanogpt_jax.checkpoint import quiet_orbax, steps_on_disk
from nanogpt_jax.devices import select_devices
from nanogpt_jax.errors import UserError, optional_import, report_user_error
from nanogpt_jax.run_dir import data_dir_of, is_remote
from nanogpt_jax.pretrained import CONV1D
from nanogpt_jax.sharding import make_mesh
from nanogpt_jax.tokenizer import end_of_text, load_vocabulary, make_tokenizer

sys.excepthook = report_user_error
quiet_orbax()
# -----------------------------------------------------------------------------
src = '' # a ckpt.pt of nanoGPT, or the out_dir of a run of train_jax.py
dst = '' # the path to write: an out_dir, a ckpt.pt, or a folder
format = 'jax' # what to write: an out_dir ('jax'), a ckpt.pt ('nanogpt') or a folder ('hf')
checkpoint = 'auto' # of an out_dir: 'latest', 'best', an iteration, or 'auto', as in sample_jax.py
from configurator import configure
configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

devices = select_devices('cpu')[:1]
# only the structure of its state is used
TX = create_optimizer(lambda it: 0.0, weight_decay=0.1, betas=(0.9, 0.95), grad_clip=1.0)


def parameter_names(weights):
    """Names of the parameters in nanoGPT's order, without the tied head."""
    def position(name):
        parts = name.split('.')
        block, module = 0, 0
        if parts[1] == 'h':
            block, module = int(parts[2]), ('ln_1', 'attn', 'ln_2', 'mlp').index(parts[3])
        return (('wte', 'wpe', 'h', 'ln_f').index(parts[1]), block, module, 'c_proj' in parts,
                parts[-1] == 'bias')
    return sorted((name for name in weights if name != 'lm_head.weight'), key=position)


def optimizer_names(weights):
    """Names in the two groups of nanoGPT's optimizer: (with weight decay, without)."""
    names = parameter_names(weights)
    return ([name for name in names if len(weights[name].shape) >= 2],
            [name for name in names if len(weights[name].shape) < 2])


# -----------------------------------------------------------------------------
# from nanoGPT's ckpt.pt

def read_ckpt(path):
    """Load a ckpt.pt, with weights_only so that it cannot run code. Raises UserError."""
    torch = optional_import('torch')
    if not os.path.isfile(path):
        raise UserError(f'{path} is not a file; give a ckpt.pt of nanoGPT with --src')
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # UnpicklingError if it would run code, nearly anything if damaged
        raise UserError(f'cannot read {path} ({type(e).__name__}): it is damaged, or holds more '
                        'than tensors and plain data') from e
    wanted = {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    if not isinstance(ckpt, dict) or wanted - ckpt.keys():
        found = sorted(map(str, ckpt)) if isinstance(ckpt, dict) else type(ckpt).__name__
        raise UserError(f'{path} is no checkpoint of nanoGPT: it lacks some of {sorted(wanted)}, '
                        f'and has {found}')
    return ckpt


def read_config(model_args):
    """The GPTConfig of a checkpoint's model_args. Raises UserError if they are incomplete."""
    if not isinstance(model_args, dict):
        raise UserError(f'{src} has no dict of model_args, but {model_args!r}')
    return GPTConfig.from_model_args(model_args)


def read_weights(ckpt):
    """{nanoGPT's name: float32 array} of a checkpoint's model."""
    prefixes = ('_orig_mod.', 'module.')  # of torch.compile and of DDP
    weights = {}
    for name, tensor in ckpt['model'].items():
        while name.startswith(prefixes):
            name = name.split('.', 1)[1]
        if not name.endswith('.attn.bias'):  # a buffer with the causal mask
            weights[name] = tensor.float().numpy()
    return weights


def model_with(config, weights):
    """A model with the given weights, {nanoGPT's name: array}."""
    model = split_model(config)[0]
    load_torch_weights(model, weights)
    return model


def read_moments(ckpt, weights):
    """AdamW's state, as (exp_avg, exp_avg_sq, number of steps), the first two by nanoGPT's names;
    None before the first step. Raises UserError."""
    optimizer = ckpt['optimizer']
    decayed, others = optimizer_names(weights)
    try:
        order = [i for group in optimizer['param_groups'] for i in group['params']]
        state = optimizer['state']
        if not state:
            return None
        if [len(g['params']) for g in optimizer['param_groups']] != [len(decayed), len(others)]:
            raise ValueError(f'its groups have not {len(decayed)} and {len(others)} parameters')
        exp_avg, exp_avg_sq = (
            {name: state[i][key].float().numpy() for i, name in zip(order, decayed + others)}
            for key in ('exp_avg', 'exp_avg_sq'))
        steps = {int(state[i]['step']) for i in order}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{src} has an optimizer state that is not of nanoGPT's AdamW "
                        f'({type(e).__name__}: {e})') from e
    if len(steps) != 1:
        raise UserError(f'{src} counts different numbers of optimizer steps for its parameters: '
                        f'{sorted(steps)}')
    return exp_avg, exp_avg_sq, steps.pop()


def set_moments(opt_state, mu, nu, steps, iter_num):
    """An optimizer state with AdamW's moments and step count, and with the schedule's count, which
    is the iteration."""
    def replaced(state):
        if isinstance(state, optax.ScaleByAdamState):
            return state._replace(mu=mu, nu=nu, count=np.int32(steps))
        if isinstance(state, optax.ScaleByScheduleState):
            return state._replace(count=np.int32(iter_num))
        return state
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    return jax.tree.map(replaced, opt_state, is_leaf=lambda s: isinstance(s, kinds))


def read_state(ckpt, config):
    """(training state on this machine's CPU, whether it has the optimizer's moments)."""
    weights = read_weights(ckpt)
    state = create_train_state(model_with(config, weights), TX)
    moments = read_moments(ckpt, weights)
    if moments:
        *trees, steps = moments
        mu, nu = (nnx.to_pure_dict(nnx.state(model_with(config, tree), nnx.Param))
                  for tree in trees)
        state['opt_state'] = set_moments(state['opt_state'], mu, nu, steps, int(ckpt['iter_num']))
    return jax.device_put(state, devices[0]), moments is not None


def vocabulary_of(config, data_dir):
    """A model's vocabulary (of nanogpt_jax/tokenizer.py), from its data set. Raises UserError if
    the data set has another one."""
    vocab_size, vocabulary = load_vocabulary(data_dir)
    if vocabulary is None and config.vocab_size < 50257:  # so the ids are not GPT-2's
        print(f'WARNING: no meta.pkl or tokenizer.json in {data_dir}, so {dst} can be trained but '
              'not sampled: prepare the data, and convert again')
        vocabulary = []
    if vocab_size and vocab_size != config.vocab_size < 50257:
        raise UserError(f'{data_dir} has a vocabulary of {vocab_size}, the model of {src} one of '
                        f'{config.vocab_size}: prepare the data that it was trained on')
    return vocabulary


def nanogpt_to_run():
    if steps_on_disk(dst):
        raise UserError(f'{dst} holds checkpoints of another run; choose another --dst')
    ckpt = read_ckpt(src)
    config = read_config(ckpt['model_args'])
    state, has_moments = read_state(ckpt, config)
    model_args = model_args_of(config)
    shape = {name: value for name, value in model_args.items() if name != 'vocab_size'}
    settings = {'always_save_checkpoint': True} | ckpt['config'] | shape
    vocabulary = vocabulary_of(config, data_dir_of(str(settings.get('dataset', ''))))
    iter_num = int(ckpt['iter_num'])
    with Checkpoints(dst) as checkpoints:
        checkpoints.save(state, dict(
            iter_num=iter_num, best_val_loss=float(ckpt['best_val_loss']), model_args=model_args,
            config=settings, chars=vocabulary))
    print(f'{dst} has iteration {iter_num} of {src}, {"with" if has_moments else "without"} the '
          "optimizer's moments; resume with: "
          f'python train_jax.py --init_from=resume --out_dir={dst}')


# -----------------------------------------------------------------------------
# from a run

def read_run():
    """(weights, first moments, second moments, Adam's count, the checkpoint's meta); the first
    three by nanoGPT's names."""
    checkpoints = Checkpoints(src, read_only=True)
    _, meta, state = checkpoints.load(checkpoint, lambda meta: abstract_train_state(
        GPTConfig.from_model_args(meta['model_args']), TX, make_mesh(devices)))
    config = GPTConfig.from_model_args(meta['model_args'])

    def is_adam(s):
        return isinstance(s, optax.ScaleByAdamState)
    adam = next(filter(is_adam, jax.tree.leaves(state['opt_state'], is_leaf=is_adam)))
    graphdef = split_model(config)[1]
    trees = (export_torch_weights(nnx.merge(graphdef, tree))
             for tree in (state['params'], adam.mu, adam.nu))
    return *trees, int(adam.count), meta


def run_to_nanogpt():
    torch = optional_import('torch')
    *trees, steps, meta = read_run()
    weights, exp_avg, exp_avg_sq = ({name: torch.tensor(w) for name, w in tree.items()}
                                    for tree in trees)
    settings = meta['config']
    decayed, others = optimizer_names(weights)
    # a real AdamW, so that its state has the format of the installed torch
    groups = [{'params': [torch.nn.Parameter(weights[name]) for name in names],
               'weight_decay': decay}
              for names, decay in ((decayed, settings.get('weight_decay', 0.1)), (others, 0.0))]
    betas = settings.get('beta1', 0.9), settings.get('beta2', 0.95)
    optimizer = torch.optim.AdamW(groups, lr=settings.get('learning_rate', 6e-4),
                                  betas=betas).state_dict()
    if steps:
        optimizer['state'] = {
            i: {'step': torch.tensor(float(steps)), 'exp_avg': exp_avg[name],
                'exp_avg_sq': exp_avg_sq[name]}
            for i, name in enumerate(decayed + others)}
    names = [*parameter_names(weights), 'lm_head.weight']
    ckpt = {'model': {name: weights[name] for name in names},
            'optimizer': optimizer, 'model_args': meta['model_args'], 'iter_num': meta['iter_num'],
            'best_val_loss': meta['best_val_loss'], 'config': settings}
    os.makedirs(os.path.dirname(os.path.abspath(dst)), exist_ok=True)
    torch.save(ckpt, dst + '.part')
    os.replace(dst + '.part', dst)
    print(f'{dst} has iteration {meta["iter_num"]} of {src}; '
          "nanoGPT resumes it from its out_dir with --init_from=resume")


def hf_config(args, vocabulary):
    """The config.json of a GPT-2 with these model_args and this vocabulary."""
    end = None
    if isinstance(vocabulary, str):
        end = end_of_text(make_tokenizer(vocabulary, src)[0])
    elif args['vocab_size'] > 50256:
        end = 50256  # GPT-2's <|endoftext|>
    sizes = {name: args[name] for name in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
    dropout = {f'{part}_pdrop': args['dropout'] for part in ('attn', 'embd', 'resid')}
    return dict(architectures=['GPT2LMHeadModel'], model_type='gpt2',
                activation_function='gelu',  # the exact form
                n_positions=args['block_size'], **sizes, layer_norm_epsilon=1e-5,
                tie_word_embeddings=True, dtype='float32', bos_token_id=end, eos_token_id=end,
                **dropout)


def run_to_hf():
    save_file = optional_import('safetensors.numpy').save_file
    weights, *_, meta = read_run()
    names = parameter_names(weights)
    tensors = {name: np.ascontiguousarray(weights[name].T) if name.endswith(CONV1D)
               else weights[name] for name in names}
    for name in names:  # GPT-2 has all biases; zeros where the model has none
        if name.endswith('.weight') and name.split('.')[-2] not in ('wte', 'wpe'):
            bias = np.zeros(weights[name].shape[0], np.float32)
            tensors.setdefault(name.removesuffix('weight') + 'bias', bias)
    part = dst.rstrip('/\\') + '.part'
    os.makedirs(part, exist_ok=True)
    save_file(tensors, os.path.join(part, 'model.safetensors'), metadata={'format': 'pt'})
    with open(os.path.join(part, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(hf_config(meta['model_args'], meta['chars']), f, indent=1)
    if isinstance(meta['chars'], str):
        with open(os.path.join(part, 'tokenizer.json'), 'w', encoding='utf-8') as f:
            f.write(meta['chars'])
    os.replace(part, dst)
    print(f'{dst} has iteration {meta["iter_num"]} of {src}, '
          'for transformers.GPT2LMHeadModel.from_pretrained')


makers = {'jax': nanogpt_to_run, 'nanogpt': run_to_nanogpt, 'hf': run_to_hf}
if format not in makers:
    raise UserError(f'format is {format!r}; it must be jax, nanogpt or hf')
for name, value in (('src', src), ('dst', dst)):
    if not value:
        raise UserError(f'give --{name}, the path to {"read" if name == "src" else "write"}')
if format != 'jax' and is_remote(dst):
    raise UserError(f'cannot write {dst}: only --format=jax writes to a bucket; give a path on '
                    'this machine')
if format != 'jax' and os.path.exists(dst):
    raise UserError(f'{dst} exists, and is not overwritten; choose another --dst')
try:
    makers[format]()
except OSError as e:
    raise UserError(f'cannot write {dst}: {e}') from e
