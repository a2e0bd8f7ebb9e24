"""The chunked delta rule on one CPU thread against transformers' references.

  pip install -e '.[peers]'
  python -m experiments.bench_delta

B=1 H=4 K=V=128 float32, one pinned thread, CPU time of the process, interleaved
repeats, medians. At T=4096: the token recurrence, the chunked form, and the
chunked torch references of qwen3_next (Gated DeltaNet, one decay per head) and
kimi_linear (KDA, one per channel), forward and forward+backward, all with the
same inputs and compared with each other; without transformers, what is ours
alone. Then the chunked form from T=1K to 16K, which must be linear in T.
Memory is what the compiled program needs beside arguments and results. About
ten minutes, most of them KDA in torch.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import time

from absl import app, flags, logging

from experiments import report

REPEATS = flags.DEFINE_integer('repeats', 9, 'interleaved repeats')
SLOW = flags.DEFINE_integer('slow', 2, 'repeats of jobs that take seconds')
OUT = flags.DEFINE_string('out', 'experiments/results/bench_delta.json', 'file')
SMOKE = flags.DEFINE_bool('smoke', False, 'tiny sizes, one repeat')

# How much faster than the torch reference, forward and forward+backward.
AIMS = {('gdn', 'forward'): 1.7, ('gdn', 'gradient'): 2.6,
        ('kda', 'forward'): 14.0, ('kda', 'gradient'): 50.0}
GRADIENT_MIB = 80
PASSES = ('forward', 'gradient')


def pin():
  """One thread on one core, for jax and for torch; before either starts."""
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
      f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false '
      'intra_op_parallelism_threads=1')
  if importlib.util.find_spec('torch'):
    import torch
    torch.set_num_threads(1)


def draw(kind, length, heads, width):
  """Unit keys, decays as these layers have them, beta in (0, 1)."""
  import numpy as np
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal((1, length, heads, *shape))
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  rate = rng.uniform(0.01, 1.0, (heads,) + (1,) * (kind == 'kda'))
  wide = (width,) if kind == 'kda' else ()
  beta = 1 / (1 + np.exp(-normal()))
  args = (unit(normal(width)), unit(normal(width)), normal(width),
          -rate * np.log1p(np.exp(normal(*wide))), beta, beta,
          0.1 * rng.standard_normal((1, heads, width, width)))
  weights = normal(width), rng.standard_normal((1, heads, width, width))
  as32 = lambda xs: tuple(np.asarray(x, np.float32) for x in xs)
  return as32(args), as32(weights)


def our_job(args, weights, implementation, which):
  """Compiles the op; returns the job and the MiB of its temporaries."""
  import jax
  import jax.numpy as jnp

  from statejax.ops.delta_rule import delta_rule

  def forward(*args):
    return delta_rule(*args, implementation=implementation)

  def loss(args, weights):
    return sum(jnp.vdot(w, x) for w, x in zip(weights, forward(*args)))

  args, weights = jax.tree.map(jnp.asarray, (args, weights))
  quick = {'xla_backend_optimization_level': 0} if SMOKE.value else None
  jit = functools.partial(jax.jit, compiler_options=quick)
  if which == 'forward':
    compiled = jit(forward).lower(*args).compile()
    run = functools.partial(compiled, *args)
  else:
    compiled = jit(jax.grad(loss)).lower(args, weights).compile()
    run = functools.partial(compiled, args, weights)
  memory = compiled.memory_analysis().temp_size_in_bytes / 2 ** 20
  return lambda: jax.block_until_ready(run()), memory


def peer_job(kind, args, weights, which):
  """Returns the job of the torch reference; erase and write are one beta."""
  import torch
  if kind == 'gdn':
    from transformers.models.qwen3_next import modeling_qwen3_next as module
    run = module.torch_chunk_gated_delta_rule
  else:
    from transformers.models.kimi_linear import modeling_kimi_linear as module
    run = module.chunk_kimi_delta_attention
  # What the decorator would swap for a GPU kernel is taken as written.
  run = getattr(run, '__wrapped__', run)
  q, k, v, g, beta, _, state = (
      torch.from_numpy(x.copy()).requires_grad_(which == 'gradient')
      for x in args)
  weights = [torch.from_numpy(w) for w in weights]
  inputs = (q, k, v, g, beta, state)

  def job():
    with torch.set_grad_enabled(which == 'gradient'):
      out = run(q, k, v, g, beta, initial_state=state, output_final_state=True)
    if which == 'forward':
      return [x.numpy() for x in out]
    loss = sum((w * x).sum() for w, x in zip(weights, out))
    return [x.numpy() for x in torch.autograd.grad(loss, inputs)]

  return job


def interleave(jobs, slow, repeats):
  """Runs each job in turn; returns median seconds and the first results.

  The first run, whose results are kept, is not timed.
  """
  results = {name: job() for name, job in jobs.items()}
  spent = {name: [] for name in jobs}
  for i in range(repeats):
    for name, job in jobs.items():
      if name in slow and i >= SLOW.value:
        continue
      clock = time.process_time()
      job()
      spent[name].append(time.process_time() - clock)
  return {n: statistics.median(t) for n, t in spent.items()}, results


def difference(got, want):
  """Returns the largest relative error of any array."""
  import numpy as np
  one = lambda a, b: float(np.linalg.norm(np.asarray(a) - np.asarray(b))
                           / np.linalg.norm(np.asarray(b)))
  return max(one(a, b) for a, b in zip(got, want, strict=True))


def merge_betas(grads):
  """Our gradients with those of erase and write added, as torch has them."""
  q, k, v, log_decay, erase, write, state = grads
  return q, k, v, log_decay, erase + write, state


def compare(length, heads, width, repeats):
  """Times everything at one length; returns rows, times and memory."""
  jobs, slow, memory = {}, set(), {}
  for kind, which in AIMS:
    args, weights = draw(kind, length, heads, width)
    for name, form in (('chunked', 'xla'), ('recurrence', 'reference')):
      job, mib = our_job(args, weights, form, which)
      jobs[kind, which, name], memory[kind, which, name] = job, mib
    slow.add((kind, 'gradient', 'recurrence'))
    if importlib.util.find_spec('transformers'):
      jobs[kind, which, 'torch'] = peer_job(kind, args, weights, which)
  slow |= {('kda', which, 'torch') for which in PASSES}
  jobs['matmul',] = matmul_job()
  times, results = interleave(jobs, slow, repeats)
  rows = []
  for (kind, which), aim in AIMS.items():
    ours = results[kind, which, 'chunked']
    off = difference(ours, results[kind, which, 'recurrence'])
    rows.append(report.Row(f'{kind} {which}: as the recurrence', '<= 1e-5',
                           f'{off:.1e}', off <= 1e-5))
    mine, tokens = (times[kind, which, n] for n in ('chunked', 'recurrence'))
    facts = f'{1e3 * mine:.0f} ms, recurrence {1e3 * tokens:.0f}'
    if (kind, which, 'torch') not in jobs:
      rows.append(report.Row(f'{kind} {which}: time', '', facts, True))
      continue
    if which == 'gradient':
      ours = merge_betas(ours)
    off = difference(ours, results[kind, which, 'torch'])
    rows.append(report.Row(f'{kind} {which}: as torch', '<= 1e-3',
                           f'{off:.1e}', off <= 1e-3))
    other = times[kind, which, 'torch']
    rows.append(report.Row(
        f'{kind} {which}: faster than torch', f'>= {aim:g}x',
        f'{other / mine:.2f}x ({facts}, torch {1e3 * other:.0f})',
        SMOKE.value or other / mine >= aim))
  for kind in ('gdn', 'kda'):
    ours, tokens = (memory[kind, 'gradient', n]
                    for n in ('chunked', 'recurrence'))
    rows.append(report.Row(
        f'{kind}: temporaries of the gradient', f'<= {GRADIENT_MIB} MiB',
        f'{ours:.0f} MiB, recurrence {tokens:.0f}', ours <= GRADIENT_MIB))
  return rows, times, memory


def matmul_job(size=1024):
  """What the machine can do at best: one large product."""
  import jax
  import jax.numpy as jnp
  a = jnp.ones((size, size))
  product = jax.jit(lambda x: x @ x)
  return lambda: jax.block_until_ready(product(a))


def scaling(lengths, heads, width, repeats):
  """The chunked form alone, over lengths; returns rows and the table."""
  import numpy as np
  jobs, memory = {}, {}
  for kind, which in AIMS:
    for length in lengths:
      args, weights = draw(kind, length, heads, width)
      name = kind, which, length
      jobs[name], memory[name] = our_job(args, weights, 'xla', which)
  times, _ = interleave(jobs, (), repeats)
  rows, table = [], []
  for kind, which in AIMS:
    per_token = [1e6 * times[kind, which, n] / n for n in lengths]
    growth = np.polyfit(np.log(lengths), np.log(per_token), 1)[0]
    rows.append(report.Row(
        f'{kind} {which}: time grows as T^x, T={lengths[0]} to {lengths[-1]}',
        'x <= 1.15', f'{1 + growth:.2f} (us per token '
        f'{" ".join(f"{x:.1f}" for x in per_token)})',
        SMOKE.value or bool(growth <= 0.15)))
    table += [{'kind': kind, 'pass': which, 'T': n, 'us per token': round(u, 2),
               'temporary MiB': round(memory[kind, which, n], 1)}
              for n, u in zip(lengths, per_token)]
  return rows, table


def products(heads, width, chunk=32):
  """FLOPs per token, forward, of the products with state, pairs, inverse."""
  levels = chunk.bit_length() - 2
  return heads * (6 * width * width + 8 * chunk * width
                  + 4 * levels * chunk * chunk)


def main(_):
  """Measures, prints the claims, writes the results file."""
  logging.set_verbosity(logging.WARNING)
  pin()
  smoke = SMOKE.value
  length, heads, width = (128, 2, 32) if smoke else (4096, 4, 128)
  repeats = 1 if smoke else REPEATS.value
  rows, times, memory = compare(length, heads, width, repeats)
  lengths = (64, 128) if smoke else tuple(2 ** n for n in range(10, 15))
  more, table = scaling(lengths, heads, width, repeats)
  rows += more
  print(report.table(rows))
  peak = 2 * 1024 ** 3 / times.pop(('matmul',))
  forward = products(heads, width) * length / times['gdn', 'forward', 'chunked']
  limits = {'matmul GFLOP/s': round(peak / 1e9, 1),
            'gdn forward: share of it': round(forward / peak, 2)}
  print(json.dumps(limits, indent=1))
  pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
  flat = lambda d, n: {' '.join(k): round(v, n) for k, v in d.items()}
  report.write(
      OUT.value, rows, 'python -m experiments.bench_delta', repeats=repeats,
      shape={'B': 1, 'T': length, 'H': heads, 'K': width, 'V': width},
      peers={n: importlib.metadata.version(n) for n in ('torch', 'transformers')
             if importlib.util.find_spec(n)},
      milliseconds=flat({k: 1e3 * v for k, v in times.items()}, 2),
      temporary_mib=flat(memory, 1), scaling=table, limits=limits)
  raise SystemExit(0 if all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  app.run(main)
