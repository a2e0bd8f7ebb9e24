"""The training loop: resume, update, log, evaluate, save, stop on a signal."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time

import jax

from statejax import config as cfg
from statejax import sharding
from statejax.model import LanguageModel
from statejax.train import checkpoint, optimizer
from statejax.train import step as train_step


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run ends with.

  Attributes:
    model: the `LanguageModel`.
    params: trained parameters.
    step: updates done.
    metrics: of the last update; empty if this process made none.
    evaluation: loss, bits and accuracy on held-out data, or None if the run
      was stopped before its end.
    seconds: wall-clock time of this process's updates.
    tokens: tokens of this process's updates.
  """

  model: LanguageModel
  params: dict
  step: int
  metrics: dict
  evaluation: dict | None
  seconds: float
  tokens: int


def make_task(config: cfg.Config, split='train'):
  """Returns the data source of a config."""
  from statejax.tasks import mqar, palindrome, stack, text
  task = config.task
  if task.name == 'text':
    return text.TextSource(split)
  held_out = split != 'train'
  shape = dict(size=512 if held_out else task.items, vocab=task.vocab,
               length=config.train.length,
               seed=config.train.seed + 1_000_003 * held_out)
  if task.name == 'mqar':
    return mqar.MQARSource(pairs=task.pairs, **shape)
  if task.name == 'palindrome':
    return palindrome.PalindromeSource(**shape)
  if task.name == 'stack':
    return stack.StackSource(stacks=task.stacks, **shape)
  raise ValueError("task: expected 'text', 'mqar', 'palindrome' or 'stack', "
                   f'got {task.name!r}.')


def train(config: cfg.Config, workdir, *, report=None) -> Result:
  """Trains to `config.train.steps`, resuming from `workdir` if it can.

  Writes `config.json`, `metrics.jsonl` (values that are a function of the
  config alone: a resumed run's file is byte-identical) and checkpoints.
  SIGTERM saves and returns; SIGKILL loses at most `save_every` updates.

  Args:
    config: what to train.
    workdir: directory of the run; made if missing.
    report: called with a progress line now and then; None prints to stderr.

  Raises:
    ValueError: `workdir` holds another config's run, or a damaged checkpoint.
    FloatingPointError: the loss is not finite; names the step.
  """
  return _Run(config, pathlib.Path(workdir), report).run()


class _Run:
  """One process's share of a run; holds what is not part of the state."""

  def __init__(self, config, workdir, report):
    self.config, self.workdir = config, workdir
    self.report = report or (lambda line: print(line, file=sys.stderr))
    self.model = LanguageModel(config.model)
    t = config.train
    _check_vocabulary(config)
    # Refuses what cannot be, before anything is read or written.
    optimizer.make_optimizer(t, self.model.axes())
    self.mesh = sharding.make_mesh(data=t.data, fsdp=t.fsdp, tensor=t.tensor)
    parts = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    if t.rows % t.accumulate or t.rows % parts:
      raise ValueError(
          f'train: expected rows divisible by accumulate={t.accumulate} and by '
          f'data * fsdp = {parts} devices, got rows={t.rows}; change one of '
          'them, e.g. train.data=1.')
    self.folder = workdir / 'checkpoints'
    self.stopping = False
    self._bits = 'bits/byte' if config.task.name == 'text' else 'bits/token'

  def run(self):
    self._prepare()
    data = self._data()
    state, done = self._restore(data)
    if threading.current_thread() is not threading.main_thread():
      return self._loop(state, done, data)  # only that one gets signals
    previous = signal.signal(signal.SIGTERM, self._on_signal)
    try:
      return self._loop(state, done, data)
    finally:
      signal.signal(signal.SIGTERM, previous)

  def _on_signal(self, *_):
    self.stopping = True

  def _prepare(self):
    self.workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(self.folder)
    path, mine = self.workdir / 'config.json', cfg.to_dict(self.config)
    if path.exists() and checkpoint.steps(self.folder):
      old = cfg.renewed(json.loads(path.read_text()), self.config)
      if _identity(old) != _identity(mine):
        raise ValueError(f'{self.workdir}: holds a run of another config; use '
                         'another workdir, or remove this one.')
    _replace(path, json.dumps(mine, indent=1) + '\n')

  def _data(self):
    from statejax.tasks import pipeline
    t = self.config.train
    return pipeline.batches(
        make_task(self.config), rows=t.rows // jax.process_count(),
        length=t.length, seed=t.seed, shard=jax.process_index(),
        shards=jax.process_count())

  def _shardings(self):
    """Of the whole TrainState: optimizer moments lie where parameters do."""
    make = lambda: train_step.initial(self.model, self.config.train)
    abstract = jax.eval_shape(make)
    params = sharding.shardings(
        self.model.axes(), abstract.params, self.mesh)
    whole = jax.sharding.NamedSharding(
        self.mesh, jax.sharding.PartitionSpec())
    optimizer = _like_params(abstract.optimizer, params, whole)
    return make, abstract, train_step.TrainState(
        params, optimizer, whole, whole)

  def _restore(self, data):
    from statejax.tasks import pipeline
    make, abstract, shardings = self._shardings()
    self.by_row = jax.sharding.NamedSharding(
        self.mesh, jax.sharding.PartitionSpec(('data', 'fsdp')))
    found = checkpoint.steps(self.folder)
    if not found:
      self._truncate_log(0)
      return jax.jit(make, out_shardings=shardings)(), 0
    done = found[-1]
    about = checkpoint.about(self.folder, done)
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract, shardings)
    state = checkpoint.load(self.folder, done, target)
    pipeline.restore(data, about['data'][jax.process_index()])
    self._truncate_log(done)
    self.report(f'resumed from step {done}')
    return state, done

  def _truncate_log(self, done):
    """Drops metric lines of steps that will run again."""
    path = self.workdir / 'metrics.jsonl'
    path.touch()
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
      if not line.endswith(b'\n') or json.loads(line)['step'] > done:
        break
      size += len(line)
    # In place, so that there is no moment at which the kept lines are missing.
    os.truncate(path, size)

  def _place(self, batch):
    return {name: jax.make_array_from_process_local_data(self.by_row, x)
            for name, x in batch.items()}

  def _loop(self, state, done, data):
    t = self.config.train
    begin, first, line = time.perf_counter(), done, {}
    ready, waiting = begin, None
    with open(self.workdir / 'metrics.jsonl', 'a') as log:
      stopping = False
      while done < t.steps and not stopping:
        batch = self._place(next(data))
        state, metrics = train_step.update(self.model, t, state, batch)
        # Metrics of a step are read after the next one is dispatched.
        if waiting is not None:
          line = self._log(log, *waiting)
        if done == first:
          jax.block_until_ready(metrics)
          ready = time.perf_counter()
        done += 1
        waiting = (done, metrics)
        if self._due(t.eval_every, done) and done < t.steps:
          line = self._flush(log, waiting)
          waiting = None
          self._write(log, {'step': done, 'eval': self._evaluate(state)})
        stopping = self.stopping  # read once: the signal may come any time
        if self._due(t.save_every, done) or done == t.steps or stopping:
          line = self._flush(log, waiting) or line
          waiting = None
          os.fsync(log.fileno())
          self._save(state, done, data)
        if line and done % max(1, t.steps // 20) == 0:
          self._progress(line, done, (done - first - 1) * t.rows * t.length
                         / max(time.perf_counter() - ready, 1e-9))
    evaluation = None
    if done >= t.steps:
      evaluation = self._evaluate(state)
      _replace(self.workdir / 'evaluation.json',
               json.dumps(evaluation) + '\n')
    return Result(self.model, state.params, done, line or {}, evaluation,
                  time.perf_counter() - begin,
                  (done - first) * t.rows * t.length)

  def _due(self, every, done):
    return every and done % every == 0

  def _flush(self, log, waiting):
    return self._log(log, *waiting) if waiting else None

  def _log(self, log, step, metrics):
    values = {k: float(v) for k, v in metrics.items()}
    if not math.isfinite(values['loss'] + values['grad_norm']):
      raise FloatingPointError(
          f'step {step}: loss={values["loss"]}, grad_norm='
          f'{values["grad_norm"]}; lower the peak rate or look at the data.'
          f' Checkpoints of before: {checkpoint.steps(self.folder)}.')
    line = {'step': step, **{k: round(v, 6) for k, v in values.items()},
            'bits': round(values['loss'] / math.log(2), 6)}
    if self._due(self.config.train.log_every, step):
      self._write(log, line)
    return line

  def _write(self, log, line):
    log.write(json.dumps(line) + '\n')
    log.flush()

  def _progress(self, line, done, rate):
    self.report(
        f'step {done}/{self.config.train.steps}  loss {line["loss"]:.3f}  '
        f'{self._bits} {line["bits"]:.3f}  accuracy {line["accuracy"]:.3f}  '
        f'{rate:,.0f} tokens/s')

  def _save(self, state, done, data):
    from statejax.tasks import pipeline
    if done in checkpoint.steps(self.folder):
      return
    here = pipeline.state_to_json(data)
    checkpoint.save(
        self.folder, done, state,
        {'step': done, 'config': cfg.to_dict(self.config), 'data': [here],
         'jax': jax.__version__}, keep=self.config.train.keep)

  def _evaluate(self, state):
    from statejax.tasks import pipeline
    t = self.config.train
    loss = correct = count = 0.0
    for batch in pipeline.evaluation(
        make_task(self.config, 'eval'), rows=t.rows // jax.process_count(),
        length=t.length, batches=t.eval_batches):
      sums = train_step.evaluate(self.model, state.params, self._place(batch))
      loss += float(sums.loss)
      correct += float(sums.correct)
      count += float(sums.count)
    loss, accuracy = loss / max(count, 1.0), correct / max(count, 1.0)
    return {'loss': round(loss, 6), 'bits': round(loss / math.log(2), 6),
            'accuracy': round(accuracy, 6), 'tokens': int(count)}


def _like_params(tree, params, default):
  """Gives each leaf what the parameter has whose path its own path ends with.

  So an optimizer's moments, wherever it keeps them, lie as their parameters.
  """
  named = dict(jax.tree_util.tree_flatten_with_path(params)[0])
  def one(path, _):
    ends = (path[i:] for i in range(len(path)))
    return next((named[end] for end in ends if end in named), default)
  return jax.tree_util.tree_map_with_path(one, tree)


def _replace(path, text):
  """Writes a file of which a kill leaves the old or the new, never a part."""
  new = path.with_name(f'.{path.name}.new')
  new.write_text(text)
  new.replace(path)


def _check_vocabulary(config):
  from statejax.tasks import text
  need = text.VOCAB if config.task.name == 'text' else config.task.vocab
  if config.model.vocab < need:
    raise ValueError(f'train: task {config.task.name!r} has {need} tokens, the '
                     f'model vocab={config.model.vocab}; use '
                     f'--set model.vocab={need}.')


def _identity(config: dict):
  """What must agree for a run to be resumed; its length may grow."""
  free = ('steps', 'save_every', 'keep', 'eval_every', 'eval_batches',
          'log_every')
  train = {k: v for k, v in config['train'].items() if k not in free}
  return {**config, 'train': train}
