"""Weights and checkpoints against PyTorch and Hugging Face transformers; .ci/run installs both and runs these."""

import os
import pickle
import shutil

import jax
import numpy as np
import pytest
from conftest import ITER, ROOT, one_line_error, run, train, with_data
from flax import nnx

torch = pytest.importorskip('torch', reason='the oracle is PyTorch: pip install torch')
transformers = pytest.importorskip('transformers', reason='the oracle is transformers: pip install transformers')

import jax_train_utils as utils
from jax_checkpoint import Checkpoints
from jax_transformer import GPT, GPTConfig, export_torch_weights
from test_jax_transformer import tokens

FIXTURE = os.path.join(ROOT, 'testdata', 'ckpt.pt')
MESH = utils.make_mesh(jax.devices()[:1])


def convert(folder, *args):
    result = run(folder, 'convert_jax.py', *args)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def our_state(out_dir, tx):
    """(graphdef in training mode, training state, meta) of the latest checkpoint of a run."""
    checkpoints = Checkpoints(out_dir, read_only=True)
    step = checkpoints.newest_whole()
    meta = checkpoints.meta(step)
    config = GPTConfig(**meta['model_args'])
    return utils.split_model(config)[1], checkpoints.state(step, config, tx, MESH), meta


def hf_model(seed, **changes):
    """A random GPT-2 of transformers with the exact GELU, its weights large enough for logits of all sizes."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=65, n_positions=16) | changes
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **sizes, activation_function='gelu', initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None))
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

@pytest.mark.parametrize('seed, sizes', [(0, {}), (1, dict(n_layer=3, n_head=4, n_embd=24, vocab_size=31, n_positions=9)),
                                         (2, dict(n_layer=1, n_head=1, n_embd=8, vocab_size=7, n_positions=40))])
def test_a_model_of_transformers_gives_its_logits_here(tmp_path, capsys, seed, sizes):
    theirs = hf_model(seed, **sizes)
    theirs.save_pretrained(tmp_path)
    idx = tokens(2, theirs.config.n_positions, high=theirs.config.vocab_size, seed=seed)
    ours = GPT.from_pretrained(str(tmp_path))
    assert_same_logits(our_logits(ours, idx), hf_logits(theirs, idx))
    assert 'tanh' not in capsys.readouterr().out  # the exact GELU was asked for, and is computed


@pytest.mark.parametrize('bias', [True, False])
def test_a_run_gives_its_logits_in_transformers(folder, bias):
    train(folder, '--max_iters=4', f'--bias={bias}')
    assert 'transformers' in convert(folder, '--src=out_jax', '--dst=hf', '--format=hf')
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder / 'hf').eval()
    assert theirs.config.activation_function == 'gelu'  # hardly seen in the logits of weights this small
    graphdef, state, _ = our_state(folder / 'out_jax', utils.create_optimizer(lambda it: 0.0, 0.1, (0.9, 0.95), 1.0))
    idx = tokens(2, 16, high=20)
    assert_same_logits(hf_logits(theirs, idx), our_logits(nnx.merge(graphdef, state['params']), idx))
    # and back: every weight bit for bit, the biases zero where there were none
    back = export_torch_weights(GPT.from_pretrained(str(folder / 'hf')))
    weights = export_torch_weights(nnx.merge(graphdef, state['params']))
    assert all(np.array_equal(back[name], weights.get(name, np.zeros_like(back[name]))) for name in back)
    assert set(weights) <= set(back)


# -----------------------------------------------------------------------------
# nanoGPT's checkpoints

def test_nanogpts_checkpoint_comes_in_and_goes_out_bit_for_bit(folder):
    data = folder / 'data' / 'shakespeare_char'
    shutil.copytree(folder / 'data' / 'tiny', data)
    meta = {'vocab_size': 65, 'itos': dict(enumerate(map(chr, range(40, 105))))}
    (data / 'meta.pkl').write_bytes(pickle.dumps(meta))
    assert 'iteration 1 of' in convert(folder, f'--src={FIXTURE}', '--dst=in')
    theirs = torch.load(FIXTURE, weights_only=True)
    graphdef, state, meta = our_state(folder / 'in', utils.create_optimizer(lambda it: 0.0, 0.1, (0.9, 0.95), 1.0))
    model = nnx.merge(graphdef, state['params'])
    for name, w in export_torch_weights(model).items():
        np.testing.assert_array_equal(w, theirs['model']['_orig_mod.' + name].numpy(), err_msg=name)
    expected = np.load(os.path.join(ROOT, 'testdata', 'ckpt_expected.npz'))
    assert_same_logits(our_logits(model, expected['x']), expected['logits'])
    assert meta['iter_num'] == 1 and meta['best_val_loss'] == float(theirs['best_val_loss'])
    # it is trained further, and sampled
    resumed = run(folder, 'train_jax.py', '--init_from=resume', '--out_dir=in', '--device=cpu', '--max_iters=3', '--eval_iters=1',
                  '--batch_size=4', '--gradient_accumulation_steps=1')
    assert [i for i, *_ in ITER.findall(resumed.stdout)] == ['1', '2', '3'], resumed.stderr
    sampled = run(folder, 'sample_jax.py', '--out_dir=in', '--start=A', '--num_samples=1', '--max_new_tokens=5', '--device=cpu')
    assert sampled.returncode == 0, sampled.stderr

    # and back: the same tensors, in the order of the same optimizer
    convert(folder, f'--src={FIXTURE}', '--dst=again')
    convert(folder, '--src=again', '--dst=back/ckpt.pt', '--format=nanogpt')
    back = torch.load(folder / 'back' / 'ckpt.pt', weights_only=True)
    assert {'_orig_mod.' + name for name in back['model']} == set(theirs['model'])
    assert all(torch.equal(w, theirs['model']['_orig_mod.' + name]) for name, w in back['model'].items())
    assert back['model_args'] == theirs['model_args'] and back['iter_num'] == 1
    assert [g['params'] for g in back['optimizer']['param_groups']] == [g['params'] for g in theirs['optimizer']['param_groups']]
    assert [g['weight_decay'] for g in back['optimizer']['param_groups']] == [0.1, 0.0]
    assert back['optimizer']['state'].keys() == theirs['optimizer']['state'].keys()
    for i, want in theirs['optimizer']['state'].items():
        got = back['optimizer']['state'][i]
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want), i


LR, DECAY, BETAS, CLIP = 1e-2, 0.1, (0.9, 0.95), 1.0


class TorchRun:
    """nanoGPT's training in PyTorch, with transformers' GPT-2 for its model: the same function, transposed products."""

    def __init__(self, model):
        self.model = model
        self.names = [name for name, _ in model.named_parameters()]
        params = dict(model.named_parameters())
        self.groups = [[n for n in self.names if params[n].dim() >= 2], [n for n in self.names if params[n].dim() < 2]]
        self.optimizer = torch.optim.AdamW([{'params': [params[n] for n in names], 'weight_decay': decay}
                                            for names, decay in zip(self.groups, (DECAY, 0.0))], lr=LR, betas=BETAS)

    def step(self, x, y):
        logits = self.model(torch.from_numpy(x).long()).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).long().flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.item()

    def transposed(self, name, tensor):
        return tensor.T.contiguous() if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else tensor

    def checkpoint(self, iter_num):
        """What nanoGPT would have written, its Linear layers (out, in)."""
        weights = {n: self.transposed(n, p.detach().clone()) for n, p in self.model.named_parameters()}
        optimizer = self.optimizer.state_dict()
        for i, name in enumerate(self.groups[0] + self.groups[1]):
            optimizer['state'][i] = {key: self.transposed(name, s.clone()) if s.ndim else s
                                     for key, s in optimizer['state'][i].items()}
        args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=True, vocab_size=65, dropout=0.0)
        return {'model': weights | {'lm_head.weight': weights['transformer.wte.weight']}, 'optimizer': optimizer,
                'model_args': args, 'iter_num': iter_num, 'best_val_loss': torch.tensor(4.0), 'config': {'dataset': 'none'}}

    def load(self, ckpt):
        """The inverse of checkpoint, as nanoGPT resumes."""
        self.model.load_state_dict({n: self.transposed(n, w) for n, w in ckpt['model'].items()})
        for i, name in enumerate(self.groups[0] + self.groups[1]):
            state = ckpt['optimizer']['state'][i]
            state.update({key: self.transposed(name, s) if s.ndim else s for key, s in state.items()})
        self.optimizer.load_state_dict(ckpt['optimizer'])


def batches(n, seed):
    rng = np.random.default_rng(seed)
    rows = (np.cumsum(rng.integers(1, 3, size=(n, 4, 17)), axis=-1) % 65).astype(np.int32)  # there is something to learn
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def test_training_goes_on_here_as_in_pytorch_and_there_as_here(tmp_path):
    theirs = TorchRun(hf_model(3).train())
    for x, y in batches(7, seed=0):
        theirs.step(x, y)
    torch.save(theirs.checkpoint(7), tmp_path / 'ckpt.pt')
    convert(tmp_path, '--src=ckpt.pt', '--dst=out')

    tx = utils.create_optimizer(lambda it: LR, DECAY, BETAS, CLIP)
    graphdef, state, _ = our_state(tmp_path / 'out', tx)
    step, losses = utils.make_train_step(graphdef, tx, 0), []
    for k, (x, y) in enumerate(batches(10, seed=1)):
        want = theirs.step(x, y)
        state, metrics = step(state, x[None], y[None], np.int32(7 + k))
        losses.append((float(metrics['loss']), want))
    # float32, and ten updates: without the moments or their count the second loss is off by 1e-2
    np.testing.assert_allclose(*np.array(losses).T, rtol=0, atol=1e-4)

    # and from here to there: the same ten steps again, from our checkpoint
    convert(tmp_path, '--src=out', '--dst=there.pt', '--format=nanogpt')
    there = TorchRun(hf_model(4).train())
    there.load(torch.load(tmp_path / 'there.pt', weights_only=True))
    there.optimizer.param_groups[0]['lr'] = there.optimizer.param_groups[1]['lr'] = LR
    again = [there.step(x, y) for x, y in batches(10, seed=1)]
    np.testing.assert_allclose(again, [want for _, want in losses], rtol=0, atol=1e-4)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_bad_checkpoints_are_refused(folder):
    def refused(change, *words):
        ckpt = torch.load(FIXTURE, weights_only=True)
        change(ckpt)
        torch.save(ckpt, folder / 'bad.pt')
        one_line_error(run(folder, 'convert_jax.py', '--src=bad.pt', '--dst=out'), *words)
        assert not (folder / 'out').exists()

    refused(lambda c: c.pop('model_args'), 'bad.pt', 'model_args')
    refused(lambda c: c['model_args'].pop('n_head'), 'n_head')
    refused(lambda c: c['model'].pop('_orig_mod.transformer.ln_f.weight'), 'ln_f.weight is missing')
    refused(lambda c: c['model'].update({'_orig_mod.transformer.wpe.weight': torch.zeros(8, 32)}), 'wpe.weight', '(8, 32)')
    refused(lambda c: c['optimizer']['param_groups'].pop(), 'optimizer state')
    refused(lambda c: c['optimizer']['state'][0].pop('exp_avg'), 'optimizer state')
    refused(lambda c: c['config'].update(evil=RunsCode()), 'bad.pt', 'plain data')
    assert not (folder / 'executed').exists()
    (folder / 'cut.pt').write_bytes(open(FIXTURE, 'rb').read()[:-1000])
    one_line_error(run(folder, 'convert_jax.py', '--src=cut.pt', '--dst=out'), 'cut.pt')
    one_line_error(run(folder, 'convert_jax.py', '--src=none.pt', '--dst=out'), 'none.pt', 'not a file')


def test_what_is_there_is_not_overwritten(tmp_path):
    folder = with_data(tmp_path)
    train(folder, '--max_iters=1')
    (folder / 'there').mkdir()
    for dst, made in (('there', 'hf'), ('there', 'nanogpt')):
        one_line_error(run(folder, 'convert_jax.py', '--src=out_jax', f'--dst={dst}', f'--format={made}'), 'there', '--dst')
    one_line_error(run(folder, 'convert_jax.py', f'--src={FIXTURE}', '--dst=out_jax'), 'another run', '--dst')
    one_line_error(run(folder, 'convert_jax.py', '--src=out_jax', '--dst=a', '--format=onnx'), "'onnx'", 'nanogpt')
    assert os.listdir(folder / 'there') == []
