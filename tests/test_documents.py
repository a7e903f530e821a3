"""What the documents say is so: files, flags and defaults, links, commands, names of libraries, the mapping from torch."""

import ast
import contextlib
import fnmatch
import glob
import io
import itertools
import os
import pkgutil
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, run

from configurator import config_block, configure, parse


def find(pattern):
    return sorted(glob.glob(pattern, root_dir=ROOT))


MAPPING = 'TORCH_TO_JAX_MAPPING.md'
DOCUMENTS = ['README.md', 'JAX_README.md', MAPPING, 'BENCHMARKS.md', *find('data/README.md'), *find('data/*/readme.md')]
SCRIPTS = find('*_jax.py')
PREPARE = find('data/*/prepare.py')
each_document = pytest.mark.parametrize('document', DOCUMENTS)

# path-like words that name no file of the repository; what .gitignore lists is made by some command and needs no entry here
ELSEWHERE = {'train.py', 'model.py', 'sample.py', 'bench.py', # nanoGPT's
             'checksums.json', 'val_loss.json', 'config.json', 'model.safetensors', # in a checkpoint, in a folder with weights
             'path/to/gpt2', 'prompt.txt', 'train.log', # a reader's own
             'train/loss', 'val/loss', 'refs/convert/parquet'} # names in wandb, a branch on the hub
COUNTERPART = {'train.py': 'train_jax.py', 'sample.py': 'sample_jax.py', 'bench.py': 'bench_jax.py'} # they take the same flags
REFUSED = {'--max_iters=1e3', '--eval_only=1'} # as the documents say of them
REDIRECTED = re.compile(r'\d?>>? \S+') # to a file that the command writes
NO_VALUE = re.compile(r'|[A-Z]+|\.\.\.|<\w+>') # --fsdp=N, --which=..., --dataset=<name>

# what each command of the README takes beside its own flags to be short: one iteration of a small model, a few tokens
SHORT = {'train_jax.py': ['--device=cpu', '--max_iters=0', '--eval_iters=1', '--batch_size=2', '--block_size=32', '--n_layer=1'],
         'sample_jax.py': ['--device=cpu', '--num_samples=1', '--max_new_tokens=3']}
RESUMED = ['--device=cpu', '--max_iters=1', '--eval_iters=1'] # the shape is the checkpoint's
NOT_SHORT = {'test_jax_transformer': 'a suite of tests', 'gpt2': 'large, or a download', 'ckpt.pt': 'needs torch',
             '../nanoGPT/': 'needs a log of nanoGPT',
             'data/shakespeare/': 'needs a tokenizer, which is a download', 'out-shakespeare ': 'is made of that'}

# what train.py, model.py, sample.py and bench.py of nanoGPT (commit 3adf61e) take from torch and its tensors, by their syntax
# trees; the word before a method's name says whose, as the mapping does where several have one of that name
TORCH = """
    nn.Module forward nn.Parameter nn.Linear nn.Embedding nn.Dropout nn.GELU nn.ModuleDict nn.ModuleList functional
    F.layer_norm F.softmax F.cross_entropy F.scaled_dot_product_attention torch.nn.init.normal_ torch.nn.init.zeros_
    Module.apply Module.to Module.train Module.eval self.training parameters named_parameters register_buffer
    model.state_dict model.load_state_dict GPT2LMHeadModel.from_pretrained
    torch.ones torch.zeros torch.tril torch.arange torch.tensor torch.cat torch.stack torch.from_numpy torch.randint
    torch.topk torch.multinomial torch.long torch.float32 torch.bfloat16 torch.float16
    tensor.view tensor.transpose tensor.contiguous tensor.split tensor.size tensor.shape tensor.t copy_ masked_fill pin_memory
    tensor.to tensor.tolist losses.mean loss.item loss.backward idx.device p.dim numel requires_grad
    torch.optim.AdamW optimizer.param_groups optimizer.step optimizer.zero_grad optimizer.state_dict load_state_dict
    torch.nn.utils.clip_grad_norm_ torch.no_grad torch.amp.autocast torch.compile torch.save torch.load
    torch.cuda.amp.GradScaler scaler.scale scaler.unscale_ scaler.step scaler.update
    torch.manual_seed torch.cuda.manual_seed torch.backends.cuda.matmul.allow_tf32 torch.backends.cudnn.allow_tf32
    torch.cuda.is_available torch.cuda.is_bf16_supported torch.cuda.set_device torch.cuda.synchronize
    DistributedDataParallel device_ids model.module require_backward_grad_sync init_process_group destroy_process_group
    torch.profiler.profile torch.profiler.schedule torch.profiler.tensorboard_trace_handler ProfilerActivity.CPU
    ProfilerActivity.CUDA prof.step
""".split()


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def blocks(document, language):
    """The fenced blocks of one language."""
    return [text for name, text in re.findall(r'^```(\w*)\n(.*?)^```$', read(document), re.M | re.S) if name == language]


def prose(document):
    return re.sub(r'^```.*?^```$', '', read(document), flags=re.M | re.S)


def spans(document):
    """What stands in backticks outside of the fenced blocks."""
    return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', prose(document))]


def is_command(span):
    return re.match(r'(python3?|pip|mpirun|[\w/.<>]+\.py) \S', span)


def commands(document):
    """Each command as a list of words: of the shell blocks, of what is one in the text, and of what is in --command="..."."""
    shell = REDIRECTED.sub('', '\n'.join([*blocks(document, 'sh'), *filter(is_command, spans(document))]))
    for line in re.sub(r'--command="(.*)"', r'&& \1', shell.replace('\\\n', ' ')).splitlines():
        for separates, words in itertools.groupby(shlex.split(line, comments=True), {'&&', '|'}.__contains__):
            if not separates:
                yield [*words]


def python_calls(document):
    """[script, argument, ...] of each command that starts Python, or that is a script's name alone."""
    for words in commands(document):
        start = [i + 1 for i, word in enumerate(words) if word in ('python', 'python3')]
        if start or words[0].endswith('.py'):
            yield words[start[0] if start else 0:]


def rows(text):
    """The cells of each line of the tables."""
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in re.findall(r'^\|.*\|$', text, re.M)]


def settings(script):
    """A script's flags with their defaults."""
    block = {}
    exec(config_block(os.path.join(ROOT, script)), block)
    return {name: value for name, value in block.items() if not name.startswith('_')}


def refusal(script, args):
    """What the configurator says against a script's arguments: an error or a warning; '' where it takes them."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            configure(settings(script), args)
        except SystemExit as e:
            return str(e)
    return ' '.join(line for line in out.getvalue().splitlines() if line.startswith('WARNING'))


IGNORED = [line.rstrip('/') for line in read('.gitignore').splitlines()]


def is_file(path, document):
    """Whether there is such a file: from the root, beside the document, or of a bare name in some folder."""
    patterns = [path, os.path.join(os.path.dirname(document), path), f'*/{path}', f'*/*/{path}']
    return any(find(pattern) for pattern in (patterns if '/' not in path else patterns[:2]))


def is_made(path, document):
    """Whether .gitignore names the path or a folder of it: some command makes it."""
    path = path.rstrip('/') if '/' in path else os.path.join(os.path.dirname(document), path)
    names = [path, *path.split('/')]
    ignored = [line for line in IGNORED if any(fnmatch.fnmatch(name, line.lstrip('!')) for name in names)]
    return ignored != [] and not any(line.startswith('!') for line in ignored)


def definitions(node, prefix=''):
    """Dotted names of what a module defines: functions, classes and values, and those inside of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + child.name
            yield from definitions(child, f'{prefix}{child.name}.')
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield prefix + child.id
        else:
            yield from definitions(child, prefix)


DEFINED = {path: set(definitions(ast.parse(read(path)))) for path in find('*.py')}
MODULES = dict(re.findall(r'`(\w+)` means `(\w+\.py)`', read(MAPPING)))
# `name` in `place`, or `name` alone
NAMED = re.compile(r'`([A-Za-z_][\w.]*)[^`]*`(?:(?:\sis)?\s(?:in|of)\s`(\w+(?:\.py)?)`)?')


def is_defined(name, place):
    """Whether place, a module or a function, defines the name; where it is '', any module, though no script."""
    place = MODULES.get(place, place)
    if place and place not in DEFINED:
        return any(re.search(rf'\b{place}\.(.*\.)?{name}$', full) for full in set.union(*DEFINED.values()))
    return any(name in DEFINED[path] for path in ([place] if place else find('jax_*.py')))


def assert_none(wrong):
    assert not wrong, '\n' + '\n'.join(sorted(wrong))


@each_document
def test_every_path_names_a_file(document):
    words = {word for span in spans(document) for word in REDIRECTED.sub('', span).split()}
    words.update(*commands(document))
    paths = {word for word in words if re.fullmatch(r'(?!\.\.)[\w.*][\w.*/-]*', word)
             and re.search(r'\w/|[\w*>]\.(py|md|txt|json|toml|bin|pkl|pt|npz|safetensors|log)$', word)}
    assert_none([f'{document}: there is no {path}' for path in paths - ELSEWHERE
                 if not (is_file(path, document) or is_made(path, document))])


@each_document
def test_every_link_leads_somewhere(document):
    for target in re.findall(r'\]\((?!https?:)([^)\s]+)\)', prose(document)):
        path, _, anchor = target.partition('#')
        path = os.path.join(os.path.dirname(document), path) if path else document
        assert os.path.exists(os.path.join(ROOT, path)), f'{document}: {target} is no file'
        headings = re.findall(r'^#+ (.*)$', prose(path), re.M) if anchor else ['']
        anchors = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings] # GitHub's rule
        assert anchor in anchors, f'{document}: {path} has no heading for #{anchor}'


def test_the_readme_names_every_module_and_script():
    assert_none([f'README.md does not name {path}' for path in DEFINED if f'`{path}`' not in read('README.md')])


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_table_of_a_script_has_its_flags_with_their_defaults(script):
    section = re.search(rf'^### {script}\n(.*?)^##', read('JAX_README.md'), re.M | re.S)
    assert section, f'JAX_README.md has no heading "### {script}" with a table of its flags'
    stated = {row[0].strip('`-'): row[1].strip('`') for row in rows(section[1]) if row[0].startswith('`--')}
    actual = settings(script)
    assert_none([f'{script}: no row for --{name}' for name in actual.keys() - stated.keys()]
                + [f'{script}: there is no --{name}' for name in stated.keys() - actual.keys()]
                + [f'{script}: the default of --{name} is {actual[name]!r}, not {stated[name]}'
                   for name in actual.keys() & stated.keys() if repr(parse(stated[name])) != repr(actual[name])])


@pytest.mark.parametrize('script', PREPARE)
def test_the_readme_of_a_data_set_names_its_flags(script):
    readme = read(script.replace('prepare.py', 'readme.md'))
    assert_none([f'no word of {flag}' for flag in re.findall(r"add_argument\('(--\w+)'", read(script)) if flag not in readme])


@each_document
def test_every_flag_in_the_text_exists_and_takes_its_value(document):
    text = ' '.join(span for span in spans(document) if not is_command(span) and span != '--key=value')
    for name, value in set(re.findall(r'(?<![\w=-])--(\w+)=?(\S*)', text)) - {('help', '')}:
        flag, scripts = f'--{name}={value}', [script for script in SCRIPTS if name in settings(script)]
        assert scripts or any(f"'--{name}'" in read(script) for script in PREPARE), f'{document}: no script has --{name}'
        if scripts and not NO_VALUE.fullmatch(value):
            said = [refusal(script, [flag]) for script in scripts]
            assert all(said) == (flag in REFUSED), f'{document}: {flag}: {said}'


@each_document
def test_defaults_in_the_text_are_those_of_training(document):
    actual = settings('train_jax.py')
    stated = re.findall(r'`--(\w+)=([^`]+)`, the default', prose(document))
    stated += [pair for pair in re.findall(r'(?:[-,]|and) `(\w+)` is `(\w+)`', prose(document)) if pair[0] in actual]
    assert_none([f'{document}: the default of {name} is {actual[name]}, not {value}'
                 for name, value in stated if str(actual[name]) != value])


@each_document
def test_shell_blocks_parse(document):
    for block in blocks(document, 'sh'):
        parsed = subprocess.run(['bash', '-n'], input=re.sub(r'<(\w+)>', r'\1', block), capture_output=True, text=True)
        assert not parsed.stderr, f'{document}: {parsed.stderr}{block}'


@each_document
def test_every_command_is_one_that_its_script_takes(document, monkeypatch):
    monkeypatch.chdir(ROOT) # config files are given from there
    for script, *args in python_calls(document):
        script, said = COUNTERPART.get(script, script), ''
        if script in SCRIPTS: # config/<name>.py is not there
            files = () if script == 'plot_jax.py' else [arg for arg in args if '<' not in arg] # it takes runs in their place
            said = refusal(script, [arg for arg in args if arg.startswith('--') or arg in files])
        elif script in PREPARE:
            said = ' '.join(arg for arg in args if f"'{arg.split('=')[0]}'" not in read(script))
        elif script == '-c':
            compile(args[0], document, 'exec')
        elif '-k' in args: # of pytest
            tests, word = ''.join(read(arg) for arg in args if arg.endswith('.py')), args[args.index('-k') + 1]
            said = '' if re.search(rf'def test_\w*{word}', tests) else f'no test is called {word}'
        assert not said, f'{document}: {shlex.join([script, *args])}: {said}'


def test_messages_that_the_documentation_explains_are_printed():
    sources = re.sub(r"'\n\s*f?'", '', ''.join(read(path) for path in DEFINED)) # one string over two lines
    quoted = re.findall(r'\*\*[^*]*"([^"*]+)"\.?\*\*', prose('JAX_README.md'))
    assert_none([f'nothing prints {part}' for text in quoted for part in text.split('...') if part.strip() not in sources])


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A folder with the scripts, configs and data sets, where a small text stands in for what would be downloaded."""
    folder = tmp_path_factory.mktemp('copy') / 'nanogpt-jax'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.*', 'tests', 'testdata', *IGNORED))
    (folder / 'data' / 'own').mkdir(exist_ok=True)
    for name in ('shakespeare_char', 'own'):
        (folder / 'data' / name / 'input.txt').write_text('The quick brown fox jumps over the lazy dog.\n' * 100)
    return folder


def must_run(folder, script, *args):
    """Without most of XLA's optimizations, which are not worth their time for what runs once."""
    result = run(folder, folder / script, *args, stdin='', PYTHONPATH=str(folder), JAX_DISABLE_MOST_OPTIMIZATIONS='True')
    assert result.returncode == 0, f'{shlex.join([script, *args])}\n{result.stdout[-2000:]}{result.stderr}'


def test_the_short_commands_of_the_readme_run_in_their_order(copy):
    ran = set()
    for script, *args in python_calls('README.md'):
        resumed = '--init_from=resume' in args
        if script == '-m' or any(word in ' '.join([script, *args, '']) for word in NOT_SHORT):
            continue
        for out in copy.glob('out*') if script == 'train_jax.py' and not resumed else []:
            shutil.rmtree(out) # two of the examples write to one out_dir, which is refused unless it is deleted
        must_run(copy, script, *args, *(RESUMED if resumed else SHORT.get(script, [])))
        ran.add(script)
    assert ran >= {'data/pydoc_char/prepare.py', 'data/shakespeare_char/prepare.py', 'train_jax.py', 'sample_jax.py'}


@pytest.mark.parametrize('number', range(len(blocks('JAX_README.md', 'python'))))
def test_python_blocks_of_the_documentation_run(copy, number):
    # from the place that one of them is meant for: it looks for input.txt beside itself
    (copy / 'data' / 'own' / 'prepare.py').write_text(blocks('JAX_README.md', 'python')[number])
    must_run(copy, 'data/own/prepare.py')


@each_document
def test_every_dotted_name_of_a_library_resolves(document):
    short = {'jnp': 'jax.numpy', 'lax': 'jax.lax', 'np': 'numpy', 'nnx': 'flax.nnx', 'ocp': 'orbax.checkpoint'}
    code, wrong = '\n'.join([*spans(document), *blocks(document, 'python'), *blocks(document, 'sh')]), []
    for name in set(re.findall(r'(?<![\w./])(?:jax|jnp|lax|np|flax|nnx|optax|orbax|ocp)(?:\.[A-Za-z_]\w*)+', code)):
        library, rest = name.split('.', 1)
        try:
            pkgutil.resolve_name(f'{short.get(library, library)}.{rest}')
        except (ImportError, AttributeError) as e:
            wrong.append(f'{document}: {name}: {e}')
    assert_none(wrong)


@each_document
def test_names_are_where_they_are_said_to_be(document):
    said = [(name, place) for name, place in NAMED.findall(prose(document)) if place in MODULES or place in DEFINED]
    if document == MAPPING: # its tables say where, with or without a module, and so do the lessons
        where = [row[2] for row in rows(read(MAPPING)) if len(row) == 4] + re.findall('^Here: (.*)$', read(MAPPING), re.M)
        said += [pair for pair in NAMED.findall('\n'.join(where)) if pair[0] not in MODULES and pair[0] not in DEFINED]
    assert_none({f'{document}: there is no {name} in {place or "any module"}' for name, place in said
                 if not is_defined(name, place)})


def test_every_torch_api_that_nanogpt_uses_has_its_row():
    first = ' '.join(span for row in rows(read(MAPPING)) for span in re.findall(r'`([^`]+)`', row[0]))
    stated = {name for word in re.findall(r'\w+(?:\.\w+)*', first) for name in (word, word.split('.')[-1])}
    assert_none([f'{MAPPING}: no row for {name}' for name in TORCH if name not in stated])


def test_the_lessons_of_the_mapping_run_in_their_order(copy):
    lessons = blocks(MAPPING, 'python')
    torch = [block for block in lessons if block.startswith('# PyTorch')]
    compile('\n'.join(torch), MAPPING, 'exec')
    (copy / 'lessons.py').write_text('\n'.join(block for block in lessons if block not in torch))
    must_run(copy, 'lessons.py')
