"""GPT-2's weights from Hugging Face folders, and the parameter counts of its larger sizes."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT, TINY, one_line_error, run, run_inside, train
from safetensors.numpy import load_file, save_file

from jax_transformer import GPT, GPTConfig, export_torch_weights
from nanogpt_jax.errors import UserError
from nanogpt_jax.pretrained import CONV1D, GPT2_SHAPES
from test_jax_transformer import golden_numbers


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
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
    return GPT(config, rngs=nnx.Rngs(0))


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
    dict(scale_attn_by_inverse_layer_idx=True), dict(tie_word_embeddings=False)])
def test_variants_that_nanogpt_does_not_compute_are_refused(tmp_path, model, change):
    path = write_hf(tmp_path / 'hf', export_torch_weights(model), **change)
    with pytest.raises(UserError, match=next(iter(change))):
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


@pytest.mark.xdist_group('memory')
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

def test_convert_names_missing_packages_and_flags(folder):
    (folder / 'stub').mkdir()
    stub = 'raise ImportError("as if it were not installed")'
    (folder / 'stub' / 'torch.py').write_text(stub)
    (folder / 'ckpt.pt').write_bytes(b'')
    for args in (['--src=ckpt.pt', '--dst=out'],
                 ['--src=out_jax', '--dst=new.pt', '--format=nanogpt']):
        result = run(folder, 'convert_jax.py', *args, PYTHONPATH=str(folder / 'stub'))
        one_line_error(result, 'pip install torch')
    one_line_error(run_inside(folder, 'convert_jax.py', '--dst=out'), '--src')
    one_line_error(run_inside(folder, 'convert_jax.py', '--src=out_jax'), '--dst')


def test_an_unreachable_hub_is_a_one_line_error(folder):
    result = run(folder, 'train_jax.py', *TINY, '--init_from=gpt2', HF_HUB_OFFLINE='1',
                 HF_HOME=str(folder / 'hf'))
    one_line_error(result, 'could not get gpt2', 'local folder', alone=True)


def test_a_run_starts_from_a_folder_and_resumes(folder, model):
    write_hf(folder / 'hf', export_torch_weights(model))
    out = train(folder, '--init_from=hf', '--block_size=8', '--max_iters=2')
    assert 'Initializing from GPT-2 weights: hf' in out
    assert 'tokens per iteration will be: 64' in out
    resumed = train(folder, '--init_from=resume', '--block_size=8', '--max_iters=3')
    assert 'iter 3: loss' in resumed
    result = run_inside(folder, 'train_jax.py', *TINY, '--init_from=hf', '--block_size=32',
                 '--out_dir=other')
    one_line_error(result, 'block_size', '16')


# -----------------------------------------------------------------------------
# sizes

@pytest.mark.parametrize('size', ['gpt2-medium', 'gpt2-large', 'gpt2-xl'])
def test_parameter_counts_and_mfu_of_the_larger_sizes_are_nanogpts(size):
    n_layer, n_head, n_embd = GPT2_SHAPES[size]
    config = GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    want = golden_numbers()['sizes'][size]
    assert model.get_num_params() == want['num_params']
    assert model.get_num_params(non_embedding=False) == want['num_params_all']
    np.testing.assert_allclose(model.estimate_mfu(12, 1.0), want['mfu_bs12_dt1'], rtol=1e-12)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in params)  # no memory was allocated
