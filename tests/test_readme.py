"""What the README shows is what happens."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / 'README.md').read_text()


def test_the_twelve_lines_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (block,) = re.findall(r'```python\n(import jax.*?)```', TEXT, re.S)
  exec(block, {})


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
