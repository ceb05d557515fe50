"""Lines of mixed text, made by a seed: English, code, Chinese, emoji, accents, numbers and runs of white space."""

import random

_ENGLISH = """
the quick brown fox doesn't jump over lazy dogs while I've been watching; it's raining, they'll say: 'stop!' (maybe) A
model's caption describes what happens in each frame of the video, before and after the camera moves.
""".split()  # noqa: SIM905
_CODE = """\
def f(x: int) -> str:
return [i**2 for i in range(10)]
if (a != b && c[i] >= 0x1F) {
# comment
print(f"{name!r:>10}")
SELECT * FROM t WHERE id=42;
x = lambda *a, **k: None
<div class="a">&nbsp;</div>
\frac{1}{2}
git commit -m 'fix'
https://example.org/a?b=c%20d#e
camelCaseName_snake""".splitlines()
_CHINESE = [
    "一只狐狸",
    "跳过了",
    "懒狗。",
    "视频描述",
    "你好，世界！",
    "（测试）",
    "二〇二四年",
    "漢字",
    "「引用」",
    "３个全角",
]
_EMOJI = ["🎉", "👩‍👩‍👧", "🇨🇭", "👍🏽", "❤️", "🤖", "🧪✨", "☃"]
_OTHER = [
    "naïve",
    "Zürich",
    "Ærø",
    "Привет",
    "مرحبا",
    "नमस्ते",
    "e\u0301",
    "½",
    "x²",
    "①",
    "Ⅷ",
    "…",
    "—",
    "\u00a0",
    "ﬁ",
    "\u200b",
]
_NUMBERS = ["0", "7", "42", "1234567", "3.14159", "-1e-5", "12:30", "٣٤", "0x00ff"]
_SPACES = [" ", " ", " ", "  ", "   ", "\t", "\n", "\n\n", " \n ", "        ", "\r\n", ""]


def mixed_lines(count: int, seed: int) -> list[str]:
    """Return `count` texts; the same for the same seed."""
    rng = random.Random(seed)
    groups = [_ENGLISH, _ENGLISH, _CODE, _CHINESE, _EMOJI, _OTHER, _NUMBERS]
    lines = []
    for _ in range(count):
        main = rng.choice(groups)
        words = [rng.choice(main if rng.random() < 0.6 else rng.choice(groups)) for _ in range(rng.randint(1, 16))]
        lines.append("".join(word + rng.choice(_SPACES) for word in words))
    return lines
