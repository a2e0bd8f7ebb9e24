"""What the README shows is what happens."""

import ast
import pathlib
import re

import numpy as np
import pytest
from test_memory import MODEL, begun, heard, params

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / 'README.md').read_text()


def lines(begin):
  """The one block of code that begins so."""
  (block,) = re.findall(rf'```python\n({re.escape(begin)}.*?)```', TEXT, re.S)
  return block


def test_the_twelve_lines_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(lines('import jax'), {})


def test_the_lines_on_memory_run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  block = lines('from statejax.artifact.journal')
  names = {'model': MODEL, 'params': params(), 'state': begun()[1],
           'statement': [3, 13], 'key': [13], 'value': [23]}
  exec(block, names)
  assert names['receipt'].op == 'delete' and names['receipt'].changed
  assert len(capsys.readouterr().out.splitlines()) == 3
  assert [e['op'] for e in names['memory'].journal.entries] == [
      'write', 'delete']


@pytest.mark.slow
def test_the_lines_on_forgetting_run(capsys):
  """Each of them of the state that it is about."""
  block = lines('from statejax import forget')
  memory, before = begun()
  log = [5, 6, 7, 8]
  after = heard(before, log[:2], [])[1]
  late = heard(after, log[2:], [])[1]
  begin = int(before.length[0])
  names = {'model': MODEL, 'params': params(), 'memory': memory, 'slot': 1,
           'before': before, 'snapshot': before, 'tokens': np.int32(log[:2]),
           'log': np.int32(log), 'span': (begin, begin + 2)}
  states = {'plan': before, 'suppress': before, 'track': after,
            'replay_without': late}
  for line in ast.parse(block).body:
    code, ran = ast.unparse(line), names.get('state')
    for verb, state in states.items():
      if f'forget.{verb}(' in code:
        ran = state
    names['state'] = ran
    exec(code, names)
    if 'receipt' in code:
      assert names['receipt'].mode in code
  assert capsys.readouterr().out.startswith('Plan(')


def test_every_law_is_in_the_table():
  from statejax import laws
  for name in laws.LAWS:
    assert f'`{name}`' in TEXT, f'README: law {name} is missing'


def test_named_files_exist():
  for path in re.findall(r'`((?:statejax|configs|experiments|colabs|tests)/'
                         r'[\w./]*)`', TEXT):
    assert (ROOT / path).exists(), path


def test_ci_runs_the_test_command():
  ci = (ROOT / '.ci' / 'run').read_text()
  command = next(line for line in TEXT.splitlines() if '-m pytest' in line)
  assert "install -q -e '.[test]'" in command and '-m pytest' in ci
  assert "install -q -e '.[test]'" in ci


def test_nothing_is_left_open():
  assert not re.findall(r'@[A-Z]+@', TEXT)
