"""Kinds of tokens by rules: regular expressions over a response's text, without labels of features.

    {"list": ["^[ \\t]*[-*] ", "^[ \\t]*\\d+[.)] "], "line break": "\\n+"}

A json object of a name and one regular expression, or a list of them: Python's re, in which ^ and $
stand at every line. They are searched in the text of an answer, without its chat markup. A token
belongs to the first rule of the file that has a match with a character of the token in it. Tokens
that are a part of one character (bytes) stand where the character stands.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from audit.choices import END, REST, Classes
from data import Pair, header_ids
from labels import RESERVED
from policy import Policy
from runtime.messages import brief
from runtime.sources import UserError, read_json, sha256

LONGEST_CHARACTER = 4  # bytes, and so tokens at most
BROKEN = "\ufffd"  # what decoding makes of a part of a character


class Rules(NamedTuple):
    """What choices tells apart; it names them in tables as it names a label file."""

    name: str  # the file's stem
    patterns: dict[str, tuple[re.Pattern, ...]]  # in the order in which they are tried
    sha256: str

    kind = "rules"
    matched = True  # rules belong to no SAE

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that tokens are divided into."""
        return (*self.patterns, END, REST)

    def described(self) -> dict:
        """What a table of results says about them."""
        patterns = {name: [p.pattern for p in found] for name, found in self.patterns.items()}
        return dict(name=self.name, sha256=self.sha256, patterns=patterns)


def read_rules(path: str | Path) -> Rules:
    """Raises UserError, naming the rule, for anything but an object of regular expressions."""
    flag = f"--token-rules {path}"
    try:
        raw = read_json(path)
        digest = sha256(Path(path))
    except (OSError, ValueError) as e:
        raise UserError(f"{flag}: a json object of rules was expected ({brief(e)}).") from e
    if not raw:
        raise UserError(f"{flag}: holds no rule.")
    patterns = {}
    for name, given in raw.items():
        if not name.strip() or name in RESERVED:
            raise UserError(f"{flag}: {brief(name)!r} cannot be the name of a rule.")
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or not given or not all(isinstance(x, str) for x in given):
            wanted = "a regular expression or a list of them"
            raise UserError(f"{flag}: {brief(name)}: {wanted} was expected.")
        try:
            patterns[name] = tuple(re.compile(x, re.MULTILINE) for x in given)
        except (re.error, OverflowError, RecursionError) as e:
            raise UserError(f"{flag}: {brief(name)}: not a regular expression ({brief(e)}).") from e
    return Rules(Path(path).stem, patterns, digest)


# --- from characters to tokens --------------------------------------------------------------------


def token_spans(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text of some tokens, and of each its characters [start, end).

    Tokens whose bytes make a character only together all have that character's place. Bytes that
    make no character, such as those of a truncated one, stand for themselves.
    """
    text_of = functools.cache(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False))
    pieces, spans, at, i = [], [], 0, 0
    while i < len(ids):
        groups = (tuple(ids[i : i + n]) for n in range(1, LONGEST_CHARACTER + 1))
        whole = (group for group in groups if BROKEN not in text_of(group))
        group = next(whole, (ids[i],))
        pieces.append(text_of(group))
        spans += [(at, at + len(pieces[-1]))] * len(group)
        at, i = at + len(pieces[-1]), i + len(group)
    return "".join(pieces), spans


def response_kinds(rules: Rules, response: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Which of rules.names each token of a response, as it stands in a Pair, belongs to.

    <end_of_turn> is END; the rest of the chat markup, and text that no rule matches, are REST.
    """
    end, rest = len(rules.patterns), len(rules.patterns) + 1
    kinds = [rest] * len(response)
    first, stop = len(header_ids(tokenizer)), len(response)
    end_of_turn = tokenizer.token_to_id("<end_of_turn>")
    if end_of_turn in response:  # once, because text has no special tokens; not in a truncated one
        stop = list(response).index(end_of_turn)
        kinds[stop] = end

    text, spans = token_spans(response[first:stop], tokenizer)
    of_character = [rest] * len(text)
    for kind, patterns in reversed(list(enumerate(rules.patterns.values()))):
        for match in (m for pattern in patterns for m in pattern.finditer(text)):
            for i in range(*match.span()):
                of_character[i] = kind
    for i, span in enumerate(spans, start=first):
        kinds[i] = min(of_character[slice(*span)], default=rest)
    return kinds


def pair_kinds(rules: Rules, pair: Pair, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """response_kinds of the chosen and of the rejected response."""
    chosen, rejected = (response_kinds(rules, r, tokenizer) for r in (pair.chosen, pair.rejected))
    return chosen, rejected


def by_rules(rules: Rules, policy: Policy, pairs: Sequence[Pair]) -> Classes:
    """Each token of the responses in the class of its own place. In the vocabulary, from which the
    model would choose something else there, a token has the class that it most often has in
    `pairs`; tokens that occur nowhere are REST.
    """
    own, rest = [], len(rules.names) - 1
    count = torch.zeros(policy.base.config.vocab_size, len(rules.names), dtype=torch.int64)
    for pair in pairs:
        target = torch.tensor([*pair.chosen, *pair.rejected])
        own.append(torch.tensor([k for r in pair_kinds(rules, pair, policy.tokenizer) for k in r]))
        count.index_put_((target, own[-1]), torch.tensor(1), accumulate=True)
    of_token = torch.where(count.any(1), count.argmax(1), rest)
    of_token[policy.tokenizer.token_to_id("<end_of_turn>")] = rest - 1
    return Classes(rules.names, of_token, own)
