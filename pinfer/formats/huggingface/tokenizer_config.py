"""tokenizer_config.json and the files beside it: special tokens by role, added tokens, chat templates."""

from __future__ import annotations

from pathlib import Path

from pinfer.formats.errors import FormatError
from pinfer.formats.huggingface.json_file import Node
from pinfer.formats.huggingface.tokenizer_json import MAX_ID, AddedToken

CONFIG_BYTES = 16 * 2**20


class TokenizerConfig:
    """What tokenizer_config.json and its companions say, in the order in which they are asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tokenizer = self._read("tokenizer_config.json")
        self._others = [self._read("special_tokens_map.json"), self._read("config.json")]
        self._generation = self._read("generation_config.json")

    def _read(self, name: str) -> Node:
        path = self._folder / name
        return Node.read(path, CONFIG_BYTES) if path.is_file() else Node(None, f"{path}:")

    def token(self, role: str) -> str | None:
        """The text of a special token."""
        for node in (self.tokenizer, self._others[0]):
            entry = node.at(f"{role}_token")
            text = entry.get("content", str) if isinstance(entry.value, dict) else entry.as_(str)
            if text is not None:
                return text
        return None

    def token_ids(self, role: str) -> list[int]:
        """The ids of a special token by generation_config.json or config.json; several may end a text."""
        for node in (self._generation, self._others[1]):
            entry = node.at(f"{role}_token_id")
            if isinstance(entry.value, list):
                return [item.as_(int, -1) for item in entry.items()]
            if entry.value is not None:
                return [entry.as_(int)]
        return []

    def added(self) -> list[AddedToken]:
        """`added_tokens_decoder`, and added_tokens.json for ids that it does not name."""
        tokens = {}
        for text, node in self._read("added_tokens.json").fields():
            tokens[node.as_(int, -1)] = AddedToken(_checked_id(node.as_(int, -1), node), text, False)
        for key, node in self.tokenizer.at("added_tokens_decoder").fields():
            token_id = _checked_id(int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1, node)
            flags = (node.get(name, bool, False) for name in ("special", "lstrip", "rstrip"))
            content = node.get("content", str)
            if not content:
                raise node.fault("has no content")
            tokens[token_id] = AddedToken(token_id, content, *flags)
        return list(tokens.values())

    def chat_templates(self) -> dict[str, str]:
        """Templates by name, the one to use under ""; chat_template.jinja comes before tokenizer_config.json."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            with path.open("rb") as file:
                data = file.read(CONFIG_BYTES + 1)
            if len(data) > CONFIG_BYTES:
                raise FormatError(f"{path}: has more than {CONFIG_BYTES} bytes")
            try:
                return {"": data.decode("utf-8")}
            except UnicodeDecodeError as error:
                raise FormatError(f"{path}: not UTF-8 at byte {error.start}") from None
        entry = self.tokenizer.at("chat_template")
        if entry.value is None:
            entry = self._read("chat_template.json").at("chat_template")
        if not isinstance(entry.value, list):
            return {} if entry.value is None else {"": entry.as_(str)}
        named = {item.get("name", str, ""): item.get("template", str, "") for item in entry.items()}
        return {"" if name == "default" else name: template for name, template in named.items()}


def _checked_id(token_id: int, node: Node) -> int:
    if not 0 <= token_id < MAX_ID:
        raise node.fault(f"is for the id {token_id}, not one from 0 to {MAX_ID - 1}")
    return token_id
