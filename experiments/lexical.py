"""Contexts whose lines share words with a question, and who selects by them."""

import collections
import math

LINES = 64
COMMON = 'it is so that then and but well now here'.split()
CONCEPTS, TOPICS, WORDS_OF_ONE, SPEAKERS, PARAPHRASED = 120, 8, 3, 6, 0.7


def chain(draw):
  """Lines of several chains, the question about one, and which lines it needs.

  Returns:
    lines, a list of lists of words; words of the question; a set of indices.
  """
  names = [f'name{i}' for i in draw.order(4 * LINES)]
  start, mine = names[-1], draw.between(2, 6)
  links = []
  while len(links) < LINES - 8:
    many = draw.between(1, 6) if links else mine
    path = [names.pop() for _ in range(many + 1)]
    links += zip(path, path[1:])
  lines = [[a, 'leads', 'to', b] for a, b in links]
  lines += [[draw.one(COMMON) for _ in range(4)] for _ in range(8)]
  order = draw.order(len(lines))
  needed = {at for at, i in enumerate(order) if i < mine}
  return [lines[i] for i in order], ['where', 'leads', start, 'to'], needed


def dialogue(draw):
  """Turns of some speakers about topics; two of them are what is asked for."""
  def word(concept):
    return f'concept{concept}{"abc"[draw.below(WORDS_OF_ONE)]}'
  def other(said):
    if draw.chance() >= PARAPHRASED:
      return said
    rest = [c for c in 'abc' if not said.endswith(c)]
    return said[:-1] + draw.one(rest)
  def turn(speaker, concepts):
    said = [word(concept) for concept in concepts]
    return [f'speaker{speaker}', *said, *(draw.one(COMMON) for _ in range(5))]

  of_topic = lambda t: [t + TOPICS * i for i in range(CONCEPTS // TOPICS)]
  topics = draw.order(TOPICS)[:2]
  about = [draw.one(of_topic(t)) for t in topics]
  who, turns = draw.below(SPEAKERS), []
  for _ in range(LINES - 2):
    topic, speaker = draw.below(TOPICS), draw.below(SPEAKERS)
    free = [c for c in of_topic(topic) if c not in about or speaker != who]
    turns.append(turn(speaker, [draw.one(free) for _ in range(3)]))
  for topic, concept in zip(topics, about):
    chatter = [c for c in of_topic(topic) if c != concept]
    turns.append(turn(who, [concept, draw.one(chatter), draw.one(chatter)]))
  question = ['what', f'speaker{who}', *(other(t[1]) for t in turns[-2:])]
  order = draw.order(len(turns))
  needed = {at for at, i in enumerate(order) if i >= LINES - 2}
  return [turns[i] for i in order], question, needed


def select(lines, question, count, hops):
  """The indices of `count` lines by shared words; ties to the earlier line."""
  seen_in = collections.Counter(w for line in lines for w in set(line))
  weight = {w: math.log(len(lines) / n) for w, n in seen_in.items()}
  asked, chosen = set(question), []
  while len(chosen) < count:
    # Exact, as a set has no order and the last bit would break ties.
    score = [math.fsum(weight[w] for w in asked.intersection(line))
             for line in lines]
    best = sorted((i for i in range(len(lines)) if i not in chosen),
                  key=lambda i: (-score[i], i))
    if not hops:
      return set(best[:count])
    chosen.append(best[0])
    asked.update(lines[best[0]])
  return set(chosen)


def f1(chosen, needed):
  """Of a set of lines."""
  hit = len(chosen & needed)
  return 2 * hit / (len(chosen) + len(needed))
