"""Tasks with right answers: how many a model gives from its exact cache, and from a restored one.

``kvtc bench tasks`` uses these functions. Each of :data:`TASKS` writes contexts around the user's
text, with questions that the context answers. Nothing is fetched, and a seed makes the same ones
again. All questions about a context are asked of one cache. Nothing is generated: likelihoods tell
what the model would say, see :class:`Question`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.evaluation import intervals
from kvtc_stream.evaluation.intervals import Estimate
from kvtc_stream.evaluation.quality import (
    Ids,
    branch,
    cast_cache,
    judge,
    made_up_name,
    prefill,
    round_trip,
)
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.statistics import StreamStatistics

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

#: Everyday nouns: what lists are made of, and code words.
WORDS = """
apple arrow basket bird boat bottle bread bridge brush bucket button candle carpet castle chain
cheese cherry clock cloud coffee copper corn cotton cradle crown desert diamond dinner doctor
dragon engine farmer feather fence finger flower forest garden ginger glass gold grape hammer
harbor hat honey horse island jacket jewel kettle kitchen ladder lake lemon letter lion marble
meadow milk mirror monkey moon mountain needle ocean olive onion orange paper pencil pepper piano
pillow pocket potato prince queen rabbit ribbon river road rocket rose salt school shadow sheep
ship silver snow spider spoon stone sugar sword table temple tiger tower train turtle valley
village violin wagon water whale window winter wolf
"""
#: One sentence of each kind is planted, so that a question needs no name to find its answer.
FACTS = (
    "The secret number of {} is",
    "The library card of {} has the number",
    "In the village of {} the postal code is",
    "The ship called {} has a crew of",
    "The bank account of {} ends in",
    "The mountain of {} has a height in feet of",
    "The telephone number of the hotel {} is",
    "The factory of {} made a yearly number of wheels of",
)
#: How an answer begins that an instruction asks for.
_ANSWER = "The code word for {} is"
#: A model can do a task if it answers this share from its exact cache; otherwise a restored cache
#: has nothing to lose, and its score says nothing.
CAN_DO = 0.6
#: Bytes that questions asked together may take, for copies of the cache and for logits.
_TOGETHER = 1 << 30


@dataclass(frozen=True)
class Question:
    """A question about a context, and its answers.

    Attributes
    ----------
    prompt
        Token ids of the question and of the beginning of the answer; it follows the context.
    options
        Token ids of possible answers, the right one first. With one option, the model is right if
        each of its tokens is the likeliest (as greedy generation would give it); with several, if
        the first option is the likeliest one.
    """

    prompt: Ids
    options: tuple[Ids, ...]


@dataclass(frozen=True)
class Problem:
    """Token ids of a context [tokens], and questions about it."""

    context: Ids
    questions: tuple[Question, ...]

    @property
    def tokens(self) -> int:
        """What a model reads at most: the context, a question and an answer but its last token."""
        asked = [len(q.prompt) + max(map(len, q.options)) - 1 for q in self.questions]
        return len(self.context) + max(asked)


class Writer:
    """What tasks write with: a tokenizer, its chat template, the user's text, random choices.

    Parameters
    ----------
    tokenizer
        A tokenizer of transformers. With a chat template, contexts are what it writes.
    text
        Token ids [tokens] of the user's text, which fills the contexts.
    context
        Tokens of each context.
    seed
        Of all choices.
    """

    def __init__(
        self, tokenizer: Any, text: Ids, context: int, seed: int | Sequence[int] = 0
    ) -> None:
        self.tokenizer, self.text, self.context = tokenizer, text, context
        self.rng = np.random.default_rng(seed)

    def ids(self, text: str) -> Ids:
        """Token ids of a piece. Pieces are tokenised alone, to be the same wherever they stand."""
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)

    def begin(self) -> Ids:
        """The BOS token, if the tokenizer begins texts with it."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        begins = self.tokenizer("x")["input_ids"][:1] == [bos]
        return np.array([bos] if begins else [], np.int64)

    def frame(self, *roles: str) -> list[Ids]:
        """What stands before, between and after messages of these roles, up to the answer."""
        if not getattr(self.tokenizer, "chat_template", None):
            heads = [f"{role.capitalize()}:\n" for role in (*roles, "assistant")]
            pieces = [self.ids(f"\n\n{head}") for head in heads[1:]]
            return [np.concatenate([self.begin(), self.ids(heads[0])]), *pieces]
        messages = [{"role": role, "content": "(here)"} for role in roles]
        try:
            whole = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # whatever a template raises that knows no system prompts
            if roles[0] != "system":
                raise
            first, *others = self.frame(*roles[1:])
            return [first, self.ids("\n\n"), *others]
        return [self.ids(piece) for piece in whole.split("(here)")]

    def passage(self, tokens: int) -> Ids:
        """A random passage of the user's text."""
        if len(self.text) < tokens:
            raise ValueError(
                f"the text has {len(self.text)} tokens, expected at least {tokens} to fill a "
                f"context: give a longer one"
            )
        start = int(self.rng.integers(len(self.text) - tokens + 1))
        return self.text[start : start + tokens]

    def filled(
        self, head: Ids, planted: Sequence[Ids] = (), tail: Ids | None = None, *, tokens: int = 0
    ) -> Ids:
        """``head``, a passage with pieces at random places, ``tail``: a whole context.

        Or another number of ``tokens``.
        """
        parts, tokens = [head], tokens or self.context
        room = tokens - sum(map(len, [head, *planted])) - (0 if tail is None else len(tail))
        if room < 1:
            raise ValueError(
                f"what is planted takes {tokens - room} of {tokens} tokens: ask for a longer "
                f"context"
            )
        cuts = np.sort(self.rng.integers(1, room + 1, len(planted)))
        for some, piece in zip(np.split(self.passage(room), cuts), [*planted, tail], strict=True):
            parts += [some] if piece is None else [some, piece]
        return np.concatenate(parts)

    def names(self, count: int) -> list[str]:
        """Different made-up names."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[made_up_name(self.rng)] = None
        return list(found)

    def numbers(self, count: int) -> list[str]:
        """Different numbers of five digits."""
        return [str(n) for n in self.rng.choice(90_000, count, replace=False) + 10_000]

    def words(self, count: int) -> list[str]:
        """Different everyday nouns."""
        return [str(word) for word in self.rng.choice(WORDS.split(), count, replace=False)]


# Tasks. Each writes one problem: a context of the writer's length, and all questions about it.


def single_key(writer: Writer) -> Problem:
    """Facts of different kinds are hidden in text; each is asked for."""
    starts = [fact.format(name) for fact, name in zip(FACTS, writer.names(len(FACTS)), strict=True)]
    values = writer.numbers(len(FACTS))
    return _facts(writer, starts, values, [(s, [v]) for s, v in zip(starts, values, strict=True)])


def multi_key(writer: Writer) -> Problem:
    """Eight facts of one kind, of different names; each is asked for."""
    starts, values = [FACTS[0].format(name) for name in writer.names(8)], writer.numbers(8)
    return _facts(writer, starts, values, [(s, [v]) for s, v in zip(starts, values, strict=True)])


def similar_keys(writer: Writer) -> Problem:
    """Names that differ in the last syllable; options are the numbers of all that look alike."""
    starts, values = [], writer.numbers(8)
    for base in writer.names(2):
        ends = dict.fromkeys(name[-2:] for name in writer.names(40))
        starts += [FACTS[0].format(base[:-2] + end) for end in [*ends][:4]]
    return _facts(
        writer,
        starts,
        values,
        [(start, _right_first(values[i // 4 * 4 :][:4], i % 4)) for i, start in enumerate(starts)],
    )


def multi_value(writer: Writer) -> Problem:
    """Two names with four numbers each; options: each of these, and the other name's numbers."""
    names, values = writer.names(2), writer.numbers(8)
    starts = [f"One of the secret numbers of {name} is" for name in names for _ in range(4)]
    others = [values[4:], values[:4]]
    questions = [
        (start, [value, *others[i // 4]])
        for i, (start, value) in enumerate(zip(starts, values, strict=True))
    ]
    return _facts(writer, starts, values, questions)


def variable_tracking(writer: Writer) -> Problem:
    """Variables are set to numbers or to other variables, up to two steps; options are all numbers.

    Asked are those set to other variables.
    """
    values = writer.numbers(4)
    letters = [str(x) for x in writer.rng.permutation([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"])]
    names = np.array(letters[: 3 * len(values)]).reshape(3, -1)  # [steps, values]
    starts = [f"VAR {name} =" for name in names.flat]
    told = [*values, *(f"VAR {name}" for name in names[:-1].flat)]
    questions = [
        (f"The value of VAR {name} is", _right_first(values, i))
        for step in names[1:]
        for i, name in enumerate(step)
    ]
    return _facts(writer, starts, told, questions, shuffle=False)


def common_words(writer: Writer) -> Problem:
    """A list: four words ten times as frequent as twenty others; options: one, and three others."""
    options = [[i % 4, *(4 + writer.rng.choice(20, 3, replace=False))] for i in range(8)]
    return _list(writer, np.array([10] * 4 + [1] * 20), options)


def frequent_words(writer: Writer) -> Problem:
    """A list with words of Zipf's frequencies; options: one of the first three, and later ones."""
    return _list(
        writer,
        1 / np.arange(1, 25) ** 1.5,
        [[i % 3, *(3 + 3 * i + np.arange(3))] for i in range(6)],
    )


def system_prompt(writer: Writer) -> Problem:
    """Six instructions in the system prompt, then a turn of text: which answer is to be given?"""
    words = writer.words(12)
    start, asked, answered, again, after = writer.frame("system", "user", "assistant", "user")
    rules = " ".join(
        f"When the user says {word}, answer: {_ANSWER.format(word)} {answer}."
        for word, answer in zip(words[:6], words[6:], strict=True)
    )
    head = [start, writer.ids(rules), asked, writer.ids("Please read this:\n\n")]
    tail = [answered, writer.ids("Thank you, I have read it."), again]
    return Problem(
        writer.filled(np.concatenate(head), tail=np.concatenate(tail)),
        _code_words(writer, words, after),
    )


def instructions(writer: Writer) -> Problem:
    """Six turns that give an instruction each, with text: which answer is to be given?"""
    words = writer.words(12)
    frame = writer.frame(*["user", "assistant"] * 6, "user")
    understood, turns = writer.ids("Understood."), []
    room = writer.context - len(frame[12])
    for turn, (word, answer) in enumerate(zip(words[:6], words[6:], strict=True)):
        rule = writer.ids(f"When I say {word}, answer: {_ANSWER.format(word)} {answer}.\n\n")
        tail = np.concatenate([frame[2 * turn + 1], understood])
        tokens = room * (turn + 1) // 6 - room * turn // 6
        turns.append(
            writer.filled(np.concatenate([frame[2 * turn], rule]), tail=tail, tokens=tokens)
        )
    return Problem(
        np.concatenate([*turns, frame[12]]),
        _code_words(writer, words, frame[13]),
    )


def copying(writer: Writer) -> Problem:
    """Passages of the text: 24 tokens of each are given, the next 4 must follow."""
    before, after = writer.frame("user")
    context = writer.filled(before)
    asked = [writer.ids("\n\nRepeat a passage of the text above."), after]
    starts = np.linspace(len(before), writer.context - 28, 8).astype(int)
    return Problem(
        context,
        tuple(
            Question(np.concatenate([*asked, context[start:][:24]]), (context[start + 24 :][:4],))
            for start in starts
        ),
    )


def continuation(writer: Writer) -> Problem:
    """How the text goes on: options are its next 24 tokens, and three other passages of it."""
    ids = np.concatenate([writer.begin(), writer.passage(writer.context + 8 * 24)])
    following = ids[writer.context :]
    return Problem(
        ids[: writer.context],
        tuple(
            Question(
                following[:start], (following[start:][:24], *(writer.passage(24) for _ in "abc"))
            )
            for start in range(24, 8 * 24, 24)
        ),
    )


#: What writes problems of a task, by its name.
TASKS: Mapping[str, Callable[[Writer], Problem]] = {
    write.__name__.replace("_", "-"): write
    for write in (
        single_key,
        multi_key,
        similar_keys,
        multi_value,
        variable_tracking,
        common_words,
        frequent_words,
        system_prompt,
        instructions,
        copying,
        continuation,
    )
}


def _right_first(options: Sequence[str], right: int) -> list[str]:
    return [options[right], *options[:right], *options[right + 1 :]]


def _facts(
    writer: Writer,
    starts: Sequence[str],
    values: Sequence[str],
    questions: Sequence[tuple[str, Sequence[str]]],
    *,
    shuffle: bool = True,
) -> Problem:
    """Sentences hidden in text, of their starts and values.

    Questions are how the answer begins, and its options.
    """
    facts = [
        np.concatenate([*map(writer.ids, (f"\n\n{start}", f" {value}", ".\n\n"))])
        for start, value in zip(starts, values, strict=True)
    ]
    if shuffle:
        facts = [facts[i] for i in writer.rng.permutation(len(facts))]
    before, after = writer.frame("user")
    asked = [writer.ids("\n\nComplete a sentence of the text above."), after]
    return Problem(
        writer.filled(before, facts),
        tuple(
            Question(
                np.concatenate([*asked, writer.ids(start)]),
                tuple(writer.ids(f" {option}") for option in options),
            )
            for start, options in questions
        ),
    )


def _list(writer: Writer, frequencies: NDArray[Any], options: Sequence[Sequence[int]]) -> Problem:
    """A list of words in random order; options are indices of words, the most frequent first."""
    before, after = writer.frame("user")
    words = [writer.ids(f" {word}") for word in writer.words(len(frequencies))]
    head = np.concatenate([before, writer.ids("A list of words:")])
    length = np.average([len(word) for word in words], weights=frequencies)
    # A little more than fits, to be cut.
    count = 1.1 * (writer.context - len(head)) / length + 1
    times = np.maximum(frequencies / frequencies.sum() * count, 1).round().astype(int)
    drawn = writer.rng.permutation(np.repeat(np.arange(len(words)), times))
    prompt = [
        writer.ids("\n\nWhich word is the most common one in the list?"),
        after,
        writer.ids("The most common word in the list is"),
    ]
    return Problem(
        np.concatenate([head, *(words[i] for i in drawn)])[: writer.context],
        tuple(Question(np.concatenate(prompt), tuple(words[i] for i in some)) for some in options),
    )


def _code_words(writer: Writer, words: Sequence[str], after: Ids) -> tuple[Question, ...]:
    """The first half of ``words`` is said, the second are answers and options."""
    half = len(words) // 2
    return tuple(
        Question(
            np.concatenate([writer.ids(word), after, writer.ids(_ANSWER.format(word))]),
            tuple(writer.ids(f" {x}") for x in _right_first(words[half:], i)),
        )
        for i, word in enumerate(words[:half])
    )


def write_problems(
    tokenizer: Any, texts: Sequence[Ids], task: str, context: int, questions: int, seed: int = 0
) -> Iterator[Problem]:
    """Problems of a task, until there are at least so many questions; around each text in turn.

    Raises
    ------
    ValueError
        The texts or the context are too short.
    """
    number = 0
    while questions > 0:
        seeds = [seed, zlib.crc32(task.encode()), context, number]
        text = texts[number % len(texts)]
        problem = TASKS[task](Writer(tokenizer, text, context, seeds))
        yield problem
        questions -= len(problem.questions)
        number += 1


# Answers.


@dataclass(frozen=True)
class Answers:
    """What a model answers from one cache.

    Attributes
    ----------
    right
        Whether each question was answered rightly, bool [questions].
    log_probabilities
        Of the next token, where the right answer's are: float32 [tokens, vocabulary] of each
        question, in nats.
    """

    right: NDArray[np.bool_]
    log_probabilities: list[Tensor]


def answer(model: PreTrainedModel, cache: DynamicCache, questions: Sequence[Question]) -> Answers:
    """Ask each question separately, from a cache in the model's dtype, which is not changed."""
    import torch

    from kvtc_stream.integrations.transformers.model import growing

    # Options that differ in their last token only need one row.
    rows: dict[bytes, list[tuple[int, Question, Ids]]] = {}
    options = [(question, option) for question in questions for option in question.options]
    for number, (question, option) in enumerate(options):
        asked = np.concatenate([question.prompt, option[:-1]])
        rows.setdefault(asked.tobytes(), []).append((number, question, option))
    asked_rows = [np.frombuffer(row, np.int64) for row in rows]
    longest = max(map(len, asked_rows))
    layers: list[Any] = cache.layers
    held = sum(x.keys.nbytes + x.values.nbytes for x in layers if x.is_initialized)
    each = 2 * held + longest * model.config.get_text_config().vocab_size * 8
    together = max(_TOGETHER // each, 1)
    scores, right_answers = {}, {}
    for start in range(0, len(rows), together):
        some = asked_rows[start : start + together]
        # Padding comes after all that counts, so that nothing attends to it.
        ids = np.stack([np.pad(row, (0, longest - len(row))) for row in some])
        grown = branch(cache)
        grown.batch_repeat_interleave(len(some))
        with torch.inference_mode():
            inputs = torch.from_numpy(ids).to(model.device)
            logits = model(input_ids=inputs, **growing(model, grown)).logits
            for row, answered in zip(logits, [*rows.values()][start:], strict=False):
                for number, question, option in answered:
                    first = len(question.prompt) - 1
                    p = row[first : first + len(option)].float().log_softmax(-1)
                    tokens = torch.from_numpy(option).to(p.device)
                    likely = (p.argmax(-1) == tokens).all()
                    scores[number] = torch.stack([p.gather(1, tokens[:, None]).sum(), likely])
                    if option is question.options[0]:
                        right_answers[number] = p
    found = torch.stack([scores[number] for number in range(len(options))]).cpu().numpy()
    of_questions = np.split(found, np.cumsum([len(q.options) for q in questions])[:-1])
    right = [bool(s[0, 1] if len(s) == 1 else s[:, 0].argmax() == 0) for s in of_questions]
    return Answers(np.array(right), [right_answers[number] for number in sorted(right_answers)])


@dataclass(frozen=True)
class Outcome:
    """Answers to one problem from a restored cache.

    Attributes
    ----------
    right
        Whether each question was answered rightly, bool [questions].
    kl_divergence
        Of next-token distributions from those of the exact cache, mean over the right answers'
        tokens; nats.
    statistics
        Of the stream; sizes count every byte.
    """

    right: NDArray[np.bool_]
    kl_divergence: float
    statistics: StreamStatistics


def measure(
    model: PreTrainedModel, problem: Problem, codecs: Iterable[Codec]
) -> tuple[NDArray[np.bool_], list[Outcome]]:
    """Answers from the exact cache in bfloat16, bool [questions]; and from those codecs restore.

    Raises
    ------
    ValueError
        The context is so short that sinks and window leave nothing to code.
    """
    import torch

    cache = prefill(model, problem.context, torch.bfloat16)
    exact = answer(model, cast_cache(cache, model.dtype), problem.questions)
    targets = np.concatenate([question.options[0] for question in problem.questions])
    outcomes = []
    for codec in codecs:
        restored, stream = round_trip(model, cache, codec, problem.context)
        found = answer(model, restored, problem.questions)
        before, after = (torch.cat(x.log_probabilities) for x in (exact, found))
        judgement = judge(before, after, targets)
        outcomes.append(Outcome(found.right, judgement.kl_divergence, StreamStatistics.of(stream)))
    return exact.right, outcomes


# Scores.


@dataclass(frozen=True)
class Score:
    """How a codec does at a task.

    Attributes
    ----------
    ratio, coded_ratio
        Of all streams together; ``coded_ratio`` without sinks, window, header and index.
    kl_divergence
        Mean over contexts, nats.
    score
        The share of right answers.
    difference
        ``score`` less that from the exact cache, of the same questions.
    lost, won
        Questions answered rightly from the exact cache only; and from the restored cache only.
    verdict
        ``"says nothing"`` if the model cannot do the task with its exact cache;
        ``"within 1 point"``; ``"in the interval"``, which has no difference in it;
        else ``"loss"`` or ``"gain"``.
    """

    ratio: float
    coded_ratio: float
    kl_divergence: float
    score: Estimate
    difference: Estimate
    lost: int
    won: int
    verdict: str


def exact_score(exact: Sequence[NDArray[np.bool_]]) -> Estimate:
    """The share of right answers from exact caches, of the problems of a task."""
    return intervals.rate(np.concatenate(exact), _groups(exact))


def can_do(exact: Estimate) -> bool:
    """Whether a score from exact caches is high enough to have something to lose."""
    return exact.value >= CAN_DO


def score(exact: Sequence[NDArray[np.bool_]], outcomes: Sequence[Outcome]) -> Score:
    """Put together what :func:`measure` gave for the problems of a task, with one codec."""
    groups = _groups(exact)
    before, after = np.concatenate(exact), np.concatenate([x.right for x in outcomes])
    difference = intervals.difference(before, after, groups)
    if not can_do(exact_score(exact)):
        verdict = "says nothing"
    elif abs(difference.value) <= 0.01 + 1e-9:
        verdict = "within 1 point"
    elif difference.low <= 0 <= difference.high:
        verdict = "in the interval"
    else:
        verdict = "loss" if difference.value < 0 else "gain"
    return Score(
        ratio=harmonic_mean([x.statistics.ratio for x in outcomes]),
        coded_ratio=harmonic_mean([x.statistics.coded_ratio for x in outcomes]),
        kl_divergence=fmean([x.kl_divergence for x in outcomes]),
        score=intervals.rate(after, groups),
        difference=difference,
        lost=int((before & ~after).sum()),
        won=int((after & ~before).sum()),
        verdict=verdict,
    )


def _groups(exact: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """Which problem each question belongs to [questions]."""
    return np.repeat(np.arange(len(exact)), [len(right) for right in exact])
