"""The loss curve of a run, for those who have matplotlib."""

import pathlib

from statejax.train import restore


def loss_curve(workdir) -> pathlib.Path:
  """Writes `loss.png` into a workdir and returns its path."""
  try:
    from matplotlib import figure
  except ImportError as error:
    raise ValueError('plot: needs matplotlib; install statejax[colab].'
                     ) from error
  columns = restore.metrics(workdir)
  picture = figure.Figure(figsize=(6, 4))
  axes = picture.subplots()
  axes.plot(columns['step'], columns['bits'])
  axes.set(xlabel='update', ylabel='bits per token', ylim=(0, None))
  path = pathlib.Path(workdir) / 'loss.png'
  picture.savefig(path, dpi=120)
  return path
