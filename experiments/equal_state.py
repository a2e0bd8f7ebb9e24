"""Memories of one size: each mixer brought to the same bytes of state.

  python -m experiments.equal_state --bytes=32768 --context=73

Experiments that compare memories import `sized`. Bytes are counted from the
schema of one layer and one row after so many tokens. Each mixer has one number
that decides them: rows of a window or a memory, vectors, or the width of its
heads.

Expected: every mixer within 3 % of the bytes asked for; a few seconds.
"""

from absl import app, flags

from experiments import report
from statejax import account
from statejax import config as c

BYTES = flags.DEFINE_integer('bytes', 32768, 'of one layer and row')
CONTEXT = flags.DEFINE_integer('context', 73, 'tokens')

WIDTH, SEGMENT = 64, 24
CLOSE = 0.03


def heads(key=16, value=16, kv_heads=4):
  """Four query heads."""
  return dict(heads=4, kv_heads=kv_heads, key=key, value=value)


def halves(n):
  """A key and a value width that together grow by one with n; keys even."""
  key = 2 * ((n + 2) // 4)
  return max(2, key), max(1, n - key)


# Name -> mixer by its number, 1 or more. The larger, the more bytes, nearly.
MAKERS = {
    'attention': lambda n: c.AttentionConfig(**heads(*halves(n), 1)),
    'window': lambda n: c.AttentionConfig(**heads(), window=n),
    'delta': lambda n: c.DeltaNetConfig(4, *halves(n), conv=1, chunk=16),
    'KDA': lambda n: c.KDAConfig(4, *halves(n), conv=1, chunk=16),
    'Transformer-XL': lambda n: c.TransformerXLConfig(
        WIDTH, **heads(), segment=SEGMENT, memory=n, relative=32),
    'Compressive': lambda n: c.CompressiveConfig(
        WIDTH, **heads(), segment=SEGMENT, memory=4 * (n // 8), relative=32,
        compressed=n - 4 * (n // 8), rate=4),
    'DST': lambda n: c.DSTConfig(
        WIDTH, **heads(), segment=SEGMENT, vectors=n),
    'RMT': lambda n: c.DSTConfig(
        WIDTH, **heads(), segment=SEGMENT, vectors=n, update='rows'),
    'Infini': lambda n: c.InfiniConfig(**heads(*halves(n)), segment=SEGMENT),
    'Titans': lambda n: c.TitansConfig(
        4, *halves(n), segment=SEGMENT, rate=0.1),
}


def nbytes(mixer, tokens, width=WIDTH):
  """Bytes of one layer and row after so many tokens.

  Args:
    mixer: configuration of a registered mixer.
    tokens: of the context.
    width: of the model.
  """
  layer = c.LayerConfig('mixer', mixer)
  model = c.ModelConfig(vocab=1, width=width, layers=(layer,),
                        groups=(c.GroupConfig(('mixer',)),))
  return account.account(model, tokens)['mixer'].total


def fit(make, budget, tokens):
  """The mixer whose state is nearest to so many bytes.

  Args:
    make: function of a whole number >= 1; large ones have large states.
    budget: bytes of one layer and row.
    tokens: of the context.

  Returns:
    The mixer and its bytes.

  Raises:
    ValueError: the nearest is more than 3 % away.
  """
  found, size, n = [], 0, 0
  while size <= 2 * budget:
    n += 1
    mixer = make(n)
    size = nbytes(mixer, tokens)
    found.append((mixer, size))
  mixer, size = min(found, key=lambda pair: abs(pair[1] - budget))
  if abs(size - budget) > CLOSE * budget:
    raise ValueError(
        f'fit: expected a state within {CLOSE:.0%} of {budget:,} bytes after '
        f'{tokens} tokens, the nearest {type(mixer).__name__} has {size:,}; '
        'ask for another budget, or size another of its fields.')
  return mixer, size


def sized(budget, tokens, names=tuple(MAKERS)):
  """Returns {name: (mixer, bytes)}, see `fit`.

  Args:
    budget: bytes of one layer and row.
    tokens: of the context.
    names: keys of `MAKERS`.
  """
  return {name: fit(MAKERS[name], budget, tokens) for name in names}


def main(_):
  """Prints the mixers, their bytes, and whether they are near enough."""
  found = sized(BYTES.value, CONTEXT.value)
  rows = [report.Row(name, f'{BYTES.value:,} bytes', f'{size:,}',
                     abs(size - BYTES.value) <= CLOSE * BYTES.value)
          for name, (_, size) in found.items()]
  print(report.table(rows))
  for name, (mixer, _) in found.items():
    print(name.ljust(16), mixer)


if __name__ == '__main__':
  app.run(main)
