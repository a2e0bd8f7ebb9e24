"""What every experiment shares: the table of claims, and its results file."""

import dataclasses
import json
import pathlib
import platform
import subprocess


@dataclasses.dataclass(frozen=True)
class Row:
  """One claim: what was expected, what came out, and whether that is so."""

  claim: str
  expected: str
  obtained: str
  ok: bool


def table(rows) -> str:
  """Returns the rows as aligned text with a header."""
  cells = [('claim', 'expected', 'obtained', 'ok')]
  cells += [(r.claim, r.expected, r.obtained, 'ok' if r.ok else 'NOT OK')
            for r in rows]
  widths = [max(len(row[i]) for row in cells) for i in range(4)]
  lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip()
           for row in cells]
  return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def write(path, rows, command, **facts):
  """Writes `results.json`: the rows, the command, versions and machine."""
  import jax
  commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'],
                          capture_output=True, text=True, check=False)
  data = {
      'command': command,
      'rows': [dataclasses.asdict(r) for r in rows],
      'commit': commit.stdout.strip() or None,
      'python': platform.python_version(), 'jax': jax.__version__,
      'device': jax.devices()[0].device_kind, **facts}
  pathlib.Path(path).write_text(json.dumps(data, indent=1) + '\n')
