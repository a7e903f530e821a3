"""Weights, checkpoints and evaluation against PyTorch, Hugging Face transformers and lm_eval;
torchrun.

.ci/run installs them and runs these tests.
"""

import collections
import json
import os
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import ENV, ITER, ROOT, TINY, one_line_error, run, train, with_data

torch = pytest.importorskip('torch', reason='compares with PyTorch: pip install torch')
transformers = pytest.importorskip('transformers',
                                   reason='compares with transformers: pip install transformers')

import jax_train_utils as utils
from jax_transformer import GPT, GPTConfig, export_torch_weights
from nanogpt_jax import tokenizer
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.errors import UserError
from nanogpt_jax.sharding import make_mesh
from nanogpt_jax.torch_file import read_torch_file
from test_jax_transformer import tokens

pytestmark = pytest.mark.slow  # .ci/run installs the packages for it
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


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A working directory with a short run for each vocabulary, as out-<kind>, and its folder for
    transformers, as hf-<kind>; and the tasks of testdata/."""
    folder = with_data(tmp_path_factory.mktemp('runs'))
    shutil.copytree(os.path.join(ROOT, 'testdata', 'tasks'), folder / 'testdata' / 'tasks')
    with open(folder / 'testdata' / 'tasks' / 'items.jsonl', encoding='utf-8') as f:
        docs = [json.loads(line)['text'] for line in f]
    own = tokenizer.train_tokenizer(docs, 400)
    text = '\n'.join(docs)
    # a vocabulary of GPT-2's size has padding, as those of most models
    for kind, vocabulary in (('own', own), ('gpt2', None), ('characters', sorted(set(text)))):
        data = folder / 'data' / kind
        data.mkdir()
        if kind == 'own':
            (data / 'tokenizer.json').write_text(own, encoding='utf-8')
        if kind == 'characters':
            meta = {'vocab_size': len(vocabulary) + 3, 'itos': dict(enumerate(vocabulary))}
            (data / 'meta.pkl').write_bytes(pickle.dumps(meta))
        try:
            ids = np.array(tokenizer.get_tokenizer(vocabulary)[0](text), np.uint16)
        except UserError:  # GPT-2's tokens are neither cached nor reachable
            continue
        for split in ('train', 'val'):
            ids.tofile(data / f'{split}.bin')
        train(folder, f'--dataset={kind}', f'--out_dir=out-{kind}', '--block_size=32',
              '--max_iters=40', '--eval_interval=100')
        convert(folder, f'--src=out-{kind}', f'--dst=hf-{kind}', '--format=hf')
    return folder


def need(runs, kind):
    if not (runs / f'hf-{kind}').exists():
        pytest.skip("GPT-2's tokenizer is neither cached nor reachable")


@pytest.mark.parametrize('kind', ['own', 'gpt2', 'characters'])
def test_a_pipeline_of_transformers_writes_the_same_greedy_text(runs, kind):
    need(runs, kind)
    pipeline = transformers.pipeline('text-generation', str(runs / f'hf-{kind}'))
    assert pipeline('The day')[0]['generated_text'].startswith('The day')  # sampled
    for prompt in ('The day after', '\n', 'two, three, four.  The'):
        n_new = 32 - len(pipeline.tokenizer.encode(prompt))  # they stop at block_size
        ours = run(runs, 'sample_jax.py', f'--out_dir=out-{kind}', f'--start={prompt}',
                   '--num_samples=1', '--temperature=0', f'--max_new_tokens={n_new}',
                   '--device=cpu')
        theirs = pipeline(prompt, do_sample=False)[0]['generated_text']
        assert ours.stdout == theirs + '\n---------------\n', ours.stderr


def offline(folder):
    return {'HF_HOME': str(folder / 'hub'), 'HF_HUB_OFFLINE': '1'}


def evaluate(folder, *args):
    return run(folder, 'tools.evaluate', '--include_path=testdata/tasks', '--device=cpu',
               '--log_samples=True', *args, **offline(folder))


def answers(samples):
    """{item: [(log-likelihood, greedy) or text of each request]}."""
    return {sample['doc_id']: [response[0] for response in sample['resps']] for sample in samples}


def test_the_harness_gets_the_same_answers_of_its_own_adapter(runs):
    pytest.importorskip('lm_eval', reason='compares with pip install lm_eval[hf]')
    tasks = 'local_choice,local_rolling,local_generate'
    ours = evaluate(runs, '--out_dir=out-own', f'--tasks={tasks}', '--num_fewshot=1')
    assert ours.returncode == 0, ours.stderr
    assert '|local_rolling |' in ours.stdout
    with open(runs / 'out-own' / f'lm_eval-41-{tasks.replace(",", "+")}.json') as f:
        ours = json.load(f)
    subprocess.run(
        [sys.executable, '-m', 'lm_eval', '--model', 'hf', '--model_args', 'pretrained=hf-own',
         '--tasks', tasks, '--include_path', 'testdata/tasks', '--device', 'cpu', '--num_fewshot',
         '1', '--batch_size', '16', '--log_samples', '--output_path', 'theirs'],
        cwd=runs, check=True, env=os.environ | offline(runs))
    for task in tasks.split(','):
        path, = runs.glob(f'theirs/**/samples_{task}_*.jsonl')
        theirs = answers(map(json.loads, path.read_text().splitlines()))
        own = answers(ours['samples'][task])
        assert own.keys() == theirs.keys() and len(own) == 35
        for i, responses in own.items():
            if task == 'local_generate':
                assert responses == theirs[i]
            for response, their in zip(responses, theirs[i]):
                if task == 'local_choice':
                    np.testing.assert_allclose(response[0], float(their[0]), rtol=0, atol=1e-4)
                    assert str(response[1]) == their[1]
                if task == 'local_rolling':
                    np.testing.assert_allclose(response, float(their), rtol=0, atol=1e-4)


def test_what_cannot_be_evaluated_is_one_line(runs):
    pytest.importorskip('lm_eval', reason='needs pip install lm_eval')
    one_line_error(evaluate(runs, '--out_dir=out-own', '--tasks=hellaswag'),  # not cached
                   'cannot load hellaswag')
    train(runs, '--max_iters=1')
    one_line_error(evaluate(runs, '--tasks=local_choice'), 'the model never saw the characters')


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


def assert_same(got, want):
    """The same plain data, and the same bits in all tensors."""
    if isinstance(want, torch.Tensor):
        bits = want.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert got.shape == tuple(want.shape) and str(got.dtype) == str(want.dtype)[6:]
        np.testing.assert_array_equal(np.ascontiguousarray(got).reshape(-1).view(np.uint8), bits)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert type(got) is type(want) and len(got) == len(want)
        for pair in zip(got, want):
            assert_same(*pair)
    else:
        assert got == want and type(got) is type(want)


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_checkpoint_is_read_as_torch_reads_it(tmp_path, dtype, prefix):
    theirs = TorchRun(hf_model(5).train())
    for x, y in batches(2, seed=0):
        theirs.step(x, y)
    ckpt = theirs.checkpoint(2)
    ckpt['model'] = collections.OrderedDict(
        (prefix + name, w.to(getattr(torch, dtype))) for name, w in ckpt['model'].items())
    ckpt['model']._metadata = {'': {'version': 1}}  # as state_dict() has it
    ckpt['model'] |= {'view': torch.arange(12).reshape(3, 4)[1:, ::2].T, 'none': torch.empty(0, 3),
                      'parameter': torch.nn.Parameter(torch.ones(2)),
                      'flags': torch.tensor([True, False]), 'step': torch.tensor(3.5)}
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    assert_same(read_torch_file(tmp_path / 'ckpt.pt'),
                torch.load(tmp_path / 'ckpt.pt', weights_only=True))
    for name in ('view', 'none', 'parameter', 'flags', 'step'):
        del ckpt['model'][name]
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    convert(tmp_path, '--src=ckpt.pt', '--dst=out')
    graphdef, state, _ = latest_state(tmp_path / 'out', any_optimizer())
    for name, w in export_torch_weights(nnx.merge(graphdef, state['params'])).items():
        np.testing.assert_array_equal(w, ckpt['model'][prefix + name].float().numpy())


def test_checkpoints_that_hold_more_than_dense_tensors_are_refused(tmp_path):
    for value in (torch.eye(2).to_sparse(), torch.empty(2, device='meta'), torch.float32,
                  torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)):
        torch.save({'model': {'x': value}}, tmp_path / 'bad.pt')
        with pytest.raises(UserError, match='only dense tensors and plain data'):
            read_torch_file(tmp_path / 'bad.pt')


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
                'best_val_loss': torch.tensor(4.0), 'config': {'dataset': 'none', 1: 2}}

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
# torchrun

def test_torchrun_starts_one_run_of_several_processes(folder):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']
    result = subprocess.run(
        [*torchrun, os.path.join(ROOT, 'train_jax.py'), *TINY, '--max_iters=2'], cwd=folder,
        text=True, capture_output=True, env=os.environ | ENV)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('platform: cpu, devices: 2 (cpu), processes: 2') == 1
    assert [i[0] for i in ITER.findall(result.stdout)] == ['0', '1', '2']
