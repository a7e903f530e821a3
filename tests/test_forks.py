"""docs/forks.md: each diff applies to the tree as it is, and does there what the document says.

pytest applies a diff to a copy of the tree and runs this file in it, as a script, which makes the
checks in one process of two devices.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import ROOT, TINY, run, saved, with_data

import jax_train_utils as utils
import jax_transformer
from jax_transformer import GPTConfig
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import read_metrics
from nanogpt_jax.sharding import make_mesh, shard_batch
from test_jax_transformer import (
    assert_equal_trees, forward, generate_plainly, one_device_mesh, tiny, tokens,
)

CHECKS = 'trains', 'samples', 'resumes', 'shards', 'converts'
QUICK = 'RoPE', 'WSD schedule'  # the others are slow
TRAINING = ('Muon', 'WSD schedule', 'z-loss', 'muP', 'Log-spaced checkpoints',
            'Gradient norms by layer')  # may change other files than the model's


def read_forks():
    """{heading: (its diff, the names of the checks that it skips)} of the document."""
    with open(os.path.join(ROOT, 'docs/forks.md'), encoding='utf-8') as f:
        sections = re.split(r'^## ', f.read(), flags=re.M)
    forks = {}
    for section in sections:
        if block := re.search(r'^```diff\n(.*?)^```$', section, re.M | re.S):
            skips = re.match(r'skips: (.*)', block[1])
            forks[section.split('\n')[0]] = block[1], skips[1].split(', ') if skips else []
    return forks


# -----------------------------------------------------------------------------
# pytest: a fork in a copy of the tree

def copy_of_the_tree(folder):
    files = subprocess.check_output(['git', 'ls-files'], cwd=ROOT, text=True).splitlines()
    for path in files:
        os.makedirs(folder / os.path.dirname(path), exist_ok=True)
        shutil.copy(os.path.join(ROOT, path), folder / path)
    return with_data(folder)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in read_forks()])
def test_a_fork_trains_samples_resumes_shards_and_converts(name, tmp_path):
    diff, skips = read_forks()[name]
    copy = copy_of_the_tree(tmp_path / 'copy')
    subprocess.run(['git', 'apply', '-'], cwd=copy, input=diff, text=True, check=True)
    files = re.findall('^--- a/(.*)', diff, re.M)
    subprocess.run([sys.executable, '-m', 'ruff', 'check', '-q', *files], cwd=copy, check=True)
    result = run(copy, str(copy / 'tests/test_forks.py'), name,
                 *[check for check in CHECKS if check not in skips], devices=2, PYTHONPATH=copy)
    assert result.returncode == 0, result.stdout + result.stderr
    refused = json.loads(result.stdout.splitlines()[-1])

    # what the unchanged code makes of its checkpoint
    mesh = one_device_mesh()

    def abstract_params(meta):
        config = GPTConfig.from_model_args(meta['model_args'])
        return {'params': utils.abstract_train_state(config, optax.identity(), mesh)['params']}
    checkpoints = Checkpoints(copy / 'whole', read_only=True)
    if refused:
        assert 'is not a GPT-2' in refused and '\n' not in refused
        with pytest.raises(UserError, match='was written by another model'):
            checkpoints.load('latest', abstract_params)
    else:
        _, meta, state = checkpoints.load('latest', abstract_params)
        config = GPTConfig.from_model_args(meta['model_args'])
        model = nnx.merge(utils.split_model(config).eval_graphdef, state['params'])
        # rounding differs in another compiled program
        np.testing.assert_allclose(forward(model, tokens(1, 16, high=20))[0],
                                   np.load(copy / 'logits.npy'), rtol=1e-5, atol=1e-5)


def test_diffs_apply_are_short_and_those_of_the_architecture_change_the_model_alone():
    forks = read_forks()
    assert forks.keys() == CLAIMS.keys()
    for name, (diff, skips) in forks.items():
        assert {*skips} <= {*CHECKS}
        applied = subprocess.run(['git', 'apply', '--check', '-'], cwd=ROOT, input=diff, text=True,
                                 capture_output=True)
        assert applied.returncode == 0, (name, applied.stderr)
        n_changed = len(re.findall(r'^(?:\+(?!\+\+ )|-(?!-- ))', diff, re.M))
        files = re.findall(r'^--- a/(.*)', diff, re.M)
        assert n_changed < 40, name
        assert name in (*TRAINING, 'A modern GPT') or n_changed < 25, name
        assert name in TRAINING or files == ['jax_transformer.py'], name


# -----------------------------------------------------------------------------
# in the copy: the purpose of each fork

def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def rope():
    """Scores depend on distances alone."""
    q, k = random(2, 1, 4, 3, 8)

    def scores(start):
        turned = [jax_transformer.rotate(a, start) for a in (q, k)]
        return jnp.einsum('bqnh,bknh->bnqk', *turned)
    np.testing.assert_allclose(scores(7), scores(0), atol=1e-4)
    assert np.abs(scores(0) - jnp.einsum('bqnh,bknh->bnqk', q, k)).max() > 0.1


def rmsnorm():
    y = jax_transformer.LayerNorm(8, False)(3 + random(4, 8))
    np.testing.assert_allclose(jnp.square(y).mean(-1), 1, atol=1e-3)
    assert (y.mean(-1) > 0.8).all()


def swiglu():
    mlp = jax_transformer.MLP(GPTConfig(n_embd=96, n_head=2, bias=False), rngs=nnx.Rngs(0))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(mlp))) == 8 * 96 ** 2
    assert mlp.c_fc.kernel.shape == (96, 512)


def qk_norm():
    """The size of queries and keys does not matter."""
    attn, x = tiny(bias=False).transformer.h[0].attn, random(2, 8, 32)
    y, w = attn(x), attn.c_attn.kernel
    w.set_value(w[...] * jnp.where(jnp.arange(96) < 64, 100, 1))
    z = attn(x)
    w.set_value(w[...] * 100)
    np.testing.assert_allclose(attn(x), 100 * z, rtol=1e-3)
    assert np.abs(z - y).max() < np.abs(y).max()  # epsilon matters to the small initial ones


def grouped_queries():
    cache = tiny(n_head=8).empty_cache(1, 16)
    assert cache[0][0].shape == (1, 2, 16, 4)


def untied():
    model, x = tiny(), tokens(2, 8)
    model.lm_head.kernel.set_value(jnp.zeros((32, 65)))
    assert not np.any(model(x)[0]) and np.any(model.hidden(x))


def muon():
    """Matrices change by one with equal singular values, all else by AdamW's first step."""
    grads = {'kernel': random(8, 24), 'embedding': random(8, 24)}
    tx = utils.create_optimizer(lambda it: 1.0, 0.0, (0.9, 0.95), 0.0)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    singular = np.linalg.svd(updates['kernel'], compute_uv=False) / (0.2 * 24 ** 0.5)
    assert (0.6 < singular).all() and (singular < 1.3).all()
    np.testing.assert_allclose(updates['embedding'], -np.sign(grads['embedding']), rtol=1e-3)
    # with --fsdp each of the eight matrices is gathered once to be orthogonalized
    mesh, config = make_mesh(jax.devices(), fsdp=2), tiny(n_layer=2).config
    tx = utils.create_optimizer(lambda it: 1.0, 0.0, (0.9, 0.95), 0.0, mesh)
    step = utils.make_train_step(utils.split_model(config).train_graphdef, tx, 0, mesh)
    x, = shard_batch(mesh, tokens(1, 2, 16))
    text = step.lower(utils.abstract_train_state(config, tx, mesh), x, x, 0).compile().as_text()
    gathers = re.findall(r' all-gather\(.*/optimizer/', text)
    assert len(gathers) == 8, len(gathers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'torch', SimpleNamespace(__file__=''))  # not used
        with pytest.raises(UserError, match='not trained by AdamW alone'):
            run_script('convert_jax.py', '--src=whole', '--dst=ckpt.pt', '--format=nanogpt')


def wsd():
    lr = utils.create_learning_rate_schedule(1.0, 10, 100, 0.1)
    assert lr(4) < 1 and {float(lr(it)) for it in range(10, 81)} == {1.0}
    np.testing.assert_allclose([lr(95), lr(100), lr(200)],
                               [0.1 + 0.9 * (1 - 0.75 ** 0.5), 0.1, 0.1])


def z_loss():
    losses = train('z', '--max_iters=0', '--z_loss=1.0')
    assert losses[0] > np.log(20) ** 2  # log Z is about log(20) at first


def log_spaced():
    assert {1, 2, 4, 8, 16, 21} <= {*Checkpoints('whole', read_only=True).steps()}


def gradient_norms():
    for line in read_metrics('whole'):
        if 'loss' in line:
            squares = [x ** 2 for name, x in line.items() if name.startswith('grad_norm_')]
            assert len(squares) == 5  # wte, wpe, two blocks, ln_f
            np.testing.assert_allclose(sum(squares), line['grad_norm'] ** 2, rtol=1e-4)


def mup():
    """The document's coordinate check; without muP the last change is four times the first."""
    with open('docs/forks.md', encoding='utf-8') as f:
        code = re.search(r'^## muP$.*?^```python\n(.*?)^```$', f.read(), re.M | re.S)[1]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code.replace('(64, 128, 256, 512)', '(64, 512)'), {})
    changes = [float(line.split()[1]) for line in out.getvalue().splitlines()]
    assert len(changes) == 2 and max(changes) < 2 * min(changes), changes


def modern():
    rope(), rmsnorm(), swiglu(), qk_norm()


CLAIMS = {
    'RoPE': rope, 'RMSNorm': rmsnorm, 'SwiGLU': swiglu, 'QK-norm': qk_norm,
    'Grouped-query attention': grouped_queries, 'Untied head': untied, 'Muon': muon,
    'WSD schedule': wsd, 'z-loss': z_loss, 'muP': mup, 'Log-spaced checkpoints': log_spaced,
    'Gradient norms by layer': gradient_norms, 'A modern GPT': modern}


# -----------------------------------------------------------------------------
# in the copy: the checks of all forks

def run_script(script, *args):
    sys.argv = [script, *args]
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as e:
        assert not e.code, e


def train(out_dir, *args):
    """The losses of a training run."""
    run_script('train_jax.py', *TINY, '--device=cpu:0', '--n_layer=2', '--n_head=4',
               '--eval_interval=20', f'--out_dir={out_dir}', *args)
    return [line['loss'] for line in read_metrics(out_dir) if 'loss' in line]


def samples():
    # with the small initial weights the last token alone would decide, and not attention
    model, x = tiny(n_layer=2, n_head=4), tokens(2, 3)
    nnx.update(model, jax.tree.map(lambda p: 10 * p, nnx.state(model, nnx.Param)))
    want = generate_plainly(model, x, 30)
    np.testing.assert_array_equal(model.generate(x, 30, temperature=0), want)


def resumes():
    train('resumed', '--max_iters=9')
    run_script('train_jax.py', '--init_from=resume', '--out_dir=resumed', '--max_iters=20',
               '--device=cpu:0')
    assert_equal_trees(*(saved(Path(), out_dir, 21)[0] for out_dir in ('whole', 'resumed')))


def shards(losses):
    sharded = train('sharded', '--device=cpu', '--fsdp=2')
    # float32 sums in another order, which AdamW amplifies from step to step
    np.testing.assert_allclose(sharded, losses, rtol=1e-3)


def converts():
    """How convert_jax.py refuses the model, '' if it does not."""
    try:
        run_script('convert_jax.py', '--src=whole', '--dst=hf', '--format=hf')
    except UserError as e:
        return '' if 'safetensors' in str(e) else str(e)  # which is read last
    return ''


def main(name, *checks):
    losses = train('whole')
    assert losses[-1] < losses[0] - 0.3
    CLAIMS[name]()
    if 'samples' in checks:
        samples()
    if 'resumes' in checks:
        resumes()
    if 'shards' in checks:
        shards(losses)
    state, meta = saved(Path(), 'whole', 21)
    config = GPTConfig.from_model_args(meta['model_args'])
    model = nnx.merge(utils.split_model(config).eval_graphdef, state['params'])
    np.save('logits.npy', forward(model, tokens(1, 16, high=20))[0])
    print(json.dumps(converts() if 'converts' in checks else ''))


if __name__ == '__main__':
    main(*sys.argv[1:])
