"""A tokenizer of one token a character."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def characters(joined=()):
    """Return it; what is in `joined` is one token where it is met."""
    known = ["<?>", "\n", *(chr(c) for c in range(32, 127)), *(f" {chr(c)}" for c in range(48, 91)), *joined]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(known))}, "<?>"))
    whole = "|".join([*(j.replace("(", r"\(") for j in joined), r"(?<=Answer:) [A-Z0-9]", r"[\s\S]"])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(whole), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<?>")
