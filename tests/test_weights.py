"""Weights from Hugging Face folders, and the larger sizes' counts."""

import json

import jax
import numpy as np
import pytest
from conftest import TINY, run, train
from flax import nnx
from safetensors.numpy import save_file

from jax_transformer import GPT, GPTConfig, UserError, export_torch_weights
from test_jax_transformer import golden_numbers

CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')


def write_hf(folder, weights, prefix='', **changes):
    """A folder as the hub has it: Conv1D weights transposed, mask buffers among them."""
    config = dict(model_type='gpt2', n_positions=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32) | changes
    tensors = {prefix + name.removeprefix('transformer.'): np.ascontiguousarray(w.T) if name.endswith(CONV1D) else w
               for name, w in weights.items() if name != 'lm_head.weight'}
    for i in range(2):
        tensors[f'{prefix}h.{i}.attn.bias'] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope='module')
def model():
    return GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32), rngs=nnx.Rngs(0))


@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_a_hugging_face_folder_loads_bit_for_bit(tmp_path, model, prefix):
    weights = export_torch_weights(model)
    loaded = GPT.from_pretrained(write_hf(tmp_path / 'hf', weights, prefix), dict(dropout=0.1))
    assert loaded.config.dropout == 0.1 and loaded.config.bias
    for name, w in export_torch_weights(loaded).items():
        np.testing.assert_array_equal(w, weights[name], err_msg=name)


def test_what_does_not_fit_is_one_message(tmp_path, model):
    weights = export_torch_weights(model)
    weights.pop('transformer.h.1.mlp.c_fc.bias')
    weights['transformer.wpe.weight'] = np.zeros((8, 32), np.float32)
    with pytest.raises(UserError, match=r'h\.1\.mlp\.c_fc\.bias is missing.*wpe\.weight has shape \(8, 32\)'):
        GPT.from_pretrained(write_hf(tmp_path / 'hf', weights))


def test_unusable_folders_are_refused(tmp_path, model):
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


def test_the_hub_out_of_reach_is_one_line(folder):
    result = run(folder, 'train_jax.py', *TINY, '--init_from=gpt2', HF_HUB_OFFLINE='1', HF_HOME=str(folder / 'hf'))
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
    assert 'could not get gpt2' in result.stderr and 'local folder' in result.stderr


def test_finetuning_and_sampling_start_from_a_folder(folder, model):
    write_hf(folder / 'hf', export_torch_weights(model))
    out = train(folder, '--init_from=hf', '--block_size=8', '--max_iters=2')
    assert 'Initializing from OpenAI GPT-2 weights: hf' in out and 'tokens per iteration will be: 64' in out
    resumed = train(folder, '--init_from=resume', '--block_size=8', '--max_iters=3')
    assert 'iter 3: loss' in resumed
    result = run(folder, 'train_jax.py', *TINY, '--init_from=hf', '--block_size=32', '--out_dir=other')
    assert result.returncode == 1 and 'block_size' in result.stderr and '16' in result.stderr


@pytest.mark.parametrize('size, shape', [
    ('gpt2-medium', (24, 16, 1024)), ('gpt2-large', (36, 20, 1280)), ('gpt2-xl', (48, 25, 1600))])
def test_parameter_counts_and_mfu_of_the_larger_sizes_are_nanogpts(size, shape):
    config = GPTConfig(vocab_size=50257, n_layer=shape[0], n_head=shape[1], n_embd=shape[2])
    model, want = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))), golden_numbers()['sizes'][size]
    assert model.get_num_params() == want['num_params']
    assert model.get_num_params(non_embedding=False) == want['num_params_all']
    np.testing.assert_allclose(model.estimate_mfu(12, 1.0), want['mfu_bs12_dt1'], rtol=1e-12)
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
