"""What the documents say agrees with the code: files, flags, links, commands, names, messages."""

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
from helpers import ROOT, run, run_inside

from configurator import config_block, configure
from nanogpt_jax.errors import UserError


def find(*patterns):
    return [path for pattern in patterns for path in sorted(glob.glob(pattern, root_dir=ROOT))]


MAPPING = 'TORCH_TO_JAX_MAPPING.md'
DOCUMENTS = ['README.md', 'JAX_README.md', MAPPING, 'BENCHMARKS.md',
             *find('docs/*.md', 'data/README.md', 'data/*/readme.md')]
TOOLS = [f'tools/{name}.py' for name in ('compare', 'plan', 'plot', 'sizing')]
SCRIPTS = [*find('*_jax.py'), *TOOLS]
PREPARE = find('data/*/prepare.py')
each_document = pytest.mark.parametrize('document', DOCUMENTS)

# path-like words that name no file of the repository; files that .gitignore lists need no entry
ELSEWHERE = {
    'train.py', 'model.py', 'sample.py', 'bench.py',  # nanoGPT's
    'checksums.json', 'val_loss.json', 'config.json', 'model.safetensors',  # in folders of weights
    'path/to/gpt2', 'prompt.txt', 'train.log', 'logs/*.log',  # a reader's own
    'train/loss', 'val/loss', 'refs/convert/parquet'}  # names in wandb, a branch on the hub
# nanoGPT's scripts, and ours that take the same flags
COUNTERPART = {'train.py': 'train_jax.py', 'sample.py': 'sample_jax.py', 'bench.py': 'bench_jax.py'}
REFUSED = {'--max_iters=1e3', '--eval_only=1'}  # as the documents say
REDIRECTED = re.compile(r'\d?>>? \S+')  # output that goes to a file
NO_VALUE = re.compile(r'|[A-Z]+|\.\.\.|<\w+>')  # --fsdp=N, --checkpoint=..., --dataset=<name>

# flags that make a command of the README short: one iteration of a small model, a few tokens
SHORT = {'train_jax.py': ['--device=cpu', '--max_iters=0', '--eval_iters=1', '--batch_size=2',
                          '--block_size=32', '--n_layer=1'],
         'sample_jax.py': ['--device=cpu', '--num_samples=1', '--max_new_tokens=3']}
RESUMED = ['--device=cpu', '--max_iters=1', '--eval_iters=1']  # the shape is the checkpoint's
NOT_SHORT = {'test_jax_transformer': 'a suite of tests', 'gpt2': 'large, or a download',
             'openwebtext': 'downloads 54 GB', 'ckpt.pt': 'needs torch',
             '../nanoGPT/': 'needs a log of nanoGPT',
             'data/shakespeare/': 'downloads a tokenizer', 'out-shakespeare ': 'needs that data'}

# all that train.py, model.py, sample.py and bench.py of nanoGPT (commit 3adf61e) use of torch and
# its tensors, collected from their syntax trees; where several objects have a method of one name,
# the word before it says which, as in the mapping
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


def blocks(document, language):
    """The fenced blocks of one language."""
    fenced = re.findall(r'^```(\w*)\n(.*?)^```$', read(document), re.M | re.S)
    return [text for name, text in fenced if name == language]


def prose(document):
    return re.sub(r'^```.*?^```$', '', read(document), flags=re.M | re.S)


def spans(text):
    """What is in backticks."""
    return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', text)]


def is_command(span):
    return re.match(r'(python3?|pip|mpirun|[\w/.<>]+\.py) \S', span)


def commands(document):
    """Each command as a list of words: of shell blocks, in the text, and in --command="..."."""
    lines = [*blocks(document, 'sh'), *filter(is_command, spans(prose(document)))]
    shell = REDIRECTED.sub('', '\n'.join(lines)).replace('\\\n', ' ')
    for line in re.sub(r'--command="(.*)"', r'&& \1', shell).splitlines():
        words = shlex.split(line, comments=True)
        for separates, command in itertools.groupby(words, {'&&', '|'}.__contains__):
            if not separates:
                yield [*command]


def python_calls(document):
    """[script, argument, ...] of each command that starts Python, or with the name of a script.

    `python -m tools.plot` is the script tools/plot.py.
    """
    for words in commands(document):
        start = [i + 1 for i, word in enumerate(words) if word in ('python', 'python3')]
        if start or words[0].endswith('.py'):
            words = words[start[0] if start else 0:]
            if words[0] == '-m' and words[1].startswith('tools.'):
                words = [module_path(words[1]), *words[2:]]
            yield words


def module_path(name):
    return name.replace('.', '/') + '.py'


def module_name(path):
    return path.removesuffix('.py').replace('/', '.')


def rows(text):
    """The cells of each line of the tables."""
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in re.findall(r'^\|.*\|$', text, re.M)]


def assert_none(wrong):
    assert not wrong, '\n' + '\n'.join(sorted(wrong))


# -----------------------------------------------------------------------------
# files, links, flags, commands, messages

IGNORED = [line.rstrip('/') for line in read('.gitignore').splitlines()]


def is_file(path, document):
    """Whether a file exists: below the root, beside the document, or a bare name in any folder."""
    patterns = [path, os.path.join(os.path.dirname(document), path), f'*/{path}', f'*/*/{path}']
    return any(find(pattern) for pattern in (patterns if '/' not in path else patterns[:2]))


def is_generated(path, document):
    """Whether .gitignore names the path or one of its folders, so some command writes it."""
    path = path.rstrip('/') if '/' in path else os.path.join(os.path.dirname(document), path)
    names = [path, *path.split('/')]
    ignored = [line for line in IGNORED
               if any(fnmatch.fnmatch(name, line.lstrip('!')) for name in names)]
    return ignored != [] and not any(line.startswith('!') for line in ignored)


@each_document
def test_every_path_names_a_file(document):
    words = {word for span in spans(prose(document)) for word in REDIRECTED.sub('', span).split()}
    words.update(*commands(document))
    endings = 'py|md|txt|json|toml|bin|pkl|pt|npz|safetensors|log'
    paths = {word for word in words if re.fullmatch(r'(?!\.\.)[\w.*][\w.*/-]*', word)
             and re.search(rf'\w/|[\w*>]\.({endings})$', word)}
    paths |= {module_path(word) for word in words if re.fullmatch(r'tools\.\w+', word)}
    assert_none([f'{document}: there is no {path}' for path in paths - ELSEWHERE
                 if not (is_file(path, document) or is_generated(path, document))])


@each_document
def test_what_the_commands_write_is_ignored_by_git(document):
    written = [arg.split('=', 1)[1] for call in python_calls(document) for arg in call
               if arg.startswith(('--out_dir=', '--dst='))]
    assert_none([f'{document}: git does not ignore {path}' for path in written
                 if not path.startswith('data/') and not is_generated(path, '')])


@each_document
def test_every_link_leads_somewhere(document):
    for target in re.findall(r'\]\((?!https?:)([^)\s]+)\)', prose(document)):
        path, _, anchor = target.partition('#')
        path = os.path.join(os.path.dirname(document), path) if path else document
        assert os.path.exists(os.path.join(ROOT, path)), f'{document}: {target} is no file'
        headings = re.findall(r'^#+ (.*)$', prose(path), re.M) if anchor else ['']
        anchors = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
                   for heading in headings]  # GitHub's rule
        assert anchor in anchors, f'{document}: {path} has no heading for #{anchor}'


def test_the_readme_names_every_module_and_script():
    assert_none([f'README.md does not name {path}' for path in TREES
                 if f'`{path}`' not in read('README.md') and not path.endswith('__init__.py')])


def settings(script):
    """A script's flags with their defaults."""
    block = {}
    exec(config_block(os.path.join(ROOT, script)), block)
    return {name: value for name, value in block.items() if not name.startswith('_')}


def refusal(script, args):
    """The configurator's error or warnings for a script's arguments; '' if it accepts them."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            configure(settings(script), args)
        except UserError as e:
            return str(e)
    return ' '.join(line for line in out.getvalue().splitlines() if line.startswith('WARNING'))


@pytest.mark.parametrize('script', PREPARE)
def test_the_readme_of_a_data_set_names_its_flags(script):
    readme = read(script.replace('prepare.py', 'readme.md'))
    flags = re.findall(r"\badd(?:_argument)?\(\s*'(--\w+)'", read(script))
    assert_none([f'no word of {flag}' for flag in flags if flag not in readme])


@each_document
def test_every_flag_in_the_text_exists_and_takes_its_value(document):
    text = ' '.join(span for span in spans(prose(document))
                    if not is_command(span) and span != '--key=value')
    for name, value in set(re.findall(r'(?<![\w=-])--(\w+)=?(\S*)', text)) - {('help', '')}:
        flag, scripts = f'--{name}={value}', [s for s in SCRIPTS if name in settings(s)]
        assert scripts or any(f"'--{name}'" in read(script) for script in PREPARE), (
            f'{document}: no script has --{name}')
        if scripts and not NO_VALUE.fullmatch(value):
            said = [refusal(script, [flag]) for script in scripts]
            assert all(said) == (flag in REFUSED), f'{document}: {flag}: {said}'


@each_document
def test_defaults_in_the_text_are_those_of_training(document):
    actual = settings('train_jax.py')
    stated = re.findall(r'`--(\w+)=([^`]+)`, the default', prose(document))
    stated += [pair for pair in re.findall(r'(?:[-,]|and) `(\w+)` is `(\w+)`', prose(document))
               if pair[0] in actual]
    assert_none([f'{document}: the default of {name} is {actual[name]}, not {value}'
                 for name, value in stated if str(actual[name]) != value])


@each_document
def test_shell_blocks_parse(document):
    for block in blocks(document, 'sh'):
        shell = re.sub(r'<(\w+)>', r'\1', block)
        parsed = subprocess.run(['bash', '-n'], input=shell, capture_output=True, text=True)
        assert not parsed.stderr, f'{document}: {parsed.stderr}{block}'


@each_document
def test_every_command_is_one_that_its_script_takes(document, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of config files are relative to it
    for script, *args in python_calls(document):
        script, said = COUNTERPART.get(script, script), ''
        if script in SCRIPTS:
            # no config file: the runs that tools.plot takes, and config/<name>.py
            said = refusal(script, [arg for arg in args if arg.startswith('--')
                                    or script != 'tools/plot.py' and '<' not in arg])
        elif script in PREPARE:
            said = ' '.join(arg for arg in args if f"'{arg.split('=')[0]}'" not in read(script))
        elif script == '-c':
            compile(args[0], document, 'exec')
        elif '-k' in args:  # of pytest
            tests = ''.join(read(arg) for arg in args if arg.endswith('.py'))
            word = args[args.index('-k') + 1]
            said = '' if re.search(rf'def test_\w*{word}', tests) else f'no test is called {word}'
        assert not said, f'{document}: {shlex.join([script, *args])}: {said}'


def test_messages_that_the_documentation_explains_are_printed():
    strings = [node.value for tree in TREES.values() for node in ast.walk(tree)
               if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    quoted = re.findall(r'\*\*"([^"*]+)"\.?\*\*', prose('JAX_README.md'))
    assert quoted
    assert_none([f'nothing prints {part}' for text in quoted for part in text.split('...')
                 if not any(part.strip() in string for string in strings)])


# -----------------------------------------------------------------------------
# running commands and code

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A copy of the scripts, configs and data sets, with a small text instead of downloads."""
    folder = tmp_path_factory.mktemp('copy') / 'nanogpt-jax'
    ignored = shutil.ignore_patterns('.*', 'tests', 'testdata', *IGNORED)
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / 'data' / 'own').mkdir(exist_ok=True)
    text = 'The quick brown fox jumps over the lazy dog.\n' * 100
    for name in ('shakespeare_char', 'own'):
        (folder / 'data' / name / 'input.txt').write_text(text)
    return folder


def must_run(folder, script, *args):
    """Run a script in the copy: training and sampling inside this process, which is faster."""
    if script in SCRIPTS and script not in TOOLS:
        result = run_inside(folder, script, *args)
    else:
        script = module_name(script) if script in TOOLS else folder / script
        result = run(folder, script, *args, stdin='', PYTHONPATH=str(folder))
    assert result.returncode == 0, (
        f'{shlex.join([str(script), *args])}\n{result.stdout[-2000:]}{result.stderr}')


def test_the_short_commands_of_the_readme_run_in_their_order(copy):
    ran = set()
    for script, *args in python_calls('README.md'):
        resumed = '--init_from=resume' in args
        command = ' '.join([script, *args, ''])
        if script == '-m' or any(word in command for word in NOT_SHORT):
            continue
        if script == 'train_jax.py' and not resumed:
            for out in copy.glob('out*'):  # two examples write to one out_dir, which is refused
                shutil.rmtree(out)
        must_run(copy, script, *args, *(RESUMED if resumed else SHORT.get(script, [])))
        ran.add(script)
    assert ran >= {'data/pydoc_char/prepare.py', 'data/shakespeare_char/prepare.py',
                   'train_jax.py', 'sample_jax.py'}


@pytest.mark.parametrize('number', range(len(blocks('JAX_README.md', 'python'))))
def test_python_blocks_of_the_documentation_run(copy, number):
    # run as data/own/prepare.py, which one of them is: it reads input.txt beside itself
    (copy / 'data' / 'own' / 'prepare.py').write_text(blocks('JAX_README.md', 'python')[number])
    must_run(copy, 'data/own/prepare.py')


def test_the_lessons_of_the_mapping_run_in_their_order(copy):
    lessons = blocks(MAPPING, 'python')
    torch = [block for block in lessons if block.startswith('# PyTorch')]
    compile('\n'.join(torch), MAPPING, 'exec')
    ours = '\n'.join(block for block in lessons if block not in torch)
    (copy / 'lessons.py').write_text(ours)
    must_run(copy, 'lessons.py')


# -----------------------------------------------------------------------------
# names in the code, and in libraries

def definitions(node, prefix=''):
    """(dotted name, syntax tree) of functions, classes and values, and of those inside them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + child.name, child
            yield from definitions(child, f'{prefix}{child.name}.')
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield prefix + child.id, node  # the assignment
        else:
            yield from definitions(child, prefix)


TREES = {path: ast.parse(read(path)) for path in find('*.py', 'nanogpt_jax/*.py', 'tools/*.py')}
DEFINED = {path: [*definitions(tree)] for path, tree in TREES.items()}
LIBRARY = find('jax_*.py', 'nanogpt_jax/*.py')
MODULES = {'model': 'jax_transformer.py', 'utils': 'jax_train_utils.py'} | {
    os.path.basename(path).removesuffix('.py'): path for path in find('nanogpt_jax/*.py')}
# `name` in `place`, or `name` alone
NAMED = re.compile(r'`([A-Za-z_][\w./]*)[^`]*`(?:(?:\sis)?\s(?:in|of)\s`([\w/]+(?:\.py)?)`)?')
ALIASES = {'jnp': 'jax.numpy', 'lax': 'jax.lax', 'np': 'numpy', 'nnx': 'flax.nnx',
           'ocp': 'orbax.checkpoint'}
API = re.compile(r'(?<![\w./])(?:jax|jnp|lax|np|flax|nnx|optax|orbax|ocp)(?:\.[A-Za-z_]\w*)+')


def find_definitions(name, place):
    """[(path, syntax tree)] of a name in a place: a module, a function, or '' for the library."""
    path = MODULES.get(place, place)
    paths = [path] if path in DEFINED else DEFINED if place else LIBRARY
    pattern = re.compile(rf'(.*\.)?{re.escape(place)}\.(.*\.)?{re.escape(name)}')
    return [(p, tree) for p in paths for full, tree in DEFINED[p]
            if full == name and (p == path or not place) or place and pattern.fullmatch(full)]


def full_name(name, aliases):
    """A dotted name with its first word replaced by what it is an alias of."""
    first, dot, rest = name.partition('.')
    return aliases.get(first, first) + dot + rest


def imported(tree):
    """{name: full name} of all that a module imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
            names |= {first: first for first in (a.name.split('.')[0] for a in node.names)}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f'{node.module}.{a.name}' for a in node.names}
    return names


def names_used(path, tree):
    """Full names of imported things in a syntax tree, and all attributes with a dot, as .shape."""
    imports, used = imported(TREES[path]), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add(f'.{node.attr}')
        if isinstance(node, (ast.Attribute, ast.Name)):
            used.add(full_name(ast.unparse(node), imports))
    return used


def is_used(name, used):
    """Whether a name is among those used; of a method, such as Manager.save, only .save can be."""
    if name.startswith('.'):
        return name in used
    name = full_name(name, ALIASES)
    owner, _, attribute = name.rpartition('.')
    is_method = isinstance(pkgutil.resolve_name(owner), type)
    return (f'.{attribute}' if is_method else name) in used


@each_document
def test_every_dotted_name_of_a_library_resolves(document):
    code = [*spans(prose(document)), *blocks(document, 'python'), *blocks(document, 'sh')]
    wrong = []
    for name in set(API.findall('\n'.join(code))):
        try:
            pkgutil.resolve_name(full_name(name, ALIASES))
        except (ImportError, AttributeError) as e:
            wrong.append(f'{document}: {name}: {e}')
    assert_none(wrong)


@each_document
def test_names_are_where_they_are_said_to_be(document):
    said = [(name, place) for name, place in NAMED.findall(prose(document))
            if place in MODULES or place in DEFINED]
    if document == MAPPING:  # its tables and lessons name functions with or without a module
        where = [row[2] for row in rows(read(MAPPING)) if len(row) == 4]
        where += re.findall('^Here: (.*)$', read(MAPPING), re.M)
        said += [(name, place) for name, place in NAMED.findall('\n'.join(where))
                 if name not in MODULES and name not in DEFINED]
    assert_none({f'{document}: there is no {name} in {place or "any module"}'
                 for name, place in said if not find_definitions(name, place)})


def test_every_torch_api_that_nanogpt_uses_has_its_row():
    first = ' '.join(span for row in rows(read(MAPPING)) for span in spans(row[0]))
    stated = {name for word in re.findall(r'\w+(?:\.\w+)*', first)
              for name in (word, word.split('.')[-1])}
    assert_none([f'{MAPPING}: no row for {name}' for name in TORCH if name not in stated])


def test_the_functions_that_a_row_of_the_mapping_names_use_its_jax_apis():
    """Each API in the second cell is used by one of the functions or modules in the third."""
    wrong, checked = [], 0
    for _, jax_cell, where, _ in (row for row in rows(read(MAPPING)) if len(row) == 4):
        apis = [*API.findall('\n'.join(spans(jax_cell))),
                *re.findall(r'`(\.[a-z_]+)', jax_cell)]  # `.reshape` is an array's method
        found = []
        for name, place in NAMED.findall(where):
            path = MODULES.get(name, name)
            found += ([(path, TREES[path])] if path in TREES and not place else
                      find_definitions(name, place))
        used = set().union(*(names_used(path, tree) for path, tree in found))
        if found:
            wrong += [f'{where} does not use {name}' for name in apis if not is_used(name, used)]
            checked += len(apis)
    assert_none(wrong)
    assert checked > 60
