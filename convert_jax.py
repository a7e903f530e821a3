"""
Checkpoints to and from PyTorch: nanoGPT's ckpt.pt both ways, and a folder for Hugging Face transformers.
$ python convert_jax.py --src=ckpt.pt --dst=out-converted
$ python convert_jax.py --src=out-shakespeare-char --dst=ckpt.pt --format=nanogpt
$ python convert_jax.py --src=out-shakespeare-char --dst=hf-shakespeare --format=hf
A ckpt.pt needs torch, to read and to write; the folder does not. Nothing that lies at dst is overwritten.
"""

import json
import os
import sys

import jax
import numpy as np
import optax
from flax import nnx

from jax_checkpoint import Checkpoints, steps_on_disk
from jax_devices import report_user_error, select_devices
from jax_train_utils import create_optimizer, create_train_state, load_meta, make_mesh, split_model
from jax_transformer import (
    CONV1D, GPT, GPT_ARGS, GPTConfig, UserError, export_torch_weights, load_torch_weights, optional_import,
)

# -----------------------------------------------------------------------------
src = '' # a ckpt.pt of nanoGPT, or the out_dir of a run here
dst = '' # what is made of it: an out_dir, a ckpt.pt, or a folder
format = 'jax' # what to make: 'jax', a run's out_dir; 'nanogpt', a ckpt.pt; 'hf', a folder for Hugging Face transformers
which = 'auto' # the checkpoint of a run: 'latest', 'best', an iteration, or 'auto', as in sample_jax.py
from configurator import configure
configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.excepthook = report_user_error
devices = select_devices('cpu')[:1]
TX = create_optimizer(lambda it: 0.0, weight_decay=0.1, betas=(0.9, 0.95), grad_clip=1.0) # for the form of its state alone


def parameter_names(weights):
    """nanoGPT's order of parameters, the tied head left out."""
    def place(name):
        parts = name.split('.')
        inside = ('ln_1', 'attn', 'ln_2', 'mlp').index(parts[3]) if parts[1] == 'h' else 0
        return (('wte', 'wpe', 'h', 'ln_f').index(parts[1]), int(parts[2]) if parts[1] == 'h' else 0, inside,
                'c_proj' in parts, parts[-1] == 'bias')
    return sorted((name for name in weights if name != 'lm_head.weight'), key=place)


def optimizer_names(weights):
    """The names in the order of nanoGPT's optimizer: its group with weight decay, and the one without."""
    names = parameter_names(weights)
    return [n for n in names if len(weights[n].shape) >= 2], [n for n in names if len(weights[n].shape) < 2]


# -----------------------------------------------------------------------------
# nanoGPT's ckpt.pt in

def read_ckpt(path):
    """The dict of a ckpt.pt. torch reads it with weights_only, so it cannot run code. Raises UserError."""
    torch = optional_import('torch')
    if not os.path.isfile(path):
        raise UserError(f'{path} is not a file; give a ckpt.pt of nanoGPT with --src')
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e: # a damaged file can raise nearly anything, and one that would run code UnpicklingError
        raise UserError(f'cannot read {path} ({type(e).__name__}): it is damaged, or holds more than tensors and plain '
                        'data') from e
    wanted = {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    if not isinstance(ckpt, dict) or wanted - ckpt.keys():
        found = sorted(map(str, ckpt)) if isinstance(ckpt, dict) else type(ckpt).__name__
        raise UserError(f'{path} is no checkpoint of nanoGPT: it lacks some of {sorted(wanted)}, and has {found}')
    return ckpt


def model_config(model_args):
    """The GPTConfig of a checkpoint's model_args. Raises UserError for what is missing among them."""
    if not isinstance(model_args, dict) or set(GPT_ARGS) - model_args.keys() - {'dropout'}:
        raise UserError(f'{src} lacks some of {", ".join(GPT_ARGS)} in its model_args: {model_args}')
    return GPTConfig(**{name: model_args[name] for name in GPT_ARGS if name in model_args})


def load(config, weights):
    """Parameters as a plain tree, from arrays under nanoGPT's names."""
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    load_torch_weights(model, weights)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def moments(ckpt, weights):
    """(exp_avg, exp_avg_sq, steps): AdamW's state under the parameters' names, or None where no step was taken."""
    optimizer = ckpt['optimizer']
    decayed, others = optimizer_names(weights)
    try:
        order = [i for group in optimizer['param_groups'] for i in group['params']]
        state = optimizer['state']
        if not state:
            return None
        if [len(group['params']) for group in optimizer['param_groups']] != [len(decayed), len(others)]:
            raise ValueError(f'its groups have not {len(decayed)} and {len(others)} parameters')
        exp_avg, exp_avg_sq = ({name: state[i][key].float().numpy() for i, name in zip(order, decayed + others)}
                               for key in ('exp_avg', 'exp_avg_sq'))
        steps = {int(state[i]['step']) for i in order}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f'{src} has an optimizer state that is not of nanoGPT\'s AdamW ({type(e).__name__}: {e})') from e
    if len(steps) != 1:
        raise UserError(f'{src} has taken different numbers of optimizer steps for its parameters: {sorted(steps)}')
    return exp_avg, exp_avg_sq, steps.pop()


def with_moments(opt_state, mu, nu, steps, iter_num):
    """An optimizer state with AdamW's moments, its count of steps, and the schedule's, which follows the iteration."""
    def put(state):
        if isinstance(state, optax.ScaleByAdamState):
            return state._replace(mu=mu, nu=nu, count=np.int32(steps))
        return state._replace(count=np.int32(iter_num)) if isinstance(state, optax.ScaleByScheduleState) else state
    return jax.tree.map(put, opt_state, is_leaf=lambda s: isinstance(s, (optax.ScaleByAdamState, optax.ScaleByScheduleState)))


def nanogpt_to_run():
    if steps_on_disk(dst):
        raise UserError(f'{dst} holds checkpoints of another run; choose another --dst')
    ckpt = read_ckpt(src)
    prefixes = ('_orig_mod.', 'module.') # of torch.compile, and of DDP
    weights = {}
    for name, tensor in ckpt['model'].items():
        while name.startswith(prefixes):
            name = name.split('.', 1)[1]
        if not name.endswith('.attn.bias'): # a buffer with the causal mask
            weights[name] = tensor.float().numpy()
    config = model_config(ckpt['model_args'])
    params = load(config, weights)
    state = create_train_state(nnx.merge(split_model(config)[1], params), TX)
    kept = moments(ckpt, weights)
    iter_num = int(ckpt['iter_num'])
    if kept:
        exp_avg, exp_avg_sq, steps = kept
        state['opt_state'] = with_moments(state['opt_state'], load(config, exp_avg), load(config, exp_avg_sq), steps, iter_num)
    state = jax.device_put(state, devices[0])

    model_args = {name: getattr(config, name) for name in GPT_ARGS}
    settings = {'always_save_checkpoint': True} | ckpt['config'] | {k: v for k, v in model_args.items() if k != 'vocab_size'}
    data_dir = os.path.join('data', str(settings.get('dataset', '')))
    vocab_size, chars = load_meta(data_dir)
    if chars is None and config.vocab_size < 50257: # not GPT-2's tokens, then
        print(f'WARNING: no meta.pkl in {data_dir}, so {dst} can be trained but not sampled: prepare the data, and convert again')
        chars = []
    if vocab_size and vocab_size != config.vocab_size < 50257:
        raise UserError(f'{data_dir} has a vocabulary of {vocab_size}, the model of {src} one of {config.vocab_size}: prepare '
                        'the data that it was trained on')
    checkpoints = Checkpoints(dst)
    checkpoints.save(state, iter_num, float(ckpt['best_val_loss']), model_args, settings, chars)
    checkpoints.close()
    print(f'{dst} has iteration {iter_num} of {src}, {"with" if kept else "without"} the optimizer\'s moments; go on with: '
          f'python train_jax.py --init_from=resume --out_dir={dst}')


# -----------------------------------------------------------------------------
# a run out

def read_run():
    """(weights, first moments, second moments, each under nanoGPT's names; Adam's count; the checkpoint's meta)."""
    checkpoints = Checkpoints(src, read_only=True)
    step = checkpoints.find(which)
    meta = checkpoints.meta(step)
    config = GPTConfig(**meta['model_args'])
    state = checkpoints.state(step, config, TX, make_mesh(devices))
    adam = next(s for s in jax.tree.leaves(state['opt_state'], is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
                if isinstance(s, optax.ScaleByAdamState))
    graphdef = split_model(config)[1]
    trees = (export_torch_weights(nnx.merge(graphdef, tree)) for tree in (state['params'], adam.mu, adam.nu))
    return *trees, int(adam.count), meta


def run_to_nanogpt():
    torch = optional_import('torch')
    *trees, steps, meta = read_run()
    weights, exp_avg, exp_avg_sq = ({name: torch.tensor(w) for name, w in tree.items()} for tree in trees)
    settings = meta['config']
    decayed, others = optimizer_names(weights)
    # a real AdamW, so that its state has the form of the torch that is installed
    groups = [{'params': [torch.nn.Parameter(weights[name]) for name in names], 'weight_decay': decay}
              for names, decay in ((decayed, settings.get('weight_decay', 0.1)), (others, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=settings.get('learning_rate', 6e-4),
                                  betas=(settings.get('beta1', 0.9), settings.get('beta2', 0.95))).state_dict()
    if steps:
        optimizer['state'] = {
            i: {'step': torch.tensor(float(steps)), 'exp_avg': exp_avg[name], 'exp_avg_sq': exp_avg_sq[name]}
            for i, name in enumerate(decayed + others)}
    ckpt = {'model': {name: weights[name] for name in [*parameter_names(weights), 'lm_head.weight']},
            'optimizer': optimizer, 'model_args': meta['model_args'], 'iter_num': meta['iter_num'],
            'best_val_loss': meta['best_val_loss'], 'config': settings}
    os.makedirs(os.path.dirname(os.path.abspath(dst)), exist_ok=True)
    torch.save(ckpt, dst + '.part')
    os.replace(dst + '.part', dst)
    print(f'{dst} has iteration {meta["iter_num"]} of {src}, for nanoGPT\'s out_dir (--init_from=resume)')


def run_to_hf():
    save_file = optional_import('safetensors.numpy').save_file
    weights, *_, meta = read_run()
    args = meta['model_args']
    tensors = {name: np.ascontiguousarray(weights[name].T) if name.endswith(CONV1D) else weights[name]
               for name in parameter_names(weights)}
    for name in parameter_names(weights): # GPT-2 has all biases: where the model has none they are zero
        if name.endswith('.weight') and name.split('.')[-2] not in ('wte', 'wpe'):
            tensors.setdefault(name.removesuffix('weight') + 'bias', np.zeros(weights[name].shape[0], np.float32))
    end = 50256 if args['vocab_size'] > 50256 else None # GPT-2's <|endoftext|>
    config = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu', # the exact one
                  n_positions=args['block_size'], vocab_size=args['vocab_size'], n_layer=args['n_layer'], n_head=args['n_head'],
                  n_embd=args['n_embd'], layer_norm_epsilon=1e-5, tie_word_embeddings=True, dtype='float32',
                  bos_token_id=end, eos_token_id=end, **{f'{p}_pdrop': args['dropout'] for p in ('attn', 'embd', 'resid')})
    part = dst.rstrip('/\\') + '.part'
    os.makedirs(part, exist_ok=True)
    save_file(tensors, os.path.join(part, 'model.safetensors'), metadata={'format': 'pt'})
    with open(os.path.join(part, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f, indent=1)
    os.replace(part, dst)
    print(f'{dst} has iteration {meta["iter_num"]} of {src}, for transformers.GPT2LMHeadModel.from_pretrained')


makers = {'jax': nanogpt_to_run, 'nanogpt': run_to_nanogpt, 'hf': run_to_hf}
if format not in makers:
    raise UserError(f'format is {format!r}; it must be jax, nanogpt or hf')
for name, value in (('src', src), ('dst', dst)):
    if not value:
        raise UserError(f'give --{name}: {"what to convert" if name == "src" else "where it goes"}')
if format != 'jax' and os.path.exists(dst):
    raise UserError(f'{dst} is there already, and is not overwritten; choose another --dst')
try:
    makers[format]()
except OSError as e:
    raise UserError(f'cannot write {dst}: {e}') from e
