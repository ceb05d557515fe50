"""Replies of judges are read by a grammar: what it takes, what it refuses, and that it never evaluates."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.evaluation.verdict import Verdict, read_object, read_published, read_verdict


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ('{"pred": "yes", "score": 5}', Verdict(True, 5)),
        ("{'pred': 'no', 'score': 2}", Verdict(False, 2)),
        ("  {'pred': 'Yes', 'score': '4'}\n", Verdict(True, 4)),
        ("{'score': 4.8, 'pred': 'yes',}", Verdict(True, 4.8)),
        ('```json\n{"pred": "no", "score": 0}\n```', Verdict(False, 0)),
        ('{"pred": "yes", "score": 3, "reason": "it\\"s {so}, or not"}', Verdict(True, 3)),
        ("Sure! {'pred': 'yes', 'score': 5}", None),
        ("{'pred': 'yes', 'score': 5} Hope that helps", None),
        ("{'pred': 'yes', 'score': 5} or {'pred': 'no', 'score': 0}", None),
        ("{'pred': 'yes', 'score': 9}", None),
        ("{'pred': 'yes', 'score': -1}", None),
        ("{'pred': 'maybe', 'score': 3}", None),
        ("{'pred': 'yes'}", None),
        ("{'score': 5}", None),
        ('{"pred": "yes", "score": null}', None),
        ('{"pred": true, "score": 5}', None),
        ("{'pred': 'yes', 'score': nan}", None),
        ("{'pred': 'yes', 'score': 'inf'}", None),
        ("{'pred': 'yes', 'score': 1e999}", None),
        ("{'pred': 'yes', 'score': [5]}", None),
        ("{'pred': __import__('os').system('true'), 'score': 5}", None),
        ("{'pred': 'yes' 'score': 5}", None),
        ("{", None),
        ("{}", None),
        ("", None),
        ("yes", None),
        ("{" * 3000, None),
        ("{'pred': 'yes', 'score': 5" + " " * 5000 + "}", None),
    ],
)
def test_what_is_a_verdict(reply, wanted):
    assert read_verdict(reply) == wanted


def test_the_published_script_reads_otherwise():
    assert read_published("{'pred': 'Yes', 'score': 9}") == Verdict(False, 9)
    assert read_published("{'pred': 'yes', 'score': '4'}") == Verdict(True, 4)
    assert read_published("{'pred': 'yes'}") is None
    assert read_published("```\n{'pred': 'yes', 'score': 4}\n```") is None


VALUES = st.one_of(
    st.text(alphabet="abc yes{},:'", max_size=6),
    st.integers(-99, 99),
    st.floats(-9, 9).map(lambda x: round(x, 3)),
    st.none(),
)


@given(st.dictionaries(st.text(alphabet="predscor ", min_size=1, max_size=5), VALUES, max_size=4))
def test_what_python_writes_is_read_as_python_reads_it(fields):
    assert read_object(repr(fields)) == ast.literal_eval(repr(fields))


@given(st.text(alphabet="{}'\":,.01 apredyscor\\\n", max_size=40))
def test_any_text_is_read_or_refused(text):
    fields = read_object(text)
    assert fields is None or isinstance(fields, dict)
