"""Greedy text from a base or steered model.

Nothing is cached between tokens: each one runs the whole sequence again, which is plain and exact, and enough for
the few sentences train.py prints.
"""

import torch
from tokenizers import Tokenizer

from fsrl import SteeredModel
from model import Gemma2


@torch.no_grad()  # not inference_mode, whose tensors FSDP2 could not train on afterwards
def greedy(model: Gemma2 | SteeredModel, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int = 96) -> str:
    """The model's answer to a prompt that ends after a user turn (Pair.prompt): token ids -> text.

    Ends at <end_of_turn> or <eos>.
    """
    header = [tokenizer.token_to_id("<start_of_turn>"), *tokenizer.encode("model\n", add_special_tokens=False).ids]
    tokens = [*prompt, *header]
    stops = {tokenizer.token_to_id("<end_of_turn>"), tokenizer.token_to_id("<eos>")}
    new: list[int] = []
    while len(new) < max_new_tokens:
        token = int(model.head(model.hidden(torch.tensor(tokens + new))[-1:]).argmax())
        if token in stops:
            break
        new.append(token)
    return tokenizer.decode(new)
