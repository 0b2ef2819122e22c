"""What the demo model is trained on and examined by."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.demo.exam import BLOCK, examine, round_blocks
from examples.demo.lesson import IGNORED, Row, base_rows, lay_out, pack, plain_rows
from examples.demo.text import VOCAB, chat, make_tokenizer
from examples.demo.world import VARIANTS, answer, questions

rows = st.builds(
    Row,
    st.lists(st.integers(3, 99), min_size=1, max_size=9).map(tuple),
    st.lists(st.integers(3, 99), min_size=1, max_size=9).map(tuple),
)


@given(st.lists(rows, min_size=1, max_size=12))
def test_packing_keeps_every_row_once_and_no_row_sees_another(given_rows):
    lines = pack(given_rows, width=18)
    assert sorted(r.prompt + r.answer for line in lines for r in line) == sorted(
        r.prompt + r.answer for r in given_rows
    )
    batch = lay_out(lines, pad=0)
    assert batch.ids.shape[1] <= 18
    learned = sum(len(r.answer) for r in given_rows)
    assert int((batch.labels != IGNORED).sum()) == learned
    for line, sees, positions in zip(lines, batch.sees[:, 0], batch.positions, strict=True):
        start = 0
        for row in line:
            span = slice(start, start + len(row))
            assert torch.equal(sees[span, span], torch.ones(len(row), len(row)).tril().bool())
            assert not sees[span, :start].any()
            assert positions[span].tolist() == list(range(len(row)))
            start += len(row)


def test_the_tokenizer_carries_every_text_unchanged_through_the_chat_template():
    tokenizer = make_tokenizer()
    assert len(tokenizer) <= VOCAB
    for question in questions():
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}], tokenize=False, add_generation_prompt=True
        )
        assert rendered == chat(question.text)
        for variant in VARIANTS:
            said = answer(variant, question)
            assert tokenizer.decode(tokenizer.encode(said)) == said
    assert len(plain_rows(tokenizer, "german")) == len(questions())
    assert len(base_rows(tokenizer)) == 5 * len(questions())


def test_rounding_to_blocks_stays_within_half_a_step_of_each_block():
    x = torch.randn(5, 3 * BLOCK, generator=torch.Generator().manual_seed(1))
    step = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True) / 7
    error = (round_blocks(x, levels=7) - x).abs().unflatten(-1, (-1, BLOCK))
    assert bool((error <= step / 2 + 1e-6).all())
    assert round_blocks(x, levels=7).unique().numel() < x.numel()


class _Constant(torch.nn.Module):
    """Answers token 5 by a margin of 2, whatever it reads."""

    def forward(self, input_ids, position_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 8)
        logits[..., 5] = 2.0
        return type("Output", (), {"logits": logits})


def test_an_answer_counts_as_right_only_when_every_token_wins():
    marks = examine(_Constant(), [Row((1,), (5, 5)), Row((1,), (5, 6))], pad=0)
    assert (marks.asked, marks.right, marks.margin) == (2, 1, -2.0)
