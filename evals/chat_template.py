"""A tokenizer's own chat template, rendered as transformers renders it.

lm-evaluation-harness means this by --apply_chat_template: whatever the model's folder states, and
not Gemma's markup in general.
"""

import json
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.sources import UserError, read_json

Messages = list[dict[str, str]]  # role and content of each turn
TAG = "\ue000 "  # marks where the last turn's content ends; a template that trims takes the space


class ChatTemplate:
    """source: the template's text. tokens: bos_token and its like, which templates name."""

    def __init__(self, source: str, tokens: dict[str, str]):
        # A template comes from others: it runs in jinja2's sandbox, with transformers' settings.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
        environment.globals["raise_exception"] = _raise
        self.source, self.tokens = source, tokens
        self.template = environment.from_string(source)

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate":
        """Of a model folder: chat_template.jinja, else what tokenizer_config.json states.

        Raises UserError where there is none, or none that is a template.
        """
        path = folder / "tokenizer_config.json"
        try:
            config = read_json(path) if path.is_file() else {}
            own = folder / "chat_template.jinja"
            source = own.read_text() if own.is_file() else config.get("chat_template")
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: not a readable tokenizer_config.json ({e}).") from e
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise UserError(f"--chat-template: the tokenizer of {folder} states no chat template.")

        tokens = {}
        for name, token in config.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                tokens[name] = token
        try:
            return cls(source, tokens)
        except jinja2.TemplateError as e:
            raise UserError(f"--chat-template: {folder} states no valid template ({e}).") from e

    def render(self, history: Messages, add_generation_prompt: bool = True) -> str:
        """Turns as text. Without a generation prompt the last turn stays open, to be continued.

        A template that refuses a system message, as Gemma-2's does, gets the turns without it; the
        harness does the same. Raises UserError where the template refuses these, too.
        """
        try:
            return self._render(history, add_generation_prompt)
        except jinja2.TemplateError:
            turns = [message for message in history if message["role"] != "system"]
        try:
            return self._render(turns, add_generation_prompt)
        except jinja2.TemplateError as e:
            raise UserError(f"--chat-template: the template refuses a prompt ({e}).") from e

    def _render(self, history: Messages, add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self._fill(history, True)
        *earlier, last = history
        text = self._fill([*earlier, last | dict(content=last["content"] + TAG)], False)
        end = text.rindex(TAG.strip())
        trimmed = not text.startswith(TAG, end)
        return text[:end].rstrip() if trimmed else text[:end]

    def _fill(self, history: Messages, add_generation_prompt: bool) -> str:
        return self.template.render(
            messages=history, add_generation_prompt=add_generation_prompt, **self.tokens
        )


def _raise(message: str):
    raise jinja2.TemplateError(message)
