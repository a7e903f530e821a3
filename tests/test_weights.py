"""Weights of other projects: Hugging Face folders and nanoGPT's ckpt.pt, read, written and refused;
the parameter counts of GPT-2's larger sizes."""

import fcntl
import json
import os
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import ITER, ROOT, RUN, STEP, TINY, one_line_error, resume, run, save_model
from safetensors.numpy import load_file, save_file

import convert_jax
from jax_train_utils import create_train_state
from jax_transformer import GPT, GPTConfig, export_torch_weights, model_args
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.errors import UserError
from nanogpt_jax.pretrained import CONV1D, GPT2_SHAPES, check_is_gpt2
from nanogpt_jax.run_dir import LOCK
from nanogpt_jax.torch_file import read_torch_file, rebuild_tensor
from test_jax_transformer import golden_numbers, tiny

pytestmark = pytest.mark.usefixtures('unoptimized')
CONFIG = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32, bias=False)
FIXTURE = os.path.join(ROOT, 'testdata', 'ckpt.pt')


def write_hf(folder, weights, prefix='', **changes):
    """Write a folder as the hub has it: Conv1D weights transposed, with the causal mask buffers."""
    config = dict(model_type='gpt2', n_positions=16, vocab_size=65, n_layer=2, n_head=2,
                  n_embd=32) | changes
    tensors = {}
    for name, w in weights.items():
        if name != 'lm_head.weight':
            w = np.ascontiguousarray(w.T) if name.endswith(CONV1D) else w
            tensors[prefix + name.removeprefix('transformer.')] = w
    for i in range(2):
        tensors[f'{prefix}h.{i}.attn.bias'] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope='module')
def model():
    return tiny(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32, bias=True)


# -----------------------------------------------------------------------------
# reading a folder

@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_a_hugging_face_folder_loads_bit_for_bit(tmp_path, model, prefix):
    weights = export_torch_weights(model)
    loaded = GPT.from_pretrained(write_hf(tmp_path / 'hf', weights, prefix), dict(dropout=0.1))
    assert loaded.config.dropout == 0.1 and loaded.config.bias
    for name, w in export_torch_weights(loaded).items():
        np.testing.assert_array_equal(w, weights[name], err_msg=name)


def test_all_weights_that_do_not_fit_are_named_in_one_message(tmp_path, model):
    weights = export_torch_weights(model)
    weights.pop('transformer.h.1.mlp.c_fc.bias')
    weights['transformer.wpe.weight'] = np.zeros((8, 32), np.float32)
    message = r'h\.1\.mlp\.c_fc\.bias is missing.*wpe\.weight has shape \(8, 32\)'
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(write_hf(tmp_path / 'hf', weights))


def test_unusable_folders_and_overrides_are_refused(tmp_path, model):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='config.json'):
        GPT.from_pretrained(str(tmp_path / 'empty'))
    path = write_hf(tmp_path / 'bert', export_torch_weights(model), model_type='bert')
    with pytest.raises(UserError, match="'bert'"):
        GPT.from_pretrained(path)
    path = write_hf(tmp_path / 'cut', export_torch_weights(model))
    file = tmp_path / 'cut' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match='cannot read weights'):
        GPT.from_pretrained(path)
    with pytest.raises(UserError, match='dropout only'):
        GPT.from_pretrained(path, dict(bias=False))


@pytest.mark.parametrize('change', [
    dict(n_inner=64), dict(activation_function='relu'), dict(layer_norm_epsilon=1e-6),
    dict(scale_attn_by_inverse_layer_idx=True), dict(tie_word_embeddings=False),
    dict(n_layer='2'), dict(n_head=2.0), dict(n_embd=None), dict(vocab_size=float('nan')),
    dict(n_layer=10_000), dict(n_layer=10 ** 7)])
def test_variants_that_nanogpt_does_not_compute_are_refused(tmp_path, model, monkeypatch, change):
    # at once: a model of 10,000 blocks takes half a minute to build
    monkeypatch.setattr(nnx, 'eval_shape', None)
    path = write_hf(tmp_path / 'hf', export_torch_weights(model), **change)
    with pytest.raises(UserError, match=f'config.json.*{next(iter(change))}'):
        GPT.from_pretrained(path)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='has no FIFOs')
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_fifo_in_a_folder_is_refused(tmp_path, model, name):
    path = write_hf(tmp_path / 'hf', export_torch_weights(model))
    os.remove(os.path.join(path, name))
    os.mkfifo(os.path.join(path, name))
    with pytest.raises(UserError, match=f'{name}.*not a file'):
        GPT.from_pretrained(path)


def test_weights_split_over_several_files_load_bit_for_bit(tmp_path, model):
    weights = export_torch_weights(model)
    path = tmp_path / 'hf'
    write_hf(path, weights)
    tensors = load_file(path / 'model.safetensors')
    os.remove(path / 'model.safetensors')
    names = sorted(tensors)
    files = {'a.safetensors': names[:7], 'b.safetensors': names[7:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file)
    index = {'weight_map': {name: file for file, part in files.items() for name in part}}
    (path / 'model.safetensors.index.json').write_text(json.dumps(index))
    for name, w in export_torch_weights(GPT.from_pretrained(str(path))).items():
        np.testing.assert_array_equal(w, weights[name], err_msg=name)
    os.remove(path / 'b.safetensors')
    with pytest.raises(UserError, match='b.safetensors'):
        GPT.from_pretrained(str(path))


def test_a_note_is_printed_for_weights_trained_with_the_tanh_form_of_gelu(tmp_path, model, capsys):
    weights = export_torch_weights(model)
    GPT.from_pretrained(write_hf(tmp_path / 'a', weights, activation_function='gelu'))
    assert not capsys.readouterr().out
    GPT.from_pretrained(write_hf(tmp_path / 'b', weights))  # gelu_new is GPT-2's default
    assert 'tanh' in capsys.readouterr().out


MEMORY_SHAPE = dict(n_layer=12, n_head=8, n_embd=512, vocab_size=20000)

# prints the growth of anonymous memory, the model's bytes and the largest tensor's
MEASURE_LOADING = '''
import re, threading, time
import jax
from flax import nnx
from jax_transformer import GPT, GPTConfig

def anonymous_bytes():
    with open('/proc/self/smaps_rollup') as f:
        return 1024 * int(re.search(r'Anonymous:\\s+(\\d+)', f.read())[1])

GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=8), rngs=nnx.Rngs(0))  # JAX is initialized
start, seen, done = anonymous_bytes(), [], threading.Event()

def watch():
    while not done.is_set():
        seen.append(anonymous_bytes())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = jax.block_until_ready(nnx.state(GPT.from_pretrained('.')))
done.set()
thread.join()
sizes = [p.nbytes for p in jax.tree.leaves(model)]
print(max(seen) - start, sum(sizes), max(sizes))
'''


@pytest.mark.slow
def test_loading_holds_at_most_one_tensor_twice(tmp_path):
    if not os.path.exists('/proc/self/smaps_rollup'):
        pytest.skip('anonymous memory is read from /proc')
    big = nnx.eval_shape(lambda: GPT(GPTConfig(**MEMORY_SHAPE), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for _, p in nnx.to_flat_state(nnx.state(big, nnx.Param)):
        p.set_value(jax.numpy.asarray(rng.standard_normal(p.shape, np.float32)))
    write_hf(tmp_path, export_torch_weights(big), **MEMORY_SHAPE, n_positions=1024)
    result = subprocess.run([sys.executable, '-c', MEASURE_LOADING], cwd=tmp_path, text=True,
                            env=os.environ | {'PYTHONPATH': ROOT}, capture_output=True)
    assert result.returncode == 0, result.stderr
    grown, total, largest = map(int, result.stdout.split()[-3:])
    print(f'{grown / 1e6:.0f} MB for a model of {total / 1e6:.0f} MB whose largest tensor has '
          f'{largest / 1e6:.0f} MB')
    # 50 MB for Python and JAX (19 MB were seen); a second copy of the model would be 194 MB
    assert grown < total + largest + 50e6


# -----------------------------------------------------------------------------
# from the command line

@pytest.fixture
def convert(folder, monkeypatch):
    """convert(**flags) does in this process and in folder what convert_jax.py does, and raises its
    errors."""
    def run_main(**flags):
        for name, value in (dict(src='', dst='', format='jax') | flags).items():
            monkeypatch.setattr(convert_jax, name, value)
        convert_jax.main()
    monkeypatch.chdir(folder)
    return run_main


def train_converted(folder, *args):
    """stdout of a run that starts from a converted run."""
    save_model(folder, CONFIG, [])
    code = RUN + f'''
run('convert_jax.py', '--src=out_jax', '--dst=hf', '--format=hf')
run('train_jax.py', *{[*TINY, '--init_from=hf', '--out_dir=out', *args]})
'''
    result = run(folder, '-c', code)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_run_is_converted_to_a_folder_that_another_run_loads(folder):
    out = train_converted(folder, '--block_size=8', '--eval_only=True')
    assert 'hf has iteration 1 of out_jax' in out and 'out_jax does not know the text' in out
    assert 'Initializing from GPT-2 weights: hf' in out
    assert 'tokens per iteration will be: 64' in out and len(STEP.findall(out)) == 1


@pytest.mark.slow
def test_a_run_that_starts_from_a_folder_resumes(folder):
    out = train_converted(folder, '--block_size=8', '--max_iters=2')
    assert [i for i, *_ in ITER.findall(out)] == ['0', '1', '2']
    out = resume(folder, '--out_dir=out', '--max_iters=3')
    assert [i for i, *_ in ITER.findall(out)] == ['3']


@pytest.mark.slow
def test_an_unreachable_hub_and_a_missing_package_are_one_line_errors(folder):
    result = run(folder, 'train_jax.py', *TINY, '--init_from=gpt2', HF_HUB_OFFLINE='1',
                 HF_HOME=str(folder / 'hf'))
    one_line_error(result, 'could not get gpt2', 'local folder', alone=True)
    without = ("import runpy, sys; sys.modules['lm_eval'] = None\n"
               "runpy.run_module('tools.evaluate', run_name='__main__')")
    for args, words in ((['--tasks=x'], 'pip install lm_eval'), ([], '--tasks')):
        one_line_error(run(folder, '-c', without, *args), words)


def test_a_missing_package_and_flags_are_named(convert, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)  # as if it were not installed
    for flags, words in ((dict(src='a', dst='a.pt', format='nanogpt'), 'pip install torch'),
                         (dict(dst='out'), '--src'), (dict(src='out_jax'), '--dst')):
        with pytest.raises(UserError, match=words):
            convert(**flags)


# -----------------------------------------------------------------------------
# nanoGPT's ckpt.pt, read without torch; test_torch.py compares with torch

class Named:
    """A call of a named function, in a pickle."""

    def __init__(self, module, name, *args):
        self.module, self.name, self.args = module, name, args


class TorchPickler(pickle._Pickler):
    """Pickles arrays as torch.save does, and collects them as storages."""

    def __init__(self, file, n_missing=0):
        super().__init__(file, protocol=2)
        self.storages, self.n_missing = [], n_missing

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(f'c{obj.module}\n{obj.name}\n'.encode())
            super().save(obj.args)
            self.write(pickle.REDUCE)
        elif isinstance(obj, np.ndarray):
            self.write(b'ctorch._utils\n_rebuild_tensor_v2\n((')  # with MARK, twice
            super().save('storage')
            self.write(b'ctorch\nFloatStorage\n')
            for part in (str(len(self.storages)), 'cpu', obj.size):
                super().save(part)
            self.write(pickle.TUPLE + pickle.BINPERSID)
            strides = tuple(n // obj.itemsize for n in obj.strides)
            for part in (0, obj.shape, strides, False, None):
                super().save(part)
            self.write(pickle.TUPLE + pickle.REDUCE)
            storage = obj.astype(np.float32).tobytes()
            self.storages.append(storage[:len(storage) - self.n_missing])
        else:
            super().save(obj, save_persistent_id)


def save_ckpt(path, ckpt, n_missing=0, compression=zipfile.ZIP_STORED):
    """torch.save without torch; the storages lack their last n_missing bytes."""
    with zipfile.ZipFile(path, 'w', compression) as file:
        with file.open('ckpt/data.pkl', 'w') as f:
            pickler = TorchPickler(f, n_missing)
            pickler.dump(ckpt)
        file.writestr('ckpt/version', '3\n')
        for i, storage in enumerate(pickler.storages):
            file.writestr(f'ckpt/data/{i}', storage)


HOSTILE = {
    'no model_args': (lambda c: c.pop('model_args'), 'model_args'),
    'no n_head': (lambda c: c['model_args'].pop('n_head'), 'n_head'),
    'config None': (lambda c: c.update(config=None), 'config is None'),
    'iter_num None': (lambda c: c.update(iter_num=None), 'iter_num is None'),
    'iter_num text': (lambda c: c.update(iter_num='five'), "iter_num is 'five'"),
    'iter_num negative': (lambda c: c.update(iter_num=-1), 'iter_num is -1'),
    'loss text': (lambda c: c.update(best_val_loss='low'), 'best_val_loss'),
    'loss huge': (lambda c: c.update(best_val_loss=10 ** 400), 'best_val_loss'),
    'loss row': (lambda c: c.update(best_val_loss=np.zeros(2)), 'best_val_loss'),
    'model list': (lambda c: c.update(model=[]), 'model is []'),
    'int key': (lambda c: c['model'].update({1: np.zeros(2)}), 'its model has 1'),
    'text value': (lambda c: c['model'].update(x='y'), "its model has 'x', a str"),
    'missing': (lambda c: c['model'].pop('_orig_mod.transformer.ln_f.weight'),
                'ln_f.weight is missing'),
    'shape': (lambda c: c['model'].update({'transformer.wpe.weight': np.zeros((8, 32))}),
              '(8, 32)'),
    'n_layer text': (lambda c: c['model_args'].update(n_layer='1'), "n_layer is '1'"),
    'n_layer': (lambda c: c['model_args'].update(n_layer=10 ** 7), 'weights have 2 blocks'),
    'n_head float': (lambda c: c['model_args'].update(n_head=2.0), 'n_head is 2.0'),
    'dropout text': (lambda c: c['model_args'].update(dropout='x'), "dropout is 'x'"),
    'groups': (lambda c: c['optimizer']['param_groups'].pop(), 'optimizer state'),
    'no moment': (lambda c: c['optimizer']['state'][0].pop('exp_avg'), 'optimizer state'),
    'sparse': (lambda c: c['model'].update(x=Named('torch._utils', '_rebuild_sparse_tensor', 1)),
               'only dense tensors'),
    'meta': (lambda c: c['model'].update(
        x=Named('torch._utils', '_rebuild_meta_tensor_no_storage', 1)), 'only dense tensors'),
    'code': (lambda c: c['config'].update(x=Named('os', 'mkdir', 'executed')),
             'asks for os.mkdir'),
}


@pytest.mark.parametrize('name', [
    name if name in ('code', 'shape', 'groups') else pytest.param(name, marks=pytest.mark.slow)
    for name in HOSTILE])
def test_hostile_checkpoints_are_refused_in_one_line_and_run_no_code(folder, convert, name):
    change, words = HOSTILE[name]
    ckpt = read_torch_file(FIXTURE)
    change(ckpt)
    save_ckpt(folder / 'bad.pt', ckpt)
    with pytest.raises(UserError) as raised:
        convert(src='bad.pt', dst='out')
    assert words in str(raised.value) and '\n' not in str(raised.value)
    assert not (folder / 'executed').exists() and not (folder / 'out').exists()


def test_damaged_files_of_torch_are_refused(tmp_path):
    def refused(words, **how):
        save_ckpt(tmp_path / 'bad.pt', {'x': np.zeros(10 ** 6)}, **how)
        with pytest.raises(UserError, match=words):
            read_torch_file(tmp_path / 'bad.pt')
    refused('3999996 bytes; it should have 1000000 of float32', n_missing=4)
    refused('larger than the file', compression=zipfile.ZIP_DEFLATED)  # a zip bomb
    (tmp_path / 'cut.pt').write_bytes(open(FIXTURE, 'rb').read()[:-1000])
    for name in ('cut.pt', 'none.pt'):
        with pytest.raises(UserError, match=f'cannot read .*{name}'):
            read_torch_file(tmp_path / name)


@pytest.mark.parametrize('offset, shape, strides', [
    (0, (7,), (1,)), (4, (3,), (1,)), (0, (2, 3), (4, 1)), (0, (10 ** 9,), (0,)),
    (2, (2,), (-1,)), (-1, (2,), (1,))])
def test_a_tensor_never_reaches_past_its_storage(offset, shape, strides):
    storage = np.arange(6.0)
    np.testing.assert_array_equal(rebuild_tensor(storage, 1, (2, 2), (1, 2)), [[1, 3], [2, 4]])
    with pytest.raises(ValueError, match='a tensor of shape'):
        rebuild_tensor(storage, offset, shape, strides)


def test_convert_overwrites_nothing_and_writes_beside_no_other_run(folder, convert):
    save_model(folder, CONFIG, [])
    (folder / 'there').mkdir()

    def refused(words, **flags):
        with pytest.raises(UserError, match=words):
            convert(**flags)
    for format in ('hf', 'nanogpt'):
        refused('there .*--dst', src='out_jax', dst='there', format=format)
    refused('another run.*--dst', src=FIXTURE, dst='out_jax')
    refused("'onnx'.*nanogpt", src='out_jax', dst='a', format='onnx')
    refused('none.pt is not a file', src='none.pt', dst='a')
    refused('gs://bucket/hf.*--format=jax', src='out_jax', dst='gs://bucket/hf', format='hf')
    assert os.listdir(folder / 'there') == []
    with open(folder / 'there' / LOCK, 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused('another run is writing to there', src=FIXTURE, dst='there')
    assert os.listdir(folder / 'there') == [LOCK]


# -----------------------------------------------------------------------------
# only a GPT-2 is written as a GPT-2

def rms_norm(self, x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * self.scale[...]


@pytest.mark.parametrize('name, other', [
    ('gelu', lambda x: jnp.square(jnp.maximum(x, 0))), ('LayerNorm.__call__', rms_norm)])
def test_a_model_that_computes_something_else_is_not_written_as_gpt2(
        folder, convert, monkeypatch, name, other):
    save_model(folder, CONFIG, [])
    owner, _, attribute = ('jax_transformer.' + name).rpartition('.')
    monkeypatch.setattr(f'{owner}.{attribute}', other)
    with pytest.raises(UserError, match='out_jax is not a GPT-2.*other logits'):
        convert(src='out_jax', dst='hf', format='hf')
    assert not (folder / 'hf').exists()


def test_other_parameters_and_settings_than_gpt2s_are_named(model):
    weights, args = export_torch_weights(model), model_args(model.config)
    with pytest.raises(UserError, match='out is not .* model_args have n_kv_head'):
        check_is_gpt2(weights, args | {'n_kv_head': 1, 'rope': False}, 'out', None)
    weights['transformer.h.0.attn.q_norm.weight'] = weights.pop('transformer.wpe.weight')
    with pytest.raises(UserError, match=r'out is not .* 2 parameters .*q_norm.weight.*wpe'):
        check_is_gpt2(weights, args, 'out', None)


def test_a_run_with_another_optimizer_is_written_too(folder, convert, model):
    state = create_train_state(model, optax.sgd(0.1, momentum=0.9))
    with Checkpoints(str(folder / 'out_jax')) as checkpoints:
        checkpoints.save(state, dict(
            iter_num=2, best_val_loss=1.0, model_args=model_args(model.config), chars=[],
            config={'always_save_checkpoint': True}))
    (folder / 'hf.part').mkdir()
    (folder / 'hf.part' / 'mine').touch()  # what is beside dst is not touched
    before = {*folder.iterdir()}
    convert(src='out_jax', dst='hf', format='hf')
    assert {*folder.iterdir()} - before == {folder / 'hf'}
    assert (folder / 'hf.part' / 'mine').exists() and not (folder / 'hf' / 'mine').exists()
    back = export_torch_weights(GPT.from_pretrained(str(folder / 'hf')))
    for name, w in export_torch_weights(model).items():
        np.testing.assert_array_equal(w, back[name], err_msg=name)


# -----------------------------------------------------------------------------
# sizes

@pytest.mark.parametrize('size', list(GPT2_SHAPES))
def test_parameter_counts_and_mfu_of_all_sizes_are_nanogpts(size):
    n_layer, n_head, n_embd = GPT2_SHAPES[size]
    config = GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    want = golden_numbers()['sizes'][size]
    assert model.get_num_params() == want['num_params']
    assert model.get_num_params(non_embedding=False) == want['num_params_all']
    np.testing.assert_allclose(model.estimate_mfu(12, 1.0), want['mfu_bs12_dt1'], rtol=1e-12)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in params)  # no memory was allocated
