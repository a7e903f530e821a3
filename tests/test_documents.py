"""What the documents say agrees with the code: links, files, flags, messages, snippets, lengths."""

import ast
import fnmatch
import glob
import itertools
import os
import pkgutil
import re
import shlex
import shutil

import pytest
from helpers import ROOT, run

from configurator import config_block, configure


def find(*patterns):
    return [path for pattern in patterns for path in sorted(glob.glob(pattern, root_dir=ROOT))]


MAPPING = 'TORCH_TO_JAX_MAPPING.md'
DOCUMENTS = find('*.md', 'docs/*.md', 'data/README.md', 'data/*/readme.md')
SCRIPTS = [path for path in find('*_jax.py', 'tools/*.py', 'data/*/prepare.py')
           if 'from configurator import config' in open(os.path.join(ROOT, path)).read()]
CODE = find('*.py', 'nanogpt_jax/*.py', 'tools/*.py')
WORDS = {'README.md': 700, 'JAX_README.md': 2500, 'BENCHMARKS.md': 3000, 'CONTRIBUTING.md': 300,
         'docs/distributed.md': 1200, 'docs/sizing.md': 600, 'docs/design.md': 1400}
each_document = pytest.mark.parametrize('document', DOCUMENTS)

# path-like words that name no file of the repository
ELSEWHERE = {'train.py', 'model.py', 'sample.py', 'bench.py',  # nanoGPT's
             'config.json', 'generation_config.json', 'model.safetensors', 'path/to/gpt2',
             'input.txt', 'prompt.txt', 'train.log', 'logs/*.log',  # a reader's own
             'train/loss', 'val/loss', 'refs/convert/parquet'}  # names in wandb, on the hub
# nanoGPT's scripts, and ours that take the same flags
COUNTERPART = {'train.py': 'train_jax.py', 'sample.py': 'sample_jax.py', 'bench.py': 'bench_jax.py'}
# all that nanoGPT's scripts (commit 3adf61e) use of torch, collected from their syntax trees; where
# several objects have a method of one name, the word before it says which, as in the mapping
TORCH = """
    nn.Module forward nn.Parameter nn.Linear nn.Embedding nn.Dropout nn.GELU nn.ModuleDict
    nn.ModuleList functional F.layer_norm F.softmax F.cross_entropy F.scaled_dot_product_attention
    torch.nn.init.normal_ torch.nn.init.zeros_ Module.apply Module.to Module.train Module.eval
    self.training parameters named_parameters register_buffer model.state_dict
    model.load_state_dict GPT2LMHeadModel.from_pretrained torch.ones torch.zeros torch.tril
    torch.arange torch.tensor torch.cat torch.stack torch.from_numpy torch.randint torch.topk
    torch.multinomial torch.long torch.float32 torch.bfloat16 torch.float16 tensor.view
    tensor.transpose tensor.contiguous tensor.split tensor.size tensor.shape tensor.t copy_
    masked_fill pin_memory tensor.to tensor.tolist losses.mean loss.item loss.backward idx.device
    p.dim numel requires_grad torch.optim.AdamW optimizer.param_groups optimizer.step
    optimizer.zero_grad optimizer.state_dict load_state_dict torch.nn.utils.clip_grad_norm_
    torch.no_grad torch.amp.autocast torch.compile torch.save torch.load torch.cuda.amp.GradScaler
    scaler.scale scaler.unscale_ scaler.step scaler.update torch.manual_seed
    torch.cuda.manual_seed torch.backends.cuda.matmul.allow_tf32 torch.backends.cudnn.allow_tf32
    torch.cuda.is_available torch.cuda.is_bf16_supported torch.cuda.set_device
    torch.cuda.synchronize DistributedDataParallel device_ids model.module
    require_backward_grad_sync init_process_group destroy_process_group torch.profiler.profile
    torch.profiler.schedule torch.profiler.tensorboard_trace_handler ProfilerActivity.CPU
    ProfilerActivity.CUDA prof.step
""".split()


# -----------------------------------------------------------------------------
# reading documents

def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def fenced(document):
    """[(language, text)] of a document's code blocks."""
    return re.findall(r'^```(\w*)\n(.*?)^```$', read(document), re.M | re.S)


def prose(document):
    return re.sub(r'^```.*?^```$', '', read(document), flags=re.M | re.S)


def spans(document):
    """What is in backticks, outside of code blocks."""
    return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', prose(document))]


def commands(document):
    """Each command of the shell blocks and of the text, as a list of words."""
    lines = [text for language, text in fenced(document) if language == 'sh']
    lines += [s for s in spans(document) if re.match(r'(python3?|pip|[\w/.<>]+\.py) \S', s)]
    shell = re.sub(r'\d?>>? \S+', '', '\n'.join(lines)).replace('\\\n', ' ')
    for line in re.sub(r'--command="(.*)"', r'&& \1', shell).splitlines():
        words = shlex.split(line, comments=True)
        for separates, command in itertools.groupby(words, {'&&', '|'}.__contains__):
            if not separates:
                yield [*command]


def python_calls(document):
    """[script, argument, ...] of each command that starts Python; `-m tools.plot` is a script."""
    for words in commands(document):
        start = [i + 1 for i, word in enumerate(words) if word == 'python']
        if start or words[0].endswith('.py'):
            words = words[start[0] if start else 0:]
            if words[0] == '-m' and words[1].startswith('tools.'):
                words = [words[1].replace('.', '/') + '.py', *words[2:]]
            yield words


def assert_none(wrong):
    assert not wrong, '\n' + '\n'.join(sorted(wrong))


# -----------------------------------------------------------------------------
# files, links, flags, names, messages

IGNORED = [line.rstrip('/') for line in read('.gitignore').splitlines() if line[0] not in '#!']


def exists(path, document):
    """Whether a path is a file here, beside the document or in any folder, or a run writes it."""
    beside = os.path.join(os.path.dirname(document), path)
    written = any(fnmatch.fnmatch(name, line) for line in IGNORED
                  for name in (beside, *path.rstrip('/').split('/')))
    return written or find(path, beside, *([f'*/{path}', f'*/*/{path}'] * ('/' not in path)))


@each_document
def test_every_file_that_it_names_exists(document):
    words = {word for line in [*map(str.split, spans(document)), *commands(document)]
             for word in line}
    paths = {word for word in words if re.fullmatch(r'(?!\.\.)[\w.*][\w.*/-]*', word)
             and re.search(r'\w/|[\w*>]\.(py|md|txt|json|toml|bin|pkl|safetensors|log)$', word)}
    paths |= {word.replace('.', '/') + '.py' for word in words if re.fullmatch(r'tools\.\w+', word)}
    assert_none([f'{document}: there is no {path}' for path in paths - ELSEWHERE
                 if not exists(path, document)])


@each_document
def test_every_link_leads_somewhere(document):
    for target in re.findall(r'\]\((?!https?:)([^)\s]+)\)', prose(document)):
        path, _, anchor = target.partition('#')
        path = os.path.join(os.path.dirname(document), path) if path else document
        assert os.path.exists(os.path.join(ROOT, path)), f'{document}: {target} is not a file'
        headings = re.findall(r'^#+ (.*)$', prose(path), re.M) if anchor else ['']
        anchors = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
                   for heading in headings]  # GitHub's rule
        assert anchor in anchors, f'{document}: {path} has no heading for #{anchor}'


def settings(script):
    """A script's flags with their defaults."""
    block = {}
    exec(config_block(os.path.join(ROOT, script)), block)
    return {name: value for name, value in block.items() if not name.startswith('_')}


@each_document
def test_its_scripts_take_its_commands(document, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of config files are relative to it
    for script, *args in python_calls(document):
        script = COUNTERPART.get(script, script)
        if script in SCRIPTS:  # configure raises an error for what it does not take
            # no config file: the runs that tools.plot takes, and config/<name>.py
            configure(settings(script), [arg for arg in args if arg.startswith('--')
                                         or script != 'tools/plot.py' and '<' not in arg])


@each_document
def test_every_flag_in_its_text_is_one_of_a_script(document):
    flags = {flag for span in spans(document) for flag in re.findall(r'(?<![\w=-])--(\w+)', span)}
    known = {'help', 'key'}.union(*map(settings, SCRIPTS))
    assert_none([f'{document}: no script has --{flag}' for flag in flags - known])


def test_the_guides_table_of_flags_has_the_defaults_of_training():
    stated = dict(re.findall(r'^\| `--(\w+)` \| `(.*?)` \|', read('JAX_README.md'), re.M))
    assert len(stated) == 12
    defaults = settings('train_jax.py')
    assert {k: type(defaults[k])(v) for k, v in stated.items()} == {k: defaults[k] for k in stated}


def test_messages_that_the_guide_explains_are_printed():
    strings = [node.value for path in [*CODE, 'data/common.py'] for node in
               ast.walk(ast.parse(read(path)))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    quoted = re.findall(r'^\| "(.*?)" \|', read('JAX_README.md'), re.M)
    assert len(quoted) > 9
    assert_none([f'nothing prints {text}' for text in quoted
                 if not any(text in string for string in strings)])


def test_design_names_every_script_and_module():
    assert_none([f'docs/design.md does not name {path}' for path in CODE
                 if os.path.basename(path) not in read('docs/design.md')
                 and '__init__' not in path])


@each_document
def test_every_dotted_name_of_a_library_exists(document):
    alias = {'jnp': 'jax.numpy', 'lax': 'jax.lax', 'np': 'numpy', 'nnx': 'flax.nnx',
             'ocp': 'orbax.checkpoint'}
    text = '\n'.join(spans(document) + [text for _, text in fenced(document)])
    for name in set(re.findall(
            r'(?<![\w./])(?:jax|jnp|lax|np|flax|nnx|optax|ocp)(?:\.[A-Za-z_]\w*)+', text)):
        first, _, rest = name.partition('.')
        pkgutil.resolve_name(f'{alias.get(first, first)}.{rest}')


def test_the_mapping_has_every_torch_api_of_nanogpt_and_only_names_of_ours_that_exist():
    rows = [line.strip('|').split('|') for line in re.findall(r'^\|.*\|$', read(MAPPING), re.M)]
    first = ' '.join(word for row in rows for word in re.findall('`([^`]+)`', row[0]))
    stated = {name for word in re.findall(r'\w+(?:\.\w+)*', first)
              for name in (word, word.split('.')[-1])}
    assert_none([f'{MAPPING}: no row for {name}' for name in TORCH if name not in stated])
    code = '\n'.join(map(read, CODE))
    where = re.findall('^Here: .*$', read(MAPPING), re.M)
    where += [row[2] for row in rows if len(row) == 4]
    named = re.findall(r'`(\w+)[^`]*`', '\n'.join(where))
    assert len(named) > 40
    assert_none({f'{MAPPING}: no script or module has {name}' for name in named
                 if not re.search(rf'\b{name}\b', code)})


# -----------------------------------------------------------------------------
# lengths

@pytest.mark.parametrize('document', WORDS)
def test_it_is_short(document):
    assert len(read(document).split()) <= WORDS[document]


def test_no_sentence_stands_in_two_documents():
    seen = {}
    for document in DOCUMENTS:
        text = re.sub(r'^(\||#|[-*] |\s*$)', '\n. ', prose(document), flags=re.M)
        for sentence in re.split(r'[.:|]\s', text):
            words = ' '.join(re.findall(r'\w+', re.sub(r'\]\(.*?\)', '', sentence)))
            if len(words.split()) >= 8:
                assert seen.setdefault(words, document) == document, f'{document}: {words}'


# -----------------------------------------------------------------------------
# running commands and code

@pytest.fixture
def copy(tmp_path):
    """A folder with the configs and data sets, and a small text instead of a download."""
    for name in ('config', 'data'):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name,
                        ignore=shutil.ignore_patterns('*.bin', '*.pkl', 'input.txt'))
    text = 'The quick brown fox jumps.\n' * 100
    (tmp_path / 'data' / 'shakespeare_char' / 'input.txt').write_text(text)
    return tmp_path


def must_run(folder, script, *args):
    result = run(folder, script, *args)
    assert result.returncode == 0, f'{shlex.join([script, *args])}\n{result.stdout}{result.stderr}'
    return result.stdout


@pytest.mark.slow
def test_readmes_commands_run_in_their_order(copy):
    # one iteration of a small model, a few tokens; the shape of a resumed run is its checkpoint's
    small = {'train_jax.py': ['--device=cpu', '--max_iters=0', '--eval_iters=1', '--batch_size=2',
                              '--block_size=32', '--n_layer=1'],
             'sample_jax.py': ['--device=cpu', '--num_samples=1', '--max_new_tokens=3']}
    resumed = ['--device=cpu', '--max_iters=1', '--eval_iters=1']
    needs_a_download = ('gpt2', 'openwebtext', 'ckpt.pt', 'out-converted', 'data/shakespeare/',
                        'out-shakespeare ')
    ran = []
    for script, *args in python_calls('README.md'):
        command = ' '.join([script, *args, ''])
        if script == '-m' or any(word in command for word in needs_a_download):
            continue
        more = resumed if '--init_from=resume' in args else small.get(script, [])
        must_run(copy, str(copy / script) if script.startswith('data/') else script, *args, *more)
        ran.append(script)
    assert len(ran) == 8, ran


@pytest.mark.slow
def test_the_guides_python_runs(copy):
    (copy / 'guide.py').write_text('\n'.join(
        text for language, text in fenced('JAX_README.md') if language == 'python'))
    must_run(copy, str(copy / 'guide.py'))


@pytest.mark.slow
def test_the_mappings_lessons_print_what_they_show(copy):
    """A block without a language shows what the Python block before it prints."""
    lessons, blocks = [], fenced(MAPPING)
    for (language, text), (following, output) in itertools.pairwise([*blocks, ('sh', '')]):
        if language == 'python' and text.startswith('# PyTorch'):
            compile(text, MAPPING, 'exec')
        elif language == 'python':
            lessons.append((text, output if following == '' else ''))
    (copy / 'lessons.py').write_text('\nprint("\\f")\n'.join(text for text, _ in lessons))
    printed = must_run(copy, str(copy / 'lessons.py')).split('\f\n')
    assert len(printed) == len(lessons) and any(output for _, output in lessons)
    for (text, output), actual in zip(lessons, printed):
        assert actual.strip() == output.strip(), text
