"""The benchmarks of artifacts and of the witness: what they make of times.

Quick: of invented ones. With -m slow they run to their end, small.
"""

import contextlib
import importlib
import json
import pathlib
import subprocess
import sys
import types

import pytest
from absl import flags

NAMES = ('bench_artifacts', 'bench_witness')


@pytest.fixture
def module(monkeypatch):
  """Imports a script with flags of its own: many define the same names."""
  def default(name, value, *_, **__):
    return types.SimpleNamespace(value=value)
  for kind in ('integer', 'string', 'bool'):
    monkeypatch.setattr(flags, f'DEFINE_{kind}', default)
  yield lambda name: importlib.import_module(f'experiments.{name}')
  for name in NAMES:
    sys.modules.pop(f'experiments.{name}', None)


@pytest.fixture
def bench(module, monkeypatch, tmp_path):
  found = module('bench_artifacts')
  monkeypatch.setattr(found.logging, 'set_verbosity', lambda level: None)
  monkeypatch.setattr(found, 'draw', lambda path, *_: path.touch())
  found.OUT.value = str(tmp_path / 'out.json')
  return found


def ends(bench, capsys):
  """Exit code, the claims that fail, and what was printed."""
  with pytest.raises(SystemExit) as end:
    bench.main([])
  facts = json.loads(pathlib.Path(bench.OUT.value).read_text())
  assert facts['command'].endswith('--rounds=15 --starts=100')
  printed = capsys.readouterr().out
  assert '\n'.join(facts['table']) in printed
  return end.value.code, [r['claim'] for r in facts['rows'] if not r['ok']]


def invent(bench, monkeypatch, p99=9.9, p50=2.):
  """Times, all within the limits, which a mint may exceed at 64 MiB."""
  asked = []
  def restored(mib, rounds):
    asked.append(('restore', mib))
    return {'bytes': mib << 20, 'verified': 2., 'orbax': 1., 'numpy': 1.}
  def looped(mib, starts):
    asked.append(('loop', mib, starts))
    return {'alone': [1., 5., 200], 'beside': [1., 5., 200],
            'start': [p50, p99 if mib == 64 else 0.5, starts],
            'copy': [1., 2., starts]}
  def ways(name, length, rounds):
    asked.append((name, length))
    return {'restore': 10., 'prefill': length / 64}
  for function in (restored, looped, ways):
    monkeypatch.setattr(bench, function.__name__, function)
  return asked


def test_what_was_measured_is_kept(bench, monkeypatch, capsys):
  asked = invent(bench, monkeypatch)
  assert ends(bench, capsys) == (0, [])
  assert {('loop', 8, 100), ('loop', 64, 100), ('restore', 256),
          ('hybrid', 16384)} <= set(asked)
  count = len(asked)
  assert ends(bench, capsys) == (0, []) and len(asked) == count
  bench.OUT.value += '.other'
  invent(bench, monkeypatch, p99=10.1)
  assert ends(bench, capsys) == (1, ['64 MiB: a mint keeps the loop, p99'])
  bench.OUT.value += '.another'
  invent(bench, monkeypatch, p50=2.1)
  assert ends(bench, capsys) == (1, [
      f'{mib} MiB: that, over a bare copy of what is live, p50'
      for mib in (32, 64)])


def test_percentiles_are_of_what_the_loop_saw(bench, monkeypatch):
  """Of all steps beside a mint; the first loop, which compiles, is left out."""
  from statejax.artifact import background
  model = types.SimpleNamespace(init=lambda key: {}, unstack=lambda x: x)
  for name, value in (('wide', lambda mib: model), ('filled', lambda x: x),
                      ('opened', contextlib.nullcontext)):
    monkeypatch.setattr(bench, name, value)
  monkeypatch.setattr(background, 'Minter',
                      lambda shop, state: contextlib.nullcontext('minter'))
  loops = []
  def loop(model, params, state, steps, minter=None):
    loops.append((steps, minter))
    if len(loops) == 1:
      return [1e9] * steps, [1e9], [1e9]
    if minter is None:
      return [1.] * steps, [], []
    # One step in fifty is slow, and one start in ten.
    return ([30., *[2.] * 49] * (steps // 50), [20., *[3.] * 9],
            [4., *[5.] * 9])
  monkeypatch.setattr(bench, 'loop', loop)
  assert bench.looped(8, 25) == {
      'alone': [1., 1., 300], 'beside': [2., 30., 300], 'start': [3., 20., 30],
      'copy': [5., 5., 30]}
  assert loops == [(2, 'minter'), *[(100, None), (100, 'minter')] * 3]


def test_shares_of_a_step(module):
  bench = module('bench_witness')
  found = {'parameters': 7, 'step_ms': 10., 'without_ms': 9.9, 'alone_us': 49.,
           'loop_us': 0.1, 'more_us': [-3., 2., 5.], 'flops': [1000., 996.],
           'bytes': [1000., 990.]}
  rows = bench.claims({('tiny', 1): found, ('small', 8): found})
  assert [row.obtained for row in rows] == 2 * ['0.490 %', '0.400 %', '1.000 %']
  assert [row.ok for row in rows] == [True] * 5 + [False]
  assert bench.table({('small', 8): found})[1].split() == [
      'small,', '8,', '7', '10.000', '9.900', 'ms', '49.0,', '0.10', 'us',
      '-3.0,', '+2.0,', '+5.0', 'us']


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_smoke(name):
  subprocess.run([sys.executable, '-m', f'experiments.{name}', '--smoke'],
                 check=True, cwd=pathlib.Path(__file__).parent.parent)
