"""What happens to texts that are interrupted: saved, edited, undone.

Logs of `statejax.tasks.lifecycle_text` in one batch, each with two questions,
about two keys, asked apart of the same state.
"""

import dataclasses
import pathlib
import tempfile

import numpy as np

from statejax.tasks import lifecycle_words as words


@dataclasses.dataclass(frozen=True)
class Texts:
  """A model, its parameters, a batch of logs and places in them, [rows] each.

  Attributes:
    half: within a line, about the middle of the log.
    last: where the log ends and the first question begins.
    ask: the last token before the first answer.
    answered: where the second question begins.
    again: the last token before its answer.
    late: whether the log says the first key's value after `half`.
    over: within the line after the last that does, if there is one.
  """

  model: object
  params: object
  tokens: np.ndarray
  half: np.ndarray
  last: np.ndarray
  ask: np.ndarray
  answered: np.ndarray
  again: np.ndarray
  late: np.ndarray
  over: np.ndarray

  def read(self, state, begin, end):
    """Logits of the tokens between two places, and the state after them."""
    rows, width = len(end), 64 * -(-int(np.max(end - begin)) // 64)
    part = np.zeros((rows, width), np.int32)
    for row in range(rows):
      part[row, :end[row] - begin[row]] = self.tokens[row, begin[row]:end[row]]
    return self.model.step(self.params, state, part, end - begin)

  def _said(self, state, begin, end):
    logits, state = self.read(state, begin, end + 1)
    at = (end - begin)[:, None, None]
    logits = np.take_along_axis(np.asarray(logits), at, axis=1)[:, 0]
    said, seen = [], []
    for _ in range(5):
      seen.append(logits)
      said.append(np.argmax(logits, axis=-1).astype(np.int32))
      logits, state = self.model.step(self.params, state, said[-1][:, None])
      logits = np.asarray(logits)[:, 0]
    return np.stack(said, axis=1), np.stack(seen, axis=1)

  def answer(self, state):
    """The five tokens that follow the first question, each fed back, [rows, 5],
    and their logits, [rows, 5, vocab]."""
    return self._said(state, self.last, self.ask)

  def beside(self, state):
    """The same of the second question: tokens only."""
    return self._said(state, self.answered, self.again)[0]


def texts(model, params, source):
  """Returns the `Texts` of all items of a source."""
  items = [source[i] for i in range(len(source))]
  tokens = np.stack([x['tokens'] for x in items])
  spots = [np.flatnonzero(x['targets'] >= 0) for x in items]
  gaps = [np.argmax(np.diff(x) > 1) for x in spots]
  ask = np.array([x[0] for x in spots])
  stop = words.encode(words.STOP)[0]
  ends = [np.flatnonzero(row[:at] == stop) for row, at in zip(tokens, ask)]
  records = [source.record(i) for i in range(len(source))]
  about = [[i for i, x in enumerate(r.lines) if x.kind == 'update'
            and x.key == r.questions[0].key] for r in records]
  last = np.array([e[-1] + 1 for e in ends])
  return Texts(
      model, params, tokens, ask=ask, last=last,
      half=np.array([e[len(e) // 2] - 3 for e in ends]),
      answered=np.array([x[g] + 1 for x, g in zip(spots, gaps)]),
      again=np.array([x[g + 1] for x, g in zip(spots, gaps)]),
      late=np.array([lines[-1] >= len(e) // 2
                     for lines, e in zip(about, ends)]),
      over=np.minimum(last, [e[lines[-1]] + 4
                             for lines, e in zip(about, ends)]))


def told(editor, params, state, question, value, row):
  """What a host writes over the key of a question: as `editor.write`."""
  key, value = words.name(question.key), words.value(value)
  said = words.encode(f'word is {key} now holds {value} promptly .')
  return editor.write(params, state, said, key=words.encode(key),
                      value=words.encode(value), row=row)


def front(state, row, slot):
  """Bytes of the value that a slot holds now."""
  held = state.layers['memory']
  return [np.asarray(x[0, row, slot, 0]).tobytes()
          for x in (held.value, held.span)]


def amid(logs, state, at, late, questions, beside):
  """Edits within the log, after which it goes on.

  Args:
    logs: `Texts`.
    state: after the tokens before `at`, [rows].
    late: rows whose log says the first key's value after that.
    questions: the first of each row.
    beside: answers to the second without an edit.

  Returns:
    rows that answer the last of what was said, by the host or by the log, and
    the second question as without the edit.
  """
  from statejax.memory import Memory
  editor, value = Memory(logs.model), lambda row: 54321 + row
  for row, question in enumerate(questions):
    state, _ = told(editor, logs.params, state, question, value(row), row)
  state = logs.read(state, at, logs.last)[1]
  new, after = logs.answer(state)[0], logs.beside(state)
  want = [question.answer if late[row] else value(row)
          for row, question in enumerate(questions)]
  return sum(words.decode(new[row]) == words.value(want[row])
             and bool((after[row] == beside[row]).all())
             for row in range(len(questions)))


def edits(logs, state, questions, book, plain, beside):
  """Edits and undoes, row by row, what the log's end has left; see `study`."""
  from statejax.memory import Memory
  editor = Memory(logs.model, journal=book)
  before, (said, logits) = state, plain
  same = lambda x: (x.view(np.uint32) == logits.view(np.uint32)).all((1, 2))
  found = dict.fromkeys(('edited', 'beside', 'undone', 'waited', 'others'), 0)
  for row, question in enumerate(questions):
    value = 12345 + row
    state, receipt = told(editor, logs.params, before, question, value, row)
    found['waited'] += receipt.overruled >= 0
    new, seen = logs.answer(state)
    rest = np.arange(len(questions)) != row
    found['others'] += bool(same(seen)[rest].all())
    found['edited'] += receipt.changed and (
        words.decode(new[row]) == words.value(value))
    found['beside'] += bool((logs.beside(state)[row] == beside[row]).all())
    state, _ = editor.rollback(state, receipt.slot, row=row)
    found['undone'] += bool(
        (logs.answer(state)[0][row] == said[row]).all()
        and front(state, row, receipt.slot) == front(before, row, receipt.slot))
  return found


def study(model, params, source, room):
  """What interruptions do to the logs of a source.

  Args:
    model, params: of `lifecycle_text`.
    source: of logs with two questions.
    room: of the state, tokens.

  Returns:
    {'rows': logs,
     'restored': those whose logits after save and restore in mid-log are the
       same bits,
     'amid': those that answer an edit made after the log's last word on the
       first key while the log goes on, and the second question as before,
     'again': the same of an edit at half of the log, or the log's word if it
       comes later; 'late': in how many it does,
     'edited': rows that answer what the host wrote at the log's end over the
       first key,
     'beside': of these, those that answer about the second key as before,
     'undone': of these, those that a rollback gives the answer of before, and
       the slot the value of before, bit by bit; its history goes on,
     'waited': edits that overruled a line which no commit had seen, and which a
       rollback therefore does not bring back,
     'others': edits that leave all other rows the same bits,
     'journal': whether it says these edits and nothing else, in order}.
  """
  from statejax.artifact import journal, serving
  logs = texts(model, params, source)
  rows, questions = len(logs.half), [source.record(i).questions[0]
                                     for i in range(len(source))]
  begin = lambda end: logs.read(
      model.init_state(rows, room), np.zeros_like(end), end)[1]
  held = begin(logs.half)
  with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place) / 'state'
    serving.save_state(path, model, params, held)
    back = serving.load_state(path, model, params)
    book = journal.Journal(pathlib.Path(place) / 'journal')
    ends = [logs.read(state, logs.half, logs.last)[1] for state in (held, back)]
    plain, kept = (logs.answer(state) for state in ends)
    beside = logs.beside(ends[0])
    found = edits(logs, ends[0], questions, book, plain, beside)
    told_of = [(e['op'], e['row'], e['outcome']) for e in book.entries]
  same = plain[1].view(np.uint32) == kept[1].view(np.uint32)
  return found | {
      'rows': rows, 'restored': int(same.all((1, 2)).sum()),
      'amid': amid(logs, begin(logs.over), logs.over, np.zeros(rows, bool),
                   questions, beside),
      'again': amid(logs, held, logs.half, logs.late, questions, beside),
      'late': int(logs.late.sum()),
      'journal': told_of == [(op, row, 'committed') for row in range(rows)
                             for op in ('write', 'rollback')]}
