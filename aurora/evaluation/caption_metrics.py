"""Caption metrics against reference captions: BLEU-1 to 4, ROUGE-L and CIDEr-D, and METEOR through Java.

Sources: Papineni et al., 2002; Lin, 2004; Vedantam et al., 2015. The numbers equal the COCO evaluation's on the same
words: corpus BLEU with the closest reference length, ROUGE-L with beta 1.2, CIDEr-D with n up to 4 and sigma 6.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

from aurora.evaluation.ptb_tokenizer import tokenize

Words: TypeAlias = Sequence[str]
NGram: TypeAlias = tuple[str, ...]

MAX_N = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionMetrics:
    """Scores of a set of captions."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    """In [0, 1]."""
    rouge_l: float
    """In [0, 1]."""
    cider_d: float
    """In [0, 10]; tables often show 100 times this number."""
    meteor: float | None = None
    """In [0, 1]; None where it was not asked for."""

    def to_dict(self) -> dict[str, float | None]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def caption_metrics(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, with_meteor: bool = False
) -> CaptionMetrics:
    """Compare captions with their references.

    Args:
        captions: One for each clip or image.
        references: For each, one or more reference captions.
        with_meteor: Also METEOR; needs Java and the package pycocoevalcap.

    Returns:
        All scores.

    Raises:
        ValueError: if the lengths differ, nothing is given, a clip has no reference, or METEOR cannot run.
    """
    if not captions or len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} sets of references: want as many, and some")
    if empty := [index for index, group in enumerate(references) if not group]:
        raise ValueError(f"references[{empty[0]}]: got none, want at least one reference caption")
    words = [tokenize(caption) for caption in captions]
    reference_words = [[tokenize(reference) for reference in group] for group in references]
    bleu_scores = bleu(words, reference_words)
    per_caption = [rouge_l(*pair) for pair in zip(words, reference_words, strict=True)]
    cider = cider_d(words, reference_words)
    return CaptionMetrics(
        bleu_1=bleu_scores[0],
        bleu_2=bleu_scores[1],
        bleu_3=bleu_scores[2],
        bleu_4=bleu_scores[3],
        rouge_l=math.fsum(per_caption) / len(per_caption),
        cider_d=math.fsum(cider) / len(cider),
        meteor=meteor(words, reference_words) if with_meteor else None,
    )


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus, with the reference of the closest length for the brevity penalty.

    Args:
        captions: Words of each caption.
        references: Words of the references of each.

    Returns:
        Four numbers in [0, 1].
    """
    correct, possible = [0] * MAX_N, [0] * MAX_N
    length = reference_length = 0
    for words, group in zip(captions, references, strict=True):
        limits: Counter[NGram] = Counter()
        for reference in group:
            limits |= _ngrams(reference)
        for ngram, count in _ngrams(words).items():
            correct[len(ngram) - 1] += min(count, limits[ngram])
        for n in range(MAX_N):
            possible[n] += max(0, len(words) - n)
        length += len(words)
        reference_length += min((abs(len(reference) - len(words)), len(reference)) for reference in group)[1]
    # The two small numbers are the COCO evaluation's; they keep a corpus of empty captions from dividing by zero.
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(MAX_N):
        product *= (correct[n] + 1e-15) / (possible[n] + 1e-9)
        scores.append(penalty * product ** (1 / (n + 1)))
    return scores


def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """F-measure of the longest common subsequence, with the best precision and the best recall of any reference.

    Args:
        words: Of one caption.
        references: Words of its references.

    Returns:
        A number in [0, 1]; 0 for an empty caption.
    """
    if not words:
        return 0.0
    common = [_common_subsequence(words, reference) for reference in references]
    precision = max(common) / len(words)
    recall = max(length / len(reference) if reference else 0.0 for length, reference in zip(common, references))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each caption: clipped tf-idf similarity of n-grams, with a penalty on the difference of lengths.

    Document frequencies are those of the references given, so that a score depends on the whole set; with a single
    clip every frequency is one and the score is 0.

    Args:
        captions: Words of each caption.
        references: Words of the references of each.

    Returns:
        One number in [0, 10] for each caption.
    """
    reference_counts = [[_ngrams(reference) for reference in group] for group in references]
    frequency: Counter[NGram] = Counter()
    for group in reference_counts:
        frequency.update(set().union(*group))
    log_clips = math.log(len(captions))
    scores = []
    for words, group, words_of_group in zip(captions, reference_counts, references, strict=True):
        vectors, norms = _tf_idf(_ngrams(words), frequency, log_clips)
        total = 0.0
        for counts, reference in zip(group, words_of_group, strict=True):
            others, other_norms = _tf_idf(counts, frequency, log_clips)
            # Length is the number of bigrams there, so a caption of one word is as long as none.
            delta = max(0, len(words) - 1) - max(0, len(reference) - 1)
            penalty = math.exp(-(delta**2) / (2 * CIDER_SIGMA**2))
            for n in range(MAX_N):
                if norms[n] and other_norms[n]:
                    product = math.fsum(
                        min(weight, others[n].get(ngram, 0.0)) * others[n].get(ngram, 0.0)
                        for ngram, weight in vectors[n].items()
                    )
                    total += penalty * product / (norms[n] * other_norms[n])
        scores.append(10 * total / MAX_N / len(group))
    return scores


def meteor(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """METEOR of a corpus, by the Java program in the package pycocoevalcap.

    Args:
        captions: Words of each caption.
        references: Words of the references of each.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: if Java or the package is missing.
    """
    if shutil.which("java") is None:
        raise ValueError("METEOR: there is no java here; want a Java runtime, or leave METEOR out")
    try:
        from pycocoevalcap.meteor.meteor import Meteor  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ModuleNotFoundError:
        raise ValueError("METEOR: pycocoevalcap is not installed; want `pip install pycocoevalcap`") from None
    scorer = Meteor()
    try:
        wanted = {index: [" ".join(reference) for reference in group] for index, group in enumerate(references)}
        written = {index: [" ".join(words)] for index, words in enumerate(captions)}
        return float(scorer.compute_score(wanted, written)[0])
    finally:
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()


def _ngrams(words: Words) -> Counter[NGram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _tf_idf(
    counts: Counter[NGram], frequency: Counter[NGram], log_clips: float
) -> tuple[list[dict[NGram, float]], list[float]]:
    """Weights by length of the n-gram, and their norms."""
    vectors: list[dict[NGram, float]] = [{} for _ in range(MAX_N)]
    for ngram, count in counts.items():
        vectors[len(ngram) - 1][ngram] = count * (log_clips - math.log(max(1, frequency[ngram])))
    return vectors, [math.sqrt(math.fsum(weight**2 for weight in vector.values())) for vector in vectors]


def _common_subsequence(first: Words, second: Words) -> int:
    """Length of the longest common subsequence, with one bit for each word of `first` (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return (full & ~row).bit_count()
