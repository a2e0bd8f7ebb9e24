"""Who may import whom, and other rules of the house; read from the source."""

import ast
import collections
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = ('statejax', 'pallas_kernels', 'configs', 'experiments')
FILES = sorted(p.relative_to(ROOT) for top in (*SHIPPED, 'tests', 'colabs')
               for p in (ROOT / top).rglob('*.py'))

# Part -> what it may import beside itself and the standard library. A part of
# statejax is a file or folder right below it, and so is what it may import.
LOW = 'jax numpy config state'
MODEL = f'{LOW} ops layers sharding model'
ALLOWED = {
    '__init__': '',
    'config': '',
    'state': 'jax numpy config',
    'sharding': LOW,
    'ops': 'jax numpy state',
    'ops/dispatch': 'jax numpy state pallas_kernels',
    'layers': f'{LOW} ops sharding flax',
    'model': f'{LOW} ops layers sharding flax',
    'account': f'{MODEL}',
    'laws': f'{MODEL}',
    'artifact': f'{LOW} sharding orbax tensorstore __version__',
    **{f'artifact/{name}': 'artifact cryptography' for name in (
        'grant', 'keys', 'sealing', 'trust')},
    # What a verifier runs on: the standard library.
    **{f'artifact/{name}': 'artifact' for name in (
        'access', 'canonical', 'catalog', 'chains', 'collect', 'commit',
        'compat', 'desk', 'envelope', 'foreign', 'grammar', 'home', 'installed',
        'journal', 'layout', 'manifest', 'names', 'objects', 'outcome',
        'portable', 'revoke', 'revoked', 'shred', 'told', 'tree', 'verify',
        'withdraw')},
    'artifact/bucket': 'artifact tensorstore',
    'tasks': 'numpy grain config',
    'metrics': 'numpy grain config',
    'generate': f'{MODEL} artifact',
    'slot_facts': 'numpy',
    'edit_events': 'jax numpy ops slot_facts state layers',
    'slot_merge': 'jax numpy ops state edit_events slot_facts',
    'edit_marks': 'jax numpy ops state artifact',
    'memory': f'{MODEL} artifact edit_events edit_marks slot_facts slot_merge',
    'forget': f'{MODEL} artifact edit_marks memory slot_facts',
    'parallel': f'{MODEL} artifact',
    'convert': f'{MODEL} artifact safetensors',
    'serve': f'{MODEL} artifact generate starlette uvicorn',
    'train': f'{MODEL} artifact tasks parallel optax',
    'train/plot': f'{MODEL} artifact matplotlib',
    'asking': f'{MODEL} account artifact tasks train absl',
    'exchange': 'artifact asking absl',
    'looking': 'artifact asking absl',
    'meter': 'jax',
    'states': f'{MODEL} artifact asking exchange generate looking meter tasks '
              'absl',
    'memories': 'artifact asking memory tasks train absl',
    'main': f'{MODEL} artifact asking tasks metrics generate memories states '
            'train serve absl pallas_kernels',
    'pallas_kernels': 'jax numpy',
    'configs': 'config',
}
NOBODY = {'experiments', 'colabs', 'tests'}


def part(path):
  """The row of the table for a file, the narrowest there is."""
  names = path.with_suffix('').parts
  if names[0] != 'statejax':
    return names[0]
  narrow = '/'.join(names[1:3])
  return narrow if narrow in ALLOWED else names[1]


def imports(tree):
  """Yields (line, part or library) of every import, also inside functions."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      # Of `from statejax import state` the part is the name.
      names = [f'{"." * node.level}{node.module or ""}.{alias.name}'
               for alias in node.names]
    else:
      continue
    for name in names:
      first, *rest = name.split('.')
      yield node.lineno, rest[0] if first == 'statejax' and rest else first


def violations(path, source):
  """Returns the imports of a file that its row of the table does not allow."""
  me = part(path)
  allowed = {*ALLOWED[me].split(), me.split('/')[0]}
  return [f'{path}:{line}: imports {name or "relatively"}; {me} may import '
          f'{sorted(allowed)}'
          for line, name in imports(ast.parse(source))
          if name not in allowed and name not in sys.stdlib_module_names]


@pytest.mark.parametrize('path', [
    p for p in FILES if p.parts[0] in SHIPPED[:3]], ids=str)
def test_dependency_direction(path):
  found = violations(path, (ROOT / path).read_text())
  assert not found, '\n'.join(found)


@pytest.mark.parametrize('path, source', [
    ('statejax/ops/rope.py', 'def f():\n  import flax.linen as nn'),
    ('statejax/ops/rope.py', 'import pallas_kernels'),
    ('statejax/artifact/store.py', 'from statejax import model'),
    ('statejax/artifact/store.py', 'from statejax.model import LanguageModel'),
    ('statejax/artifact/commit.py', 'import jax'),
    ('statejax/tasks/text.py', 'import jax.numpy as jnp'),
    ('statejax/model.py', 'from . import generate'),
    ('statejax/train/loop.py', 'import experiments.report'),
    ('pallas_kernels/a.py', 'import statejax.state'),
])
def test_the_test_sees(path, source):
  assert len(violations(pathlib.Path(path), source)) == 1


def test_nobody_imports_what_is_on_top():
  for path in FILES:
    used = {name for _, name in imports(ast.parse((ROOT / path).read_text()))}
    assert not used & NOBODY - {path.parts[0]} or path.parts[0] == 'tests', path


def flags_of(path):
  """Names of the absl flags that a file defines."""
  return [node.args[0].value
          for node in ast.walk(ast.parse((ROOT / path).read_text()))
          if isinstance(node, ast.Call) and node.args
          and isinstance(node.func, ast.Attribute)
          and node.func.attr.startswith('DEFINE_')]


def test_flags_do_not_clash():
  """Those of the command line and of the experiments that tests import."""
  used = {f'experiments/{name}.py' for path in FILES if path.parts[0] == 'tests'
          for name in re.findall(r'^from experiments import (\w+)',
                                 (ROOT / path).read_text(), re.MULTILINE)}
  assert 'experiments/synthetic.py' in used
  found = {}
  for path in FILES:
    if path.parts[0] == 'statejax' or str(path) in used:
      for name in flags_of(path):
        assert name not in found, f'--{name}: {path} and {found[name]}'
        found[name] = path
  assert 'tokens' in found


# Linen is a thin layer, so that leaving it stays cheap.

LINEN = {'Module', 'compact', 'scan', 'remat',
         'LogicallyPartitioned', 'get_partition_spec', 'PARTITION_NAME',
         'logical_to_mesh_sharding', 'meta'}


@pytest.mark.parametrize('path', [
    p for p in FILES if 'flax' in (ROOT / p).read_text()
    and p.parts[0] == 'statejax'], ids=str)
def test_linen_names(path):
  tree = ast.parse((ROOT / path).read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        assert not alias.name.startswith('flax') or (
            alias.name, alias.asname) == ('flax.linen', 'nn')
    elif isinstance(node, ast.ImportFrom):
      assert not (node.module or '').startswith('flax')
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      if node.value.id == 'nn':
        assert node.attr in LINEN, f'{path}:{node.lineno}: nn.{node.attr}'
      if node.value.id == 'self':
        assert node.attr not in {'variable', 'sow', 'make_rng', 'is_mutable'}


def test_file_sizes():
  sizes = {p: len((ROOT / p).read_text().splitlines()) for p in FILES}
  long = {str(p): n for p, n in sizes.items() if n > 600}
  assert not long
  shipped = [n for p, n in sizes.items()
             if p.parts[0] in SHIPPED and p.name != '__init__.py']
  assert statistics.median(shipped) <= 200


def test_no_error_is_swallowed():
  for path in FILES:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
      if not isinstance(node, ast.ExceptHandler):
        continue
      broad = node.type is None or (isinstance(node.type, ast.Name) and
                                    node.type.id in ('Exception',
                                                     'BaseException'))
      silent = all(isinstance(n, ast.Pass | ast.Continue) for n in node.body)
      assert not (broad and silent), f'{path}:{node.lineno}'


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='no git checkout')
def test_no_paths_of_one_machine():
  names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout
  pattern = re.compile(rb'(?<![\w.}/-])/(work|root|home|Users|mnt)/\w')
  for name in filter(None, names.split('\0')):
    path = ROOT / name
    found = path.is_file() and pattern.search(path.read_bytes())
    assert not found, f'{name}: {found[0].decode()}'


@pytest.mark.parametrize('module, absent', [
    ('statejax', 'jax numpy'), ('statejax.config', 'jax numpy'),
    ('statejax.artifact.commit', 'jax numpy'),
    ('statejax.artifact.digest', 'jax orbax'),
    ('statejax.main', 'jax orbax'), ('statejax.tasks.text', 'jax grain'),
    ('statejax.generate', 'orbax grain optax')])
def test_what_an_import_loads(module, absent):
  code = (f'import sys, {module}\n'
          f'assert not set({absent.split()}) & set(sys.modules)')
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_modules_of_tests_have_names_of_their_own():
  """Without packages pytest imports a second one of a name in place of it."""
  names = collections.Counter(
      path.name for path in pathlib.Path(__file__).parent.rglob('*.py')
      if path.name != 'conftest.py')
  assert [name for name, n in names.items() if n > 1] == []
