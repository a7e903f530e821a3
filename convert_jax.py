"""
Convert checkpoints: from and to nanoGPT's ckpt.pt, and to a folder with weights and tokenizer for
Hugging Face transformers. Only writing a ckpt.pt needs torch. Existing files are never overwritten.
$ python convert_jax.py --src=ckpt.pt --dst=out-converted
$ python convert_jax.py --src=out-shakespeare-char --dst=ckpt.pt --format=nanogpt
$ python convert_jax.py --src=out-shakespeare-char --dst=hf-shakespeare --format=hf
"""

import contextlib
import math
import os
import sys
import tempfile

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
from nanogpt_jax.pretrained import (
    check_is_gpt2, check_model_args, check_n_layer, gpt2_shapes, write_folder,
)
from nanogpt_jax.run_dir import data_dir_of, hold_out_dir, is_remote
from nanogpt_jax.sharding import make_mesh
from nanogpt_jax.tokenizer import as_tokenizer, end_of_text, load_vocabulary
from nanogpt_jax.torch_file import read_torch_file

if __name__ == '__main__':
    sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
    quiet_orbax()
# -----------------------------------------------------------------------------
src = '' # a ckpt.pt of nanoGPT, or the out_dir of a run of train_jax.py
dst = '' # the path to write: an out_dir, a ckpt.pt, or a folder
format = 'jax' # what to write: an out_dir ('jax'), a ckpt.pt ('nanogpt') or a folder ('hf')
checkpoint = 'auto' # of an out_dir: 'latest', 'best', an iteration, or 'auto', as in sample_jax.py
from configurator import configure
# overrides from the command line and config files
configure(globals(), sys.argv[1:] if __name__ == '__main__' else [])
# -----------------------------------------------------------------------------

# only the structure of its state is used
TX = create_optimizer(lambda it: 0.0, weight_decay=0.1, betas=(0.9, 0.95), grad_clip=1.0)


def optimizer_names(model_args):
    """Names in the two groups of nanoGPT's optimizer: (with weight decay, without)."""
    shapes = gpt2_shapes(model_args)
    return ([name for name, shape in shapes.items() if len(shape) >= 2],
            [name for name, shape in shapes.items() if len(shape) < 2])


# -----------------------------------------------------------------------------
# from nanoGPT's ckpt.pt

KINDS = dict(model=dict, optimizer=dict, model_args=dict, config=dict, iter_num=int,
             best_val_loss=(int, float, np.ndarray))


def read_ckpt():
    """The ckpt.pt at src, with parts of the right types. Raises UserError."""
    if not os.path.isfile(src):
        raise UserError(f'{src} is not a file; give a ckpt.pt of nanoGPT with --src')
    ckpt = read_torch_file(src)
    if not isinstance(ckpt, dict) or KINDS.keys() - ckpt.keys():
        raise UserError(f'{src} is not a checkpoint of nanoGPT: it must be a dict with '
                        f'{", ".join(KINDS)}')
    for name, kind in KINDS.items():
        if not isinstance(ckpt[name], kind):
            raise UserError(f'{src} is not a checkpoint of nanoGPT: {name} is {ckpt[name]!r:.50}')
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        best = float(ckpt['best_val_loss'])
        if math.isfinite(best) and 0 <= ckpt['iter_num'] < 2 ** 31:
            return ckpt | {'best_val_loss': best}
    raise UserError(f'{src} has impossible numbers: iter_num is {ckpt["iter_num"]!r:.50}, '
                    f'best_val_loss is {ckpt["best_val_loss"]!r:.50}')


def read_weights(ckpt):
    """{nanoGPT's name: float32 array} of a checkpoint's model. Raises UserError."""
    prefixes = ('_orig_mod.', 'module.')  # of torch.compile and of DDP
    weights = {}
    for name, tensor in ckpt['model'].items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise UserError(f'{src}: its model has {name!r:.50}, a {type(tensor).__name__}; it '
                            'must have names and tensors')
        while name.startswith(prefixes):
            name = name.split('.', 1)[1]
        if not name.endswith('.attn.bias'):  # a buffer with the causal mask
            weights[name] = np.asarray(tensor, np.float32)
    return weights


def model_with(config, weights):
    """A model with the given weights, {nanoGPT's name: array}."""
    model = split_model(config).model
    load_torch_weights(model, weights)
    return model


def read_moments(optimizer, names):
    """AdamW's state: (exp_avg, exp_avg_sq, number of steps), the first two by nanoGPT's names; None
    before the first step. names: of optimizer_names. Raises UserError."""
    try:
        order = [i for group in optimizer['param_groups'] for i in group['params']]
        state = optimizer['state']
        if not state:
            return None
        if [len(g['params']) for g in optimizer['param_groups']] != [*map(len, names)]:
            raise ValueError(f'its groups must have {len(names[0])} and {len(names[1])} parameters')
        exp_avg, exp_avg_sq = (
            {name: np.asarray(state[i][key], np.float32) for i, name in zip(order, sum(names, []))}
            for key in ('exp_avg', 'exp_avg_sq'))
        steps = {int(state[i]['step']) for i in order}
        if len(steps) != 1 or not 0 <= min(steps) < 2 ** 31:
            raise ValueError(f'it counts {sorted(steps)} steps')
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise UserError(f"{src} has an optimizer state that is not of nanoGPT's AdamW "
                        f'({type(e).__name__}: {e!s:.200})') from e
    return exp_avg, exp_avg_sq, steps.pop()


def read_state(ckpt, config, weights):
    """(training state on this machine's CPU, whether it has the optimizer's moments)."""
    state = create_train_state(model_with(config, weights), TX)
    moments = read_moments(ckpt['optimizer'], optimizer_names(vars(config)))
    if moments:
        *trees, steps = moments
        mu, nu = (nnx.to_pure_dict(nnx.state(model_with(config, tree), nnx.Param))
                  for tree in trees)
        state['opt_state'] = optax.tree.set(
            state['opt_state'],
            ScaleByAdamState=optax.ScaleByAdamState(np.int32(steps), mu, nu),
            ScaleByScheduleState=optax.ScaleByScheduleState(np.int32(ckpt['iter_num'])))
    return jax.device_put(state, jax.devices('cpu')[0]), moments is not None


def vocabulary_of(config, data_dir):
    """A model's vocabulary (see nanogpt_jax/tokenizer.py), from its data set. Raises UserError if
    the data set has another one."""
    vocab_size, vocabulary = load_vocabulary(data_dir)
    if vocabulary is None and config.vocab_size < 50257:  # not GPT-2's tokens
        print(f'WARNING: no meta.pkl or tokenizer.json in {data_dir}, so {dst} can be trained but '
              'not sampled: prepare the data, and convert again')
        vocabulary = []
    if vocab_size and vocab_size != config.vocab_size < 50257:
        raise UserError(f'{data_dir} has a vocabulary of {vocab_size}, the model of {src} one of '
                        f'{config.vocab_size}: prepare the data that it was trained on')
    return vocabulary


def nanogpt_to_run():
    ckpt = read_ckpt()
    weights = read_weights(ckpt)
    check_model_args(ckpt['model_args'], src)
    check_n_layer(ckpt['model_args']['n_layer'], weights, src)
    config = GPTConfig.from_model_args(ckpt['model_args'])
    state, has_moments = read_state(ckpt, config, weights)
    model_args = model_args_of(config)
    settings = {name: value for name, value in ckpt['config'].items()
                if type(name) is str and type(value) in (bool, int, float, str)}
    settings = {'always_save_checkpoint': True} | settings | model_args
    del settings['vocab_size']  # which is not a setting
    vocabulary = vocabulary_of(config, data_dir_of(str(settings.get('dataset', ''))))
    hold_out_dir(dst)
    if steps_on_disk(dst):
        raise UserError(f'{dst} holds checkpoints of another run; choose another --dst')
    with Checkpoints(dst) as checkpoints:
        checkpoints.save(state, dict(
            iter_num=ckpt['iter_num'], best_val_loss=ckpt['best_val_loss'],
            model_args=model_args, config=settings, chars=vocabulary))
    print(f'{dst} has iteration {ckpt["iter_num"]} of {src}, '
          f'{"with" if has_moments else "without"} the '
          "optimizer's moments; resume with: "
          f'python train_jax.py --init_from=resume --out_dir={dst}')


# -----------------------------------------------------------------------------
# from a run

def read_run(tx=None):
    """(weights by nanoGPT's names, training state, its graphdef, the checkpoint's meta) of src.

    Without an optimizer tx the state has params only. Raises UserError if it is not a GPT-2.
    """
    def abstract_of(meta):
        config = GPTConfig.from_model_args(meta['model_args'])
        mesh = make_mesh(jax.devices('cpu')[:1])
        state = abstract_train_state(config, tx or optax.identity(), mesh)
        return state if tx else {'params': state['params']}
    _, meta, state = Checkpoints(src, read_only=True).load(checkpoint, abstract_of)
    graphdef = split_model(GPTConfig.from_model_args(meta['model_args'])).eval_graphdef
    model = nnx.merge(graphdef, state['params'])
    weights = export_torch_weights(model)
    check_is_gpt2(weights, meta['model_args'], src, lambda idx: np.asarray(model(idx, idx)[0]))
    return weights, state, graphdef, meta


@contextlib.contextmanager
def written(path):
    """A path to write to in a with block, which renames it to path at its end if it succeeds."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # a new folder: a fixed name could be another file, or another conversion to the same path
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        part = os.path.join(folder, os.path.basename(path))
        yield part
        os.replace(part, path)


def run_to_nanogpt():
    torch = optional_import('torch')
    weights, state, graphdef, meta = read_run(TX)
    adam = optax.tree.get(state['opt_state'], 'ScaleByAdamState')
    if adam is None or jax.tree.structure(adam.mu) != jax.tree.structure(state['params']):
        raise UserError(f'{src} was not trained by AdamW alone, and a ckpt.pt needs its moments; '
                        '--format=hf writes the weights')
    steps, settings = int(adam.count), meta['config']
    weights, exp_avg, exp_avg_sq = (
        {name: torch.tensor(w) for name, w in tree.items()} for tree in
        (weights, *(export_torch_weights(nnx.merge(graphdef, m)) for m in (adam.mu, adam.nu))))
    names = optimizer_names(meta['model_args'])
    # a real AdamW has a state in the format of the installed torch
    groups = [{'params': [torch.nn.Parameter(weights[name]) for name in group],
               'weight_decay': decay}
              for group, decay in zip(names, (settings.get('weight_decay', 0.1), 0.0))]
    betas = settings.get('beta1', 0.9), settings.get('beta2', 0.95)
    optimizer = torch.optim.AdamW(groups, lr=settings.get('learning_rate', 6e-4),
                                  betas=betas).state_dict()
    if steps:
        optimizer['state'] = {
            i: {'step': torch.tensor(float(steps)), 'exp_avg': exp_avg[name],
                'exp_avg_sq': exp_avg_sq[name]}
            for i, name in enumerate(sum(names, []))}
    order = [*gpt2_shapes(meta['model_args']), 'lm_head.weight']
    ckpt = {'model': {name: weights[name] for name in order},
            'optimizer': optimizer, 'model_args': meta['model_args'], 'iter_num': meta['iter_num'],
            'best_val_loss': meta['best_val_loss'], 'config': settings}
    with written(dst) as part:
        torch.save(ckpt, part)
    print(f'{dst} has iteration {meta["iter_num"]} of {src}; '
          "nanoGPT resumes it from its out_dir with --init_from=resume")


def run_to_hf():
    weights, *_, meta = read_run()
    args, vocabulary = meta['model_args'], meta['chars']
    known = vocabulary or vocabulary is None and args['vocab_size'] >= 50257
    if not known:
        print(f'WARNING: {src} does not know the text of its tokens, so {dst} has no tokenizer')
    tokenizer = as_tokenizer(vocabulary, src) if known else None
    with written(dst) as part:
        write_folder(part, weights, args, tokenizer, tokenizer and end_of_text(tokenizer))
    print(f"{dst} has iteration {meta['iter_num']} of {src}, for "
          f"transformers.pipeline('text-generation', {dst!r})")


def main():
    makers = {'jax': nanogpt_to_run, 'nanogpt': run_to_nanogpt, 'hf': run_to_hf}
    if format not in makers:
        raise UserError(f'format is {format!r}; it must be jax, nanogpt or hf')
    for name, path, use in (('src', src, 'read'), ('dst', dst, 'write')):
        if not path:
            raise UserError(f'give --{name}, the path to {use}')
    if format != 'jax' and is_remote(dst):
        raise UserError(f'cannot write {dst}: only --format=jax writes to a bucket; give a path on '
                        'this machine')
    if format != 'jax' and os.path.exists(dst):
        raise UserError(f'{dst} exists, and is not overwritten; choose another --dst')
    select_devices('cpu')
    try:
        makers[format]()
    except OSError as e:
        raise UserError(f'cannot write {dst}: {e}') from e


if __name__ == '__main__':
    main()
