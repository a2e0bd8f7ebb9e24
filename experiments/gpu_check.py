"""What holds and how fast it is on a GPU.

  python -m experiments.gpu_check

Claims: on a GPU, where products of float32 are rounded unless told otherwise,
the delta rule gives the golden vectors and the float64 recurrence within the
limits that hold on a CPU, values and gradients, and bfloat16 operands within
theirs; delta, attention, sparse and slots layers obey every law of carried
state with the usual tolerances, decoding and prefilling alike among them. The
decode kernel `pallas_gpu` equals the equation. Reported beside that: times of
the chunked forms and of decode steps against the Triton kernels of fla
(flash-linear-attention), interleaved; see `experiments/gpu_times.py`.

Most of the time is compilation, and choosing among the device's products: a
machine of its own, and a quarter of an hour. The results file is written anew
after each case. --smoke: on any device, tiny shapes, nothing of fla, no law but
two of one layer. --parts and --batches leave out parts and shapes.
"""

import concurrent.futures
import functools
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import time
import traceback
import warnings

from absl import app, flags, logging

from experiments import report

OUT = flags.DEFINE_string('out', 'experiments/results/gpu_check.json', 'file')
PARTS = flags.DEFINE_list(
    'parts', 'step,golden,oracle,decode,forward,gradient,laws', 'what to run')
TURNS = flags.DEFINE_integer('turns', 9, 'interleaved repeats')
BATCHES = flags.DEFINE_list('batches', '1,4,8,16,64', 'which are timed')
SMOKE = flags.DEFINE_bool('smoke', False, 'tiny shapes, one repeat, no peer')

# Sizes of groups and chunks compiled as one that are timed.
GROUPS = ((1 << 16, 1), (1 << 16, 8), (1 << 18, 8))
GOLDEN = pathlib.Path(__file__).parents[1] / 'tests' / 'golden'


def golden() -> list[report.Row]:
  """Golden vectors of the delta rule: largest error over its limit."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from statejax.ops import delta_chunk, delta_rule, delta_wide
  about = json.loads((GOLDEN / 'ops.json').read_text())
  cases = {n: f for n, f in about.items() if f['op'] in ('gdn', 'kda')}
  if SMOKE.value:
    cases = {n: cases[n] for n in ('gdn_grad', 'kda_one_token')}

  def unit(x, norm):
    return x * jax.lax.rsqrt(
        jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6) if norm else x

  def op(*args, form):
    if form in ('xla', 'reference'):
      return delta_rule(*args, implementation=form)
    module = delta_wide if form == 'groups' else delta_chunk
    *inputs, state = args
    return module.chunked(delta_chunk.Inputs(*inputs), state, None, None,
                          scale=inputs[0].shape[-1] ** -0.5, chunk_size=16)

  def run(x, weights, norm, form):
    def loss(x):
      out = op(unit(x['q'], norm), unit(x['k'], norm), x['v'], x['g'],
               x['beta'], x['beta'], x['initial_state'], form=form)
      return sum(jnp.vdot(w, y) for w, y in zip(weights, out)), out

    if not weights:
      return loss(x)[1], {}
    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(x)
    return out, grads

  def shares(name, form):
    """Errors over their limits, of values and of gradients."""
    facts, arrays = cases[name], dict(np.load(GOLDEN / f'{name}.npz'))
    arrays.setdefault('initial_state', np.zeros_like(arrays['final_state']))
    x = {n: arrays[n] for n in ('q', 'k', 'v', 'g', 'beta', 'initial_state')}
    weights = [arrays[n] for n in ('loss_w_out', 'loss_w_state')
               if n in arrays]
    out, grads = jax.jit(functools.partial(
        run, norm=facts['use_qk_l2norm'], form=form))(x, weights)
    limits = facts['float32_error']['chunk']
    values = [np.abs(got - arrays[want]).max() / (10 * limit)
              for got, want, limit in zip(out, ('out', 'final_state'), limits)]
    wants = {n: arrays[f'd_{n}'] for n in grads}
    gradients = [np.abs(grads[n] - w).max() / np.abs(w).max() / 5e-6
                 for n, w in wants.items()]
    return max(values), max(gradients, default=0.0)

  rows = []
  for form in ('xla', 'chunks', 'groups', 'reference'):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
      found = list(pool.map(functools.partial(shares, form=form), cases))
    for what, share in zip(('values', 'gradients'), map(max, zip(*found))):
      rows.append(report.Row(
          f'golden vectors, {form}, {what}: error over its limit', '<= 1',
          f'{share:.2f}', bool(share <= 1)))
  return rows


def oracle() -> list[report.Row]:
  """The chunked forms against the recurrence in float64 on the CPU."""
  import jax
  import numpy as np

  from experiments import gpu_times
  from pallas_kernels.workloads import DeltaRule
  from statejax.ops import delta_rule

  rows, tiny = [], SMOKE.value
  for kind in ('head', 'channel'):
    for dtype, limit in (('float32', 2e-6), ('bfloat16', 1e-2)):
      shape = (DeltaRule(1, 2, 16, 16, kind, 1, 80, dtype) if tiny else
               DeltaRule(2, 4, 128, 128, kind, 2, 300, dtype))
      arrays = shape.arrays()
      want = recurrence(arrays)
      inputs = tuple(arrays[n] for n in ('q', 'k', 'v', *gpu_times.GATES))
      for name, form in gpu_times.forms((64,), ((1 << 12, 2),)).items():
        run = jax.jit(gpu_times.passes(form, shape.width ** -0.5, 'forward'))
        got = run(inputs, arrays['state'], None)
        error = max(gpu_times.off(a, b) for a, b in zip(got, want))
        rows.append(report.Row(
            f'decay by {kind}, {dtype}, {name}: as in float64',
            f'<= {limit:.0e}', f'{error:.1e}', error <= limit))
      got = jax.jit(functools.partial(
          delta_rule, implementation='reference'))(
              *inputs, arrays['state'])
      error = max(gpu_times.off(a, b) for a, b in zip(got, want))
      rows.append(report.Row(
          f'decay by {kind}, {dtype}, reference: as in float64',
          f'<= {limit:.0e}', f'{error:.1e}', error <= limit))
      assert np.isfinite(error)
  return rows


def recurrence(arrays):
  """The equations of `delta_rule` in float64; returns y and the state."""
  import numpy as np
  wide = {n: np.asarray(x, np.float32).astype(np.float64)
          for n, x in arrays.items()}
  groups = wide['v'].shape[2] // wide['q'].shape[2]
  q, k = (np.repeat(wide[n], groups, axis=2) for n in 'qk')
  decay, erase, write = (
      x if x.ndim == 4 else x[..., None]
      for x in (wide['log_decay'], wide['erase'], wide['write']))
  state, out = wide['state'], []
  for t in range(q.shape[1]):
    state = np.exp(decay[:, t])[..., None] * state
    residual = write[:, t] * wide['v'][:, t] - np.einsum(
        'bhk,bhkv->bhv', erase[:, t] * k[:, t], state)
    state = state + k[:, t][..., None] * residual[..., None, :]
    out.append(np.einsum('bhk,bhkv->bhv', q[:, t], state))
  return q.shape[-1] ** -0.5 * np.stack(out, axis=1), state


def step() -> list[report.Row]:
  """The decode kernel against the equation in float64."""
  import jax
  import numpy as np

  from experiments import gpu_times
  from pallas_kernels import delta_rule_step_gpu
  from pallas_kernels.workloads import DeltaRule
  from statejax.ops.delta_rule import delta_rule
  interpret = jax.default_backend() != 'gpu'
  if interpret and delta_rule_step_gpu.declines(
      *(np.zeros((1, 1, 1, 128)),) * 2):
    return []
  shapes = [DeltaRule(1, 2, 32, 32, 'channel', 2, 1, 'float32')]
  if not interpret:
    shapes = [DeltaRule(heads // groups, heads, width, values, kind, batch, 1,
                        dtype, gates)
              for heads, groups, width, values, batch in (
                  (4, 2, 128, 128, 3), (2, 1, 64, 96, 2), (2, 2, 256, 32, 1))
              for kind, gates in (('head', 'head'), ('channel', 'channel'),
                                  ('channel', 'head'))
              for dtype in ('float32', 'bfloat16')]
  worst = {'state': 0.0, 'y, float32': 0.0, 'y, bfloat16': 0.0}
  kept = True
  for i, shape in enumerate(shapes):
    arrays = shape.arrays(i)
    want = recurrence(arrays)
    state = arrays.pop('state')
    run = jax.jit(functools.partial(
        delta_rule_step_gpu.delta_rule_step, scale=shape.width ** -0.5,
        interpret=True) if interpret else functools.partial(
            delta_rule, implementation='pallas_gpu'))
    y, after = run(**arrays, state=state)
    worst['state'] = max(worst['state'], gpu_times.off(after, want[1]))
    name = f'y, {shape.dtype}'
    worst[name] = max(worst[name], gpu_times.off(y, want[0]))
    n_valid = np.arange(shape.batch, dtype=np.int32) % 2
    y, after = run(**arrays, state=state, n_valid=n_valid)
    idle = n_valid == 0
    kept &= bool(np.array_equal(after[idle], state[idle])
                 and not np.any(np.asarray(y[idle], np.float32)))
    if not idle.all():
      worst['state'] = max(worst['state'], gpu_times.off(
          np.asarray(after)[~idle], want[1][~idle]))
  limits = {'state': 3e-7, 'y, float32': 3e-7, 'y, bfloat16': 4e-3}
  rows = [report.Row(f'decode kernel, {n}: as in float64, {len(shapes)} shapes',
                     f'<= {limits[n]:.0e}', f'{e:.1e}', e <= limits[n])
          for n, e in worst.items()]
  return [*rows, report.Row('decode kernel: rows without a token', 'as before',
                            'as before' if kept else 'changed', kept)]


def subjects():
  """What the laws are checked of: one layer of a kind, and a model."""
  import importlib

  from statejax import config as c
  heads = c.AttentionConfig(heads=4, kv_heads=2, key=8, value=8)
  latent = c.MLAConfig(heads=2, nope=6, rope_width=4, value=5, rank=8,
                       q_rank=7)
  found = {
      'KDA': c.KDAConfig(heads=2, key=8, value=8, rank=8, chunk=8),
      'Gated DeltaNet': c.GatedDeltaNetConfig(
          heads=2, value_heads=4, key=8, value=12, chunk=4, max_erase=2.0),
      'attention': heads,
      'window with a sink': c.AttentionConfig(
          heads=4, kv_heads=2, key=8, value=8, window=5, sink=True),
      'sparse latent attention (DSA)': c.DSAConfig(
          mla=latent, k=4, index_heads=8, index_width=8),
      'block sparse attention (MoBA)': c.MoBAConfig(heads, block=4, k=2),
      'slots, a model': importlib.import_module(
          'configs.tiny_slots').get_config().model,
  }
  return {n: found[n] for n in ('KDA',)} if SMOKE.value else found


def held(subject, names):
  """Checks laws of one subject; returns worst errors, and what broke."""
  from statejax import laws
  warnings.filterwarnings('ignore', message='.*declines')
  worst, broken = {}, {}
  for law in names:
    try:
      worst |= laws.check(subject, laws=law).worst
    except laws.LawError as error:
      broken[law] = str(error)[:600]
  return worst, broken


def law_rows(save) -> tuple[list[report.Row], dict]:
  """Every subject in a process of its own, a few beside each other: more of
  them share one device so badly that all are slower."""
  from statejax import laws
  names = ('split', 'decode') if SMOKE.value else tuple(laws.LAWS)
  rows, facts = [], {}
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(4, context) as pool:
    jobs = {pool.submit(held, subject, names): name
            for name, subject in subjects().items()}
    for job in concurrent.futures.as_completed(jobs):
      worst, broken = job.result()
      facts[jobs[job]] = {'worst': worst, 'broken': broken}
      print(jobs[job], json.dumps(facts[jobs[job]]), flush=True)
      rows.append(report.Row(
          f'laws, {jobs[job]}', f'{len(names)} of {len(names)}',
          f'{len(worst)} of {len(names)}' + ''.join(
              f'; not {law}' for law in broken), not broken))
      save(rows, facts)
  return rows, facts


def cases(part):
  """Name -> shape of what a part times."""
  from pallas_kernels.workloads import DeltaRule
  kinds = {'gdn': (16, 32, 'head'), 'kda': (32, 32, 'channel')}
  if SMOKE.value:
    return {'gdn, 1 x 80': DeltaRule(
        1, 2, 32, 32, 'head', 1, 1 if part == 'decode' else 80)}
  shapes = ([(b, 1) for b in (1, 4, 16, 64)] if part == 'decode' else
            [(1, 8192), (8, 4096)])
  shapes = [(b, t) for b, t in shapes if str(b) in BATCHES.value]
  return {f'{kind}, {b} x {t}, {heads} heads': DeltaRule(
      key_heads, heads, 128, 128, decay, b, t)
      for b, t in shapes for kind, (key_heads, heads, decay) in kinds.items()}


def timed(part, save):
  """Times every case of a part; returns rows and facts."""
  from experiments import gpu_times
  rows, facts, smoke = [], {}, SMOKE.value
  turns = 1 if smoke else TURNS.value
  for name, shape in cases(part).items():
    clock = time.perf_counter()
    if part == 'decode':
      found, unit = gpu_times.decode(
          shape, turns, not smoke, ('xla',) if smoke else None), 'us'
    else:
      forms = gpu_times.forms((16,) if smoke else (64,),
                              ((1 << 10, 2),) if smoke else GROUPS)
      found, unit = gpu_times.sequence(
          shape, part, forms, turns, not smoke), 'ms'
    found['seconds'] = round(time.perf_counter() - clock)
    facts[name] = found
    print(part, name, json.dumps(found), flush=True)
    rows.append(report.Row(
        f'{part}, {name}', 'reported', ', '.join(
            f'{n} {t:.3g}' for n, t in found[unit].items()) + f' {unit}',
        True))
    save(rows, facts)
  return rows, facts


def main(_):
  """Runs the parts, prints the table and the figures, writes the file."""
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  logging.set_verbosity(logging.WARNING)
  import jax
  rows, facts, out = [], {}, pathlib.Path(OUT.value)
  versions = {}
  for name in ('jaxlib', 'torch', 'triton', 'flash-linear-attention'):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  out.parent.mkdir(parents=True, exist_ok=True)

  def save(part, new, found):
    report.write(
        out, rows + new, 'python -m experiments.gpu_check', versions=versions,
        backend=jax.default_backend(), turns=TURNS.value,
        cases={n: f for n, f in {**facts, part: found}.items() if f})

  simple = {'step': step, 'golden': golden, 'oracle': oracle}
  for part in PARTS.value:
    found = {}
    try:
      if part in simple:
        new = simple[part]()
      elif part == 'laws':
        new, found = law_rows(functools.partial(save, part))
      else:
        new, found = timed(part, functools.partial(save, part))
    except Exception as error:  # the other parts are worth their time
      traceback.print_exc()
      new = [report.Row(part, 'runs', f'{type(error).__name__}: '
                        f'{str(error)[:200]}', False)]
    # After every part, so that a run that is stopped leaves what it measured.
    save(part, new, found)
    rows, facts[part] = rows + new, found
    print(report.table(new), flush=True)
  print(report.table(rows))
  raise SystemExit(0 if all(row.ok for row in rows) else 1)


if __name__ == '__main__':
  app.run(main)
