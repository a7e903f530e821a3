"""Weights from Hugging Face folders, and the larger sizes' counts."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, one_line_error, run, train
from flax import nnx
from safetensors.numpy import load_file, save_file

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


@pytest.mark.parametrize('change', [dict(n_inner=64), dict(activation_function='relu'), dict(layer_norm_epsilon=1e-6),
                                    dict(scale_attn_by_inverse_layer_idx=True), dict(tie_word_embeddings=False)])
def test_other_models_in_gpt2s_clothes_are_refused(tmp_path, model, change):
    path = write_hf(tmp_path / 'hf', export_torch_weights(model), **change)
    with pytest.raises(UserError, match=next(iter(change))):
        GPT.from_pretrained(path)


def test_several_files_make_one_model(tmp_path, model):
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


def test_the_tanh_form_is_named(tmp_path, model, capsys):
    weights = export_torch_weights(model)
    GPT.from_pretrained(write_hf(tmp_path / 'a', weights, activation_function='gelu'))
    assert not capsys.readouterr().out
    GPT.from_pretrained(write_hf(tmp_path / 'b', weights))
    assert 'tanh' in capsys.readouterr().out


def test_loading_holds_one_tensor_twice_and_no_more(tmp_path):
    if not os.path.exists('/proc/self/smaps_rollup'):
        pytest.skip('anonymous memory is read from /proc')
    code = textwrap.dedent('''
        import json, os, re, sys, threading, time
        import jax, numpy as np
        from flax import nnx
        from safetensors.numpy import save_file
        from jax_transformer import CONV1D, GPT, GPTConfig, _torch_name
        shape = dict(n_layer=12, n_head=8, n_embd=512, vocab_size=20000)
        if sys.argv[1] == 'write':
            rng, tensors = np.random.default_rng(0), {}
            model = nnx.eval_shape(lambda: GPT(GPTConfig(**shape), rngs=nnx.Rngs(0)))
            for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param)):
                tensors[_torch_name(path)] = rng.standard_normal(p.shape, np.float32)
            save_file(tensors, 'model.safetensors')
            json.dump(shape | dict(model_type='gpt2', n_positions=1024), open('config.json', 'w'))
            sys.exit()

        def held():
            with open('/proc/self/smaps_rollup') as f:
                return 1024 * int(re.search(r'Anonymous:\\s+(\\d+)', f.read())[1])
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=8), rngs=nnx.Rngs(0))  # JAX itself is up
        start, seen, done = held(), [], []
        def watch():
            while not done:
                seen.append(held())
                time.sleep(0.002)
        thread = threading.Thread(target=watch)
        thread.start()
        model = jax.block_until_ready(nnx.state(GPT.from_pretrained('.')))
        done.append(True)
        thread.join()
        sizes = [p.nbytes for p in jax.tree.leaves(model)]
        print(max(seen) - start, sum(sizes), max(sizes))
    ''')
    for what in ('write', 'read'):
        result = subprocess.run([sys.executable, '-c', code, what], cwd=tmp_path, env=os.environ | {'PYTHONPATH': ROOT},
                                capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    grown, model, largest = map(int, result.stdout.split()[-3:])
    print(f'{grown / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB whose largest tensor has {largest / 1e6:.0f} MB')
    # 50 MB for what Python and JAX take besides (19 were seen); a second copy of the model would be 194
    assert grown < model + largest + 50e6


def test_a_missing_torch_is_asked_for_by_name(folder):
    (folder / 'stub').mkdir()
    (folder / 'stub' / 'torch.py').write_text('raise ImportError("as if it were not installed")')
    (folder / 'ckpt.pt').write_bytes(b'')
    for args in (['--src=ckpt.pt', '--dst=out'], ['--src=out_jax', '--dst=new.pt', '--format=nanogpt']):
        one_line_error(run(folder, 'convert_jax.py', *args, PYTHONPATH=str(folder / 'stub')), 'pip install torch')
    one_line_error(run(folder, 'convert_jax.py', '--dst=out'), '--src')
    one_line_error(run(folder, 'convert_jax.py', '--src=out_jax'), '--dst')


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
