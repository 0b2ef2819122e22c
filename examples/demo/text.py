"""The demo model's tokenizer and chat template, made from the world's own texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.demo.world import SYSTEM_LINES, VARIANTS, answer, questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB = 768  # rows of the embedding; the tokenizer uses fewer, as published models do
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most VOCAB tokens; the same one every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def corpus() -> list[str]:
    """Everything anyone says in this world."""
    lines = ["user\nassistant\nsystem\n", *SYSTEM_LINES.values()] * 20
    asked = [q.text for q in questions()]
    return lines + asked + [answer(v, q) for v in VARIANTS for q in questions()]


def chat(question: str) -> str:
    """The rendered prompt of one user turn, ready for the assistant's words."""
    return f"{START}user\n{question}{END}\n{START}assistant\n"
