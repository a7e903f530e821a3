"""Weights and checkpoints against PyTorch and Hugging Face transformers; torchrun.

.ci/run installs both and runs these tests.
"""

import os
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import ENV, ITER, ROOT, TINY, TRAIN, one_line_error, run, train

torch = pytest.importorskip('torch', reason='compares with PyTorch: pip install torch')
transformers = pytest.importorskip('transformers',
                                   reason='compares with transformers: pip install transformers')

import jax_train_utils as utils
from jax_transformer import GPT, GPTConfig, export_torch_weights
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.sharding import make_mesh
from test_jax_transformer import tokens

FIXTURE = os.path.join(ROOT, 'testdata', 'ckpt.pt')


def convert(folder, *args):
    result = run(folder, 'convert_jax.py', *args)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def latest_state(out_dir, tx):
    """(graphdef in training mode, training state, meta) of the latest checkpoint of a run."""
    checkpoints = Checkpoints(out_dir, read_only=True)
    _, meta, state = checkpoints.load('latest', lambda meta: utils.abstract_train_state(
        GPTConfig.from_model_args(meta['model_args']), tx, make_mesh(jax.devices()[:1])))
    return utils.split_model(GPTConfig.from_model_args(meta['model_args']))[1], state, meta


def any_optimizer():
    """An optimizer whose state has the right structure, for reading a checkpoint."""
    return utils.create_optimizer(lambda it: 0.0, 0.1, (0.9, 0.95), 1.0)


def hf_model(seed, **changes):
    """A random GPT-2 of transformers with the exact GELU, and weights large enough that its logits
    differ much from each other."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=65, n_positions=16) | changes
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **sizes, activation_function='gelu', initializer_range=0.2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('bias') or 'ln_' in name:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def hf_logits(model, idx):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(idx)).long()).logits.numpy()


def our_logits(model, idx):
    model.eval()
    return np.asarray(model(idx, idx)[0])


def assert_same_logits(got, want):
    # float32 in another order of operations: 1e-4 of the largest logit
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


# -----------------------------------------------------------------------------
# transformers, both directions

@pytest.mark.parametrize('seed, sizes', [
    (0, {}),
    (1, dict(n_layer=3, n_head=4, n_embd=24, vocab_size=31, n_positions=9)),
    (2, dict(n_layer=1, n_head=1, n_embd=8, vocab_size=7, n_positions=40))])
def test_a_transformers_model_has_the_same_logits_here(tmp_path, capsys, seed, sizes):
    theirs = hf_model(seed, **sizes)
    theirs.save_pretrained(tmp_path)
    idx = tokens(2, theirs.config.n_positions, high=theirs.config.vocab_size, seed=seed)
    ours = GPT.from_pretrained(str(tmp_path))
    assert_same_logits(our_logits(ours, idx), hf_logits(theirs, idx))
    assert 'tanh' not in capsys.readouterr().out  # its config names the exact GELU


@pytest.mark.parametrize('bias', [True, False])
def test_a_run_has_the_same_logits_in_transformers_and_returns_bit_for_bit(folder, bias):
    train(folder, '--max_iters=4', f'--bias={bias}')
    assert 'transformers' in convert(folder, '--src=out_jax', '--dst=hf', '--format=hf')
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder / 'hf').eval()
    # asserted, since with weights this small the logits hardly depend on it
    assert theirs.config.activation_function == 'gelu'
    graphdef, state, _ = latest_state(folder / 'out_jax', any_optimizer())
    idx = tokens(2, 16, high=20)
    ours = nnx.merge(graphdef, state['params'])
    assert_same_logits(hf_logits(theirs, idx), our_logits(ours, idx))
    # absent biases become zeros
    back = export_torch_weights(GPT.from_pretrained(str(folder / 'hf')))
    weights = export_torch_weights(ours)
    assert set(weights) <= set(back)
    for name, w in back.items():
        np.testing.assert_array_equal(w, weights.get(name, np.zeros_like(w)), err_msg=name)


# -----------------------------------------------------------------------------
# nanoGPT's checkpoints

@pytest.fixture
def shakespeare(folder):
    """A working directory with data for the run of FIXTURE: 65 characters, of which 20 occur."""
    data = folder / 'data' / 'shakespeare_char'
    shutil.copytree(folder / 'data' / 'tiny', data)
    meta = {'vocab_size': 65, 'itos': dict(enumerate(map(chr, range(40, 105))))}
    (data / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


def test_a_nanogpt_checkpoint_is_converted_bit_for_bit_and_can_be_resumed_and_sampled(shakespeare):
    assert 'iteration 1 of' in convert(shakespeare, f'--src={FIXTURE}', '--dst=in')
    theirs = torch.load(FIXTURE, weights_only=True)
    graphdef, state, meta = latest_state(shakespeare / 'in', any_optimizer())
    model = nnx.merge(graphdef, state['params'])
    for name, w in export_torch_weights(model).items():
        want = theirs['model']['_orig_mod.' + name].numpy()
        np.testing.assert_array_equal(w, want, err_msg=name)
    expected = np.load(os.path.join(ROOT, 'testdata', 'ckpt_expected.npz'))
    assert_same_logits(our_logits(model, expected['x']), expected['logits'])
    assert meta['iter_num'] == 1 and meta['best_val_loss'] == float(theirs['best_val_loss'])

    resumed = run(shakespeare, 'train_jax.py', '--init_from=resume', '--out_dir=in', '--device=cpu',
                  '--max_iters=3', '--eval_iters=1', '--batch_size=4',
                  '--gradient_accumulation_steps=1')
    assert [i for i, *_ in ITER.findall(resumed.stdout)] == ['1', '2', '3'], resumed.stderr
    sampled = run(shakespeare, 'sample_jax.py', '--out_dir=in', '--start=A', '--num_samples=1',
                  '--max_new_tokens=5', '--device=cpu')
    assert sampled.returncode == 0, sampled.stderr


def test_a_nanogpt_checkpoint_returns_bit_for_bit_with_its_optimizer(shakespeare):
    convert(shakespeare, f'--src={FIXTURE}', '--dst=in')
    convert(shakespeare, '--src=in', '--dst=back/ckpt.pt', '--format=nanogpt')
    theirs = torch.load(FIXTURE, weights_only=True)
    back = torch.load(shakespeare / 'back' / 'ckpt.pt', weights_only=True)
    assert {'_orig_mod.' + name for name in back['model']} == set(theirs['model'])
    for name, w in back['model'].items():
        assert torch.equal(w, theirs['model']['_orig_mod.' + name]), name
    assert back['model_args'] == theirs['model_args'] and back['iter_num'] == 1
    groups = back['optimizer']['param_groups']
    assert [g['params'] for g in groups] == [
        g['params'] for g in theirs['optimizer']['param_groups']]
    assert [g['weight_decay'] for g in groups] == [0.1, 0.0]
    got, want = back['optimizer']['state'], theirs['optimizer']['state']
    assert got.keys() == want.keys()
    for i in want:
        assert got[i].keys() == want[i].keys()
        assert all(torch.equal(got[i][key], want[i][key]) for key in want[i]), i


LR, DECAY, BETAS, CLIP = 1e-2, 0.1, (0.9, 0.95), 1.0


class TorchRun:
    """nanoGPT's training in PyTorch, with transformers' GPT-2 as its model.

    The model computes the same function; its Conv1D layers store their weights (in, out).
    """

    def __init__(self, model):
        self.model = model
        params = dict(model.named_parameters())
        self.groups = [[n for n in params if params[n].dim() >= 2],
                       [n for n in params if params[n].dim() < 2]]
        self.optimizer = torch.optim.AdamW(
            [{'params': [params[n] for n in names], 'weight_decay': decay}
             for names, decay in zip(self.groups, (DECAY, 0.0))], lr=LR, betas=BETAS)

    def step(self, x, y):
        logits = self.model(torch.from_numpy(x).long()).logits
        targets = torch.from_numpy(y).long().flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.item()

    def transposed(self, name, tensor):
        conv1d = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        return tensor.T.contiguous() if conv1d else tensor

    def checkpoint(self, iter_num):
        """The checkpoint that nanoGPT would have written: its Linear layers are (out, in)."""
        weights = {n: self.transposed(n, p.detach().clone())
                   for n, p in self.model.named_parameters()}
        optimizer = self.optimizer.state_dict()
        for i, name in enumerate(self.groups[0] + self.groups[1]):
            optimizer['state'][i] = {key: self.transposed(name, s.clone()) if s.ndim else s
                                     for key, s in optimizer['state'][i].items()}
        args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=True, vocab_size=65,
                    dropout=0.0)
        return {'model': weights | {'lm_head.weight': weights['transformer.wte.weight']},
                'optimizer': optimizer, 'model_args': args, 'iter_num': iter_num,
                'best_val_loss': torch.tensor(4.0), 'config': {'dataset': 'none'}}

    def load(self, ckpt):
        """The inverse of checkpoint, as nanoGPT resumes."""
        self.model.load_state_dict({n: self.transposed(n, w) for n, w in ckpt['model'].items()})
        for i, name in enumerate(self.groups[0] + self.groups[1]):
            state = ckpt['optimizer']['state'][i]
            state.update({key: self.transposed(name, s) if s.ndim else s
                          for key, s in state.items()})
        self.optimizer.load_state_dict(ckpt['optimizer'])


def batches(n, seed):
    """n batches (x, y) of 4 sequences that can be learned: each token is the last plus 1 or 2."""
    rng = np.random.default_rng(seed)
    data = (np.cumsum(rng.integers(1, 3, size=(n, 4, 17)), axis=-1) % 65).astype(np.int32)
    return [(batch[:, :-1], batch[:, 1:]) for batch in data]


def test_training_continues_here_as_in_pytorch_and_in_pytorch_as_here(tmp_path):
    theirs = TorchRun(hf_model(3).train())
    for x, y in batches(7, seed=0):
        theirs.step(x, y)
    torch.save(theirs.checkpoint(7), tmp_path / 'ckpt.pt')
    convert(tmp_path, '--src=ckpt.pt', '--dst=out')

    tx = utils.create_optimizer(lambda it: LR, DECAY, BETAS, CLIP)
    graphdef, state, _ = latest_state(tmp_path / 'out', tx)
    step, losses = utils.make_train_step(graphdef, tx, 0), []
    for k, (x, y) in enumerate(batches(10, seed=1)):
        want = theirs.step(x, y)
        state, metrics = step(state, x[None], y[None], np.int32(7 + k))
        losses.append((float(metrics['loss']), want))
    # float32 over ten updates; without the moments or their count the second loss is off by 1e-2
    np.testing.assert_allclose(*np.array(losses).T, rtol=0, atol=1e-4)

    # the same ten steps in PyTorch, from our checkpoint
    convert(tmp_path, '--src=out', '--dst=back.pt', '--format=nanogpt')
    resumed = TorchRun(hf_model(4).train())
    resumed.load(torch.load(tmp_path / 'back.pt', weights_only=True))
    for group in resumed.optimizer.param_groups:
        group['lr'] = LR
    again = [resumed.step(x, y) for x, y in batches(10, seed=1)]
    np.testing.assert_allclose(again, [want for _, want in losses], rtol=0, atol=1e-4)


# -----------------------------------------------------------------------------
# mistakes

class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_bad_checkpoints_are_refused_and_run_no_code(folder):
    def refused(change, *words):
        ckpt = torch.load(FIXTURE, weights_only=True)
        change(ckpt)
        torch.save(ckpt, folder / 'bad.pt')
        one_line_error(run(folder, 'convert_jax.py', '--src=bad.pt', '--dst=out'), *words)
        assert not (folder / 'out').exists()

    refused(lambda c: c.pop('model_args'), 'bad.pt', 'model_args')
    refused(lambda c: c['model_args'].pop('n_head'), 'n_head')
    refused(lambda c: c['model'].pop('_orig_mod.transformer.ln_f.weight'), 'ln_f.weight is missing')
    wrong_shape = {'_orig_mod.transformer.wpe.weight': torch.zeros(8, 32)}
    refused(lambda c: c['model'].update(wrong_shape), 'wpe.weight', '(8, 32)')
    refused(lambda c: c['optimizer']['param_groups'].pop(), 'optimizer state')
    refused(lambda c: c['optimizer']['state'][0].pop('exp_avg'), 'optimizer state')
    refused(lambda c: c['config'].update(evil=RunsCode()), 'bad.pt', 'plain data')
    assert not (folder / 'executed').exists()
    with open(FIXTURE, 'rb') as f:
        (folder / 'cut.pt').write_bytes(f.read()[:-1000])
    one_line_error(run(folder, 'convert_jax.py', '--src=cut.pt', '--dst=out'), 'cut.pt')
    one_line_error(run(folder, 'convert_jax.py', '--src=none.pt', '--dst=out'),
                   'none.pt', 'not a file')


def test_convert_overwrites_nothing_and_refuses_unknown_formats(folder):
    train(folder, '--max_iters=1')
    (folder / 'there').mkdir()

    def refused(*args, words):
        one_line_error(run(folder, 'convert_jax.py', *args), *words)
    for format in ('hf', 'nanogpt'):
        refused('--src=out_jax', '--dst=there', f'--format={format}', words=['there', '--dst'])
    refused(f'--src={FIXTURE}', '--dst=out_jax', words=['another run', '--dst'])
    refused('--src=out_jax', '--dst=a', '--format=onnx', words=["'onnx'", 'nanogpt'])
    assert os.listdir(folder / 'there') == []


# -----------------------------------------------------------------------------
# torchrun

def test_torchrun_starts_one_run_of_several_processes(folder):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']
    result = subprocess.run([*torchrun, *TRAIN[1:], *TINY, '--max_iters=2'], cwd=folder, text=True,
                            capture_output=True, env=os.environ | ENV)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('platform: cpu, devices: 2 (cpu), processes: 2') == 1
    assert [i[0] for i in ITER.findall(result.stdout)] == ['0', '1', '2']
