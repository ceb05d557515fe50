"""Caption metrics against the COCO evaluation, and its tokenizer where Java is."""

import random
import shutil

import pytest

from aurora.evaluation.caption_metrics import _common_subsequence, bleu, caption_metrics, cider_d, meteor, rouge_l
from aurora.evaluation.ptb_tokenizer import tokenize

SENTENCES = [
    ("A man doesn't know what it's about; he'll go, won't he?",
     "a man does n't know what it 's about he 'll go wo n't he"),
    ("The U.S. team (in red) plays -- at 3:30 p.m. -- near Mr. Smith's well-known cafe.",
     "the u.s. team -lrb- in red -rrb- plays at 3:30 p.m. near mr. smith 's well-known cafe"),
    ('It cost $3.50, i.e. 1,000 yen, or 1/2 of what "they" said...',
     "it cost $ 3.50 i.e. 1,000 yen or 1/2 of what they said"),
    ("Dogs' toys and the '90s rock'n'roll: o'clock, can't cannot gonna",
     "dogs toys and the '90s rock 'n' roll o'clock ca n't can not gon na"),
    ("A café — with “quotes” and ellipsis… and 5'11\" tall, 20th-century",
     "a café with quotes and ellipsis and 5 11 tall 20th-century"),
    ("What?! No!! ok... the cat,dog and a person's dog", "what ?! no !! ok the cat dog and a person 's dog"),
    ("state-of-the-art T-shirt AT&T 50% #1 and/or x*y", "state-of-the-art t-shirt at&t 50 % # 1 and/or x * y"),
]  # fmt: skip
WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "red",
    "blue",
    "car",
    "street",
    "runs",
    "walks",
    "on",
    "in",
    "near",
    "small",
]


def random_pairs(count, seed=0, *, rare=False):
    """Captions and references that share words: some references are edits of the caption."""
    rng = random.Random(seed)
    captions, references = [], []
    for index in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 18))]
        captions.append(words)
        group = []
        for _ in range(rng.randint(1, 5)):
            edited = [word for word in words if rng.random() < 0.8] + [
                rng.choice(WORDS) for _ in range(rng.randint(1, 6))
            ]
            rng.shuffle(edited) if rng.random() < 0.3 else None
            group.append(edited + ([f"rare{index}"] if rare else []))
        references.append(group)
    return captions, references


@pytest.mark.parametrize(("caption", "words"), SENTENCES)
def test_words_are_those_of_the_penn_treebank(caption, words):
    """Expected words are what Stanford's tokenizer gives, less the punctuation that the COCO evaluation drops."""
    assert " ".join(tokenize(caption)) == words


def test_equal_captions_score_the_most_and_different_ones_nothing():
    texts = ["a red car on the street", "the small dog runs near a tree", "a woman walks in the blue car"]
    best = caption_metrics(texts, [[text] for text in texts])
    assert (best.bleu_1, best.bleu_4, best.rouge_l) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert best.cider_d == pytest.approx(10)
    worst = caption_metrics(["x y z w"] * 3, [[text] for text in texts])
    assert worst.bleu_4 < 1e-6
    assert (worst.rouge_l, worst.cider_d) == (0, 0)
    empty = caption_metrics(["", "", ""], [[text] for text in texts])
    assert (empty.bleu_1, empty.rouge_l, empty.cider_d) == (pytest.approx(0), 0, 0)


def test_case_and_punctuation_do_not_matter():
    plain = caption_metrics(["the dog runs", "a car"], [["the dog ran"], ["a red car"]])
    assert caption_metrics(["The dog, runs!", "A car."], [['"The dog" ran'], ["A red car..."]]) == plain


def test_the_numbers_are_those_of_the_coco_evaluation():
    """What pycocoevalcap 1.2 gives for six pairs; `test_metrics_equal_the_coco_evaluation` asks it itself for 200."""
    captions, references = random_pairs(6)
    assert bleu(captions, references) == pytest.approx(
        [0.7834008839739908, 0.7420289008551627, 0.6987798471875591, 0.643472556631727], abs=1e-9
    )
    assert [rouge_l(*pair) for pair in zip(captions, references)] == pytest.approx(
        [0.7439024390243902, 0.8895833333333334, 0.8341880341880341, 0.6434599156118143, 0.6792873051224945,
         0.7721518987341772], abs=1e-9
    )  # fmt: skip
    assert cider_d(captions, references) == pytest.approx(
        [3.8128138302743846, 5.771693899746931, 6.964087878520315, 3.9701191200578534, 5.992885591465408,
         1.6339365652937898], abs=1e-9
    )  # fmt: skip


def test_the_subsequence_is_the_longest():
    rng = random.Random(1)
    for _ in range(50):
        first, second = ([rng.choice("abcd") for _ in range(rng.randint(0, 90))] for _ in range(2))
        row = [0] * (len(second) + 1)
        for word in first:
            last = row[:]
            for j, other in enumerate(second):
                row[j + 1] = last[j] + 1 if word == other else max(last[j + 1], row[j])
        assert _common_subsequence(first, second) == row[-1]


@pytest.mark.parametrize(
    ("captions", "references", "wanted"),
    [([], [], "0 captions"), (["a"], [], "1 captions for 0"), (["a"], [[]], r"references\[0\]: got none")],
)
def test_what_cannot_be_compared_is_refused(captions, references, wanted):
    with pytest.raises(ValueError, match=wanted):
        caption_metrics(captions, references)


def test_meteor_without_java_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="METEOR: there is no java here"):
        meteor([["a"]], [[["a"]]])


@pytest.mark.slow
@pytest.mark.parametrize("rare", [False, True])
def test_metrics_equal_the_coco_evaluation(rare):
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = random_pairs(200, rare=rare)
    wanted = {i: [" ".join(words) for words in group] for i, group in enumerate(references)}
    written = {i: [" ".join(words)] for i, words in enumerate(captions)}
    peer, _ = bleu_module.Bleu(4).compute_score(wanted, written, verbose=0)
    assert bleu(captions, references) == pytest.approx(peer, abs=1e-6)
    _, each = Rouge().compute_score(wanted, written)
    assert [rouge_l(*pair) for pair in zip(captions, references)] == pytest.approx(list(each), abs=1e-6)
    _, each = Cider().compute_score(wanted, written)
    assert cider_d(captions, references) == pytest.approx(list(each), abs=1e-6)
    assert max(each) > 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer and METEOR are Java programs")
def test_words_and_meteor_equal_the_java_programs():
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    captions, references = random_pairs(200)
    rng = random.Random(2)
    marks = [", ", ". ", " - ", "; ", " (", ") ", "'s ", " isn't ", '" ', " ", " ", " "]
    texts = ["".join(word + rng.choice(marks) for word in words) for words in captions]
    texts += [sentence for sentence, _ in SENTENCES]
    peer = tokenizer.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert [" ".join(tokenize(text)) for text in texts] == [peer[i][0] for i in range(len(texts))]
    score = meteor(captions, references)
    assert 0.2 < score < 0.9
    assert meteor(captions, [[words] for words in captions]) > 0.95
